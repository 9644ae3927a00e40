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


def run(
    config: WhisperConfig,
    clips: Sequence[PolytoneClip],
    root: str | Path,
    recipe: Recipe,
    out_dir: str | Path,
    *,
    attributes: Sequence[str] = DIMENSIONS,
    init_encoder: Mapping[str, Any] | None = None,
    augment: Augment | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Trains, tests and saves both analyzers of every attribute.

    Writes out_dir/<set>/<attribute>.safetensors, which `StyleAnalyzers.load(out_dir / "polytone")`
    reads, and the training's metrics and checkpoints beside them.

    Returns: accuracy on the contradiction test, as polytone/<attribute>/<set>, and its mean over
    attributes as polytone/mean/<set>.
    """
    root, out_dir = Path(root), Path(out_dir)
    accuracy: dict[tuple[str, str], float] = {}
    for attribute in attributes:
        of_set = {
            name: [clip for clip in clips if (clip.attribute, clip.set) == (attribute, name)]
            for name in (*SETS, "test")
        }
        labels = _labels(attribute, of_set)
        # The same amount of speech for both.
        num_clips = min(len(of_set[name]) for name in SETS)
        waves = [wave_lib.load(wave_lib.inside(root, clip.wav)) for clip in of_set["test"]]
        for name in SETS:
            folder = out_dir / name
            analyzer = _train(
                config,
                balanced(of_set[name], num_clips, labels, recipe.seed),
                root,
                labels,
                recipe,
                grouped=name == "polytone",
                init_encoder=init_encoder,
                augment=augment,
                folder=folder / f"{attribute}_training",
                progress_label=f"{name} {attribute}",
            )
            found, _ = analyzer.name(waves)
            hits = [label == clip.label for label, clip in zip(found, of_set["test"])]
            accuracy[attribute, name] = float(np.mean(hits))
            StyleAnalyzers({attribute: analyzer}).save(folder)
    means = {name: np.mean([accuracy[a, name] for a in attributes]).item() for name in SETS}
    _print_table(attributes, accuracy, means, console or Console())
    figures = {f"polytone/{a}/{name}": value for (a, name), value in accuracy.items()}
    return figures | {f"polytone/mean/{name}": value for name, value in means.items()}


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


def _print_table(
    attributes: Sequence[str],
    accuracy: Mapping[tuple[str, str], float],
    means: Mapping[str, float],
    console: Console,
) -> None:
    table = Table(title="Accuracy where the words contradict the voice", title_justify="left")
    table.add_column("attribute")
    for name in SETS:
        table.add_column(name, justify="right")
    for attribute in attributes:
        table.add_row(attribute, *(f"{accuracy[attribute, name]:.3f}" for name in SETS))
    table.add_section()
    table.add_row("mean", *(f"{means[name]:.3f}" for name in SETS))
    console.print(table)
