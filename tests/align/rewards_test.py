"""The reward model: scores, sharing within groups, padding, loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.align import rewards
from paras2s_jax.models.qwen2_5_omni import (
    OmniAudioConfig,
    Qwen2_5OmniConfig,
    Qwen2_5OmniThinker,
)


@pytest.fixture(scope="module")
def variables(reward_model):
    # Larger than the usual start, so that scores differ clearly from each other.
    start = reward_model.init(jax.random.key(0))
    return jax.tree.map(lambda x: x * 5.0 if x.ndim > 1 else x, start)


@pytest.fixture(scope="module")
def waves():
    """Two queries and three answers to each, of different lengths, zero-padded."""
    rng = np.random.default_rng(0)
    query, query_len = rng.normal(0, 0.1, (2, 6400)), np.array([6400, 4000])
    answer = rng.normal(0, 0.1, (2, 3, 4800))
    answer_len = np.array([[4800, 3000, 4800], [2000, 4800, 0]])
    query[np.arange(6400) >= query_len[:, None]] = 0
    answer[np.arange(4800) >= answer_len[..., None]] = 0
    return tuple(
        jnp.asarray(x) for x in (query.astype("f4"), query_len, answer.astype("f4"), answer_len)
    )


def scored(waves):
    """A training batch of each query and the first answer to it."""
    query, query_len, answer, answer_len = waves
    return {
        "query": query,
        "query_len": query_len,
        "answer": answer[:, 0],
        "answer_len": answer_len[:, 0],
        "score": jnp.array([2.0, 3.5]),
    }


def first_readings(reward_model, variables, waves):
    query, query_len, answer, answer_len = waves
    return reward_model.readings(variables, query, query_len, answer[:, :1], answer_len[:, :1])


def test_two_hot_by_hand():
    got = rewards.two_hot(jnp.array([3.0, 4.25, 1.0, 5.0]))
    want = [[0, 0, 1, 0, 0], [0, 0, 0, 0.75, 0.25], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_allclose(got, want)


def test_expected_score_by_hand():
    # Equal logits: (1 + 2 + 3 + 4 + 5) / 5. Logits 0 and ln 3 on 4 and 5: (4 + 3 * 5) / 4.
    assert float(rewards.expected_score(jnp.zeros(5))) == pytest.approx(3.0)
    off = -1e9
    logits = jnp.array([off, off, off, 0.0, np.log(3.0)])
    assert float(rewards.expected_score(logits)) == pytest.approx(19 / 4)


def test_answers_of_a_group_share_the_query_exactly(reward_model, variables, waves):
    query, query_len, answer, answer_len = waves
    score = jax.jit(reward_model.score)
    grouped = np.asarray(score(variables, *waves))
    alone = np.asarray(
        score(
            variables,
            jnp.repeat(query, 3, axis=0),
            jnp.repeat(query_len, 3),
            answer.reshape(6, 1, -1),
            answer_len.reshape(6, 1),
        )
    ).reshape(2, 3)
    np.testing.assert_allclose(grouped, alone, atol=1e-5)
    assert np.isnan(grouped[1, 2])  # No samples: nothing to judge.
    real = grouped[~np.isnan(grouped)]
    assert ((real >= 1) & (real <= 5)).all() and real.std() > 1e-4


def test_padding_changes_nothing(reward_model, variables, waves):
    query, query_len, answer, answer_len = waves
    score = jax.jit(reward_model.score)
    longer = score(
        variables,
        jnp.pad(query, ((0, 0), (0, 3200)), constant_values=0.3),
        query_len,
        jnp.pad(answer, ((0, 0), (0, 0), (0, 1600)), constant_values=0.3),
        answer_len,
    )
    np.testing.assert_allclose(longer, score(variables, *waves), atol=1e-5)


def test_both_waves_matter(reward_model, variables, waves):
    query, query_len, answer, answer_len = waves
    score = jax.jit(reward_model.score)
    base = np.asarray(score(variables, *waves))[0]
    other_query = np.asarray(score(variables, query * 0.01, query_len, answer, answer_len))[0]
    other_answer = np.asarray(score(variables, query, query_len, answer * 0.01, answer_len))[0]
    assert np.abs(base - other_query).max() > 1e-5
    assert np.abs(base - other_answer).max() > 1e-5


def test_loss_is_the_cross_entropy_of_the_score_token(reward_model, variables, waves):
    batch = scored(waves)
    sums = rewards.make_loss(reward_model)(variables, batch, None)
    given = first_readings(reward_model, variables, waves)
    logp = np.asarray(jax.nn.log_softmax(given.score[:, 0]))
    one, two, three, four, five = reward_model.prompt.digit_ids
    want = -logp[0, two] - 0.5 * logp[1, three] - 0.5 * logp[1, four]
    np.testing.assert_allclose(sums.loss_sum, want, rtol=1e-5)
    assert float(sums.weight) == 2.0
    assert len({one, two, three, four, five}) == 5


def test_findings_of_the_judge_are_taught_where_they_are_known(reward_model, variables, waves):
    batch = scored(waves) | {
        "style": jnp.array([rewards.STYLE_LABELS.index("sad"), rewards.UNKNOWN]),
        "tone": jnp.array([rewards.TONE_LABELS.index("wry"), rewards.TONE_LABELS.index("flat")]),
    }
    plain, taught = (
        rewards.make_loss(reward_model, weight)(variables, batch, None) for weight in (0.0, 0.5)
    )
    given = first_readings(reward_model, variables, waves)
    style, tone = (np.asarray(jax.nn.log_softmax(x)) for x in (given.style, given.tone[:, 0]))
    prompt = reward_model.prompt
    sad = style[0, prompt.style_ids[rewards.STYLE_LABELS.index("sad")]]
    wry = tone[0, prompt.tone_ids[rewards.TONE_LABELS.index("wry")]]
    flat = tone[1, prompt.tone_ids[rewards.TONE_LABELS.index("flat")]]
    want = -0.5 * (sad + wry + flat)
    np.testing.assert_allclose(taught.loss_sum - plain.loss_sum, want, rtol=1e-4)
    assert float(taught.metrics["reward/style_hit"][1]) == 1.0
    assert float(taught.metrics["reward/tone_hit"][1]) == 2.0


def test_the_style_is_read_before_the_answer_is_heard(reward_model, variables, waves):
    query, query_len, answer, answer_len = waves
    one = reward_model.readings(variables, *waves)
    other = reward_model.readings(variables, query, query_len, answer * 0.01, answer_len)
    np.testing.assert_array_equal(one.style, other.style)
    assert np.abs(one.tone - other.tone).max() > 1e-5


def test_a_trained_tower_is_taken_over(reward_model, variables):
    tower = jax.tree.map(lambda x: x + 1.0, variables["params"]["audio_tower"])
    taken = reward_model.init(jax.random.key(0), tower=tower)
    jax.tree.map(np.testing.assert_array_equal, taken["params"]["audio_tower"], tower)
    with pytest.raises(ValueError, match="shapes"):
        reward_model.init(jax.random.key(0), tower={"norm": jnp.zeros(3)})


def test_the_thinker_is_a_reward_model_as_well(reward_model, waves):
    config = reward_model.model.config
    audio = OmniAudioConfig(**dataclasses.asdict(config.audio), n_window=5, output_dim=16)
    config = Qwen2_5OmniConfig(audio, config.text, config.audio_token_index)
    thinker = dataclasses.replace(reward_model, model=Qwen2_5OmniThinker(config))
    variables = jax.tree.map(
        lambda x: x * 5.0 if x.ndim > 1 else x, thinker.init(jax.random.key(0))
    )
    tower = {"layers": jax.tree.map(jnp.ones_like, variables["params"]["audio_tower"]["layers"])}
    taken = thinker.init(jax.random.key(0), tower=tower)["params"]["audio_tower"]
    jax.tree.map(np.testing.assert_array_equal, taken["layers"], tower["layers"])
    assert "proj" in taken
    score = jax.jit(thinker.score)
    scores = np.asarray(score(variables, *waves))
    assert np.isnan(scores[1, 2]) and np.isfinite(scores).sum() == 5
    assert np.nanstd(scores) > 1e-4
    query, query_len, answer, answer_len = waves
    longer = [jnp.pad(query, ((0, 0), (0, 1500))), query_len]
    longer += [jnp.pad(answer, ((0, 0), (0, 0), (0, 3000))), answer_len]
    np.testing.assert_allclose(score(variables, *longer), scores, atol=1e-5)


def test_digits_must_be_single_tokens():
    class Splitting:
        def encode(self, text):
            return [7, *text.encode()]

    with pytest.raises(ValueError, match="single tokens"):
        rewards.score_prompt(Splitting())
