"""The synthetic queries of the bench: the built-in bank, spoken where the dataset is built."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data import speaking, synthesize
from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.datasets import queries
from paras2s_jax.data.records import Query

SEED = 0


class Paras2sBench(tfds.core.GeneratorBasedBuilder):
    """Neutral sentences in two contrastive styles each, in four dimensions."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First form."}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Synthetic queries in emotion, sarcasm, age and gender.",
            features=queries.features(),
            citation=queries.CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str, max_clips: int | None = None):
        return queries.numbered(_spoken(split, max_clips))


def _spoken(split: str, max_clips: int | None) -> Iterator[tuple[Query, np.ndarray]]:
    """max_clips: of the split's queries, all by default."""
    plan = synthesize.plan_queries(load_bank(), SEED, synthesize.Sizes())
    clips = [clip for clip in plan if clip.row.split == split][:max_clips]
    with tempfile.TemporaryDirectory(prefix="paras2s-bench-") as folder:
        rows, _ = speaking.speak(clips, Path(folder))
        for row in rows:
            yield row, wave_lib.load(Path(folder) / row.wav)
