"""The policy between waveforms: padding, likelihoods of its own answers, demonstrations."""

import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.align import phases
from paras2s_jax.align import policy as policy_lib
from paras2s_jax.models import decode
from paras2s_jax.models.codec import PATCH_SAMPLES

GROUP = 3


def test_padding_of_queries_changes_nothing(tiny, queries):
    waves, lens = queries["query"][:2], queries["query_len"][:2]
    responder = phases.Responder(tiny.policy, group_size=GROUP)

    def respond(waves):
        batch = {"query": waves, "query_len": lens}
        return responder(tiny.variables, tiny.frontend, batch, jax.random.key(3))

    rollout, answers = respond(waves)
    junk = np.full((2, 2 * PATCH_SAMPLES), 0.5, np.float32)
    longer = np.concatenate([waves, junk], axis=1)
    padded_rollout, padded_answers = respond(longer)
    np.testing.assert_array_equal(rollout.text_ids, padded_rollout.text_ids)
    np.testing.assert_array_equal(rollout.audio_ids, padded_rollout.audio_ids)
    np.testing.assert_allclose(rollout.text_logp, padded_rollout.text_logp, atol=1e-4)
    np.testing.assert_allclose(answers.waves, padded_answers.waves, atol=1e-6)


def test_answers_depend_on_what_is_heard(tiny, queries):
    waves, lens = queries["query"][:2], queries["query_len"][:2]
    prompt = tiny.policy.prompt(tiny.frontend, waves, lens)
    softer = tiny.policy.prompt(tiny.frontend, waves * 0.05, lens)
    assert prompt.features.shape[1] == waves.shape[1] // PATCH_SAMPLES + 5
    heard = np.asarray(prompt.continuous_mask)
    assert heard.sum() == -(-lens // PATCH_SAMPLES).sum()
    assert np.abs(np.asarray(prompt.features - softer.features))[heard].max() > 1e-3


def test_logp_agrees_with_what_was_sampled(tiny, queries):
    waves, lens = queries["query"][:2], queries["query_len"][:2]
    prompt = tiny.policy.prompt(tiny.frontend, waves, lens)
    rollout = tiny.policy.rollout(tiny.variables, prompt, jax.random.key(0), GROUP)
    streams = decode.rollout_streams(tiny.policy.model.config, rollout)
    at_temperature = tiny.policy.logp(tiny.variables, prompt, streams, at_temperature=True)
    at_one = tiny.policy.logp(tiny.variables, prompt, streams, at_temperature=False)
    np.testing.assert_allclose(at_temperature["logp"]["text"], rollout.text_logp, atol=1e-4)
    np.testing.assert_allclose(at_temperature["logp"]["audio"], rollout.audio_logp, atol=1e-4)
    # The streams are sampled at 0.9 and 0.8, so temperature 1 must differ.
    assert np.abs(at_one["logp"]["text"] - at_temperature["logp"]["text"]).max() > 1e-2


def test_demonstration_holds_all_of_the_answer(tiny):
    # Three codes of sound, delay 2: steps 0 1 blank, 2-4 codes, 5 msg_end; text 7 8 then eos.
    waves = np.zeros((1, 4 * PATCH_SAMPLES), np.float32)
    waves[:, : 3 * PATCH_SAMPLES] = 0.1
    lens, len_text = np.array([3 * PATCH_SAMPLES]), np.array([2])
    text = np.array([[7, 8, 0, 0]])
    streams = tiny.policy.demonstration(tiny.frontend, waves, lens, text, len_text)
    ids = tiny.policy.model.config.special
    assert streams["text_out"].shape == (1, 1, 2 + 4 + 1)
    np.testing.assert_array_equal(streams["text_out"][0, 0, :3], [7, 8, ids.kimia_text_eos])
    np.testing.assert_array_equal(streams["text_mask"][0, 0], [True] * 3 + [False] * 4)
    np.testing.assert_array_equal(
        streams["audio_mask"][0, 0], [False, False, True, True, True, True, False]
    )
    assert int(streams["audio_out"][0, 0, 5]) == ids.msg_end


def test_texts_leave_control_tokens_out(tiny):
    # "hi", then text_eos, then blanks; every byte is one token of this tokenizer.
    ids = tiny.policy.model.config.special
    letters = tiny.tokenizer.encode("hi")
    blank = ids.kimia_text_blank
    row = jnp.array([[[*letters, ids.kimia_text_eos, blank, blank]]])
    off = jnp.zeros(row.shape, bool)
    rollout = decode.Rollout(
        text_ids=row,
        audio_ids=row,
        text_mask=off.at[..., :3].set(True),
        audio_mask=off,
        text_logp=jnp.zeros(row.shape),
        audio_logp=jnp.zeros(row.shape),
        steps=jnp.array([[5]]),
        finished=jnp.array([[True]]),
    )
    assert policy_lib.texts_of(tiny.policy, rollout, tiny.tokenizer) == [["hi"]]


class Tone:
    """A detokenizer that plays 1 kHz at 24 kHz, 80 ms a code."""

    rate_hz = 24_000

    def decode(self, codes, len_codes, rng=None):
        size = 1920 * codes.shape[1]
        lens = 1920 * len_codes
        tone = 0.5 * jnp.sin(2 * jnp.pi * 1000 / self.rate_hz * jnp.arange(size))
        return jnp.where(jnp.arange(size) < lens[:, None], tone, 0.0), lens


def test_answers_are_at_16_khz_whatever_the_detokenizer_plays(tiny):
    config = tiny.policy.model.config
    first = config.kimia_token_offset
    row = jnp.array([[[first, first + 1, first + 2, config.special.msg_end, 0]]])
    rollout = decode.Rollout(
        text_ids=row,
        audio_ids=row,
        text_mask=jnp.zeros(row.shape, bool),
        audio_mask=jnp.broadcast_to(jnp.arange(5) < 4, row.shape),
        text_logp=jnp.zeros(row.shape),
        audio_logp=jnp.zeros(row.shape),
        steps=jnp.array([[4]]),
        finished=jnp.array([[True]]),
    )
    answers = tiny.policy.speak(tiny.frontend.replace(detokenizer=Tone()), rollout, None)
    codes = answers.codes.shape[-1]
    assert answers.lens.tolist() == [[3 * PATCH_SAMPLES]]
    assert answers.waves.shape == (1, 1, codes * PATCH_SAMPLES)
    tone = 0.5 * np.sin(2 * np.pi * 1000 / 16_000 * np.arange(3 * PATCH_SAMPLES))
    heard = np.asarray(answers.waves[0, 0, : 3 * PATCH_SAMPLES])
    np.testing.assert_allclose(heard[100:-100], tone[100:-100], atol=1e-3)
    assert not np.any(answers.waves[0, 0, 3 * PATCH_SAMPLES :])
