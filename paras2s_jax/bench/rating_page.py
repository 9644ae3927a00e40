"""A page on which people rate answers from 1 to 5, and which exports what `agreement` reads.

Raters hear a spoken query and a spoken answer, and never learn which system answers. Every rater
gets the pairs in an order of their own, so that tiredness falls on all pairs alike.
"""

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench import page, sounds
from paras2s_jax.bench.aggregate import BenchError, column_of
from paras2s_jax.bench.cards import answer_wav, query_wav
from paras2s_jax.bench.rows import AnswerRow, read_benches, read_queries, read_rows
from paras2s_jax.judge.agreement import RATING_COLUMNS

# What each score means, 1 to 5: in a word, and in a sentence.
LEVELS = (
    ("unusable", "No intelligible answer, or one that hurts or mocks this speaker."),
    ("misses the voice", "Words or tone suit another way of speaking, or are beside the point."),
    ("suits anybody", "Answers the words; nothing shows that the voice was heard."),
    ("fits", "Clearly suits how it was said, with a small flaw in words or tone."),
    ("just right", "A thoughtful person could have said it just so, words and tone."),
)


class Pair(NamedTuple):
    """An answer, and where it is heard."""

    row: AnswerRow
    wav: Path


def write_rating_page(
    folders: Sequence[Path],
    root: Path,
    out: Path,
    *,
    num_pairs: int,
    seed: int,
    together: bool = False,
    max_mb: float = 32.0,
) -> Path:
    """Writes the page from the files of benches.

    Args:
        folders: of `run.bench`.
        root: the queries' wavs are relative to it.
        out: the page, for instance rate/index.html.
        num_pairs: pairs of a query and an answer, drawn evenly from systems and columns.
        seed: of the draw and of the raters' orders.
        together: draws queries instead, and all answers to each, for comparisons of systems.
        max_mb: of sound inside the page (FLAC); beyond that, wavs lie in <page>_sounds/ beside it
            and have to be given to raters with it.

    Returns:
        out.

    Raises:
        BenchError: there are fewer answers than `num_pairs`, or two systems of one name.
    """
    root, out = Path(root), Path(out)
    pairs = []
    for folder, results in read_benches(folders):
        queries = read_queries(folder)
        for system in results.systems:
            rows = read_rows(folder, queries, system.name)
            pairs += [Pair(row, answer_wav(row, folder)) for row in rows if not row.response.error]
    picked = draw(pairs, num_pairs, seed, together=together)
    wavs: dict[Path, int] = {}
    items = []
    for row, wav in picked:
        heard = query_wav(row.query, root), wav
        query, answer = (wavs.setdefault(path, len(wavs)) for path in heard)
        items.append({"key": _hidden(row), "query": query, "answer": answer})
    pages = {"items": items, "columns": RATING_COLUMNS}
    pages["id"] = hashlib.sha256(json.dumps([seed, items]).encode()).hexdigest()[:16]
    text = page.render(
        "rating.html",
        styles=("page.css", "rating.css"),
        scripts=("rating.js",),
        title="How well does the answer fit?",
        levels=LEVELS,
        num_pairs=len(items),
        data=pages | {"sounds": _sources(list(wavs), out, max_mb)},
    )
    return page.write(out, text)


def draw(pairs: Sequence[Pair], num_pairs: int, seed: int, *, together: bool = False) -> list[Pair]:
    """`num_pairs` answers in random order, as evenly as there are from each system and column.

    together: as evenly from each column, all answers to one query at a time, so that the last
    query may bring some more than `num_pairs`.
    """
    if not 0 < num_pairs <= len(pairs):
        raise BenchError(
            f"cannot draw {num_pairs} pairs: the bench has {len(pairs)} answers; ask for 1 to "
            f"{len(pairs)}."
        )
    rng = np.random.default_rng(seed)
    units: dict[str | int, list[Pair]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        units[pair.row.query.id if together else number].append(pair)
    strata = defaultdict(list)
    for unit in units.values():
        row = unit[0].row
        strata[column_of(row.query), "" if together else row.response.system].append(unit)
    shuffled = [[part[i] for i in rng.permutation(len(part))] for part in strata.values()]
    # Which strata give one more than the others is random, too.
    shuffled = [shuffled[i] for i in rng.permutation(len(shuffled))]
    longest = max(map(len, shuffled))
    turns = (part[turn] for turn in range(longest) for part in shuffled if turn < len(part))
    picked: list[Pair] = []
    while len(picked) < num_pairs:
        picked += next(turns)
    return [picked[i] for i in rng.permutation(len(picked))]


def _hidden(row: AnswerRow) -> str:
    """What the export names, in base64: whoever looks at the page's source reads no system."""
    key = [row.query.id, row.response.system, row.response.sample]
    return base64.b64encode(json.dumps(key).encode()).decode()


def _sources(wavs: Sequence[Path], out: Path, max_mb: float) -> list[str]:
    """Sources of all sounds, as the judge heard them; files get names that tell nothing."""
    inside = sounds.Sounds(out, max_mb, container="flac").embed_all(list(wavs))
    if inside is not None:
        return [inside[wav] for wav in wavs]
    names = [f"{out.stem}_sounds/{index:05d}.wav" for index in range(len(wavs))]
    for name, wav in zip(names, wavs, strict=True):
        wave_lib.save(out.parent / name, wave_lib.load(wav))
    return [sounds.quoted(name) for name in names]
