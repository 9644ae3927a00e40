"""What all query datasets have in common: one example is a `Query` with its sound."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import Query, RecordError, write_jsonl

TEXTS = (
    "id", "sentence_id", "dimension", "text", "style", "contrast", "topic", "split", "voice",
)  # fmt: skip
# The other style of a real utterance: what it would most clearly not have been.
CONTRASTS = {"happy": "sad", "sad": "happy", "angry": "happy", "surprised": "sad"}
# What is asked of a real utterance before it may be a query: shorter ones say nothing, longer ones
# are stories. In seconds, and in words.
MIN_DUR_S, MAX_DUR_S = 1.0, 12.0
MIN_WORDS, MAX_WORDS = 4, 30
CITATION = "ParaS2S, arXiv 2511.08723"


def features() -> tfds.features.FeaturesDict:
    """Of an example: the fields of Query but `wav`, and the sound itself at 16 kHz."""
    return tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in TEXTS}
        | {
            "dur_s": tfds.features.Scalar(np.float32),
            "audio": tfds.features.Audio(sample_rate=wave_lib.RATE_HZ, dtype=np.int16),
        }
    )


def example_of(query: Query, wave: np.ndarray) -> dict[str, Any]:
    """wave: float32[L] at 16 kHz."""
    pcm = np.round(np.clip(wave, -1.0, 1.0) * 32_767).astype(np.int16)
    texts = {name: getattr(query, name) for name in TEXTS}
    return texts | {"dur_s": np.float32(len(wave) / wave_lib.RATE_HZ), "audio": pcm}


def query_of(example: Mapping[str, Any]) -> tuple[Query, np.ndarray]:
    """An example as numpy -> the query, named after its wav to be, and float32[L] at 16 kHz."""
    texts = {name: example[name].decode() for name in TEXTS}
    wave = example["audio"].astype(np.float32) / 32_767
    return Query(**texts, wav=f"wavs/{texts['id']}.wav", dur_s=float(example["dur_s"])), wave


def export(builder: tfds.core.DatasetBuilder, split: str, folder: Path) -> Path:
    """Writes a split as queries.jsonl and wavs, as every stage reads them. Returns: the jsonl."""
    rows = []
    examples = tfds.as_numpy(builder.as_dataset(split=split))
    total = builder.info.splits[split].num_examples
    for example in tqdm(examples, total=total, desc="export", unit="query"):
        query, wave = query_of(example)
        wave_lib.save(wave_lib.inside(folder, query.wav), wave, wave_lib.RATE_HZ)
        rows.append(query)
    return write_jsonl(folder / "queries.jsonl", sorted(rows, key=lambda query: query.id))


def real_query(
    corpus: str, name: str, text: str, style: str, speaker: str, path: Path
) -> tuple[Query, np.ndarray] | None:
    """A real utterance as a query, or None where it is too short or long, or is not all words.

    Raises AudioError on a file that cannot be read.
    """
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or "[" in text or "(" in text:
        return None
    wave = wave_lib.load(path)
    dur_s = len(wave) / wave_lib.RATE_HZ
    if not MIN_DUR_S <= dur_s <= MAX_DUR_S:
        return None
    query = Query(
        id=f"{corpus}-{name}",
        sentence_id=f"{corpus}-{name}",
        dimension="emotion",
        text=" ".join(words),
        style=style,
        contrast=CONTRASTS[style],
        topic=corpus,
        split="test",
        voice=speaker,
        wav="",
        dur_s=dur_s,
    )
    return query, wave


class Corpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A corpus of the user's: a test split of what `utterances` finds in manual_dir."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First form."}
    DESCRIPTION, HOMEPAGE = "", ""

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.DESCRIPTION,
            features=features(),
            homepage=self.HOMEPAGE,
            citation=CITATION,
        )

    def utterances(self, manual_dir: Path) -> Iterator[tuple[Query, np.ndarray]]:
        """Queries with their waves, float32[L] at 16 kHz."""
        raise NotImplementedError

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {"test": self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, manual_dir: Path):
        found = False
        for numbered_example in numbered(self.utterances(manual_dir)):
            found = True
            yield numbered_example
        if not found:
            raise RecordError(
                f"{manual_dir} has no utterance that can be a query; is it the whole corpus, and "
                "does kept_ids.txt, if there is one, name any?"
            )


def kept_ids(manual_dir: Path) -> frozenset[str] | None:
    """Utterances that passed the filters on their words, from kept_ids.txt; None without it.

    Neutrality, plausibility and relevance (paper section 1) are asked of a language model; one id
    per line.
    """
    path = manual_dir / "kept_ids.txt"
    if not path.is_file():
        return None
    return frozenset(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())


def numbered(pairs: Iterator[tuple[Query, np.ndarray]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, example) as builders give them."""
    for query, wave in pairs:
        yield query.id, example_of(query, wave)
