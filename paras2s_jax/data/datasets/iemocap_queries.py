"""IEMOCAP (Busso et al. 2008) utterances as queries, from the user's licensed copy."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from paras2s_jax.data.datasets import queries
from paras2s_jax.data.records import Query

FOLDER = "IEMOCAP_full_release"
# Labels that the annotators agreed on; excitement is counted as happiness, as is usual.
STYLES = {"hap": "happy", "exc": "happy", "sad": "sad", "ang": "angry", "sur": "surprised"}
# [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]
_LABEL = re.compile(r"^\[[\d. -]+\]\t(?P<name>\S+)\t(?P<label>\w+)\t", re.MULTILINE)
# Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.
_WORDS = re.compile(r"^(?P<name>Ses\w+) \[[\d.-]+\]: (?P<text>.*)$", re.MULTILINE)


class IemocapQueries(queries.Corpus):
    """Improvised and scripted dialogues by ten actors; the emotional utterances that are words."""

    DESCRIPTION = "Emotional IEMOCAP utterances as spoken queries."
    HOMEPAGE = "https://sail.usc.edu/iemocap/"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Ask for IEMOCAP at https://sail.usc.edu/iemocap/ and unpack it, so that manual_dir holds "
        f"{FOLDER}/Session1 … Session5. Optionally put a kept_ids.txt beside it: the names of the "
        "utterances whose words passed the filters."
    )

    def utterances(self, manual_dir: Path) -> Iterator[tuple[Query, np.ndarray]]:
        """See _utterances."""
        return _utterances(manual_dir)


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
