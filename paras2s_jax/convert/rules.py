"""Checkpoint tensors <-> parameter pytrees, from one table per family, strictly both ways.

Every tensor of the checkpoint must be used and every parameter filled; whatever is left
over on either side is an error that lists it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from paras2s_jax.convert.checkpoint import Checkpoint, ConversionError, write_checkpoint

__all__ = [
    "CONV1D",
    "LINEAR",
    "Checkpoint",
    "ConversionError",
    "Parameter",
    "Rule",
    "check_shapes",
    "dense_rules",
    "export_params",
    "export_tensors",
    "import_params",
    "norm_rules",
    "plan",
    "write_checkpoint",
]

LINEAR = (1, 0)  # torch [out, in] <-> kernel [in, out]
CONV1D = (2, 1, 0)  # torch [out, in, k] <-> kernel [k, in, out]


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

    def sources(self) -> list[tuple[str, tuple[str, ...]]]:
        """(path, keys) of each parameter."""
        if self.is_stack:
            return [(self.target, tuple(key for key, _ in self.pairs()))]
        return [(path, (key,)) for key, path in self.pairs()]


def norm_rules(key: str, path: str, over: range | None = None) -> list[Rule]:
    """Rules of a norm with scale and bias."""
    return [
        Rule(f"{key}.weight", f"{path}/scale", over=over),
        Rule(f"{key}.bias", f"{path}/bias", over=over),
    ]


def dense_rules(
    key: str, path: str, over: range | None = None, *, use_bias: bool = True
) -> list[Rule]:
    """Rules of a linear map (torch.nn.Linear)."""
    kernel = Rule(f"{key}.weight", f"{path}/kernel", LINEAR, over)
    return [kernel, Rule(f"{key}.bias", f"{path}/bias", over=over)] if use_bias else [kernel]


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
    fills = Counter(path for rule in rules for path, _ in rule.sources())
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
    if rule.permute is not None and len(rule.permute) != len(shape):
        return f"{len(rule.permute)} axes, while the model has {shape}"
    return tuple(shape[axis] for axis in _inverse(rule.permute, len(shape)))


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model, as a rule makes it from tensors; nothing is read before `read`.

    Attributes:
        rule, keys: how it is made and of which tensors, in the order of the stack.
        tensors: where they come from.
        shape, dtype: of the parameter.
    """

    rule: Rule
    keys: tuple[str, ...]
    tensors: Mapping[str, np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def stored_axes(self) -> tuple[int, ...]:
        """Axes of the parameter in the order in which they lie in the files, outermost first."""
        if not self.rule.is_stack:
            return _inverse(self.rule.permute, len(self.shape))
        inner = _inverse(self.rule.permute, len(self.shape) - 1)
        return (0, *(axis + 1 for axis in inner))

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The parameter, or the part of it that slices (of step 1) select; a fresh array.

        Raises:
            ConversionError: a value exceeds the range of `dtype`.
        """
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        ranges = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        out = np.empty([len(part) for part in ranges], self.dtype)
        if not self.rule.is_stack:
            self._fill(out, self.keys[0], ranges)
        else:
            for row, number in enumerate(ranges[0]):
                self._fill(out[row, ...], self.keys[number], ranges[1:])
        return out

    def _fill(self, out: np.ndarray, key: str, ranges: Sequence[range]) -> None:
        """Writes a part of one tensor to `out`, cast and transposed."""
        axes = _inverse(self.rule.permute, len(ranges))
        value = self.tensors[key][tuple(slice(ranges[a].start, ranges[a].stop) for a in axes)]
        if value.dtype != out.dtype:
            value = _cast(key, value, out.dtype)
        # As plain bits: numpy transposes types that it does not know element by element.
        bits = np.dtype(f"u{out.dtype.itemsize}")
        value = np.asarray(value).view(bits)
        permute = self.rule.permute
        np.copyto(out.view(bits), value if permute is None else value.transpose(permute))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.read() if dtype is None else self.read().astype(dtype)


def _inverse(permute: tuple[int, ...] | None, rank: int) -> tuple[int, ...]:
    return tuple(range(rank)) if permute is None else tuple(int(a) for a in np.argsort(permute))


def _cast(key: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if dtype == np.float16 and np.isfinite(value).all() and not np.isfinite(cast).all():
        raise ConversionError(f"{key} exceeds the range of float16; use bfloat16 or float32")
    return cast


def plan(
    tensors: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    expected: Mapping,
    *,
    ignore: Iterable[str] = (),
    dtype: np.dtype | str | None = None,
    name: str = "checkpoint",
) -> dict[str, Parameter]:
    """How each parameter of a model is to be read from checkpoint tensors; see import_params.

    dtype: of the floats among the result: a type, None for those of `expected`, or "stored".
    Returns: parameters by path ("a/b/kernel").

    Raises:
        ConversionError: checkpoint and model do not fit (check_shapes); nothing is read.
    """
    stored = isinstance(tensors, Checkpoint)
    shapes = tensors.shapes if stored else {key: tuple(v.shape) for key, v in tensors.items()}
    check_shapes(shapes, rules, expected, ignore=ignore, name=name)
    types = tensors.dtypes if stored else {key: value.dtype for key, value in tensors.items()}
    flat = traverse_util.flatten_dict(expected, sep="/")

    def type_of(path: str, keys: Sequence[str]) -> np.dtype:
        if dtype is None or not jnp.issubdtype(flat[path].dtype, jnp.floating):
            return np.dtype(flat[path].dtype)
        if dtype != "stored":
            return np.dtype(dtype)
        return np.dtype(functools.reduce(jnp.promote_types, [types[key] for key in keys]))

    return {
        path: Parameter(rule, keys, tensors, tuple(flat[path].shape), type_of(path, keys))
        for rule in rules
        for path, keys in rule.sources()
    }


def import_params(
    tensors: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    expected: Mapping,
    *,
    ignore: Iterable[str] = (),
    dtype: np.dtype | str | None = None,
    name: str = "checkpoint",
) -> dict:
    """Builds the params pytree of a model from checkpoint tensors.

    tensors: read one by one, so a lazy mapping (Checkpoint) keeps the peak at one copy.
    expected: the model's params, or ShapeDtypeStructs from jax.eval_shape (unboxed).
    ignore: regular expressions of keys that may stay unused (buffers, other heads).
    dtype: see plan.
    Returns: numpy arrays.

    Raises:
        ConversionError: checkpoint and model do not fit (check_shapes); nothing is read.
    """
    planned = plan(tensors, rules, expected, ignore=ignore, dtype=dtype, name=name)
    params = {path: parameter.read() for path, parameter in planned.items()}
    return traverse_util.unflatten_dict(params, sep="/")


@dataclass(frozen=True)
class _Tensor:
    """One checkpoint tensor as a rule makes it from a parameter; read when it is used."""

    flat: Mapping[str, np.ndarray]
    path: str
    row: int | None
    permute: tuple[int, ...] | None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.flat[self.path].dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.flat[self.path].shape)[0 if self.row is None else 1 :]
        return tuple(shape[axis] for axis in _inverse(self.permute, len(shape)))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        value = self.flat[self.path]
        value = np.asarray(value if self.row is None else value[self.row])
        made = np.empty(self.shape, self.dtype)
        bits = np.dtype(f"u{made.dtype.itemsize}")
        axes = _inverse(self.permute, value.ndim)
        np.copyto(made.view(bits), value.view(bits).transpose(axes))
        return made if dtype is None else made.astype(dtype)


def export_tensors(flat: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict[str, _Tensor]:
    """The inverse of plan: checkpoint tensors that are made when they are used (np.asarray).

    flat: parameters by path; a value must have shape and dtype, and give an array for
    np.asarray(value) and np.asarray(value[row]).

    Raises:
        ConversionError: parameters and table do not fit.
    """
    targets = {path for rule in rules for _, path in rule.pairs()}
    _complain(
        "params",
        {
            "missing from it": sorted(targets - set(flat)),
            "without a rule": sorted(set(flat) - targets),
        },
    )
    return {
        key: _Tensor(flat, path, row if rule.is_stack else None, rule.permute)
        for rule in rules
        for row, (key, path) in enumerate(rule.pairs())
    }


def export_params(params: Mapping, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The inverse of import_params: checkpoint tensors of the params pytree."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {key: np.asarray(tensor) for key, tensor in export_tensors(flat, rules).items()}


def _complain(name: str, problems: dict[str, list[str]]) -> None:
    found = [f"{what}: {', '.join(items)}" for what, items in problems.items() if items]
    if found:
        raise ConversionError(f"{name} does not match the model; " + "; ".join(found))
