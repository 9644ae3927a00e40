"""PolyTone (paper section 2): analyzers trained where the words tell nothing about the style.

Beside each such analyzer stands a plain one, trained on as many clips whose words agree with the
voice; both are tested where words and voice contradict each other, which tells who listens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import DIMENSIONS, PolytoneClip
from paras2s_jax.judge import classifier
from paras2s_jax.judge.recipe import Augment, Recipe
from paras2s_jax.judge.style import StyleAnalyzers
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.metrics import MetricWriter

SETS = ("polytone", "plain")


def fit(
    config: WhisperConfig,
    clips: Sequence[PolytoneClip],
    root: str | Path,
    recipe: Recipe,
    folder: str | Path,
    *,
    of_set: str = "polytone",
    attributes: Sequence[str] = DIMENSIONS,
    init_encoder: Mapping[str, Any] | None = None,
    augment: Augment | None = None,
) -> dict[str, float]:
    """Trains, tests and saves an analyzer of every attribute.

    Writes folder/<attribute>.safetensors, which `StyleAnalyzers.load(folder)` reads, and the
    training's metrics and checkpoints beside them.

    Args:
        clips: of all sets; as many are used as the smaller one of SETS has.
        of_set: one of SETS: what the analyzers learn from.

    Returns: accuracy on the contradiction test, as polytone/<attribute>/<of_set>, and its mean
      over attributes as polytone/mean/<of_set>.
    """
    root, folder = Path(root), Path(folder)
    figures = {}
    for attribute in attributes:
        parts = {
            name: [clip for clip in clips if (clip.attribute, clip.set) == (attribute, name)]
            for name in (*SETS, "test")
        }
        labels = _labels(attribute, parts)
        # The same amount of speech for both sets.
        num_clips = min(len(parts[name]) for name in SETS)
        analyzer = _train(
            config,
            balanced(parts[of_set], num_clips, labels, recipe.seed),
            root,
            labels,
            recipe,
            grouped=of_set == "polytone",
            init_encoder=init_encoder,
            augment=augment,
            folder=folder / f"{attribute}_training",
            progress_label=f"{of_set} {attribute}",
        )
        waves = [wave_lib.load(wave_lib.inside(root, clip.wav)) for clip in parts["test"]]
        found, _ = analyzer.name(waves)
        hits = [label == clip.label for label, clip in zip(found, parts["test"])]
        figures[f"polytone/{attribute}/{of_set}"] = float(np.mean(hits))
        StyleAnalyzers({attribute: analyzer}).save(folder)
    return figures | {f"polytone/mean/{of_set}": float(np.mean(list(figures.values())))}


def balanced(
    clips: Sequence[PolytoneClip], num_clips: int, labels: Sequence[str], seed: int
) -> list[PolytoneClip]:
    """At most num_clips, as many of each label: whole texts first, in a random order of texts."""
    texts = sorted({clip.text_id for clip in clips})
    rank = dict(zip(np.random.default_rng(seed).permutation(texts).tolist(), range(len(texts))))
    per_label = num_clips // len(labels)
    return [
        clip
        for label in labels
        for clip in sorted(
            (clip for clip in clips if clip.label == label),
            key=lambda clip: (rank[clip.text_id], clip.id),
        )[:per_label]
    ]


def _train(
    config: WhisperConfig,
    clips: Sequence[PolytoneClip],
    root: Path,
    labels: Sequence[str],
    recipe: Recipe,
    *,
    grouped: bool,
    init_encoder: Mapping[str, Any] | None,
    augment: Augment | None,
    folder: Path,
    progress_label: str,
) -> classifier.WaveClassifier:
    checkpointer = Checkpointer(folder / "checkpoints", keep=1)
    writer = MetricWriter(folder)
    try:
        return classifier.train(
            config,
            [(clip.wav, clip.label) for clip in clips],
            root,
            labels,
            recipe,
            # All styles of a text in one batch: what differs between them is the voice alone.
            groups=[clip.text_id for clip in clips] if grouped else None,
            init_encoder=init_encoder,
            augment=augment,
            checkpointer=checkpointer,
            writer=writer,
            progress_label=progress_label,
        )
    finally:
        checkpointer.close()
        writer.close()


def _labels(attribute: str, of_set: Mapping[str, Sequence[PolytoneClip]]) -> tuple[str, ...]:
    empty = [name for name, clips in of_set.items() if not clips]
    if empty:
        raise ValueError(
            f"there are no clips of set '{empty[0]}' for the attribute '{attribute}'; "
            "run the stage synthesize, or leave the attribute out."
        )
    labels = {name: {clip.label for clip in clips} for name, clips in of_set.items()}
    if len({frozenset(found) for found in labels.values()}) > 1 or len(labels["test"]) < 2:
        raise ValueError(
            f"the sets of '{attribute}' must share two labels or more, they have "
            f"{ ({name: sorted(found) for name, found in labels.items()}) }."
        )
    return tuple(sorted(labels["test"]))


def print_table(
    figures: Mapping[str, float],
    attributes: Sequence[str] = DIMENSIONS,
    console: Console | None = None,
) -> None:
    """Prints what `fit` returned for both sets side by side."""
    table = Table(title="Accuracy where the words contradict the voice", title_justify="left")
    table.add_column("attribute")
    for name in SETS:
        table.add_column(name, justify="right")
    for attribute in (*attributes, "mean"):
        if attribute == "mean":
            table.add_section()
        values = (figures[f"polytone/{attribute}/{name}"] for name in SETS)
        table.add_row(attribute, *(f"{value:.3f}" for value in values))
    (console or Console()).print(table)
