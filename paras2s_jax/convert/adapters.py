"""LoRA adapters: to and from PEFT's files, and folded into saved weights.

PEFT keeps, for each adapted linear map M of the original model, base_model.model.M.lora_A.weight
[r, in] and lora_B.weight [out, r] (peft: LoraLayer); ours are a [in, r] and b [r, out].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from paras2s_jax.convert import stored
from paras2s_jax.convert.checkpoint import Checkpoint, ConversionError, write_checkpoint
from paras2s_jax.convert.rules import LINEAR, Rule, export_tensors, import_params

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
NO_RENAMES: Mapping[str, str] = {}
# Folder of adapters that were saved without the parameters they belong to.
ADAPTER = "adapter"


def saved_in(folder: str | Path) -> Path | None:
    """The Orbax directory that holds a converted folder's adapters; None if it has none."""
    for name in (ADAPTER, stored.PARAMS):
        directory = Path(folder) / name
        if directory.is_dir() and "lora" in stored.saved_shapes(directory / "variables"):
            return directory
    return None


def _in_checkpoint(name: str, renames: Mapping[str, str]) -> str:
    """A module's name in checkpoints. renames: beginnings in memory -> in checkpoints."""
    for memory, checkpoint in renames.items():
        if name.startswith(memory):
            return checkpoint + name.removeprefix(memory)
    return name


def _in_memory(name: str, renames: Mapping[str, str]) -> str:
    for memory, checkpoint in renames.items():
        if name.startswith(checkpoint):
            return memory + name.removeprefix(checkpoint)
    return name


def adapter_rules(rules: Sequence[Rule], stems: set[str]) -> list[Rule]:
    """Table of the adapters, from that of the model they belong to.

    stems: paths of the adapted layers ("stack/layers/mlp/up_proj").
    """
    table = []
    for rule in rules:
        stem, _, last = rule.target.rpartition("/")
        if last != "kernel" or rule.permute != LINEAR or stem not in stems:
            continue
        module = _PREFIX + rule.source.removesuffix(".weight")
        table.append(Rule(f"{module}.lora_A.weight", f"{stem}/a", LINEAR, rule.over))
        table.append(Rule(f"{module}.lora_B.weight", f"{stem}/b", LINEAR, rule.over))
    return table


def write_adapter(
    folder: str | Path,
    lora: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    *,
    alpha: float,
    base: str,
    renames: Mapping[str, str] = NO_RENAMES,
) -> None:
    """Writes a "lora" collection as a PEFT adapter.

    lora: by path ("…/up_proj/a"). rules: table of the model. base: name of the base model.
    renames: the family's memory_names.

    Raises:
        ConversionError: an adapter has no rule.
    """
    stems = {path.rpartition("/")[0] for path in lora}
    table = adapter_rules(rules, stems)
    # By their names in memory, as peft itself writes them.
    tensors = {
        _PREFIX + _in_memory(key.removeprefix(_PREFIX), renames): tensor
        for key, tensor in export_tensors(lora, table).items()
    }
    modules = {
        key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        for key in tensors
        if key.endswith(".lora_A.weight")
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": int(next(iter(tensors.values())).shape[0]),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    write_checkpoint(folder, tensors, max_shard_bytes=1 << 62, name=WEIGHTS)
    (Path(folder) / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def read_adapter(
    folder: str | Path,
    rules: Sequence[Rule],
    expected: Mapping[str, Any],
    renames: Mapping[str, str] = NO_RENAMES,
) -> tuple[dict[str, Any], float]:
    """Reads a PEFT adapter as the "lora" collection of a model.

    rules: table of the model. expected: its "lora" collection, or shapes of it (unboxed).
    renames: the family's memory_names; names as in checkpoints and as in memory are read.
    Returns: (lora, alpha).

    Raises:
        ConversionError: the files are broken, or do not fit the model.
        FileNotFoundError: there is no adapter.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the folder of a PEFT adapter")
    try:
        config = json.loads(path.read_text())
        alpha, kind = float(config["lora_alpha"]), config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path} is not an adapter's config ({error!r})") from error
    if kind != "LORA" or config.get("use_dora") or config.get("use_rslora"):
        raise ConversionError(f"{path}: only plain LoRA can be read, without DoRA and rsLoRA")
    flat = traverse_util.flatten_dict(expected, sep="/")
    table = adapter_rules(rules, {path.rpartition("/")[0] for path in flat})
    known = {key for rule in table for key, _ in rule.pairs()}
    tensors = {
        key if key in known else _PREFIX + _in_checkpoint(key.removeprefix(_PREFIX), renames): value
        for key, value in Checkpoint(folder / WEIGHTS).items()
    }
    # peft keeps a copy of an adapted head's own weight.
    ignore = (r".*\.base_layer\.weight",)
    name = str(folder / WEIGHTS)
    return import_params(tensors, table, expected, ignore=ignore, name=name), alpha


def load(directory: Path, expected: Any, shardings: Any, alpha: float) -> dict[str, Any]:
    """Saved adapters for a model that has such: its "lora" collection, float32.

    directory: of `saved_in`. expected: shapes of the collection (unboxed). alpha: of the model.

    Raises:
        ConversionError: they were trained with another rank, alpha or targets.
    """
    found = traverse_util.flatten_dict(
        stored.saved_shapes(directory / "variables")["lora"], sep="/"
    )
    wanted = traverse_util.flatten_dict(expected, sep="/")
    wrong = [
        f"{path} is {tuple(found[path].shape) if path in found else 'absent'}, the model has "
        f"{tuple(wanted[path].shape) if path in wanted else 'none'}"
        for path in sorted(found.keys() | wanted.keys())
        if path not in found or path not in wanted or found[path].shape != wanted[path].shape
    ]
    if (trained := alpha_of(directory)) != alpha:
        wrong.append(f"alpha is {trained:g}, the model has {alpha:g}")
    if wrong:
        raise ConversionError(
            f"{directory} holds other adapters; give the rank, alpha and targets that they were "
            f"trained with ({'; '.join(wrong[:3])})"
        )
    return stored.load_params(directory, {"lora": shardings}, "float32", ("lora",))[0]["lora"]


def alpha_of(directory: str | Path) -> float:
    """The scale with which saved adapters were trained: "lora": {"alpha": …} of their meta.

    Raises:
        ConversionError: it was not saved.
    """
    meta = stored.saved_meta(directory)
    if "alpha" not in meta.get("lora", {}):
        raise ConversionError(
            f"{directory} does not tell the alpha of its adapters; save it with "
            'meta={"lora": {"alpha": …}}'
        )
    return float(meta["lora"]["alpha"])


def merged(params: Mapping[str, Any], lora: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Parameters by path with the adapters folded in, kernel + (alpha / r) * a @ b, when used.

    Raises:
        ConversionError: an adapter belongs to no kernel.
    """
    stems = {path.rpartition("/")[0] for path in lora}
    homeless = sorted(stem for stem in stems if f"{stem}/kernel" not in params)
    if homeless:
        raise ConversionError(f"adapters without a kernel: {', '.join(homeless)}")
    made: dict[str, Any] = dict(params.items())
    for stem in stems:
        kernel = params[f"{stem}/kernel"]
        made[f"{stem}/kernel"] = _Merged(kernel, lora[f"{stem}/a"], lora[f"{stem}/b"], alpha)
    return made


class _Merged:
    """A kernel (perhaps a stack) with its adapter folded in when it is used."""

    def __init__(self, kernel, a, b, alpha: float):
        self.shape, self.dtype = kernel.shape, kernel.dtype
        self._parts, self._scale = (kernel, a, b), alpha / a.shape[-1]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        made = self._fold(*(np.asarray(part) for part in self._parts))
        return made if dtype is None else made.astype(dtype)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._fold(*(part[row] for part in self._parts))

    def _fold(self, kernel, a, b) -> np.ndarray:
        delta = self._scale * (a.astype(np.float32) @ b.astype(np.float32))
        return (kernel.astype(np.float32) + delta).astype(kernel.dtype)
