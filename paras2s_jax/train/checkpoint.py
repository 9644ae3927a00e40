"""Checkpoints: Orbax for training state, safetensors for small parts."""

import json
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from flax import traverse_util

from paras2s_jax.convert.stored import CheckpointError, saved_shapes
from paras2s_jax.train import state as state_lib

PART_DTYPES = ("float16", "float32", "bfloat16")


class Checkpointer:
    """Numbered checkpoints of a run: state and JSON side by side, complete or absent.

    The frozen part of the state is not saved: it comes from where it was first loaded.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        self.directory = pathlib.Path(directory).resolve()
        # Saves block: on the CPU backend a host copy may alias buffers that the next update
        # overwrites, and a step that is worth saving is seldom.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "extra")
        )

    def save(self, step: int, state: state_lib.TrainState, extra: Mapping[str, Any]) -> None:
        """Saves under `step`; `extra` is plain JSON. A step that exists is left as it is."""
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_saved_part(state)), extra=ocp.args.JsonSave(dict(extra))
        )
        self._manager.save(step, args=args, force=True)
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore_latest(
        self, template: state_lib.TrainState
    ) -> tuple[state_lib.TrainState, dict] | None:
        """Returns (state, extra) of the last checkpoint, or None if there is none.

        `template` gives structure, dtypes, shardings and the frozen part.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        self._check_fits(step, _saved_part(template))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(_abstract, _saved_part(template))),
            extra=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=args)
        return template.replace(**restored.state), restored.extra

    def close(self) -> None:
        self._manager.close()

    def _check_fits(self, step: int, wanted: Any) -> None:
        """Compares shapes by name: Orbax would silently cut or pad an array of another shape."""
        problems = _shape_problems(wanted, saved_shapes(self.directory / str(step) / "state"))
        if problems:
            raise CheckpointError(
                f"{self.directory}/{step} does not fit this run (use a new workdir): "
                + "; ".join(problems[:5])
            )


def save_part(
    path: str | os.PathLike,
    variables: Mapping[str, Any],
    meta: Mapping[str, Any],
    dtype: str = "float32",
) -> None:
    """Writes a small tree (an adapter, a codebook) as safetensors; floats are cast to `dtype`.

    Tensors are named by their path joined with "/"; `meta` is JSON.
    """
    if dtype not in PART_DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known are {list(PART_DTYPES)}")
    path = pathlib.Path(path)
    flat = traverse_util.flatten_dict(variables, sep="/")
    tensors = {name: _cast(path, name, value, dtype) for name, value in flat.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    safetensors.numpy.save_file(tensors, partial, metadata={"meta": json.dumps(dict(meta))})
    os.replace(partial, path)


def load_part(
    path: str | os.PathLike, dtype: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save_part` wrote, floats cast to `dtype`. Returns: (variables, meta), numpy."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; run the stage that writes it")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            names = file.keys()
            flat = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    if dtype is not None:
        flat = {name: _cast(path, name, value, dtype) for name, value in flat.items()}
    return traverse_util.unflatten_dict(flat, sep="/"), meta


def _saved_part(state: state_lib.TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "rng": state.rng,
    }


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _shape_problems(wanted: Any, found: Any) -> list[str]:
    shapes = [
        {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (wanted, found)
    ]
    names = sorted(shapes[0].keys() | shapes[1].keys())
    return [
        f"{name} is {shapes[1].get(name, 'absent')}, wanted {shapes[0].get(name, 'absent')}"
        for name in names
        if shapes[0].get(name) != shapes[1].get(name)
    ]


def _name(path: tuple) -> str:
    """ "a/0/b", whatever kind of node (dict, tuple, named tuple) each part belongs to."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _cast(path: pathlib.Path, name: str, value: Any, dtype: str) -> np.ndarray:
    value = np.ascontiguousarray(value)
    if not jax.dtypes.issubdtype(value.dtype, np.floating):
        return value
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    with np.errstate(over="ignore"):
        cast = value.astype(kind)
    if np.isfinite(value).all() and not np.isfinite(cast).all():
        raise CheckpointError(f"{path}: {name} exceeds the range of {dtype}; use float32")
    return cast
