"""Device meshes, and where arrays live on them. Rules are data: logical axis -> mesh axis."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from paras2s_jax.models.placement import Rules, logical_shardings, unbox

MESH_AXES = ("data", "fsdp", "tensor")
# Rows of a batch are spread over both: fsdp is data parallelism that also spreads parameters.
BATCH_AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with the axes data, fsdp and tensor; absent axes have size 1, one size may be -1.

    A mesh smaller than the machine takes the first devices.
    """
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"unknown mesh axes {unknown}; known are {list(MESH_AXES)}")
    devices = list(jax.devices() if devices is None else devices)
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(f"mesh sizes {dict(sizes)} must be positive, with at most one -1")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % known:
        raise ValueError(f"{len(devices)} devices do not fill a mesh of {dict(sizes)}")
    shape = [len(devices) // known if size == -1 else size for size in shape]
    if math.prod(shape) > len(devices):
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {math.prod(shape)} devices, "
            f"but there are {len(devices)}; change `mesh` in the config"
        )
    return jax.make_mesh(
        shape,
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[: math.prod(shape)],
    )


@contextlib.contextmanager
def activate(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Gives logical constraints inside models their meaning while functions are traced."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def init_sharded(model: nn.Module, mesh: Mesh, rules: Rules, rng: jax.Array, *args, **kwargs):
    """Initialises every variable directly where it lives; no device holds the whole model.

    Returns: (variables, shardings), two plain trees of equal structure.
    """

    def init(rng, *args):
        return model.init(rng, *args, **kwargs)

    shardings = logical_shardings(jax.eval_shape(init, rng, *args), mesh, rules)
    make = jax.jit(lambda rng, *args: unbox(init(rng, *args)), out_shardings=shardings)
    return make(rng, *args), shardings


def replicate_rest(tree: Any) -> Any:
    """Puts leaves that are on no mesh (step, counters) on the mesh of the others, replicated.

    Without a mesh all go to the first device, for good: what a jitted step returns is bound to a
    device, and a step would be compiled once for leaves that are and once for leaves that are not.
    """
    named = [x.sharding for x in jax.tree.leaves(tree) if isinstance(x.sharding, NamedSharding)]
    if not named:
        return jax.device_put(tree, jax.local_devices()[0])
    whole = NamedSharding(named[0].mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole), tree
    )


def local_rows(mesh: Mesh, num_rows: int, axes: Sequence[str] = BATCH_AXES) -> np.ndarray:
    """Which rows of a batch lie on this process's devices: int[n], ascending.

    Processes that share rows (over tensor, say) get the same ones.
    """
    spread = NamedSharding(mesh, PartitionSpec(tuple(axes)))
    held = spread.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in held]))


def shard_batch(
    batch: Mapping[str, Any], mesh: Mesh, axes: Sequence[str] = BATCH_AXES
) -> dict[str, Any]:
    """Spreads rows over mesh axes. Returns global arrays.

    batch: arrays that hold this process's `local_rows`, and scalars.
    """
    ways = math.prod(mesh.shape[axis] for axis in axes)
    held = len(local_rows(mesh, ways, axes))

    def place(path, x):
        x = np.asarray(x)
        if not x.ndim:
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
        if len(x) % held:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)}: {len(x)} rows do not divide over {held} "
                f"devices ({' x '.join(axes)}); change batch_size or `mesh`"
            )
        num_rows = len(x) // held * ways
        rows = local_rows(mesh, num_rows, axes)

        def part(index):
            return x[np.searchsorted(rows, np.arange(num_rows)[index[0]])]

        spread = NamedSharding(mesh, PartitionSpec(tuple(axes)))
        return jax.make_array_from_callback((num_rows, *x.shape[1:]), spread, part)

    return jax.tree_util.tree_map_with_path(place, dict(batch))
