import math

import numpy as np
import pytest

from paras2s_jax.bench import aggregate, comparison


def test_compare_of_proportional_scores_is_exact(make):
    queries = [make.query(f"e{n}", style) for n in range(5) for style in ("sad", "surprised")]
    b = {(query.id, 0): 1.0 + 0.3 * n for n, query in enumerate(queries)}
    # Every a is 1.25 times its b: whatever sentences are drawn, the gain is 25 %.
    a = {key: 1.25 * score for key, score in b.items()}
    found = comparison.compare(queries, a, b, names=("a", "b"))
    np.testing.assert_allclose([found.rel, found.low, found.high], 0.25, atol=1e-12)
    assert (found.num_queries, found.num_unpaired) == (10, 0)
    # Scores of b: 1.0, 1.3, …, 3.7, mean 2.35; a quarter of it is the difference.
    assert found.diff == pytest.approx(0.5875)


def test_compare_leaves_out_unpaired_and_averages_samples(make):
    queries = [make.query("e1", "sad"), make.query("e1", "surprised"), make.query("e2", "sad")]
    ids = [query.id for query in queries]
    a = {(ids[0], 0): 4.0, (ids[1], 0): 5.0, (ids[2], 0): math.nan}
    b = {(ids[0], 0): 2.0, (ids[0], 1): 4.0, (ids[1], 0): 3.0, (ids[2], 0): 1.0}
    found = comparison.compare(queries, a, b, names=("a", "b"), num_resamples=20)
    # a: (4 + 5) / 2 = 4.5; b: ((2 + 4) / 2 + 3) / 2 = 3.
    assert (found.mean_a, found.mean_b, found.rel) == (4.5, 3.0, 0.5)
    assert (found.num_queries, found.num_unpaired) == (2, 1)


def test_paired_interval_is_narrower_than_unpaired_spread(make):
    rng = np.random.default_rng(0)
    queries = [make.query(f"e{n}", "sad") for n in range(30)]
    hard = rng.uniform(1, 4, len(queries))
    b = {(query.id, 0): float(base) for query, base in zip(queries, hard)}
    a = {(query.id, 0): float(base + 0.3) for query, base in zip(queries, hard)}
    found = comparison.compare(queries, a, b, names=("a", "b"))
    own = aggregate.column_estimates(queries, b)["mean"]
    assert found.low > 0
    assert (found.high - found.low) < 0.5 * (own.high - own.low) / own.value


def test_p_value_of_all_flips_by_hand():
    # Three sentences, differences 1, 2, 3: of the 8 sign patterns only +++ and --- are as extreme.
    sums, counts = np.array([1.0, 2.0, 3.0]), np.array([1, 1, 1])
    p = comparison.sign_flip_p_value({"x": (sums, counts)}, num_flips=40_000, seed=0)
    assert p == pytest.approx(0.25, abs=0.01)


def test_p_value_without_any_difference_is_one():
    zero = (np.zeros(5), np.ones(5, int))
    assert comparison.sign_flip_p_value({"x": zero}, num_flips=99, seed=0) == 1.0
    assert math.isnan(comparison.sign_flip_p_value({}, num_flips=99, seed=0))


def test_effect_size_by_hand(make):
    # Sentence differences 1, 2, 3: mean 2, standard deviation 1.
    queries = [make.query(f"e{n}", style) for n in range(3) for style in ("sad", "surprised")]
    b = {(query.id, 0): 1.0 for query in queries}
    a = {(query.id, 0): 2.0 + int(query.sentence_id[1:]) for query in queries}
    found = comparison.compare(queries, a, b, names=("a", "b"), num_resamples=50)
    assert found.effect_size == pytest.approx(2.0)
    assert found.diff == pytest.approx(2.0)


def test_effect_size_of_a_constant_gain_is_undefined(make):
    queries = [make.query(f"e{n}", "sad") for n in range(3)]
    b = {(query.id, 0): 1.0 for query in queries}
    found = comparison.compare(
        queries, dict.fromkeys(b, 2.0), b, names=("a", "b"), num_resamples=20
    )
    assert math.isnan(found.effect_size) and found.min_detectable == 0.0


def simulate(rng, num_sentences, effect):
    """Paired scores of one column: sentences vary, and so do the two systems on each."""
    hard = rng.normal(3.0, 0.7, num_sentences)
    sums = np.zeros(num_sentences)
    for _ in range(2):  # Two styles a sentence, whose differences go together.
        a = hard + effect + rng.normal(0, 0.5, num_sentences)
        sums += a - (hard + rng.normal(0, 0.5, num_sentences))
    shared = rng.normal(0, 0.4, num_sentences)
    return {"x": (sums + 2 * shared, np.full(num_sentences, 2))}


def rejections(effect, num_sentences=30, repeats=1000):
    rng = np.random.default_rng(7)
    found = [
        comparison.sign_flip_p_value(
            simulate(rng, num_sentences, effect), num_flips=199, seed=repeat
        )
        for repeat in range(repeats)
    ]
    return np.mean(np.array(found) <= comparison.ALPHA)


def test_false_alarms_stay_at_five_percent():
    # 1000 comparisons without a difference: 5 % +- three standard errors (0.7 % each).
    assert abs(rejections(0.0) - 0.05) < 0.021


def test_power_at_the_detectable_difference_is_as_stated():
    # A sentence's mean difference has variance (0.5^2 + 0.5^2) / 2 + 0.4^2 = 0.41.
    effect = comparison.min_detectable(math.sqrt(0.41 / 30))
    assert abs(rejections(effect) - comparison.POWER) < 0.04


def test_detectable_difference_shrinks_with_the_root_of_the_sentences(make):
    rng = np.random.default_rng(3)
    found = {}
    for num in (20, 80):
        queries = [make.query(f"e{n}", "sad") for n in range(num)]
        b = {(query.id, 0): float(rng.normal(3, 1)) for query in queries}
        a = {key: score + float(rng.normal(0, 0.5)) for key, score in b.items()}
        found[num] = comparison.compare(queries, a, b, names=("a", "b"))
    assert found[20].min_detectable / found[80].min_detectable == pytest.approx(2.0, rel=0.3)
    wanted = found[20].min_detectable / 2
    assert comparison.sentences_needed(found[20], wanted, 20) == 80
    with pytest.raises(ValueError, match="must be above 0"):
        comparison.sentences_needed(found[20], 0.0, 20)
