import dataclasses
import math

import numpy as np
import pytest

from paras2s_jax.data.records import Query, Verdict
from paras2s_jax.judge import agreement
from paras2s_jax.judge.agreement import Rating, RatingError


def verdict(query_id, score, system="a", sample=0):
    status = "score: refused" if math.isnan(score) else "ok"
    return Verdict(
        query_id, system, sample, score, status, "", "sad", "label", "", "", None, None, "j", {}
    )


def query(query_id, dimension="emotion"):
    return Query(
        query_id, f"s-{query_id}", dimension, "", "sad", "surprised", "", "test", "v", "", 1.0
    )


def single(query_id):
    return query_id


def rate(query_id, score, rater="r1", system="a", sample=0):
    return Rating(rater, query_id, system, sample, score)


def test_correlations_by_hand():
    # Judge 1 2 3 4, people 1 3 2 4: r = rho = 0.8; of 6 pairs 5 agree, 1 does not: tau = 4/6.
    verdicts = [verdict(f"q{n}", score) for n, score in enumerate((1.0, 2.0, 3.0, 4.0))]
    ratings = [rate(f"q{n}", score) for n, score in enumerate((1, 3, 2, 4))]
    found = agreement.agreement(verdicts, ratings, single, num_resamples=50)
    assert found.pearson == pytest.approx(0.8)
    assert found.spearman == pytest.approx(0.8)
    assert found.kendall == pytest.approx(4 / 6)
    assert (found.num_items, found.num_raters) == (4, 1)
    assert math.isnan(found.alpha_humans)  # One person agrees with nobody.


def test_alpha_by_hand():
    # Two raters, interval scale, no missing: alpha = 1 - (n - 1) * sum_units d^2 / sum_pairs d^2.
    # r1: 1 2 4, r2: 1 3 4. Observed: 2 * (0 + 1 + 0) / 6 = 1/3. Expected over the six values
    # 1 1 2 3 4 4 : sum over ordered pairs d^2 / 30; unordered sum = 0+1+4+9+9 +1+4+9+9 +1+4+4
    # +1+1 +0 = 57, ordered 114 / 30 = 3.8. alpha = 1 - (1/3) / 3.8.
    table = [("r1", (1, 2, 4)), ("r2", (1, 3, 4))]
    ratings = [rate(f"q{n}", s, rater) for rater, row in table for n, s in enumerate(row)]
    verdicts = [verdict(f"q{n}", score) for n, score in enumerate((1.0, 2.5, 4.0))]
    found = agreement.agreement(verdicts, ratings, single, num_resamples=20)
    assert found.alpha_humans == pytest.approx(1 - (1 / 3) / 3.8)


def test_failed_verdicts_and_unrated_answers_are_left_out():
    verdicts = [verdict("q0", math.nan), verdict("q1", 3.0), verdict("q2", 4.0), verdict("q3", 5.0)]
    ratings = [rate("q0", 1), rate("q1", 2), rate("q2", 4), rate("q9", 5)]
    found = agreement.agreement(verdicts, ratings, single, num_resamples=20)
    assert found.num_items == 2 and math.isnan(found.pearson)


def simulated(rng, r, num=400, raters=3):
    """Judge and people see the same quality through noise; their correlation is about r."""
    verdicts, ratings = [], []
    for n in range(num):
        quality = rng.normal()
        judge = np.sqrt(r) * quality + np.sqrt(1 - r) * rng.normal()
        verdicts.append(verdict(f"q{n}", round(3 + 0.5 * judge, 1)))
        person = np.sqrt(r) * quality + np.sqrt(1 - r) * rng.normal()
        for rater in range(raters):
            # Whole numbers of a wide spread, so that rounding costs little.
            ratings.append(rate(f"q{n}", int(np.clip(round(3 + person), 1, 5)), f"r{rater}"))
    return verdicts, ratings


@pytest.mark.parametrize("r", [0.0, 0.4, 0.8])
def test_interval_holds_the_correlation_of_synthetic_people(r):
    rng = np.random.default_rng(11)
    covered = 0
    for repeat in range(40):
        verdicts, ratings = simulated(rng, r)
        found = agreement.agreement(verdicts, ratings, single, num_resamples=200, seed=repeat)
        low, high = found.pearson_interval
        # Rounding to five steps costs a few hundredths of the correlation.
        covered += low - 0.02 <= r <= high + 0.06
        assert found.pearson == pytest.approx(r, abs=0.2)
    # 95 % of 40, less four standard errors.
    assert covered >= 33


def test_interval_counts_sentences_not_answers():
    rng = np.random.default_rng(0)
    verdicts, ratings = simulated(rng, 0.5, num=40)
    copies = [dataclasses.replace(v, sample=s) for v in verdicts for s in range(6)]
    copied = [dataclasses.replace(x, sample=s) for x in ratings for s in range(6)]
    once = agreement.agreement(verdicts, ratings, single, seed=1)
    many = agreement.agreement(copies, copied, single, seed=1)
    assert many.num_items == 6 * once.num_items
    np.testing.assert_allclose(many.pearson_interval, once.pearson_interval, atol=1e-9)


def test_by_dimension_and_strangers():
    queries = [query(f"e{n}") for n in range(3)] + [query(f"a{n}", "age") for n in range(3)]
    verdicts = [verdict(q.id, 1.0 + n) for n, q in enumerate(queries)]
    ratings = [rate(q.id, 1 + n % 3) for n, q in enumerate(queries)]
    found = agreement.by_dimension(queries, verdicts, ratings, num_resamples=20)
    assert list(found) == ["age", "emotion", "all"]
    assert found["age"].pearson == pytest.approx(1.0)
    assert found["all"].num_items == 6 and found["all"].pearson < 1.0
    with pytest.raises(RatingError, match="1 rated queries are not in the bench, first 'zz'"):
        agreement.by_dimension(queries, verdicts, [*ratings, rate("zz", 1)])


def test_ranking_counts_swapped_pairs():
    scores = {"a": (5.0, 4), "b": (4.0, 5), "c": (1.0, 1)}
    verdicts = [verdict("q0", judge, system) for system, (judge, _) in scores.items()]
    ratings = [rate("q0", human, system=system) for system, (_, human) in scores.items()]
    found = agreement.rank_systems(verdicts, ratings)
    assert (found.by_judge, found.by_humans) == (("a", "b", "c"), ("b", "a", "c"))
    assert found.swaps == 1 and found.kendall == pytest.approx(1 / 3)


def test_ratings_from_csv(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("rater,query_id,system,sample,score,comment\nr1,q0,a,0,4,fine\n")
    assert agreement.read_ratings(path) == [rate("q0", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rater,query_id,system,sample\n", "no column score"),
        ("rater,query_id,system,sample,score\nr1,q0,a,0,6\n", ":2: score 6 is not one of 1 to 5"),
        ("rater,query_id,system,sample,score\nr1,q0,a,0,\n", ":2: score ''"),
        ("rater,query_id,system,sample,score\nr1,q0,a,0,4\nr1,q0,a,0,5\n", ":3: 'r1' rates"),
    ],
)
def test_broken_ratings_are_refused(tmp_path, text, message):
    path = tmp_path / "ratings.csv"
    path.write_text(text)
    with pytest.raises(RatingError, match=message):
        agreement.read_ratings(path)


def test_missing_ratings_are_refused(tmp_path):
    with pytest.raises(RatingError, match="no such file"):
        agreement.read_ratings(tmp_path / "none.csv")
