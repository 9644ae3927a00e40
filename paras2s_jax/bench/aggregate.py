"""Verdicts → means, confidence intervals, breakdowns and the style-swap gain.

Every interval is a 95 % percentile bootstrap clustered by sentence: the answers to one sentence
(two styles, several voices, several samples) are not independent, so sentences are resampled.
Failed verdicts (score NaN) never vanish: means run over the scored, and the failed are counted.
"""

import dataclasses
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from paras2s_jax.data.records import Query, Response, Verdict

# Columns of paper section 4, in its order.
SYNTHETIC = ("age", "emotion", "gender", "sarcasm")
REAL = ("iemocap", "meld")
MEAN = "mean"

Key = tuple[str, int]


class BenchError(ValueError):
    """Verdicts, answers and queries do not belong together."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and the counts that it rests on."""

    value: float
    low: float
    high: float
    num_scored: int
    num_failed: int
    num_sentences: int


def column_of(query: Query) -> str:
    """The table column of a query: its dimension, or the corpus that a real-speech topic names."""
    return query.topic if query.topic in REAL else query.dimension


def style_of(query: Query) -> str:
    """The style of a query with its column: "emotion/sad" and "meld/sad" are different groups."""
    return f"{column_of(query)}/{query.style}"


def columns_of(queries: Iterable[Query]) -> tuple[str, ...]:
    """The columns present in the queries, in the order of the paper; the neutral have none."""
    present = {column_of(query) for query in queries}
    return tuple(name for name in SYNTHETIC + REAL if name in present)


def scores_of(
    queries: Sequence[Query], verdicts: Sequence[Verdict], system: str
) -> dict[Key, float]:
    """Scores by (query id, sample), NaN where the judge failed.

    Raises:
        BenchError: a query has no verdict, a verdict no query, or one answer two verdicts.
    """
    counted = Counter((verdict.query_id, verdict.sample) for verdict in verdicts)
    twice = [key for key, count in counted.items() if count > 1]
    missing = {query.id for query in queries} - {query_id for query_id, _ in counted}
    unknown = {query_id for query_id, _ in counted} - {query.id for query in queries}
    for problem, ids in (("no verdict", missing), ("no query", unknown), ("two verdicts", twice)):
        if ids:
            example = sorted(ids)[0]
            raise BenchError(
                f"{system}: {problem} for {len(ids)} answers, first {example!r}; "
                "judge exactly the queries of the bench."
            )
    return {(verdict.query_id, verdict.sample): verdict.score for verdict in verdicts}


def clustered_means(
    values: np.ndarray, clusters: Sequence[str], *, num_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Means of paired values, of the sample itself and of its bootstrap resamples.

    Args:
        values: float[B, K], K quantities measured on the same rows.
        clusters: B names; rows of one name are drawn together.

    Returns:
        float64[1 + R, K]; row 0 is the sample itself. All NaN where there are no rows.
    """
    if not len(values):
        return np.full((1 + num_resamples, values.shape[1]), np.nan)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    num_clusters = int(index.max()) + 1
    sums = np.zeros((num_clusters, values.shape[1]))
    np.add.at(sums, index, values)
    counts = np.bincount(index, minlength=num_clusters)
    drawn = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), num_resamples)
    weights = np.concatenate([np.ones((1, num_clusters)), drawn])
    return (weights @ sums) / (weights @ counts)[:, None]


def interval(means: np.ndarray) -> tuple[float, float, float]:
    """(value, low, high) of bootstrap means float[1 + R]; NaN in a column stays visible as NaN."""
    low, high = np.percentile(means[1:], [2.5, 97.5])
    return float(means[0]), float(low), float(high)


def column_rng(seed: int, column: str) -> np.random.Generator:
    """The same draws for a column whatever the other columns are."""
    return np.random.default_rng((seed, zlib.crc32(column.encode())))


def column_estimates(
    queries: Sequence[Query],
    values: Mapping[Key, float],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Estimates per column and of their mean (`MEAN`), from one value per answer.

    The overall mean is the mean of the columns, not of the answers (paper section 1).
    """
    by_id = {query.id: query for query in queries}
    rows = defaultdict(list)
    for (query_id, _), value in sorted(values.items()):
        query = by_id[query_id]
        rows[column_of(query)].append((query.sentence_id, value))
    estimates, means = {}, []
    for column in columns_of(queries):
        estimates[column], column_means = _estimate(
            rows[column], column, num_resamples=num_resamples, seed=seed
        )
        means.append(column_means)
    if not means:
        raise BenchError("no query has a style dimension; the bench needs at least one column.")
    parts = list(estimates.values())
    counts = [
        sum(getattr(part, name) for part in parts)
        for name in ("num_scored", "num_failed", "num_sentences")
    ]
    estimates[MEAN] = Estimate(*interval(np.mean(means, axis=0)), *counts)
    return estimates


def _estimate(
    rows: Sequence[tuple[str, float]], name: str, *, num_resamples: int, seed: int
) -> tuple[Estimate, np.ndarray]:
    """rows: (sentence, value). Returns: their estimate and the bootstrap means float[1 + R]."""
    scored = [(sentence, value) for sentence, value in rows if not np.isnan(value)]
    sentences = [sentence for sentence, _ in scored]
    means = clustered_means(
        np.array([[value] for _, value in scored]).reshape(-1, 1),
        sentences,
        num_resamples=num_resamples,
        rng=column_rng(seed, name),
    )[:, 0]
    counts = (len(scored), len(rows) - len(scored), len(set(sentences)))
    return Estimate(*interval(means), *counts), means


def breakdown(
    queries: Sequence[Query],
    values: Mapping[Key, float],
    group_of: Callable[[Query], str],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Estimates per group (a style, a voice), by name; within a group every answer weighs the same.

    values: one per answer, NaN where the judge failed. Queries without a column are left out.
    """
    by_id = {query.id: query for query in queries if columns_of([query])}
    rows = defaultdict(list)
    for (query_id, _), value in sorted(values.items()):
        if query_id in by_id:
            query = by_id[query_id]
            rows[group_of(query)].append((query.sentence_id, value))
    return {
        group: _estimate(rows[group], group, num_resamples=num_resamples, seed=seed)[0]
        for group in sorted(rows)
    }


def swap_pairs(
    queries: Sequence[Query], responses: Sequence[Response]
) -> list[tuple[Query, Response]]:
    """Pairs each answer with a query that says the same words in the contrast style.

    The partner has the same sentence and split, the same voice where there is one, and otherwise
    the same rank among its sentence's voices, so that no voice serves as partner more than others.

    Real speech has no partner, and no pair.

    Returns:
        (query in the other style, answer), in the order of the answers that have a column.

    Raises:
        BenchError: a sentence of a dimension was never spoken in its contrast style.
    """
    by_id = {query.id: query for query in queries}
    spoken = defaultdict(list)
    for query in sorted(queries, key=lambda query: query.id):
        spoken[query.sentence_id, query.split, query.style].append(query)
    columns = columns_of(queries)
    pairs = []
    for response in responses:
        query = by_id[response.query_id]
        if column_of(query) not in columns or column_of(query) in REAL:
            continue
        others = spoken[query.sentence_id, query.split, query.contrast]
        if not others:
            raise BenchError(
                f"query {query.id!r} has no partner in style {query.contrast!r}; the style-swap "
                "gain needs both styles of every sentence."
            )
        same_voice = [other for other in others if other.voice == query.voice]
        rank = spoken[query.sentence_id, query.split, query.style].index(query)
        pairs.append(((same_voice or [others[rank % len(others)]])[0], response))
    return pairs


def swap_gains(own: Mapping[Key, float], swapped: Mapping[Key, float]) -> dict[Key, float]:
    """Style-swap gain per answer (design section 6): own score minus the score in swapped style.

    0 on average = tone-deaf. NaN where either verdict failed.

    Args:
        own: scores by (query id, sample) against the query that was answered.
        swapped: scores by the same keys against its words in the other style.
    """
    missing = set(own) - set(swapped)
    if missing:
        raise BenchError(f"{len(missing)} answers have no swapped verdict, first {min(missing)}.")
    return {key: score - swapped[key] for key, score in own.items()}
