"""Arena: answers of two systems to one query, compared in both orders -> Bradley-Terry ratings.

As S2S-Arena does, by a judge or by people. A comparator that only likes what comes first earns
nothing: its two verdicts on a pair cancel out to a tie.
"""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import scipy.optimize

from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.data.records import Query, Verdict
from paras2s_jax.judge.agreement import Rating

Winner = Literal["first", "second", "tie"]
# Elo's scale: 400 points are odds of 10 to 1; the mean of the systems is put at 1000.
SCALE, CENTRE = 400.0 / math.log(10.0), 1000.0
# One drawn game of every system against an average one: ratings stay finite where a system never
# loses (a weak Gaussian-like prior; Caron & Doucet, arXiv 1011.1761, sec. 2).
PRIOR_GAMES = 1.0


@dataclasses.dataclass(frozen=True)
class Vote:
    """Who won one comparison: the system heard first, the one heard second, or neither.

    judge: a judge's name, or a person's.
    """

    query_id: str
    first: str
    second: str
    winner: Winner
    judge: str


@dataclasses.dataclass(frozen=True)
class RatingEstimate:
    """A system's rating with its 95 % interval (bootstrap over sentences)."""

    system: str
    rating: float
    low: float
    high: float
    games: float


@dataclasses.dataclass(frozen=True)
class ArenaResult:
    """ratings: best first. wins: share won by row against column, ties counting half.

    flip_rate: share of pairs, seen in both orders, whose winner changed with the order.
    first_share: share of decided votes that the system heard first won; 0.5 without a bias.
    """

    ratings: tuple[RatingEstimate, ...]
    wins: dict[tuple[str, str], float]
    flip_rate: float
    first_share: float
    num_votes: int


def votes_from_scores(
    verdicts: Sequence[Verdict], pairs: Iterable[tuple[str, str]] = (), margin: float = 0.0
) -> list[Vote]:
    """Votes that scores imply, in both orders: the higher one wins, a tie within `margin`.

    verdicts: of all systems; samples of an answer are averaged, failed ones left out.
    pairs: of systems; by default all.
    """
    rows = [(v.judge, v.query_id, v.system, v.score) for v in verdicts]
    return _votes(rows, pairs, margin)


def votes_from_ratings(
    ratings: Sequence[Rating], pairs: Iterable[tuple[str, str]] = (), margin: float = 0.0
) -> list[Vote]:
    """As `votes_from_scores`, of people: each compares what he or she rated of one query."""
    rows = [(r.rater, r.query_id, r.system, float(r.score)) for r in ratings]
    return _votes(rows, pairs, margin)


def votes_from_shares(outcomes: Iterable[tuple[str, str, str, float]], judge: str) -> list[Vote]:
    """Votes of a comparer. outcomes: (query, first, second, share of the first: 1, 0.5 or 0)."""
    return [
        Vote(query_id, first, second, _winner(share - 0.5, 0.0), judge)
        for query_id, first, second, share in outcomes
    ]


def _votes(
    rows: Sequence[tuple[str, str, str, float]], pairs: Iterable[tuple[str, str]], margin: float
) -> list[Vote]:
    """rows: (judge, query, system, score)."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for judge, query_id, system, score in rows:
        if not math.isnan(score):
            found[query_id, judge][system].append(score)
    systems = sorted({system for _, _, system, _ in rows})
    pairs = list(pairs) or list(itertools.combinations(systems, 2))
    votes = []
    for (query_id, judge), by_system in sorted(found.items()):
        means = {system: float(np.mean(scores)) for system, scores in by_system.items()}
        for a, b in pairs:
            if a in means and b in means:
                for first, second in ((a, b), (b, a)):
                    winner = _winner(means[first] - means[second], margin)
                    votes.append(Vote(query_id, first, second, winner, judge))
    return votes


def _winner(gain: float, margin: float) -> Winner:
    if abs(gain) <= margin:
        return "tie"
    return "first" if gain > 0 else "second"


def rate(
    votes: Sequence[Vote],
    queries: Sequence[Query],
    *,
    num_resamples: int = 500,
    seed: int = 0,
) -> ArenaResult:
    """Bradley-Terry ratings of all systems that were voted on.

    Both orders of a pair are one game: two equal verdicts decide it, two that differ draw it.

    Raises:
        BenchError: there are no votes, a vote on an unknown query or of a system with itself, or
            systems that no chain of games connects.
    """
    sentence = {query.id: query.sentence_id for query in queries}
    _check(votes, sentence)
    systems = sorted({name for vote in votes for name in (vote.first, vote.second)})
    games = _games(votes)
    index = {name: i for i, name in enumerate(systems)}
    clusters = sorted({sentence[query_id] for query_id, *_ in games})
    place = {name: i for i, name in enumerate(clusters)}
    # [S, N, N]: points of row against column in the games about each sentence.
    points = np.zeros((len(clusters), len(systems), len(systems)))
    for (query_id, a, b, _), share in games.items():
        at = place[sentence[query_id]]
        points[at, index[a], index[b]] += share
        points[at, index[b], index[a]] += 1.0 - share
    total = points.sum(axis=0)
    _check_connected(total, systems)
    rng = np.random.default_rng(seed)
    count = len(clusters)
    drawn = rng.multinomial(count, np.full(count, 1 / count), num_resamples)
    samples = np.array([_fit(np.tensordot(weights, points, axes=1)) for weights in drawn])
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    ratings = _fit(total)
    played = total + total.T
    estimates = [
        RatingEstimate(name, *map(float, (ratings[i], low[i], high[i], played[i].sum())))
        for i, name in enumerate(systems)
    ]
    return ArenaResult(
        ratings=tuple(sorted(estimates, key=lambda row: (-row.rating, row.system))),
        wins={
            (a, b): float(total[index[a], index[b]] / played[index[a], index[b]])
            for a, b in itertools.permutations(systems, 2)
            if played[index[a], index[b]]
        },
        flip_rate=_flip_rate(votes),
        first_share=_first_share(votes),
        num_votes=len(votes),
    )


def _check(votes: Sequence[Vote], sentence: Mapping[str, str]) -> None:
    if not votes:
        raise BenchError("the arena has no votes; compare at least two systems.")
    for vote in votes:
        if vote.query_id not in sentence:
            raise BenchError(f"a vote is about query {vote.query_id!r}, which is not in the bench.")
        if vote.first == vote.second:
            raise BenchError(f"query {vote.query_id!r}: {vote.first!r} meets itself.")


def _games(votes: Sequence[Vote]) -> dict[tuple[str, str, str, str], float]:
    """(query, a, b, judge), a < b -> share of a: the mean over this judge's votes on the pair."""
    shares = defaultdict(list)
    for vote in votes:
        share = {"first": 1.0, "second": 0.0, "tie": 0.5}[vote.winner]
        a, b = sorted((vote.first, vote.second))
        share = share if vote.first == a else 1.0 - share
        shares[vote.query_id, a, b, vote.judge].append(share)
    return {game: float(np.mean(part)) for game, part in shares.items()}


def _check_connected(total: np.ndarray, systems: Sequence[str]) -> None:
    """A rating compares only systems that met, directly or through others."""
    met, reached, todo = (total + total.T) > 0, {0}, [0]
    while todo:
        for other in np.flatnonzero(met[todo.pop()]):
            if other not in reached:
                reached.add(int(other))
                todo.append(int(other))
    apart = [name for i, name in enumerate(systems) if i not in reached]
    if apart:
        raise BenchError(
            f"no game connects {apart[0]!r} with {systems[0]!r}; let them meet, or rate them apart."
        )


def _fit(points: np.ndarray) -> np.ndarray:
    """Maximum-likelihood ratings of points[i, j] won by i against j (Bradley & Terry 1952).

    P(i beats j) = 1 / (1 + exp(r_j - r_i)), each system with PRIOR_GAMES drawn against 0.
    """
    played = points + points.T

    def loss(r):
        gap = r[:, None] - r[None]
        value = (points * np.logaddexp(0.0, -gap)).sum()
        prior = 0.5 * PRIOR_GAMES * (np.logaddexp(0.0, -r) + np.logaddexp(0.0, r)).sum()
        chance = 1.0 / (1.0 + np.exp(-gap))
        slope = (played * chance - points).sum(axis=1)
        return value + prior, slope + PRIOR_GAMES * (1.0 / (1.0 + np.exp(-r)) - 0.5)

    found = scipy.optimize.minimize(loss, np.zeros(len(points)), jac=True, method="L-BFGS-B").x
    return CENTRE + SCALE * (found - found.mean())


def _flip_rate(votes: Sequence[Vote]) -> float:
    """NaN where no pair was seen in both orders."""
    winners = defaultdict(dict)
    for vote in votes:
        name = {"first": vote.first, "second": vote.second, "tie": ""}[vote.winner]
        a, b = sorted((vote.first, vote.second))
        winners[vote.query_id, a, b, vote.judge][vote.first] = name
    both = [found for found in winners.values() if len(found) == 2]
    return float(np.mean([len(set(found.values())) > 1 for found in both])) if both else math.nan


def _first_share(votes: Sequence[Vote]) -> float:
    decided = [vote.winner == "first" for vote in votes if vote.winner != "tie"]
    return float(np.mean(decided)) if decided else math.nan
