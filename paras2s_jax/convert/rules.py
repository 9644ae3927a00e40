"""Checkpoint tensors <-> parameter pytrees, from one table per family, strictly both ways.

Every tensor of the checkpoint must be used and every parameter filled; whatever is left
over on either side is an error that lists it.
"""

import json
import re
from collections import Counter
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


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    rules: Sequence[Rule],
    expected: Mapping,
    *,
    ignore: Iterable[str] = (),
    name: str = "checkpoint",
) -> None:
    """Whether a checkpoint fits a model, from shapes alone; no tensor is needed.

    shapes: of every tensor in the checkpoint. expected, ignore: as in import_params.

    Raises:
        ConversionError: lists every tensor that is missing, not used, or misshapen (both shapes in
            the checkpoint's layout), and every parameter that is left empty or filled twice.
    """
    wanted = {
        path: tuple(leaf.shape)
        for path, leaf in traverse_util.flatten_dict(expected, sep="/").items()
    }
    pairs = [pair for rule in rules for pair in rule.pairs()]
    used, targets = Counter(key for key, _ in pairs), {path for _, path in pairs}
    fills = Counter(path for rule in rules for path in dict.fromkeys(p for _, p in rule.pairs()))
    ignored = [re.compile(pattern) for pattern in ignore]
    wrong = []
    for rule in rules:
        for key, path in rule.pairs():
            if key in shapes and path in wanted:
                want = _stored_shape(rule, wanted[path])
                if tuple(shapes[key]) != want:
                    wrong.append(f"{key} is {tuple(shapes[key])}, {path} needs {want}")
    spare = sorted(set(shapes) - set(used))
    _complain(
        name,
        {
            "missing from it": sorted(set(used) - set(shapes)),
            "not used by the model": [k for k in spare if not any(p.fullmatch(k) for p in ignored)],
            "parameters left empty": sorted(set(wanted) - targets),
            "rules for unknown parameters": sorted(targets - set(wanted)),
            "used twice": sorted(key for key, count in used.items() if count > 1),
            "parameters filled twice": sorted(path for path, count in fills.items() if count > 1),
            "shapes that differ": wrong,
        },
    )


def _stored_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...] | str:
    """Shape of the tensors of which a parameter of the given shape is made by a rule."""
    if rule.is_stack:
        if not shape or shape[0] != len(rule.over):
            return f"{len(rule.over)} tensors of {shape[1:]}, while the model stacks {shape[:1]}"
        shape = shape[1:]
    if rule.permute is None:
        return shape
    if len(rule.permute) != len(shape):
        return f"{len(rule.permute)} axes, while the model has {shape}"
    return tuple(shape[axis] for axis in np.argsort(rule.permute))


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

    Raises:
        ConversionError: checkpoint and model do not fit (check_shapes); nothing is read.
    """
    check_shapes(_shapes_of(tensors), rules, expected, ignore=ignore, name=name)
    types = {
        path: dtype or leaf.dtype
        for path, leaf in traverse_util.flatten_dict(expected, sep="/").items()
    }
    params = {
        path: value.astype(types[path])
        for rule in rules
        for path, value in _gather(tensors, rule)
    }
    return traverse_util.unflatten_dict(params, sep="/")


def _shapes_of(tensors: Mapping) -> dict[str, tuple[int, ...]]:
    if isinstance(tensors, Checkpoint):
        return tensors.shapes
    return {key: tuple(value.shape) for key, value in tensors.items()}


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

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; reads no data."""
        return {key: tuple(file.get_slice(key).get_shape()) for key, file in self._where.items()}

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
