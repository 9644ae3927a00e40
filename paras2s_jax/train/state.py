"""Training state, and the split of variables into what is trained and what is not."""

import re
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import optax
from flax import traverse_util
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from paras2s_jax.train import sharding


@flax.struct.dataclass
class TrainState:
    """Everything a training step reads and writes.

    step: int32[]. params: trainable part of the variables, {collection: {module: …}}. frozen: the
    rest, same form; neither updated nor saved. rng: uint32[2], key data; see `step_rng`.
    """

    step: jax.Array
    params: Any
    frozen: Any
    opt_state: Any
    rng: jax.Array

    @classmethod
    def create(
        cls,
        variables: Mapping[str, Any],
        optimizer: optax.GradientTransformation,
        rng: jax.Array,
        *,
        trainable: str = "",
    ) -> "TrainState":
        """Starts at step 0, training the variables whose name matches the regex `trainable`.

        The trainable part is copied: updates donate it, and callers may hold on to `variables`
        (as a reference policy, say).
        """
        params, frozen = split_trainable(variables, trainable)
        params = jax.tree.map(jnp.copy, params)
        if jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key):
            rng = jax.random.key_data(rng)
        state = cls(jnp.int32(0), params, frozen, optimizer.init(params), jnp.copy(rng))
        return sharding.replicate_rest(state)

    @classmethod
    def abstract(
        cls,
        variables: Mapping[str, Any],
        optimizer: optax.GradientTransformation,
        *,
        trainable: str = "",
    ) -> "TrainState":
        """What `create` would return, as ShapeDtypeStructs: for compilation ahead of time.

        variables: ShapeDtypeStructs with NamedShardings; the optimiser's moments take those of
        their parameters.
        """
        params, frozen = split_trainable(variables, trainable)
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        whole = NamedSharding(mesh, PartitionSpec())
        opt_state = optax.tree.map_params(
            optimizer,
            lambda leaf, param: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=param.sharding
            ),
            jax.eval_shape(optimizer.init, params),
            params,
            transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=whole
            ),
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        rng = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
        return cls(step, params, frozen, opt_state, rng)

    @property
    def variables(self) -> dict[str, Any]:
        """All variables, as `model.apply` takes them."""
        return merge_variables(self.params, self.frozen)


def step_rng(state: TrainState) -> jax.Array:
    """The typed key of the current step: a function of the first key and the step number."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def split_trainable(variables: Mapping[str, Any], pattern: str) -> tuple[dict, dict]:
    """Splits variables by a regex searched in their names, "collection/module/…/leaf".

    Returns: (trainable, frozen), which `merge_variables` joins again.
    """
    flat = traverse_util.flatten_dict(variables, sep="/")
    trainable = {name: value for name, value in flat.items() if re.search(pattern, name)}
    if not trainable:
        raise ValueError(f"no variable matches {pattern!r}; names look like {sorted(flat)[:5]}")
    frozen = {name: value for name, value in flat.items() if name not in trainable}
    return (
        traverse_util.unflatten_dict(trainable, sep="/"),
        traverse_util.unflatten_dict(frozen, sep="/"),
    )


def merge_variables(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `split_trainable`."""
    trainable = traverse_util.flatten_dict(trainable, sep="/")
    frozen = traverse_util.flatten_dict(frozen, sep="/")
    both = sorted(trainable.keys() & frozen.keys())
    if both:
        raise ValueError(f"variables are both trainable and frozen: {both[:5]}")
    return traverse_util.unflatten_dict(trainable | frozen, sep="/")
