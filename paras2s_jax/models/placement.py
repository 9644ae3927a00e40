"""Where arrays of a model live on a mesh: logical axis -> mesh axis, by rules.

A mesh axis that does not divide a dimension is not used for it; of several, the longest run from
the first one that does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]
Names = Sequence[str | None]


def logical_shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings of abstract variables that may carry logical axis names.

    boxed: result of `jax.eval_shape(model.init, …)`. Returns: NamedShardings, unboxed tree.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules)
    return jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, _divisible(leaf.shape, spec, mesh.shape)),
        unbox(boxed),
        specs,
    )


def constrain(x: jax.Array, names: Names) -> jax.Array:
    """Inside a traced function: lays the axes of x as the active rules say; without any, as is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not nn.get_logical_axis_rules():
        return x
    return jax.lax.with_sharding_constraint(x, active_spec(x.shape, names))


def active_spec(shape: Sequence[int], names: Names) -> PartitionSpec:
    """What the active rules say of an array of this shape."""
    mesh = jax.sharding.get_abstract_mesh()
    return _divisible(shape, nn.logical_to_mesh_axes(tuple(names)), mesh.shape)


def on_every_device(function: Callable, shared: Any, rows: Any) -> Any:
    """function(shared, rows) on every device of the active mesh, on its part of the rows alone.

    For work that needs no other rows and whose weights a device can hold: they are gathered once,
    and no loop waits for other devices. Without a mesh or rules, a plain call.
    shared: whole on every device. rows, and what the function returns: trees of [B, …], spread over
    as many axes of the mesh as divide B.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual or not nn.get_logical_axis_rules():
        return function(shared, rows)
    names = dividing(mesh.axis_names, len(jax.tree.leaves(rows)[0]), mesh.shape)

    def local(shared, rows):
        with nn.logical_axis_rules(()):  # There is nothing left to be spread.
            return function(shared, rows)

    spread = PartitionSpec(names or None)
    run = jax.shard_map(
        local, in_specs=(PartitionSpec(), spread), out_specs=spread, check_vma=False
    )
    return run(shared, rows)


def unbox(tree: Any) -> Any:
    """Strips logical axis names from variables."""

    def is_box(x):
        return isinstance(x, nn.meta.AxisMetadata)

    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def dividing(axes: Sequence[str], size: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The longest run of mesh axes, from the first, whose product divides a dimension."""
    count = len(axes)
    while size % math.prod(sizes[name] for name in axes[:count]):
        count -= 1
    return tuple(axes[:count])


def _divisible(
    shape: Sequence[int], spec: PartitionSpec, sizes: Mapping[str, int]
) -> PartitionSpec:
    kept = (dividing(axes_of(entry), size, sizes) for size, entry in zip(shape, spec, strict=False))
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in kept))
