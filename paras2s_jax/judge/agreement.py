"""How well a judge agrees with people: correlations, Krippendorff's alpha, ranking of systems.

The figures of paper section 2, table 2, with 95 % bootstrap intervals that draw sentences. Human
ratings come as a CSV with the columns of `Rating`, as the rating page exports it.
"""

import csv
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import krippendorff
import numpy as np
import scipy.stats

from paras2s_jax.data.records import Query, Verdict

RATING_COLUMNS = ("rater", "query_id", "system", "sample", "score")
SCALE = (1, 2, 3, 4, 5)
# Fewer pairs than this give no correlation worth a number.
MIN_ITEMS = 3

Item = tuple[str, str, int]  # query_id, system, sample


class RatingError(ValueError):
    """A file of human ratings does not hold what it should."""


@dataclasses.dataclass(frozen=True)
class Rating:
    """One person's score of one answer, 1 to 5."""

    rater: str
    query_id: str
    system: str
    sample: int
    score: int

    @property
    def item(self) -> Item:
        return self.query_id, self.system, self.sample


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement on one set of answers; an interval is (low, high), NaN where nothing varies.

    pearson, spearman, kendall (tau-b): of the judge's score with the mean human score. alpha:
    Krippendorff's, interval scale, with the judge as one more rater; alpha_humans: people alone.
    """

    pearson: float
    pearson_interval: tuple[float, float]
    spearman: float
    kendall: float
    alpha: float
    alpha_humans: float
    num_items: int
    num_raters: int


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Systems by mean score, best first. kendall: tau-b of their means; swaps: pairs in reverse."""

    by_judge: tuple[str, ...]
    by_humans: tuple[str, ...]
    kendall: float
    swaps: int


def read_ratings(path: str | Path) -> list[Rating]:
    """Reads a CSV with RATING_COLUMNS; others are passed over.

    Raises:
        RatingError: names the file, the line and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise RatingError(f"{path}: no such file; export it from the rating page.")
    ratings: dict[tuple[str, Item], Rating] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in RATING_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise RatingError(f"{path}: no column {', '.join(missing)} in its first line.")
        for row in reader:
            rating = _rating(row, f"{path}:{reader.line_num}")
            if (rating.rater, rating.item) in ratings:
                raise RatingError(
                    f"{path}:{reader.line_num}: {rating.rater!r} rates {rating.item} twice; "
                    "keep one of the two."
                )
            ratings[rating.rater, rating.item] = rating
    return list(ratings.values())


def _rating(row: Mapping[str, str], where: str) -> Rating:
    values = {name: (row[name] or "").strip() for name in RATING_COLUMNS}
    try:
        score, sample = int(values["score"]), int(values["sample"])
    except ValueError:
        raise RatingError(
            f"{where}: score {values['score']!r} and sample {values['sample']!r} must be whole "
            "numbers."
        ) from None
    if score not in SCALE:
        raise RatingError(f"{where}: score {score} is not one of 1 to 5.")
    return Rating(values["rater"], values["query_id"], values["system"], sample, score)


def agreement(
    verdicts: Sequence[Verdict],
    ratings: Sequence[Rating],
    cluster_of: Callable[[str], str],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Agreement over the answers that both the judge and somebody scored.

    cluster_of: query id -> sentence; answers to one sentence are drawn together.
    """
    judged = {item_of(v): v.score for v in verdicts if not math.isnan(v.score)}
    people = defaultdict(dict)
    for rating in ratings:
        if rating.item in judged:
            people[rating.item][rating.rater] = rating.score
    items = sorted(people)
    raters = sorted({rater for scores in people.values() for rater in scores})
    human = np.array([np.mean(list(people[item].values())) for item in items])
    judge = np.array([judged[item] for item in items])
    table = np.array([[people[item].get(rater, np.nan) for item in items] for rater in raters])
    resampled = _clustered_pearson(
        judge, human, [cluster_of(item[0]) for item in items], num_resamples, seed
    )
    return Agreement(
        pearson=_correlation(scipy.stats.pearsonr, judge, human),
        pearson_interval=_percentiles(resampled),
        spearman=_correlation(scipy.stats.spearmanr, judge, human),
        kendall=_correlation(scipy.stats.kendalltau, judge, human),
        alpha=_alpha(np.vstack([table, judge]) if items else table),
        alpha_humans=_alpha(table),
        num_items=len(items),
        num_raters=len(raters),
    )


def by_dimension(
    queries: Iterable[Query],
    verdicts: Sequence[Verdict],
    ratings: Sequence[Rating],
    **settings,
) -> dict[str, Agreement]:
    """Agreement per dimension and over "all", as in table 2; settings: see `agreement`."""
    dimension = {query.id: query.dimension for query in queries}
    sentence = {query.id: query.sentence_id for query in queries}
    unknown = {rating.query_id for rating in ratings} - set(dimension)
    if unknown:
        raise RatingError(
            f"{len(unknown)} rated queries are not in the bench, first {min(unknown)!r}; "
            "give the ratings of this bench."
        )
    verdicts = [verdict for verdict in verdicts if verdict.query_id in dimension]
    sets = {name: {name} for name in sorted(set(dimension.values()))}
    sets["all"] = set(dimension.values())
    return {
        name: agreement(
            [v for v in verdicts if dimension[v.query_id] in members],
            [r for r in ratings if dimension[r.query_id] in members],
            sentence.__getitem__,
            **settings,
        )
        for name, members in sets.items()
    }


def rank_systems(verdicts: Sequence[Verdict], ratings: Sequence[Rating]) -> Ranking:
    """Order of the systems by the judge and by people, on the answers that both scored."""
    judged = {item_of(v): v.score for v in verdicts if not math.isnan(v.score)}
    judge, human = defaultdict(dict), defaultdict(lambda: defaultdict(list))
    for rating in ratings:
        if rating.item in judged:
            judge[rating.system][rating.item] = judged[rating.item]
            human[rating.system][rating.item].append(rating.score)
    systems = sorted(judge)
    means_judge = [float(np.mean(list(judge[name].values()))) for name in systems]
    means_human = [
        float(np.mean([np.mean(scores) for scores in human[name].values()])) for name in systems
    ]
    swaps = sum(
        (means_judge[i] - means_judge[j]) * (means_human[i] - means_human[j]) < 0
        for i in range(len(systems))
        for j in range(i)
    )
    return Ranking(
        by_judge=_best_first(systems, means_judge),
        by_humans=_best_first(systems, means_human),
        kendall=_correlation(scipy.stats.kendalltau, means_judge, means_human, least=2),
        swaps=swaps,
    )


def item_of(verdict: Verdict) -> Item:
    """What a rating of the same answer calls it."""
    return verdict.query_id, verdict.system, verdict.sample


def _best_first(systems: Sequence[str], means: Sequence[float]) -> tuple[str, ...]:
    return tuple(name for _, name in sorted(zip(means, systems), key=lambda x: (-x[0], x[1])))


def _correlation(function: Callable, x, y, least: int = MIN_ITEMS) -> float:
    """NaN where there are too few items, or one side does not vary."""
    if len(x) < least or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(function(x, y).statistic)


def _alpha(table: np.ndarray) -> float:
    """Krippendorff's alpha of [raters, items], NaN = not rated; NaN where nobody shares an item."""
    if table.size == 0:
        return math.nan
    shared = (~np.isnan(table)).sum(axis=0) > 1
    # To hundredths: the library's work grows with the square of the number of different values.
    values = np.round(table[:, shared], 2)
    if not shared.any() or np.nanmin(values) == np.nanmax(values):
        return math.nan
    return float(krippendorff.alpha(values, level_of_measurement="interval"))


def _clustered_pearson(x, y, clusters: Sequence[str], num_resamples: int, seed: int) -> np.ndarray:
    """Pearson's r of bootstrap samples of whole clusters: float[R], NaN where one side is flat."""
    if len(x) < MIN_ITEMS:
        return np.full(num_resamples, np.nan)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(index.max()) + 1
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), num_resamples)[:, index]
    total = weights.sum(axis=1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    var_x = weights @ np.square(x) / total - np.square(mean_x)
    var_y = weights @ np.square(y) / total - np.square(mean_y)
    covariance = weights @ (x * y) / total - mean_x * mean_y
    product = var_x * var_y
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(product > 1e-18, covariance / np.sqrt(np.maximum(product, 0)), np.nan)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
