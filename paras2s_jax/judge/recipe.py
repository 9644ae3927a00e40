"""What training the judge's models has in common: the recipe's numbers, start, codec copies."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.train.optimizer import make_optimizer

# (waves float32[B, L], lens int32[B], rng) → (waves float32[B, L'], lens): inside jit.
Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a judge model is trained.

    len_buckets_s: lengths that waves are padded to; the longest is also the limit in use.
    augment_share: share of the rows of a batch that go through the codec, if one is given.
    """

    num_steps: int
    batch_size: int = 16
    lr: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    len_buckets_s: tuple[float, ...] = (2.0, 4.0)
    augment_share: float = 0.5
    seed: int = 0
    save_every: int = 1000
    log_every: int = 20


def init_variables(model: nn.Module, config: WhisperConfig, seed: int, **inputs: Any) -> dict:
    """Fresh, unboxed variables of a model whose first argument is `input_features` [B, M, A]."""
    features = jnp.zeros((1, config.num_mel_bins, 16))
    return nn.unbox(jax.jit(model.init)(jax.random.key(seed), features, **inputs))


def recipe_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW that warms up and then decays to zero at the last step."""
    return make_optimizer(
        recipe.lr,
        warmup_steps=min(recipe.warmup_steps, recipe.num_steps),
        total_steps=recipe.num_steps,
        weight_decay=recipe.weight_decay,
    )


# A first-order filter's coefficient: about 15 dB between low and high frequencies, either way.
_MAX_TILT = 0.7


def another_microphone(
    waves: jax.Array, lens: jax.Array, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The waves with a random spectral tilt, their loudness kept: an `Augment`.

    Without it, a voice that is duller or brighter than all that were trained on is misheard.
    """
    real = jnp.arange(waves.shape[1]) < lens[:, None]

    def level(x):
        power = jnp.sum(jnp.square(x) * real, axis=1) / jnp.maximum(lens, 1)
        return jnp.sqrt(power + 1e-9)[:, None]

    tilt = jax.random.uniform(rng, (waves.shape[0], 1), minval=-_MAX_TILT, maxval=_MAX_TILT)
    tilted = waves + tilt * jnp.pad(waves, ((0, 0), (1, 0)))[:, :-1]
    return tilted * level(waves) / level(tilted) * real, lens


def augment_rows(
    waves: jax.Array, lens: jax.Array, augment: Augment | None, recipe: Recipe, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augments the first `augment_share` of the rows, which a shuffled batch has at random.

    waves: float32[B, L]; lens: int32[B]. Returns: the same shapes.
    """
    count = round(recipe.augment_share * waves.shape[0])
    if augment is None or not count:
        return waves, lens
    new, new_lens = augment(waves[:count], lens[:count], rng)
    length = waves.shape[1]
    new = jnp.pad(new[:, :length], ((0, 0), (0, max(0, length - new.shape[1]))))
    waves = jnp.concatenate([new, waves[count:]])
    lens = jnp.concatenate([jnp.minimum(new_lens, length), lens[count:]])
    return jax.lax.stop_gradient(waves), lens
