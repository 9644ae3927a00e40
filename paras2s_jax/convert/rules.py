"""Checkpoint tensors <-> parameter pytrees, from one table per family, strictly both ways.

Every tensor of the checkpoint must be used and every parameter filled; whatever is left
over on either side is an error that lists it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import save_file

LINEAR = (1, 0)  # torch [out, in] <-> kernel [in, out]
CONV1D = (2, 1, 0)  # torch [out, in, k] <-> kernel [k, in, out]


class ConversionError(ValueError):
    """Checkpoint and model do not match; the message lists where."""


@dataclass(frozen=True)
class Rule:
    """One line of a table: checkpoint key <-> parameter path ("a/b/kernel").

    permute: axes of the checkpoint tensor in the parameter's order. over: the values of
    "{i}" in `source`; if `target` has "{i}" too there is one parameter for each, otherwise
    they are stacked on a new first axis, as nn.scan wants them.
    """

    source: str
    target: str
    permute: tuple[int, ...] | None = None
    over: range | None = None

    @property
    def is_stack(self) -> bool:
        return self.over is not None and "{i}" not in self.target

    def pairs(self) -> list[tuple[str, str]]:
        """(key, path) of each tensor; a stack repeats its path."""
        if self.over is None:
            return [(self.source, self.target)]
        return [
            (self.source.replace("{i}", str(i)), self.target.replace("{i}", str(i)))
            for i in self.over
        ]


def import_params(
    tensors: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    expected: Mapping,
    *,
    ignore: Iterable[str] = (),
    dtype: np.dtype | None = None,
    name: str = "checkpoint",
) -> dict:
    """Builds the params pytree of a model from checkpoint tensors.

    tensors: read one by one, so a lazy mapping (Checkpoint) keeps the peak at one copy.
    expected: the model's params, or ShapeDtypeStructs from jax.eval_shape (unboxed).
    ignore: regular expressions of keys that may stay unused (buffers, other heads).
    dtype: type of the result, by default that of `expected`.
    """
    shapes = traverse_util.flatten_dict(expected, sep="/")
    pairs = [pair for rule in rules for pair in rule.pairs()]
    used = {key for key, _ in pairs}
    ignored = [re.compile(pattern) for pattern in ignore]
    missing = sorted(used - set(tensors))
    spare = sorted(key for key in set(tensors) - used if not any(p.fullmatch(key) for p in ignored))
    targets = {path for _, path in pairs}
    _complain(
        name,
        {
            "missing from it": missing,
            "not used by the model": spare,
            "parameters left empty": sorted(set(shapes) - targets),
            "rules for unknown parameters": sorted(targets - set(shapes)),
        },
    )
    params, wrong = {}, []
    for rule in rules:
        for path, value in _gather(tensors, rule):
            if value.shape != tuple(shapes[path].shape):
                wrong.append(f"{path} {value.shape}, model has {tuple(shapes[path].shape)}")
            params[path] = value.astype(dtype or shapes[path].dtype)
    _complain(name, {"shapes that differ": wrong})
    return traverse_util.unflatten_dict(params, sep="/")


def export_params(params: Mapping, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The inverse of import_params: checkpoint tensors of the params pytree."""
    flat = traverse_util.flatten_dict(params, sep="/")
    targets = {path for rule in rules for _, path in rule.pairs()}
    _complain(
        "params",
        {
            "missing from it": sorted(targets - set(flat)),
            "without a rule": sorted(set(flat) - targets),
        },
    )
    tensors = {}
    for rule in rules:
        for row, (key, path) in enumerate(rule.pairs()):
            value = np.asarray(flat[path][row] if rule.is_stack else flat[path])
            if rule.permute is not None:
                value = np.transpose(value, np.argsort(rule.permute))
            tensors[key] = np.ascontiguousarray(value)
    return tensors


def _gather(tensors, rule: Rule) -> Iterator[tuple[str, np.ndarray]]:
    def read(key):
        value = np.asarray(tensors[key])
        return value if rule.permute is None else np.transpose(value, rule.permute)

    if rule.is_stack:
        yield rule.target, np.stack([read(key) for key, _ in rule.pairs()])
    else:
        for key, path in rule.pairs():
            yield path, np.ascontiguousarray(read(key))


def _complain(name: str, problems: dict[str, list[str]]) -> None:
    found = [f"{what}: {', '.join(items)}" for what, items in problems.items() if items]
    if found:
        raise ConversionError(f"{name} does not match the model; " + "; ".join(found))


class Checkpoint(Mapping):
    """Tensors of a safetensors file, or of a folder of shards, read when asked for."""

    def __init__(self, path: str | Path):
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{path}: no .safetensors file here; give a file or its folder")
        self._where = {}
        for handle in [safe_open(file, framework="np") for file in files]:
            self._where |= dict.fromkeys(handle.keys(), handle)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._where[key].get_tensor(key)

    def __iter__(self):
        return iter(self._where)

    def __len__(self):
        return len(self._where)


def write_checkpoint(
    folder: str | Path, tensors: Mapping[str, np.ndarray], *, max_shard_bytes: int = 4 << 30
) -> None:
    """Writes model.safetensors, or numbered shards with the index that Hugging Face reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict] = [{}]
    size = 0
    for key, value in tensors.items():
        if shards[-1] and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
