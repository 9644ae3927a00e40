"""Checkpoints: Orbax for training state, safetensors for small parts."""

import copy
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from flax import traverse_util
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from paras2s_jax.convert.stored import CheckpointError, saved_shapes
from paras2s_jax.train import distributed, manifest
from paras2s_jax.train import state as state_lib

PART_DTYPES = ("float16", "float32", "bfloat16")
# What a damaged checkpoint's folder is renamed to.
TORN = ".torn"
# Instead of a step, between processes.
_NONE, _ALL_TORN = -1, -2


class Checkpointer:
    """Numbered checkpoints of a run: state and JSON side by side, whole or not there.

    Written in the background, read back, and committed by a rename. The frozen part of the state is
    not saved: it comes from where it was first loaded.

    keep: how many of the last ones stay. keep_every: those of steps that it divides stay for ever;
    0 for none.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2, keep_every: int = 0):
        self.directory = pathlib.Path(directory).resolve()
        self._writing: tuple[int, Any] | None = None  # The step, and what its shapes are to be.
        kept = [policies.LatestN(keep)]
        kept += [policies.EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._verify),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes={0} if distributed.count() < jax.process_count() else None
            ),
            # Otherwise it would stumble over what a kill left half deleted.
            lightweight_initialize=True,
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "extra")
        )

    def save(self, step: int, state: state_lib.TrainState, extra: Mapping[str, Any]) -> None:
        """Starts saving under `step`, after the save before has ended; returns meanwhile.

        The state may be donated and `extra`, plain JSON, changed at once. A step that exists is
        left as it is. Raises CheckpointError if the save before has failed.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        saved = _saved_part(state)
        # On the CPU what Orbax takes for a copy on the host is a view of the very buffer that the
        # next update is given to overwrite.
        if jax.default_backend() == "cpu":
            saved = jax.tree.map(jnp.copy, saved)
        self._writing = step, jax.tree.map(_abstract, saved)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(saved), extra=ocp.args.JsonSave(copy.deepcopy(dict(extra)))
        )
        self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Waits for the save under way; CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            step = self._writing[0] if self._writing else None
            raise CheckpointError(
                f"checkpoint {step} could not be written to {self.directory} ({error}); make room "
                "or mend the disk, and run the same command again"
            ) from error

    def latest_step(self) -> int | None:
        """The last checkpoint that is wholly written."""
        self.wait()
        return self._manager.latest_step()

    def restore_latest(
        self, template: state_lib.TrainState
    ) -> tuple[state_lib.TrainState, dict] | None:
        """Returns (state, extra) of the last whole checkpoint, or None if there is none at all.

        `template` gives structure, dtypes, shardings and the frozen part: a checkpoint of another
        mesh is spread anew. Damaged ones are named, set aside as `<step>.torn` and passed over;
        CheckpointError if no other is left.
        """
        step = self._last_whole_step()
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
        self.wait()
        self._manager.close()

    def _verify(self) -> None:
        """Reads back what was written, before it is committed; runs on process 0's save thread."""
        step, wanted = self._writing
        (folder,) = self.directory.glob(f"{step}{ocp.utils.TMP_DIR_SUFFIX}*")
        problems = _shape_problems(wanted, saved_shapes(folder / "state"))
        if problems:
            raise CheckpointError(f"read back, {'; '.join(problems[:5])}")
        manifest.write(folder)

    def _last_whole_step(self) -> int | None:
        """The newest step that passes verification, found by process 0 and told to the others."""
        self.wait()
        found = self._set_torn_aside() if distributed.is_main() else _NONE
        if distributed.count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        # Others look at the folder only now that it is in order.
        self._manager.reload()
        if found == _ALL_TORN:
            raise CheckpointError(
                f"{self.directory}: every checkpoint is torn; they are kept as *.torn. Put a whole "
                "one back, or delete the folder to start anew"
            )
        return None if found == _NONE else found

    def _set_torn_aside(self) -> int:
        """Renames torn checkpoints newer than the last whole one; its step, _NONE or _ALL_TORN."""
        torn = any(self.directory.glob(f"*{TORN}"))
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self.directory / str(step)
            problem = manifest.problem(folder)
            if problem is None:
                return step
            print(f"checkpoint {folder} is torn ({problem}): passed over, kept as {step}{TORN}")
            aside = folder.with_name(f"{step}{TORN}")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            torn = True
        return _ALL_TORN if torn else _NONE

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
