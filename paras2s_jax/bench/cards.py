"""Cards of the report's listening section: a sentence, both its styles, every system's answers."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench import tables
from paras2s_jax.bench.aggregate import column_of
from paras2s_jax.bench.rows import AnswerRow
from paras2s_jax.bench.sounds import Sounds
from paras2s_jax.data.records import Query
from paras2s_jax.data.tokenizer import normalize


def select_sentences(queries: Sequence[Query], per_column: int) -> list[str]:
    """Sentence ids, `per_column` of each column evenly over its sorted ids, columns in turn.

    By place, not by score, so that the page shows neither the best nor the worst.
    """
    found = defaultdict(set)
    for query in queries:
        found[column_of(query)].add(query.sentence_id)
    picked = []
    for column in sorted(found):
        ids = sorted(found[column])
        places = np.linspace(0, len(ids) - 1, min(per_column, len(ids))).round().astype(int)
        picked.append([ids[place] for place in places])
    longest = max(map(len, picked), default=0)
    return [ids[rank] for rank in range(longest) for ids in picked if rank < len(ids)]


def query_sound(query: Query) -> str:
    """Name of a query's player on the page."""
    return f"q:{query.id}"


def answer_sound(row: AnswerRow) -> str:
    """Name of an answer's player on the page."""
    return f"a:{row.response.system}:{row.response.sample}:{row.query.id}"


def query_wav(query: Query, root: Path) -> Path:
    return wave_lib.inside(root, query.wav)


def answer_wav(row: AnswerRow, folder: Path) -> Path | None:
    """None where the system gave no answer."""
    if row.response.error:
        return None
    return wave_lib.inside(folder / row.response.system, row.response.wav)


def shade(score: float) -> str:
    """Class of a score's colour: s1 to s5, "" where there is none."""
    return "" if math.isnan(score) else f"s{min(5, max(1, math.floor(score + 0.5)))}"


class Cards:
    """Makes cards of a bench; of each style the first voice, of each answer the first sample."""

    def __init__(
        self,
        folder: Path,
        root: Path,
        queries: Sequence[Query],
        rows: Mapping[str, Sequence[AnswerRow]],
    ):
        self._folder, self._root = folder, root
        self._spoken = defaultdict(dict)
        for query in sorted(queries, key=lambda query: query.id):
            self._spoken[query.sentence_id].setdefault(query.style, query)
        self._rows = {}
        for name, part in rows.items():
            self._rows[name] = {}
            for row in sorted(part, key=lambda row: row.response.sample):
                self._rows[name].setdefault(row.query.id, row)

    def within(self, sentence_ids: Sequence[str], sounds: Sounds) -> list[dict]:
        """Cards in order until their sound fills the page; grouped by column for reading."""
        shown = []
        for sentence_id in sentence_ids:
            embedded = sounds.embed_all(self._wavs(sentence_id))
            if embedded is None:
                break
            shown.append(self._card(sentence_id, embedded))
        return sorted(shown, key=lambda card: card["column"])

    def _wavs(self, sentence_id: str) -> list[Path]:
        wavs = []
        for query in self._spoken[sentence_id].values():
            wavs.append(query_wav(query, self._root))
            wavs += [answer_wav(part[query.id], self._folder) for part in self._rows.values()]
        return [wav for wav in wavs if wav is not None]

    def _card(self, sentence_id: str, embedded: Mapping[Path, str]) -> dict:
        queries = list(self._spoken[sentence_id].values())
        first = queries[0]
        return {
            "text": first.text,
            "column": column_of(first),
            "title": tables.TITLES[column_of(first)],
            "topic": first.topic,
            "takes": [self._take(query, embedded) for query in queries],
        }

    def _take(self, query: Query, embedded: Mapping[Path, str]) -> dict:
        rows = {name: part[query.id] for name, part in self._rows.items()}
        # What the judge heard in the query: of the first system that gave it something to judge.
        heard = next((row.verdict for row in rows.values() if row.verdict.transcript_in), None)
        heard = heard or next(iter(rows.values())).verdict
        return {
            "style": query.style,
            "sound": query_sound(query),
            "audio": embedded[query_wav(query, self._root)],
            "heard_style": heard.style_in if heard.style_source == "analyzer" else None,
            "heard_text": heard.transcript_in,
            "answers": [self._answer(name, row, embedded) for name, row in rows.items()],
        }

    def _answer(self, name: str, row: AnswerRow, embedded: Mapping[Path, str]) -> dict:
        response, verdict = row.response, row.verdict
        wav = answer_wav(row, self._folder)
        scored = not math.isnan(verdict.score)
        return {
            "name": name,
            "sound": answer_sound(row),
            "audio": None if wav is None else embedded[wav],
            "says": response.text,
            "heard": verdict.transcript_out,
            "same": normalize(response.text) == normalize(verdict.transcript_out),
            "tone": verdict.tone_out,
            "score": f"{verdict.score:.1f}" if scored else None,
            "shade": shade(verdict.score),
            "status": verdict.status,
            "reason": reason_of(row),
            "cut": not response.finished,
        }


def reason_of(row: AnswerRow) -> str:
    """The scorer's sentence, "" where it gave none."""
    score = row.verdict.raw.get("score")
    return str(score.get("reason", "")) if isinstance(score, Mapping) else ""
