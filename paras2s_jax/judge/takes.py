"""Of several spoken takes of a query, the one whose style is heard best (paper section 1)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import Query, append_jsonl, read_jsonl
from paras2s_jax.judge.interfaces import WaveNamer

# A query whose best take its analyzer names with less than this is not spoken as it should be.
MIN_PROB = 0.5


@dataclasses.dataclass(frozen=True)
class Choice:
    """query_id: of the query. wav: its best take. prob: of its style, by the analyzer, 0..1.

    num_takes: how many there were. is_kept: whether the best one is good enough.
    """

    query_id: str
    wav: str
    prob: float
    num_takes: int
    is_kept: bool


def choose_takes(
    takes: Mapping[str, Sequence[Query]],
    root: Path,
    analyzers: Mapping[str, WaveNamer],
    *,
    min_prob: float = MIN_PROB,
    log: Path | None = None,
) -> list[Query]:
    """The best take of every query whose style can be heard in it, under the query's own id.

    Args:
        takes: query id -> its takes: the same query, each with a wav (relative to `root`).
        analyzers: by dimension; each knows the styles of its dimension.
        log: jsonl of Choices, appended to; queries chosen there already are not heard again.

    Raises:
        ValueError: an analyzer is missing or does not know a style.
        AudioError: a take cannot be read.
    """
    logged = read_jsonl(log, Choice, partial_tail=True) if log and log.is_file() else []
    choices = {choice.query_id: choice for choice in logged}
    kept = []
    for query_id, options in tqdm(takes.items(), desc="choose takes", unit="query"):
        known = choices.get(query_id)
        # Takes may have become more, or others, since.
        is_of_these = known is not None and known.wav in {take.wav for take in options}
        if not is_of_these or known.num_takes != len(options):
            choices[query_id] = _choose(query_id, options, root, analyzers, min_prob)
            if log:
                append_jsonl(log, choices[query_id])
        choice = choices[query_id]
        if choice.is_kept:
            best = next(take for take in options if take.wav == choice.wav)
            kept.append(dataclasses.replace(best, id=query_id))
    return kept


def _choose(
    query_id: str,
    options: Sequence[Query],
    root: Path,
    analyzers: Mapping[str, WaveNamer],
    min_prob: float,
) -> Choice:
    first = options[0]
    if first.dimension not in analyzers:
        raise ValueError(f"no analyzer for {first.dimension} of query {query_id}; train one")
    analyzer = analyzers[first.dimension]
    if first.style not in analyzer.labels:
        known = ", ".join(analyzer.labels)
        raise ValueError(
            f"the analyzer of {first.dimension} knows {known}, not {first.style!r} of query "
            f"{query_id}"
        )
    waves = [wave_lib.load(wave_lib.inside(root, take.wav)) for take in options]
    _, probs = analyzer.name(waves)
    own = probs[:, analyzer.labels.index(first.style)]
    best = int(own.argmax())
    prob = float(own[best])
    return Choice(query_id, options[best].wav, round(prob, 4), len(options), prob >= min_prob)
