"""Peak memory and speed of `paras2s convert` on a synthetic sharded checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from paras2s_jax.convert.checkpoint import Checkpoint, write_checkpoint
from paras2s_jax.stages.registry import Figures, StageError

# A Qwen2 of about 2B width; as many layers as fill the size that is asked for.
SIZES = {
    "vocab_size": 65_536,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SHARD_BYTES = 1 << 30
STATUS = "/proc/self/status"


def run(gb: float, scratch: str | None) -> Figures:
    """Writes a random bfloat16 checkpoint of `gb` GB and converts it in a process of its own.

    scratch: folder for both (twice `gb` of space), by default a temporary one.
    Returns: convert/peak_over_baseline_gb: largest resident size while converting minus that
    after the imports; convert/seconds, convert/gb_per_s, convert/checkpoint_gb.

    Raises:
        StageError: the system does not tell how much memory a process takes.
    """
    if not Path(STATUS).is_file():
        raise StageError(f"memory is read from {STATUS}, which there is on Linux only.")
    with _folder(scratch) as folder:
        source = folder / "released"
        write_release(source, gb)
        size = Checkpoint(source).nbytes / 1e9
        command = [sys.executable, "-m", "paras2s_jax.perf.convert", str(source)]
        done = subprocess.run(
            [*command, str(folder / "converted")], stdout=subprocess.PIPE, text=True, check=True
        )
        measured = json.loads(done.stdout.splitlines()[-1])
    return {
        "convert/checkpoint_gb": size,
        "convert/seconds": measured["seconds"],
        "convert/gb_per_s": size / measured["seconds"],
        "convert/peak_over_baseline_gb": measured["peak_gb"] - measured["baseline_gb"],
    }


def write_release(folder: Path, gb: float) -> None:
    """Writes config.json and shards of random bfloat16 tensors with the names of a Qwen2."""
    shapes = _shapes(0)
    fixed = 2 * sum(np.prod(shape) for shape in shapes.values())
    per_layer = 2 * sum(np.prod(shape) for shape in _shapes(1).values()) - fixed
    layers = max(1, math.ceil((gb * 1e9 - fixed) / per_layer))
    folder.mkdir(parents=True)
    config = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": layers, **SIZES}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {key: _Random(shape, i) for i, (key, shape) in enumerate(_shapes(layers).items())}
    write_checkpoint(folder, tensors, max_shard_bytes=SHARD_BYTES)


def _shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2ForCausalLM."""
    width, hidden, vocab = (
        SIZES[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    kv = width // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, out in (("q_proj", width), ("k_proj", kv), ("v_proj", kv)):
            shapes[f"{layer}.self_attn.{name}.weight"] = (out, width)
            shapes[f"{layer}.self_attn.{name}.bias"] = (out,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, width)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"{layer}.mlp.up_proj.weight"] = (hidden, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}


class _Random:
    """A bfloat16 tensor that is drawn when it is written."""

    dtype = np.dtype(ml_dtypes.bfloat16)

    def __init__(self, shape: tuple[int, ...], seed: int):
        self.shape, self._seed = shape, seed

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        rng = np.random.default_rng(self._seed)
        bits = rng.integers(0, 1 << 16, self.shape, np.uint16, endpoint=False)
        # Random sign and mantissa, one exponent: small numbers, all of them finite.
        return ((bits & 0x807F) | 0x3C00).view(self.dtype)


@contextlib.contextmanager
def _folder(scratch: str | None) -> Iterator[Path]:
    if scratch is not None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


def _resident_gb(field: str) -> float:
    """VmRSS (now) or VmHWM (largest so far) of this process.

    Not from getrusage: its peak starts at that of the parent.
    """
    text = Path(STATUS).read_text()
    return int(re.search(rf"{field}:\s*(\d+) kB", text).group(1)) * 1024 / 1e9


def _measure(source: str, target: str) -> None:
    """In the process of its own: converts, and prints what it took as one line of JSON."""
    from paras2s_jax.convert import families, folders

    families.family_of(source)
    baseline, started = _resident_gb("VmRSS"), time.monotonic()
    folders.convert(source, target)
    measured = {
        "baseline_gb": baseline,
        "peak_gb": _resident_gb("VmHWM"),
        "seconds": time.monotonic() - started,
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _measure(*sys.argv[1:])
