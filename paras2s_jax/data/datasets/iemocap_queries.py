"""IEMOCAP (Busso et al. 2008) utterances as queries, from the user's licensed copy."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from paras2s_jax.data.datasets import queries
from paras2s_jax.data.records import Query

FOLDER = "IEMOCAP_full_release"
# Labels that the annotators agreed on; excitement is counted as happiness, as is usual.
STYLES = {"hap": "happy", "exc": "happy", "sad": "sad", "ang": "angry", "sur": "surprised"}
# [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]
_LABEL = re.compile(r"^\[[\d. -]+\]\t(?P<name>\S+)\t(?P<label>\w+)\t", re.MULTILINE)
# Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.
_WORDS = re.compile(r"^(?P<name>Ses\w+) \[[\d.-]+\]: (?P<text>.*)$", re.MULTILINE)


class IemocapQueries(tfds.core.GeneratorBasedBuilder):
    """Improvised and scripted dialogues by ten actors; the emotional utterances that are words."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First form."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Ask for IEMOCAP at https://sail.usc.edu/iemocap/ and unpack it, so that manual_dir holds "
        f"{FOLDER}/Session1 … Session5. Optionally put a kept_ids.txt beside it: the names of the "
        "utterances whose words passed the filters."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Emotional IEMOCAP utterances as spoken queries.",
            features=queries.features(),
            homepage="https://sail.usc.edu/iemocap/",
            citation=queries.CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {"test": self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, manual_dir: Path):
        return queries.numbered(_utterances(manual_dir))


def _utterances(manual_dir: Path) -> Iterator[tuple[Query, np.ndarray]]:
    """Raises FileNotFoundError where the corpus is not as it is released."""
    kept, root = queries.kept_ids(manual_dir), manual_dir / FOLDER
    sessions = sorted(root.glob("Session*"))
    if not sessions:
        raise FileNotFoundError(f"{root} has no Session folders; unpack IEMOCAP there")
    for session in sessions:
        for labels in sorted((session / "dialog/EmoEvaluation").glob("*.txt")):
            words = session / "dialog/transcriptions" / labels.name
            texts = dict(_WORDS.findall(words.read_text("utf-8", errors="replace")))
            for name, label in _LABEL.findall(labels.read_text("utf-8", errors="replace")):
                if label not in STYLES or name not in texts or (kept and name not in kept):
                    continue
                wav = session / "sentences/wav" / labels.stem / f"{name}.wav"
                # "F" or "M" behind the last underscore says who speaks of the session's pair.
                speaker = f"{session.name}-{name.rpartition('_')[2][0]}"
                found = queries.real_query(
                    "iemocap", name, texts[name], STYLES[label], speaker, wav
                )
                if found:
                    yield found
