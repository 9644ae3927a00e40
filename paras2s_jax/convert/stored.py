"""Variables in Orbax folders: saved whole or streamed, loaded whole, on a mesh, or leaf by leaf."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath
from flax import traverse_util

from paras2s_jax.convert.checkpoint import Checkpoint
from paras2s_jax.convert.rules import Parameter

# Folder of the Orbax checkpoint inside a converted folder.
PARAMS = "params"
# Streamed parameters are written in pieces of at most this size.
PIECE_BYTES = 64 << 20


class CheckpointError(ValueError):
    """A checkpoint that is missing or does not fit; the message names it."""


def save_params(
    directory: str | os.PathLike, variables: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Saves variables and a JSON `meta` as one Orbax directory, replacing what was there."""
    directory = pathlib.Path(directory).resolve()
    args = ocp.args.Composite(
        variables=ocp.args.StandardSave(dict(variables)), meta=ocp.args.JsonSave(dict(meta))
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, args=args, force=True)


def save_streamed(
    directory: str | os.PathLike,
    parameters: Mapping[str, Parameter],
    meta: Mapping[str, Any],
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Saves what save_params would, reading each parameter piece by piece as it is written.

    parameters: by path ("a/b/kernel"), of the collection "params". on_bytes: told how much was
    written.
    """
    directory = pathlib.Path(directory).resolve()
    registry = ocp.type_handlers.create_type_handler_registry((Parameter, _Pieces(on_bytes)))
    handler = ocp.CompositeCheckpointHandler(
        variables=ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry),
        meta=ocp.JsonCheckpointHandler(),
    )
    tree = {"params": traverse_util.unflatten_dict(dict(parameters), sep="/")}
    args = ocp.args.Composite(
        variables=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(dict(meta))
    )
    # Orbax warns that there is nothing to merge, as it should be without OCDBT.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory, args=args, force=True)
    finally:
        logging.set_verbosity(verbosity)


def load_params(
    directory: str | os.PathLike,
    shardings: Any = None,
    dtype: Any = None,
    collections: Sequence[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads what was saved, onto `shardings` (same tree) or the first device.

    dtype: of the floats, by default as saved. collections: to load, by default all.
    Returns: (variables, meta).

    Raises:
        CheckpointError: there is no such directory.
    """
    directory = _existing(directory)
    found = saved_shapes(directory / "variables")
    if collections is not None:
        found = {name: found[name] for name in collections}
    if shardings is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: single, found)

    def template(leaf, sharding):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        kind = dtype if dtype is not None and is_float else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)

    wanted = jax.tree.map(template, found, shardings)
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        variables = checkpointer.restore(directory / "variables", args)
    return variables, saved_meta(directory)


def saved_shapes(directory: str | os.PathLike) -> Any:
    """Tree of array metadata (shape, dtype) of one saved item."""
    directory = epath.Path(directory).resolve()  # Orbax takes no relative ones.
    return ocp.StandardCheckpointHandler().metadata(directory).tree


def saved_meta(directory: str | os.PathLike) -> dict[str, Any]:
    """The JSON that was saved beside the variables.

    Raises:
        CheckpointError: there is no such directory.
    """
    directory = _existing(directory)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return checkpointer.restore(directory, args).meta


def is_converted(folder: str | os.PathLike) -> bool:
    """Whether a folder was made by `paras2s convert`."""
    return (pathlib.Path(folder) / PARAMS / "variables").is_dir()


def released_names(folder: str | os.PathLike) -> set[str]:
    """Names of the tensors that a folder holds, or held before it was converted."""
    folder = pathlib.Path(folder)
    if is_converted(folder):
        return set(saved_meta(folder / PARAMS).get("released", ()))
    return set(Checkpoint(folder)) if any(folder.glob("*.safetensors")) else set()


class Stored(Mapping):
    """One collection of saved variables, by path ("a/b/kernel"); a leaf is read when it is used.

    The leaf that was read last is kept: a stack is asked for row by row.

    Raises:
        CheckpointError: there is no such directory.
    """

    def __init__(self, directory: str | os.PathLike, collection: str = "params"):
        self._directory = _existing(directory) / "variables"
        self._collection = collection
        tree = saved_shapes(self._directory).get(collection, {})
        self._found = traverse_util.flatten_dict(tree, sep="/")
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, path: str) -> np.ndarray:
        """The leaf at a path."""
        if self._last is None or self._last[0] != path:
            self._last = None  # given back before the next one is read
            tree = {self._collection: traverse_util.unflatten_dict({path: 0}, sep="/")}
            args = ocp.args.PyTreeRestore(
                item=tree,
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree),
                partial_restore=True,
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                (leaf,) = jax.tree.leaves(checkpointer.restore(self._directory, args))
            self._last = (path, leaf)
        return self._last[1]

    def __getitem__(self, path: str) -> StoredLeaf:
        found = self._found[path]
        return StoredLeaf(self, path, tuple(found.shape), np.dtype(found.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class StoredLeaf:
    """A saved array: shape and dtype at once, data when used as an array or indexed."""

    def __init__(self, stored: Stored, path: str, shape: tuple[int, ...], dtype: np.dtype):
        self.shape, self.dtype = shape, dtype
        self._stored, self._path = stored, path

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        value = self._stored.read(self._path)
        return value if dtype is None else value.astype(dtype)

    def __getitem__(self, index) -> np.ndarray:
        return self._stored.read(self._path)[index]


class _Pieces(ocp.type_handlers.TypeHandler):
    """Writes Parameters as Orbax writes numpy arrays (zarr), but piece by piece.

    Orbax's own handlers want every array of a checkpoint in memory at once.
    """

    def __init__(self, on_bytes: Callable[[int], None]):
        self._on_bytes = on_bytes

    def typestr(self) -> str:
        return "np.ndarray"

    async def serialize(self, values: Sequence[Parameter], infos: Sequence, args=None) -> list:
        # Orbax makes the folder once all handlers have been called.
        writing = self._write_all(values, infos)
        return [ocp.future.CommitFutureAwaitingContractedSignals(writing, name="pieces")]

    async def _write_all(self, values: Sequence[Parameter], infos: Sequence) -> None:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            await self._write(value, info)

    async def _write(self, value: Parameter, info) -> None:
        chunks = piece_shape(value, PIECE_BYTES)
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(info.parent_dir / info.name)},
            "metadata": {"shape": value.shape, "chunks": chunks, "compressor": None},
            "dtype": value.dtype.name,
            # Orbax takes a piece that is not there for a loss, not for zeros.
            "store_data_equal_to_fill_value": True,
        }
        store = await ts.open(spec, create=True, context=info.ts_context)
        starts = [range(0, size, step) for size, step in zip(value.shape, chunks, strict=True)]
        writing = None
        for corner in itertools.product(*starts):
            index = tuple(
                slice(start, min(start + step, size))
                for start, step, size in zip(corner, chunks, value.shape, strict=True)
            )
            piece = value.read(index)
            if writing is not None:
                await writing
            writing = store[index].write(piece, can_reference_source_data_indefinitely=True)
            self._on_bytes(piece.nbytes)
        await writing

    async def metadata(self, infos: Sequence) -> Sequence:
        raise NotImplementedError("parameters are streamed to Orbax, not read from it")

    async def deserialize(self, infos: Sequence, args=None) -> Sequence:
        raise NotImplementedError("parameters are streamed to Orbax, not read from it")


def piece_shape(parameter: Parameter, limit: int) -> tuple[int, ...]:
    """Shape of the largest pieces within the limit that are contiguous in the source files."""
    shape = list(parameter.shape)
    nbytes = parameter.nbytes
    for axis in parameter.stored_axes:
        if nbytes <= limit:
            break
        row = nbytes // shape[axis]
        shape[axis] = max(1, limit // row)
        nbytes = row * shape[axis]
    return tuple(shape)


def _existing(directory: str | os.PathLike) -> pathlib.Path:
    directory = pathlib.Path(directory).resolve()
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint; run the stage that writes it")
    return directory
