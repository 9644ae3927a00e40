"""One system against another on the same queries: gain, effect size, p-value, power.

Sentences are what varies independently (see bench.aggregate), so they are what the bootstrap
draws, what the test flips, and what the effect size counts.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from paras2s_jax.bench.aggregate import (
    Key,
    clustered_means,
    column_of,
    column_rng,
    columns_of,
    interval,
)
from paras2s_jax.data.records import Query

# The usual promises of a test: 5 % false alarms, two-sided, and 80 % of real differences found.
ALPHA, POWER = 0.05, 0.8


@dataclasses.dataclass(frozen=True)
class Comparison:
    """System a against system b on the same queries.

    rel, low, high: mean_a / mean_b - 1 with its 95 % interval. diff, diff_low, diff_high: mean_a -
    mean_b, in points of the scale. effect_size: diff in units of the spread between sentences
    (Cohen's d of the sentences' paired differences, within columns). p_value: two-sided, of the
    sign-flip test. min_detectable: the difference in points that a bench of this size finds with
    probability POWER. num_queries were scored for both systems; num_unpaired were not and are left
    out of both means.
    """

    a: str
    b: str
    rel: float
    low: float
    high: float
    diff: float
    diff_low: float
    diff_high: float
    effect_size: float
    p_value: float
    min_detectable: float
    mean_a: float
    mean_b: float
    num_queries: int
    num_unpaired: int


def compare(
    queries: Sequence[Query],
    scores_a: Mapping[Key, float],
    scores_b: Mapping[Key, float],
    *,
    names: tuple[str, str],
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compares a with b on the queries that both have a score for.

    Samples of a query are averaged first, so systems with different numbers of samples compare.
    The same resampled sentences serve both systems: the intervals are those of the paired gain.
    Means are means of columns, as in the tables.
    """
    rows, num_unpaired = _paired_rows(queries, scores_a, scores_b)
    settings = {"num_resamples": num_resamples, "seed": seed}
    means = np.mean([_column_means(name, part, **settings) for name, part in rows.items()], axis=0)
    rel, low, high = interval(means[:, 0] / means[:, 1] - 1.0)
    differences = means[:, 0] - means[:, 1]
    diff, diff_low, diff_high = interval(differences)
    by_sentence = {name: _sentence_differences(part) for name, part in rows.items()}
    return Comparison(
        *names,
        rel,
        low,
        high,
        diff,
        diff_low,
        diff_high,
        effect_size=_effect_size(diff, by_sentence),
        p_value=sign_flip_p_value(by_sentence, num_flips=num_resamples, seed=seed),
        min_detectable=min_detectable(float(np.std(differences[1:]))),
        mean_a=float(means[0, 0]),
        mean_b=float(means[0, 1]),
        num_queries=sum(len(part) for part in rows.values()),
        num_unpaired=num_unpaired,
    )


def min_detectable(standard_error: float, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The true difference that a two-sided test at `alpha` finds with probability `power`.

    (z(1 - alpha / 2) + z(power)) standard errors, for a mean that is about normal.
    """
    normal = NormalDist()
    return (normal.inv_cdf(1.0 - alpha / 2.0) + normal.inv_cdf(power)) * standard_error


def sentences_needed(comparison: Comparison, difference: float, num_sentences: int) -> int:
    """Sentences that a bench needs to find `difference` with probability POWER.

    comparison: of two systems on `num_sentences` sentences; the standard error falls with the root
    of their number.
    """
    if difference <= 0:
        raise ValueError(f"the difference to detect is {difference}; it must be above 0.")
    return int(np.ceil(num_sentences * (comparison.min_detectable / difference) ** 2))


def sign_flip_p_value(
    by_sentence: Mapping[str, tuple[np.ndarray, np.ndarray]], *, num_flips: int, seed: int
) -> float:
    """Two-sided p-value of "no difference", by flipping the sign of whole sentences.

    Where two systems do not differ, a sentence's differences are as likely with either sign.
    Holds the false alarms at the level asked for however few or skewed the scores are (Fisher's
    randomisation test; one is added to both counts, so that p is never 0).

    by_sentence: column -> (sums float[S] of its sentences' differences, counts int[S] of queries).
    """
    parts = [(sums, counts) for sums, counts in by_sentence.values() if len(sums)]
    if not parts:
        return float("nan")
    rng = np.random.default_rng((seed, num_flips))
    flipped = np.zeros(1 + num_flips)
    for sums, counts in parts:
        signs = rng.choice((-1.0, 1.0), (num_flips, len(sums)))
        signs = np.concatenate([np.ones((1, len(sums))), signs])
        flipped += (signs @ sums) / counts.sum()
    # A hair of tolerance: flips that only reorder a sum count as equal.
    extreme = np.abs(flipped[1:]) >= np.abs(flipped[0]) - 1e-12
    return float((1 + extreme.sum()) / (1 + num_flips))


def _paired_rows(
    queries: Sequence[Query], scores_a: Mapping[Key, float], scores_b: Mapping[Key, float]
) -> tuple[dict[str, list[tuple[str, float, float]]], int]:
    """Column -> (sentence, mean of a, mean of b) of its queries; and how many have no pair."""
    means_a, means_b = _query_means(scores_a), _query_means(scores_b)
    columns = columns_of(queries)
    rows: dict[str, list] = {column: [] for column in columns}
    num_unpaired = 0
    for query in queries:
        if column_of(query) not in columns:
            continue
        pair = (means_a.get(query.id, np.nan), means_b.get(query.id, np.nan))
        if np.isnan(pair).any():
            num_unpaired += 1
        else:
            rows[column_of(query)].append((query.sentence_id, *pair))
    return rows, num_unpaired


def _column_means(column: str, rows: Sequence[tuple], *, num_resamples: int, seed: int):
    return clustered_means(
        np.array([row[1:] for row in rows]).reshape(-1, 2),
        [row[0] for row in rows],
        num_resamples=num_resamples,
        rng=column_rng(seed, column),
    )


def _sentence_differences(rows: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of a - b and number of queries per sentence, by name of the sentence."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for sentence, a, b in rows:
        sums[sentence] += a - b
        counts[sentence] += 1
    names = sorted(sums)
    return np.array([sums[name] for name in names]), np.array([counts[name] for name in names])


def _effect_size(diff: float, by_sentence: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """NaN where no column has two sentences, or where they do not vary."""
    spread = [sums / counts for sums, counts in by_sentence.values() if len(sums) > 1]
    freedom = sum(len(part) - 1 for part in spread)
    squares = sum(float(np.square(part - part.mean()).sum()) for part in spread)
    return diff / np.sqrt(squares / freedom) if squares > 1e-18 else float("nan")


def _query_means(scores: Mapping[Key, float]) -> dict[str, float]:
    """Mean over the scored samples of each query; queries without a score are absent."""
    found = defaultdict(list)
    for (query_id, _), score in scores.items():
        if not np.isnan(score):
            found[query_id].append(score)
    return {query_id: float(np.mean(part)) for query_id, part in found.items()}
