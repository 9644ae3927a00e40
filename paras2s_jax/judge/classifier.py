"""Waves → one of a few labels, by ear alone: the model under style analyzers and the tone namer."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.audio.mel import whisper_log_mel
from paras2s_jax.data.batches import Batches
from paras2s_jax.judge.buckets import Buckets
from paras2s_jax.judge.ledger import params_digest
from paras2s_jax.judge.recipe import (
    Augment,
    Recipe,
    augment_rows,
    init_variables,
    recipe_optimizer,
)
from paras2s_jax.models.whisper import WhisperForAudioClassification
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.train.checkpoint import Checkpointer, CheckpointError, load_part, save_part
from paras2s_jax.train.loop import fit
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.state import TrainState
from paras2s_jax.train.step import Sums, make_update


class WaveClassifier:
    """Names the label of each wave, batched, in fixed shapes."""

    settings: Mapping[str, Any] = {}

    def __init__(
        self,
        config: WhisperConfig,
        variables: Mapping[str, Any],
        labels: Sequence[str],
        *,
        len_buckets_s: Sequence[float],
        batch_size: int = 16,
    ):
        self.config, self.variables, self.labels = config, variables, tuple(labels)
        self._buckets = Buckets(len_buckets_s, batch_size)
        self._len_buckets_s = tuple(len_buckets_s)
        model = WhisperForAudioClassification(config, len(self.labels))

        @jax.jit
        def probs(variables, waves, lens):
            return jax.nn.softmax(_logits(model, variables, waves, lens))

        self._probs = probs
        self.model_id = f"whisper-classifier-{params_digest(variables)[:12]}"

    @property
    def max_dur_s(self) -> float:
        return self._buckets.max_dur_s

    def name(self, waves: Sequence[np.ndarray]) -> tuple[list[str], np.ndarray]:
        """waves: float32[L] each. Returns: labels, and probabilities float32[B, C]."""
        rows = self._buckets.run(lambda *batch: self._probs(self.variables, *batch), waves)
        probs = np.stack(rows) if rows else np.zeros((0, len(self.labels)), np.float32)
        if not np.isfinite(probs).all():
            raise CheckpointError(
                f"the classifier of {'/'.join(self.labels)} gives values that are not finite; "
                "train it again."
            )
        return [self.labels[i] for i in probs.argmax(axis=1)], probs

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        meta = {
            "kind": "wave_classifier",
            "config": dataclasses.asdict(self.config),
            "labels": self.labels,
            "len_buckets_s": self._len_buckets_s,
        }
        save_part(path, self.variables, meta)

    @classmethod
    def load(cls, path: str | Path, *, batch_size: int = 16) -> "WaveClassifier":
        """Reads what `save` wrote."""
        variables, meta = load_part(path, "float32")
        if meta.get("kind") != "wave_classifier":
            raise CheckpointError(f"{path}: holds no wave classifier; train one to this path.")
        return cls(
            WhisperConfig(**meta["config"]),
            variables,
            meta["labels"],
            len_buckets_s=meta["len_buckets_s"],
            batch_size=batch_size,
        )


def train(
    config: WhisperConfig,
    rows: Sequence[tuple[str, str]],
    root: str | Path,
    labels: Sequence[str],
    recipe: Recipe,
    *,
    groups: Sequence[str] | None = None,
    init_encoder: Mapping[str, Any] | None = None,
    augment: Augment | None = None,
    checkpointer: Checkpointer | None = None,
    writer: MetricWriter | None = None,
    progress_label: str = "classifier",
) -> WaveClassifier:
    """Trains a classifier from the waves.

    Args:
        rows: (wav path relative to root, label).
        groups: per row, the name of its group: rows of a group share a batch.
        init_encoder: parameters of a WhisperEncoder of the same config, to start from.
        augment: resynthesises waves; applied to `recipe.augment_share` of each batch.
    """
    unknown = sorted({label for _, label in rows} - set(labels))
    if unknown:
        raise ValueError(f"label '{unknown[0]}' of a clip under {root} is none of {list(labels)}.")
    groups = [""] * len(rows) if groups is None else groups
    batches = Batches(
        [
            {"wav": wav, "label": labels.index(label), "group": group}
            for (wav, label), group in zip(rows, groups, strict=True)
        ],
        root=root,
        audio_keys=("wav",),
        scalar_keys=("label",),
        batch_size=recipe.batch_size,
        len_buckets_s=recipe.len_buckets_s,
        seed=recipe.seed,
        shuffle=True,
        repeat=True,
        group_key="group" if any(groups) else None,
    )
    model = WhisperForAudioClassification(config, len(labels))
    variables = init_variables(model, config, recipe.seed)
    if init_encoder is not None:
        variables["params"]["encoder"] = jax.tree.map(jnp.asarray, dict(init_encoder))
    optimizer = recipe_optimizer(recipe)

    def loss_fn(variables, batch, rng):
        waves, lens = augment_rows(batch["wav"], batch["wav_len"], augment, recipe, rng)
        logp = jax.nn.log_softmax(_logits(model, variables, waves, lens))
        hit = jnp.argmax(logp, axis=-1) == batch["label"]
        chosen = jnp.take_along_axis(logp, batch["label"][:, None], axis=-1)[:, 0]
        valid = batch["valid"].astype(jnp.float32)
        return Sums(-jnp.sum(chosen * valid), valid.sum(), {"hit": (hit @ valid, valid.sum())})

    state = fit(
        TrainState.create(variables, optimizer, jax.random.key(recipe.seed)),
        make_update(loss_fn, optimizer),
        batches,
        num_steps=recipe.num_steps,
        checkpointer=checkpointer,
        save_every=recipe.save_every,
        writer=writer,
        log_every=recipe.log_every,
        progress_label=progress_label,
    )
    return WaveClassifier(config, state.variables, labels, len_buckets_s=recipe.len_buckets_s)


def _logits(model: nn.Module, variables: Mapping, waves: jax.Array, lens: jax.Array) -> jax.Array:
    """float32[B, labels]."""
    mel, len_frames = whisper_log_mel(waves, lens, model.config.num_mel_bins)
    mask = jnp.arange(mel.shape[1]) < len_frames[:, None]
    return model.apply(variables, mel, mask, method="classify")[0]
