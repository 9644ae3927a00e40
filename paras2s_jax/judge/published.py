"""Published classifiers of waves as style analyzers: their labels become the judge's names."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.audio.level import standardize
from paras2s_jax.convert import from_pretrained
from paras2s_jax.judge.buckets import Buckets
from paras2s_jax.judge.ledger import params_digest
from paras2s_jax.models.emotion2vec import STANDARDIZE_EPS, Emotion2vec
from paras2s_jax.models.wav2vec2 import (
    GENDERS,
    AgeGenderModel,
    Wav2Vec2ForSequenceClassification,
)

# The class "child" of an age and gender model answers for the age, too.
AGE_NAMES = {"child": "child", "female": "adult", "male": "adult"}
GENDER_NAMES = {"female": "female", "male": "male"}


class _Reading(NamedTuple):
    """How a model's outputs are read: labels(config), and scores(logits) float32[B, labels]."""

    labels: Callable[[Any], Sequence[str]]
    scores: Callable[[jax.Array], jax.Array]
    eps: float  # Of `standardize`.
    masks_padding: bool = False  # Whether the mask says what is not real.


_READINGS: dict[type, _Reading] = {
    Wav2Vec2ForSequenceClassification: _Reading(lambda c: c.id2label, lambda x: x, 1e-7),
    AgeGenderModel: _Reading(lambda c: GENDERS, lambda x: x[:, 1:], 1e-7),
    Emotion2vec: _Reading(lambda c: c.token_list, lambda x: x, STANDARDIZE_EPS, True),
}


class PublishedClassifier:
    """Names each wave with a published model (wav2vec 2.0, age and gender, emotion2vec).

    It is a `WaveNamer`: `Judge` takes it as style analyzer or tone namer.

    Args:
        model, params: of `convert.from_pretrained`; `load` calls it.
        names: the model's label → the judge's name. Labels that share a name are summed up;
            those without one are taken as impossible.
        is_standardized: whether the model wants waves of zero mean and unit variance, do_normalize
            of its processor.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Any],
        names: Mapping[str, str],
        *,
        is_standardized: bool,
        len_buckets_s: Sequence[float],
        batch_size: int = 16,
    ):
        reading = _READINGS.get(type(model))
        if reading is None:
            known = ", ".join(kind.__name__ for kind in _READINGS)
            raise ValueError(f"{type(model).__name__} names no styles; give one of {known}.")
        labels = tuple(reading.labels(model.config))
        unknown = sorted(set(names) - set(labels))
        if unknown or not names:
            raise ValueError(f"the model has no labels {unknown}; it has {list(labels)}.")
        self.labels = tuple(dict.fromkeys(names.values()))
        # float32[model's labels, names]
        groups = np.array([[names.get(label) == n for n in self.labels] for label in labels], float)
        self._params, self._buckets = params, Buckets(len_buckets_s, batch_size)
        self.settings = {"names": dict(names), "is_standardized": is_standardized}
        self.model_id = f"{type(model).__name__}-{params_digest(params)[:12]}"

        @jax.jit
        def probs(params, waves, lens):
            if is_standardized:
                waves = standardize(waves, lens, eps=reading.eps)
            mask = jnp.arange(waves.shape[1]) < lens[:, None]
            mask = ~mask if reading.masks_padding else mask
            scores = reading.scores(model.apply({"params": params}, waves, mask)[0])
            scores = jnp.where(groups.any(axis=1), scores, -jnp.inf)
            return jax.nn.softmax(scores) @ groups.astype(jnp.float32)

        self._probs = probs

    @classmethod
    def load(
        cls,
        path_or_hub_id: str | Path,
        names: Mapping[str, str],
        *,
        len_buckets_s: Sequence[float],
        batch_size: int = 16,
    ) -> "PublishedClassifier":
        """Of a released or converted checkpoint; other arguments as of the class."""
        model, params, processor = from_pretrained(path_or_hub_id)
        if processor is None:
            raise ValueError(
                f"{path_or_hub_id} does not say how waves are prepared; "
                "put the released preprocessor_config.json there."
            )
        return cls(
            model,
            params,
            names,
            is_standardized=processor.do_normalize,
            len_buckets_s=len_buckets_s,
            batch_size=batch_size,
        )

    @property
    def max_dur_s(self) -> float:
        return self._buckets.max_dur_s

    def name(self, waves: Sequence[np.ndarray]) -> tuple[list[str], np.ndarray]:
        """waves: float32[L] each. Returns: labels, and probabilities float32[B, C]."""
        rows = self._buckets.run(lambda *batch: self._probs(self._params, *batch), waves)
        probs = np.stack(rows) if rows else np.zeros((0, len(self.labels)), np.float32)
        if not np.isfinite(probs).all():
            raise ValueError(
                f"{self.model_id} gives values that are not finite; convert it again, in float32."
            )
        return [self.labels[i] for i in probs.argmax(axis=1)], probs
