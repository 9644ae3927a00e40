"""Where the variables of a model live on a mesh: logical axis -> mesh axis, by rules."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]


def logical_shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings of abstract variables that may carry logical axis names.

    A dimension that its mesh axis does not divide is replicated.
    boxed: result of `jax.eval_shape(model.init, …)`. Returns: NamedShardings, unboxed tree.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules)
    return jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, _divisible(leaf.shape, spec, mesh)),
        unbox(boxed),
        specs,
    )


def unbox(tree: Any) -> Any:
    """Strips logical axis names from variables."""

    def is_box(x):
        return isinstance(x, nn.meta.AxisMetadata)

    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def _divisible(shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    kept = []
    for size, axes in zip(shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        ways = math.prod(mesh.shape[name] for name in names)
        kept.append(axes if size % ways == 0 else None)
    return PartitionSpec(*kept)
