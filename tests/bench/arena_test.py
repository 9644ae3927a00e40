import math

import numpy as np
import pytest

from paras2s_jax.bench import arena
from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.bench.arena import Vote
from paras2s_jax.judge.agreement import Rating


def both_orders(query_id, a, b, winner):
    """Votes of a judge that does not care who comes first."""
    return [
        Vote(query_id, a, b, "first" if winner == a else "second", "j"),
        Vote(query_id, b, a, "first" if winner == b else "second", "j"),
    ]


def test_two_systems_by_hand(make):
    # a wins 3 games of 4. With a drawn game of each against 0 and r_a = -r_b = r:
    # 3 (1 - s(2r)) - 1 s(2r) + ... = 0, i.e. 4 s(2r) - 3 + s(r) - 1/2 = 0, s the logistic function.
    queries = [make.query(f"e{n}", "sad") for n in range(4)]
    votes = [
        vote for n, q in enumerate(queries) for vote in both_orders(q.id, "a", "b", "ab"[n == 3])
    ]
    found = arena.rate(votes, queries, num_resamples=20)
    r = (found.ratings[0].rating - 1000) / arena.SCALE
    s = lambda x: 1 / (1 + math.exp(-x))
    assert 4 * s(2 * r) - 3 + s(r) - 0.5 == pytest.approx(0.0, abs=1e-4)
    assert [row.system for row in found.ratings] == ["a", "b"]
    assert found.ratings[0].rating + found.ratings[1].rating == pytest.approx(2000)
    assert found.wins == {("a", "b"): 0.75, ("b", "a"): 0.25}
    assert (found.flip_rate, found.first_share) == (0.0, 0.5)


def test_a_comparator_that_likes_the_first_earns_nothing(make):
    queries = [make.query(f"e{n}", "sad") for n in range(5)]
    votes = [Vote(q.id, *pair, "first", "j") for q in queries for pair in (("a", "b"), ("b", "a"))]
    found = arena.rate(votes, queries, num_resamples=20)
    assert [row.rating for row in found.ratings] == pytest.approx([1000, 1000], abs=1e-3)
    assert (found.flip_rate, found.first_share) == (1.0, 1.0)


def test_ratings_recover_known_strengths(make):
    rng = np.random.default_rng(0)
    strength = {"a": 1.0, "b": 0.2, "c": -1.2}
    queries = [make.query(f"e{n}", "sad") for n in range(600)]
    votes = []
    for query in queries:
        for a, b in (("a", "b"), ("b", "c"), ("a", "c")):
            chance = 1 / (1 + math.exp(strength[b] - strength[a]))
            votes += both_orders(query.id, a, b, a if rng.random() < chance else b)
    found = arena.rate(votes, queries, num_resamples=100)
    for row in found.ratings:
        true = 1000 + arena.SCALE * strength[row.system]
        assert row.rating == pytest.approx(true, abs=30)
        assert row.low < true < row.high


def test_a_system_that_never_loses_has_a_finite_rating(make):
    query = make.query("e1", "sad")
    found = arena.rate(both_orders(query.id, "a", "b", "a"), [query], num_resamples=5)
    assert 1000 < found.ratings[0].rating < 1400


def test_votes_follow_scores_and_leave_out_failures(make):
    rows = [("q1", "a", 4.0), ("q1", "b", 3.0), ("q2", "a", 3.0), ("q2", "b", math.nan)]
    verdicts = [make.verdict(query_id, score, system=system) for query_id, system, score in rows]
    votes = arena.votes_from_scores(verdicts)
    assert [(v.query_id, v.first, v.winner) for v in votes] == [
        ("q1", "a", "first"),
        ("q1", "b", "second"),
    ]
    assert {v.winner for v in arena.votes_from_scores(verdicts, margin=1.0)} == {"tie"}


def test_people_vote_by_their_own_ratings():
    given = [("ann", "a", 4), ("ann", "b", 2), ("bob", "a", 3), ("bob", "b", 3), ("cy", "a", 1)]
    votes = arena.votes_from_ratings([Rating(who, "q", s, 0, score) for who, s, score in given])
    # Ann prefers a, in both orders; Bob neither; Cy rated one of the two.
    assert [(v.judge, v.first, v.winner) for v in votes] == [
        ("ann", "a", "first"),
        ("ann", "b", "second"),
        ("bob", "a", "tie"),
        ("bob", "b", "tie"),
    ]


def test_impossible_arenas_are_refused(make):
    query = make.query("e1", "sad")
    with pytest.raises(BenchError, match="no votes"):
        arena.rate([], [query])
    with pytest.raises(BenchError, match="not in the bench"):
        arena.rate([Vote("zz", "a", "b", "tie", "j")], [query])
    with pytest.raises(BenchError, match="'a' meets itself"):
        arena.rate([Vote(query.id, "a", "a", "tie", "j")], [query])
    votes = [Vote(query.id, "a", "b", "tie", "j"), Vote(query.id, "c", "d", "tie", "j")]
    with pytest.raises(BenchError, match="no game connects 'c' with 'a'"):
        arena.rate(votes, [query])
