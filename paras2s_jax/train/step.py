"""One optimiser step: gradients accumulated over microbatches, normalised once."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax import numpy as jnp
from jax.sharding import NamedSharding

from paras2s_jax.train import state as state_lib
from paras2s_jax.train.sharding import ONE_DEVICE, Layout


class Sums(NamedTuple):
    """What a loss function returns: sums, so that microbatches can be added exactly.

    loss_sum: float[]; weight: float[], e.g. the number of real tokens; metrics: {name: (sum,
    weight)}.
    """

    loss_sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]


LossFn = Callable[[dict[str, Any], Mapping[str, jax.Array], jax.Array], Sums]


class Update:
    """Jitted `update(state, batch) -> (state, metrics)`; a `sharding.Program` in use.

    `metrics` are float32[] on the device: every metric of the loss, `loss`, `grad_norm` and
    `skipped`: 1 where the loss or a gradient is not finite, which leaves params and opt_state as
    they were. The new state is sharded like the old one, gradients like the parameters. With
    `donate`, the old state's params and opt_state are consumed; its frozen part never is.
    """

    name = "update"

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: optax.GradientTransformation,
        *,
        accum_steps: int,
        donate: bool,
        layout: Layout,
    ):
        self._loss_fn, self._optimizer, self.layout = loss_fn, optimizer, layout
        self._accum_steps, self._donate = accum_steps, donate
        self._jitted: Callable | None = None

    def __call__(self, state: state_lib.TrainState, batch: Mapping[str, Any]):
        if self._jitted is None:
            self._jitted = self._jit(state)
        with self.layout.active():
            new, metrics = self._jitted(state.replace(frozen={}), state.frozen, batch)
        return new.replace(frozen=state.frozen), metrics

    def lower(self, state: state_lib.TrainState, batch: Mapping[str, Any]) -> jax.stages.Lowered:
        """Lowers for ahead-of-time compilation; leaves may be ShapeDtypeStructs."""
        with self.layout.active():
            return self._jit(state).lower(state.replace(frozen={}), state.frozen, batch)

    def _jit(self, state: state_lib.TrainState) -> Callable:
        # Without this the compiler may return params in another layout than it was given.
        shardings = jax.tree.map(_named_sharding, state.replace(frozen={}))
        return jax.jit(
            functools.partial(self._step, shardings.params),
            donate_argnums=(0,) if self._donate else (),
            out_shardings=(shardings, None),
        )

    def _step(
        self,
        shardings: Any,
        state: state_lib.TrainState,
        frozen: Any,
        batch: Mapping[str, jax.Array],
    ):
        rng = state_lib.step_rng(state)

        def loss_sum(params, microbatch, micro_rng):
            variables = state_lib.merge_variables(params, frozen)
            sums = Sums(*self._loss_fn(variables, microbatch, micro_rng))
            return sums.loss_sum.astype(jnp.float32), sums

        def grads_of(microbatch, index):
            micro_rng = jax.random.fold_in(rng, index)
            grads, sums = jax.grad(loss_sum, has_aux=True)(state.params, microbatch, micro_rng)
            grads = jax.tree.map(_constrained, grads, shardings)
            return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (grads, sums))

        grads, sums = _accumulate(grads_of, batch, self._accum_steps)
        scale = jnp.where(sums.weight > 0, 1.0 / jnp.maximum(sums.weight, 1e-9), 0.0)
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, state.params)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        metrics = {name: total / weight for name, (total, weight) in sums.metrics.items()}
        metrics |= {"loss": sums.loss_sum * scale, "grad_norm": optax.global_norm(grads)}
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["skipped"] = 1.0 - sound.astype(jnp.float32)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old),
            (optax.apply_updates(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accum_steps: int = 1,
    donate: bool = True,
    layout: Layout = ONE_DEVICE,
) -> Update:
    """Builds the training step for `loss_fn(variables, batch, rng) -> Sums`.

    Gradients and metrics are sums over microbatches divided by the total weight, so the result does
    not depend on `accum_steps`. Microbatch i holds rows i, i + accum_steps, …: each stays spread
    over all devices. Scalars in the batch go to every microbatch. If the total weight is 0, the
    gradients are 0.
    """
    return Update(loss_fn, optimizer, accum_steps=accum_steps, donate=donate, layout=layout)


def _accumulate(grads_of: Callable, batch: Mapping[str, jax.Array], steps: int):
    """Sums `grads_of(microbatch, index)` over microbatches."""
    if steps == 1:
        return grads_of(batch, 0)

    def split(name, x):
        if not x.ndim:
            return jnp.broadcast_to(x, (steps,))
        if x.shape[0] % steps:
            raise ValueError(f"{name}: {x.shape[0]} rows do not divide into {steps} microbatches")
        return jnp.moveaxis(x.reshape(x.shape[0] // steps, steps, *x.shape[1:]), 1, 0)

    microbatches = jax.tree_util.tree_map_with_path(
        lambda path, x: split(jax.tree_util.keystr(path), x), batch
    )
    first = jax.tree.map(lambda x: x[0], microbatches)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grads_of, first, jnp.int32(0))
    )

    def body(total, item):
        return jax.tree.map(jnp.add, total, grads_of(*item)), None

    total, _ = jax.lax.scan(body, zeros, (microbatches, jnp.arange(steps)))
    return total


def _constrained(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _named_sharding(leaf: Any) -> NamedSharding | None:
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
