"""Saying tokens: cached = full forward, transformers' rules, temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from paras2s_jax.models import whisper_decode
from tests.models.whisper_pairs import CONFIG, build, convert_asr, speaking
from tests.models.whisper_test import pad_rows


@pytest.fixture(scope="module")
def mel():
    return np.random.default_rng(0).normal(size=(2, 40, 10)).astype(np.float32)


@pytest.fixture(scope="module")
def greedy():
    """A recogniser that says many tokens, and different ones for different rows."""
    _, tensors = build(transformers.WhisperForConditionalGeneration, CONFIG)
    model, variables = convert_asr(CONFIG, tensors)
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda x: x, variables["params"])
    decoder = params["decoder"]
    decoder["embed_tokens"]["embedding"] = 0.3 * rng.normal(size=(50, 24)).astype(np.float32)
    decoder["embed_positions"] = 4 * rng.normal(size=(16, 24)).astype(np.float32)
    cross = decoder["layers"]["encoder_attn"]["out_proj"]
    cross["kernel"] = 3 * cross["kernel"]
    return model, {"params": params}


def test_cached_greedy_decoding_equals_full_forward(greedy, mel):
    model, variables = greedy
    padded, mask = pad_rows(mel, (40, 21), 40, fill=5.0)
    options = {"prompt": (2, 9), "max_tokens": 6, "suppress_first": (4,)}
    transcribe = whisper_decode.transcribe_greedy
    said = transcribe(model, variables, padded, mask, eos_id=-1, **options)
    assert said.lens.tolist() == [6, 6] and not np.any(said.finished)
    assert len(np.unique(said.tokens)) > 4 and said.tokens[0].tolist() != said.tokens[1].tolist()
    # Teacher forcing the same tokens: each must be the most likely one at its place.
    tokens = np.concatenate([np.tile([2, 9], (2, 1)), said.tokens], axis=1)
    predict = jax.jit(lambda *args: model.apply(*args, method="predict"))
    logits = predict(variables, padded, tokens, mask)[0][:, 1:-1]
    logp = jax.nn.log_softmax(logits)
    np.testing.assert_array_equal(logits.at[:, 0, 4].set(-jnp.inf).argmax(-1), said.tokens)
    chosen = np.take_along_axis(np.asarray(logp), np.asarray(said.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(said.mean_logp, chosen.mean(1), atol=1e-5)

    # With the first row's third token as the end, it says two; the mean counts three.
    eos_id = int(said.tokens[0, 2])
    assert eos_id not in np.asarray(said.tokens[0, :2])
    ended = transcribe(model, variables, padded, mask, eos_id=eos_id, **options)
    assert ended.tokens[0].tolist() == [*said.tokens[0, :2].tolist(), 0, 0, 0, 0]
    assert int(ended.lens[0]) == 2 and bool(ended.finished[0])
    np.testing.assert_allclose(ended.mean_logp[0], chosen[0, :3].mean(), atol=1e-5)


def test_suppressed_tokens_are_never_chosen(greedy, mel):
    model, variables = greedy
    options = {"prompt": (2,), "eos_id": 49, "max_tokens": 3}
    free = whisper_decode.transcribe_greedy(model, variables, mel, **options)
    first = int(free.tokens[0, 0])
    held = whisper_decode.transcribe_greedy(model, variables, mel, suppress=(first,), **options)
    assert held.lens[0] > 0 and first not in np.asarray(held.tokens)
    with pytest.raises(ValueError, match="max_target_positions"):
        whisper_decode.transcribe_greedy(
            model, variables, mel, prompt=(2,), eos_id=1, max_tokens=16
        )


@pytest.fixture(scope="module")
def pair():
    return speaking(CONFIG, num_words=30, seed=1)


def test_times_are_allowed_as_in_transformers(pair):
    hf, _, _, ids = pair
    begin, vocab = ids.no_timestamps_token_id + 1, hf.config.vocab_size
    theirs = transformers.generation.WhisperTimeStampLogitsProcessor(
        hf.generation_config, begin_index=3
    )
    allow = jax.jit(whisper_decode.allow_timestamps, static_argnames=("is_first", "ids"))
    rng = np.random.default_rng(7)
    histories = [[], [begin + 2], [begin, 4], [begin, 4, begin + 3], [begin, 4, begin + 3, 5]]
    histories += [[begin + 1, 7, begin + 3, begin + 3], [begin, 7, begin + 2, begin + 2, 9, 8]]
    # Words far above times, and the other way round, so that both sides of the last rule show.
    for history in histories:
        for lift in (-8.0, 0.0, 8.0):
            logits = rng.normal(size=(2, vocab)).astype(np.float32)
            logits[:, begin:] += lift
            prompt = [[ids.decoder_start_token_id, 2, 3, *history]] * 2
            expected = theirs(torch.tensor(prompt), torch.tensor(logits)).numpy()
            tokens = np.zeros((2, 8), np.int32)
            tokens[:, : len(history)] = history
            found = allow(logits, tokens, len(history), is_first=not history, ids=ids)
            np.testing.assert_array_equal(found, expected)


def test_draws_follow_the_temperature(pair, mel):
    _, model, variables, ids = pair
    rows, prompt = 3000, np.array([ids.prompt(ids.language("en"), "transcribe", False)], np.int32)
    encoded = jax.jit(lambda v, x: model.apply(v, x, method="encode")[0])(variables, mel[:1])
    logits, _ = jax.jit(lambda *args: model.apply(*args, method="decode"))(
        variables, prompt, encoded
    )
    options = {"ids": ids, "timestamps": False, "max_tokens": 1}
    many = np.repeat(np.asarray(encoded), rows, axis=0), np.repeat(prompt, rows, axis=0)
    skip = np.zeros(rows, bool)
    for temperature in (0.5, 2.0):
        said, _ = whisper_decode.say(
            model, variables, *many, skip, jnp.float32(temperature), jax.random.key(0), **options
        )
        # The end token takes no place in the transcript.
        first = np.where(said.finished, ids.eos_token_id, said.tokens[:, 0])
        share = np.bincount(first, minlength=logits.shape[-1]) / rows
        wanted = np.asarray(jax.nn.softmax(logits[0, -1] / temperature))
        # Four standard errors of a share.
        assert np.all(np.abs(share - wanted) < 4 * np.sqrt(wanted / rows) + 1e-3)
        # The mean is that of temperature 1.
        logp = np.asarray(jax.nn.log_softmax(logits[0, -1]))
        np.testing.assert_allclose(said.mean_logp, logp[first], atol=1e-4)
