"""How one id per row is drawn from logits, and how likely it was."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

GREEDY_BELOW = 1e-6  # temperature under which Kimi-Audio's sampler takes the argmax


@dataclass(frozen=True)
class Sampling:
    """How one stream is drawn. temperature 0: argmax; top_k 0: all ids.

    A repetition_penalty > 1 weakens the ids of the last `window` steps, as soon as the
    answer is longer than that.
    """

    temperature: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    window: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature <= GREEDY_BELOW

    @property
    def logp_temperature(self) -> float:
        """Temperature of the reported log-probability; a greedy draw is scored at 1."""
        return 1.0 if self.is_greedy else self.temperature


def draw(
    rng: jax.Array,
    logits: jax.Array,
    history: jax.Array,
    step: jax.Array,
    sampling: Sampling,
    among: tuple[jax.Array, int] | None = None,
) -> jax.Array:
    """One id per row. logits: float32[B, V]; history: int32[R, B], filled before `step`.

    rng is not used by a greedy draw. among: int32[B] and a number of rows, if these are some rows
    of so many, and shall get what they would get among all. Returns: int32[B].
    """
    scores, ids = candidates(logits, history, step, sampling)
    if sampling.is_greedy:
        return ids[:, 0]
    if among is None:
        choice = jax.random.categorical(rng, scores)
    else:
        # What categorical does, with the noise of all rows.
        rows, total = among
        noise = jax.random.gumbel(rng, (total, scores.shape[1]), scores.dtype)
        choice = jnp.argmax(noise[rows] + scores, axis=-1)
    if ids is None:
        return choice.astype(jnp.int32)
    return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]


def candidates(logits: jax.Array, history: jax.Array, step: jax.Array, sampling: Sampling):
    """Scores whose softmax is the distribution that `draw` draws from (Kimi-Audio's sampler.py).

    Returns: (float32[B, k], int32[B, k]) in descending order; k = 1 when greedy; without
    top_k (float32[B, V], None).
    """
    logits = _penalize(logits, history, step, sampling)
    if sampling.is_greedy:
        best = jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32)
        return jnp.zeros(best.shape, jnp.float32), best
    scores, ids = logits / sampling.temperature, None
    if sampling.top_k > 0:
        scores, ids = jax.lax.top_k(scores, min(sampling.top_k, logits.shape[-1]))
    return scores, ids


def _penalize(logits, history, step, sampling: Sampling):
    if sampling.repetition_penalty <= 1.0 or history.shape[0] <= sampling.window:
        return logits
    penalty, rows = sampling.repetition_penalty, jnp.arange(logits.shape[0])
    recent = jax.lax.dynamic_slice_in_dim(history, step - sampling.window, sampling.window)
    seen = jnp.zeros(logits.shape, bool).at[rows, recent].set(True)
    weaker = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen & (step > sampling.window), weaker, logits)


def chosen_logp(logits: jax.Array, ids: jax.Array, temperature: float) -> jax.Array:
    """log softmax(logits / temperature)[ids]. logits: float32[..., V]; ids: int32[...]."""
    logits = logits / temperature
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
