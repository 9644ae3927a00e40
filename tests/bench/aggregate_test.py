import math

import numpy as np
import pytest

from paras2s_jax.bench import aggregate
from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.data.records import Response


def test_bootstrap_of_two_clusters_by_hand():
    # Two equal clusters with means 1 and 3: a resample holds (1,1), (1,3), (3,1) or (3,3), each
    # with probability 1/4, so its mean is 1, 2, 3 with 1/4, 1/2, 1/4 and the 95 % interval is 1..3.
    values = np.array([[1.0], [1.0], [3.0], [3.0]])
    means = aggregate.clustered_means(
        values, ["x", "x", "y", "y"], num_resamples=4000, rng=np.random.default_rng(0)
    )
    assert means.shape == (4001, 1)
    assert means[0, 0] == 2.0
    shares = [(means[1:, 0] == value).mean() for value in (1.0, 2.0, 3.0)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.03)


def test_bootstrap_weighs_clusters_by_their_rows():
    # Cluster x has 3 rows of 0, y one of 4: mean 1; drawn once each the mean stays 4/4 = 1.
    means = aggregate.clustered_means(
        np.array([[0.0], [0.0], [0.0], [4.0]]),
        ["x", "x", "x", "y"],
        num_resamples=200,
        rng=np.random.default_rng(0),
    )
    assert set(np.unique(means)) == {0.0, 1.0, 4.0}


def test_interval_is_wider_clustered_than_not():
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(3.0, 1.0, 10), 8)[:, None]
    spread = []
    for clusters in (np.repeat(np.arange(10), 8).astype(str), np.arange(80).astype(str)):
        means = aggregate.clustered_means(
            values, list(clusters), num_resamples=500, rng=np.random.default_rng(0)
        )
        spread.append(np.ptp(np.percentile(means[1:], [2.5, 97.5])))
    # The ratio of the standard errors is about sqrt(8).
    assert 2.0 < spread[0] / spread[1] < 4.0


def test_overall_is_the_mean_of_columns_and_failures_are_counted(make):
    queries = [make.query("e1", "sad"), make.query("e1", "surprised"), make.query("e2", "sad")]
    queries += [make.query("a1", "child", dimension="age")]
    scores = dict(zip(((query.id, 0) for query in queries), (2.0, math.nan, 3.0, 5.0)))
    found = aggregate.column_estimates(queries, scores, num_resamples=50)
    assert list(found) == ["age", "emotion", "mean"]
    emotion = found["emotion"]
    assert (emotion.value, emotion.num_scored, emotion.num_failed) == (2.5, 2, 1)
    assert emotion.num_sentences == 2
    # (5 + 2.5) / 2, where the mean of the three answers would be 10 / 3.
    assert found["mean"].value == 3.75
    assert (found["mean"].num_scored, found["mean"].num_failed) == (3, 1)
    assert found["age"].low == found["age"].high == 5.0  # One sentence has no spread.


def test_estimates_ignore_row_order_and_repeat(make):
    rng = np.random.default_rng(0)
    queries = [make.query(f"e{n}", style) for n in range(6) for style in ("sad", "surprised")]
    scores = {(query.id, 0): float(rng.uniform(1, 5)) for query in queries}
    first = aggregate.column_estimates(queries, scores, seed=3)
    again = aggregate.column_estimates(queries[::-1], dict(reversed(scores.items())), seed=3)
    assert first == again
    assert first != aggregate.column_estimates(queries, scores, seed=4)


def test_column_without_scores_is_nan_not_dropped(make):
    queries = [make.query("e1", "sad"), make.query("a1", "child", dimension="age")]
    scores = {(queries[0].id, 0): math.nan, (queries[1].id, 0): 4.0}
    found = aggregate.column_estimates(queries, scores, num_resamples=20)
    assert math.isnan(found["emotion"].value) and found["emotion"].num_failed == 1
    assert math.isnan(found["mean"].value)


def test_real_speech_has_its_own_columns(make):
    queries = [make.query("e1", "sad"), make.query("m1", "sad", topic="meld")]
    assert aggregate.columns_of(queries) == ("emotion", "meld")


def test_neutral_queries_have_no_column(make):
    neutral = make.query("n1", "sad", topic="sky")
    neutral = type(neutral)(**(vars(neutral) | {"dimension": "neutral"}))
    assert aggregate.columns_of([neutral]) == ()
    with pytest.raises(BenchError, match="no query has a style dimension"):
        aggregate.column_estimates([neutral], {(neutral.id, 0): 3.0})


def test_breakdown_by_style_weighs_every_answer_the_same(make):
    queries = [make.query("e1", "sad"), make.query("e2", "sad"), make.query("e1", "surprised")]
    queries.append(make.query("a1", "child", dimension="age"))
    scores = dict(zip(((query.id, 0) for query in queries), (2.0, 4.0, math.nan, 5.0)))
    found = aggregate.breakdown(queries, scores, lambda query: query.style, num_resamples=50)
    assert list(found) == ["child", "sad", "surprised"]
    assert (found["sad"].value, found["sad"].num_scored, found["sad"].num_sentences) == (3.0, 2, 2)
    assert math.isnan(found["surprised"].value) and found["surprised"].num_failed == 1


def test_swap_pairs_prefer_the_same_voice(make):
    queries = [
        make.query("e1", style, voice=voice)
        for style in ("sad", "surprised")
        for voice in ("v1", "v2")
    ]
    answers = [Response(query.id, "a", 0, "", "x.wav") for query in queries]
    pairs = aggregate.swap_pairs(queries, answers)
    assert [answer for _, answer in pairs] == answers
    for query, (heard, _) in zip(queries, pairs):
        assert (heard.style, heard.voice) == (query.contrast, query.voice)


def test_swap_pairs_spread_over_other_voices(make):
    # No voice speaks both styles, so the first voice of one style meets the first of the other.
    queries = [make.query("e1", "sad", voice=voice) for voice in ("m1", "m2")]
    queries += [make.query("e1", "surprised", voice=voice) for voice in ("f1", "f2", "f3")]
    answers = [Response(query.id, "a", 0, "", "x.wav") for query in queries]
    heard = [query.voice for query, _ in aggregate.swap_pairs(queries, answers)]
    assert heard == ["f1", "f2", "m1", "m2", "m1"]


def test_swap_pairs_need_both_styles(make):
    lonely = make.query("e1", "sad")
    with pytest.raises(BenchError, match="no partner in style 'surprised'"):
        aggregate.swap_pairs([lonely], [Response(lonely.id, "a", 0, "", "x.wav")])


def test_swap_gain_of_a_deaf_and_of_a_listening_system(make):
    queries = [make.query(f"e{n}", style) for n in range(4) for style in ("sad", "surprised")]
    keys = [(query.id, 0) for query in queries]
    own = dict.fromkeys(keys, 3.0)
    deaf = aggregate.column_estimates(queries, aggregate.swap_gains(own, own))["mean"]
    assert (deaf.value, deaf.low, deaf.high) == (0.0, 0.0, 0.0)
    swapped = dict.fromkeys(keys, 1.0) | {keys[0]: math.nan}
    gain = aggregate.column_estimates(queries, aggregate.swap_gains(own, swapped))["mean"]
    assert (gain.value, gain.num_scored, gain.num_failed) == (2.0, 7, 1)
    with pytest.raises(BenchError, match="1 answers have no swapped verdict"):
        aggregate.swap_gains(own, dict(list(swapped.items())[1:]))


def test_scores_must_match_the_queries(make):
    queries = [make.query("e1", "sad"), make.query("e1", "surprised")]
    verdicts = [make.verdict(query.id, 3.0) for query in queries]
    assert aggregate.scores_of(queries, verdicts, "a") == {(q.id, 0): 3.0 for q in queries}
    with pytest.raises(BenchError, match="a: no verdict for 1 answers, first 'e1-surprised-v1'"):
        aggregate.scores_of(queries, verdicts[:1], "a")
    with pytest.raises(BenchError, match="no query for 1"):
        aggregate.scores_of(queries[:1], verdicts, "a")
    with pytest.raises(BenchError, match="two verdicts"):
        aggregate.scores_of(queries, [*verdicts, verdicts[0]], "a")
