"""MELD (Poria et al. 2019) utterances as queries, from the user's own copy."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from paras2s_jax.data.datasets import queries
from paras2s_jax.data.records import Query, RecordError

FOLDER, LABELS = "MELD.Raw", "test_sent_emo.csv"
STYLES = {"joy": "happy", "sadness": "sad", "anger": "angry", "surprise": "surprised"}
COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")


class MeldQueries(queries.Corpus):
    """Utterances of a television series, of the official test split."""

    DESCRIPTION = "Emotional MELD utterances as spoken queries."
    HOMEPAGE = "https://affective-meld.github.io"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Get MELD from https://affective-meld.github.io, so that manual_dir holds {FOLDER}/"
        f"{LABELS}, and take the sound out of its videos, for instance with\n"
        "  for f in output_repeated_splits_test/dia*.mp4; do ffmpeg -i $f -ac 1 -ar 16000 "
        f"{FOLDER}/wav/$(basename $f .mp4).wav; done\n"
        "Optionally put a kept_ids.txt beside it: names like dia0_utt1 whose words passed the "
        "filters."
    )

    def utterances(self, manual_dir: Path) -> Iterator[tuple[Query, np.ndarray]]:
        """See _utterances."""
        return _utterances(manual_dir)


def _utterances(manual_dir: Path) -> Iterator[tuple[Query, np.ndarray]]:
    """Raises FileNotFoundError or RecordError where the corpus is not as it is released."""
    kept, path = queries.kept_ids(manual_dir), manual_dir / FOLDER / LABELS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; put MELD there")
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise RecordError(f"{path} has no column {', '.join(missing)}; take MELD's own file")
        for row in reader:
            name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
            style = STYLES.get(row["Emotion"])
            if style is None or (kept and name not in kept):
                continue
            # The released file keeps apostrophes of another encoding as this byte.
            text = row["Utterance"].replace("\x92", "'")
            wav = manual_dir / FOLDER / "wav" / f"{name}.wav"
            found = queries.real_query("meld", name, text, style, row["Speaker"], wav)
            if found:
                yield found
