"""Two-stream decoding against the reference loop, and log-probs against decoding."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.convert import kimi_audio as table
from paras2s_jax.convert.rules import Checkpoint, import_params
from paras2s_jax.models import decode, unrolled
from paras2s_jax.models.decode import Rollout
from paras2s_jax.models.kimi_audio import (
    KimiAudio,
    KimiAudioConfig,
    Prompt,
    audio_prompt,
    collate_prompts,
)
from paras2s_jax.models.sampling import Sampling

GOLDENS = Path(__file__).parents[1] / "goldens" / "kimi_lm"
CONFIG = KimiAudioConfig.from_json(GOLDENS / "config.json")
MODEL = KimiAudio(CONFIG)
DRAW = Sampling(temperature=1.3)
STEPS = 14
RAW = (
    "audio_ids",
    "text_ids",
    "is_continuous_mask",
    "whisper_feature_0",
    "fed_audio",
    "fed_text",
    "raw_argmax_audio",
    "raw_argmax_text",
)
NAMES = ("text_logp", "audio_logp", "text_entropy", "audio_entropy")


@pytest.fixture(scope="module")
def io():
    return np.load(GOLDENS / "io.npz")


@pytest.fixture(scope="module")
def variables():
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = nn.meta.unbox(jax.eval_shape(MODEL.init, jax.random.key(0), ids, ids))["params"]
    tensors = Checkpoint(GOLDENS / "model.safetensors")
    return {"params": import_params(tensors, table.rules(CONFIG), shapes)}


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    """Three prompts of 4, 9 and 7 codes."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 32, (3, 9)), jnp.int32)
    features = jnp.asarray(rng.normal(size=(3, 9, 96)), jnp.float32)
    return audio_prompt(CONFIG, codes, jnp.array([4, 9, 7]), features)


@pytest.fixture(scope="module")
def rollout(variables, prompt) -> Rollout:
    run = functools.partial(decode.generate, MODEL, group_size=4, max_steps=STEPS)
    return jax.jit(functools.partial(run, text=DRAW, audio=DRAW))(
        variables, prompt, jax.random.key(3)
    )


@pytest.fixture(scope="module")
def scored(variables, prompt, rollout) -> dict:
    return _score(variables, prompt, decode.rollout_streams(CONFIG, rollout))


@functools.partial(jax.jit, static_argnames="chunk")
def _score(variables, prompt, streams, chunk=None):
    return decode.stream_logp(
        MODEL,
        variables,
        prompt,
        streams,
        text_temperature=DRAW.temperature,
        audio_temperature=DRAW.temperature,
        logp_chunk=chunk,
    )


@pytest.mark.parametrize(
    "cases", [("both_eod", "both_eod_in_delay", "both_max"), ("text_eos", "text_max"), ("pen",)]
)
def test_greedy_loop_equals_the_reference(io, variables, cases):
    """Cases with the same settings run as one batch of ragged prompts."""
    wants = [
        {key.split("/")[2]: io[key] for key in io.files if key.startswith(f"gen/{case}/")}
        for case in cases
    ]
    keys = ("audio_ids", "text_ids", "is_continuous_mask")
    layouts = [{key: want[key][0] for key in keys} for want in wants]
    prompt = collate_prompts(CONFIG, layouts, [[want["whisper_feature_0"][0]] for want in wants])

    def sampling(stream):
        penalty = wants[0].get(f"{stream}_repetition_penalty", 1.0)
        window = wants[0].get(f"{stream}_repetition_window_size", 0)
        return Sampling(0.0, 5, round(float(penalty), 6), int(window))

    out = jax.jit(
        functools.partial(
            decode.generate,
            MODEL,
            group_size=1,
            max_steps=int(wants[0]["max_new_tokens"]),
            text=sampling("text"),
            audio=sampling("audio"),
            output_type="text" if wants[0]["is_text_only"] else "both",
        )
    )(variables, prompt, jax.random.key(0))
    codes, len_codes = decode.codes_of(CONFIG, out)
    text, len_text = decode.text_of(CONFIG, out)
    for row, (case, want) in enumerate(zip(cases, wants, strict=True)):
        assert wants[0]["max_new_tokens"] == want["max_new_tokens"]
        assert out.steps[row, 0] == len(want["raw_argmax_audio"]), case
        assert bool(out.finished[row, 0]) == (out.steps[row, 0] < want["max_new_tokens"]), case
        fed = len(want["fed_audio"])
        spoken = out.audio_ids[row, 0][out.audio_mask[row, 0]]
        for got, name in (
            (out.audio_ids[row, 0, :fed], "fed_audio"),
            (out.text_ids[row, 0, :fed], "fed_text"),
            (spoken, "returned_audio"),
            (codes[row, 0, : len_codes[row, 0]], "filtered_codes"),
            (text[row, 0, : len_text[row, 0]], "returned_text"),
        ):
            np.testing.assert_array_equal(got, want[name], err_msg=f"{case}: {name}")


def test_halved_batches_give_the_same_answers(variables, prompt, monkeypatch):
    """With a penalty, for which the draws need their rows' history."""
    loops = []
    while_loop = jax.lax.while_loop

    def counted(*args):
        loops.append(args[2].text_in.shape)
        return while_loop(*args)

    monkeypatch.setattr(jax.lax, "while_loop", counted)
    draws = Sampling(1.3, repetition_penalty=1.2, window=3)

    def run(halvings):
        settings = {"group_size": 4, "max_steps": 60, "text": draws, "audio": draws}
        run = functools.partial(decode.generate, MODEL, halvings=halvings, **settings)
        return jax.jit(run)(variables, prompt, jax.random.key(5))

    want, got = run(0), run(5)  # of 4 answers, there are 2 halves
    assert loops == [(12,), (12,), (6,), (3,)]
    # Some steps are made in the last loop, with one answer per prompt.
    steps = np.sort(want.steps, axis=1)
    assert len(np.unique(steps)) > 4 and steps[:, 2].max() < steps[:, 3].max()
    for name in ("text_ids", "audio_ids", "text_mask", "audio_mask", "steps", "finished"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    np.testing.assert_allclose(got.text_logp, want.text_logp, atol=1e-5)


def test_unrolled_layers_draw_the_same(variables, prompt, rollout, monkeypatch):
    monkeypatch.setattr(unrolled, "SMALL_BYTES", 0)
    run = functools.partial(decode.generate, MODEL, group_size=4, max_steps=STEPS, halvings=1)
    run = functools.partial(run, text=DRAW, audio=DRAW)
    assert "layers_1" in jax.jit(run).lower(variables, prompt, jax.random.key(3)).as_text(
        debug_info=True
    )
    got = jax.jit(run)(variables, prompt, jax.random.key(3))
    np.testing.assert_array_equal(got.audio_ids, rollout.audio_ids)
    np.testing.assert_array_equal(got.text_ids, rollout.text_ids)


CASES = ("both_eod", "both_eod_in_delay", "both_max", "text_eos", "text_max", "pen")


def test_logits_before_any_rule_point_where_the_reference_points(io, variables):
    """All cases in one batch: ragged prompts, then the tokens that the reference fed back."""
    wants = [{key: io[f"gen/{case}/{key}"] for key in RAW} for case in CASES]
    layouts = [{key: want[key][0] for key in RAW[:3]} for want in wants]
    prompt = collate_prompts(CONFIG, layouts, [[want["whisper_feature_0"][0]] for want in wants])
    steps = max(len(want["raw_argmax_audio"]) for want in wants)
    ids = CONFIG.special
    inputs = {}
    for stream, first in (("audio", ids.kimia_assistant_msg_start), ("text", ids.kimia_text_blank)):
        rows = np.full((len(wants), steps), first)
        for row, want in enumerate(wants):
            fed = want[f"fed_{stream}"][: steps - 1]
            rows[row, 1 : 1 + len(fed)] = fed
        inputs[stream] = rows

    @jax.jit
    def run(variables, prompt, inputs):
        return MODEL.apply(
            variables,
            inputs["audio"],
            inputs["text"],
            position_ids=prompt.length[:, None] + jnp.arange(steps),
            prefix=decode.prefill(MODEL, variables, prompt),
            prefix_mask=prompt.mask,
            stepwise=True,
        )[0]

    logits = run(variables, prompt, inputs)
    for row, (case, want) in enumerate(zip(CASES, wants, strict=True)):
        for stream, scores in zip(("audio", "text"), logits, strict=True):
            raw = want[f"raw_argmax_{stream}"]
            got = np.asarray(scores[row, : len(raw)]).argmax(-1)
            np.testing.assert_array_equal(got, raw, err_msg=f"{case}: {stream}")


def test_rollout_keeps_the_rules(rollout):
    ids, step = CONFIG.special, np.arange(STEPS)
    out = jax.tree.map(np.asarray, rollout)
    assert out.text_ids.shape == (3, 4, STEPS) and out.steps.shape == (3, 4)
    live = step < out.steps[..., None]
    assert np.all(out.audio_ids[..., :6] == ids.kimia_text_blank)
    np.testing.assert_array_equal(out.audio_mask, live & (step >= CONFIG.delay))
    # Text: drawn up to and with the first eos, blank after it.
    is_eos = out.text_mask & (out.text_ids == ids.kimia_text_eos)
    before = np.cumsum(is_eos, -1) - is_eos == 0
    np.testing.assert_array_equal(out.text_mask, live & before)
    assert np.all(out.text_ids[~out.text_mask] == ids.kimia_text_blank)
    ends = out.audio_mask & np.isin(out.audio_ids, [ids.msg_end, ids.media_end])
    np.testing.assert_array_equal(ends.any(-1), out.finished)
    assert np.all(ends.sum(-1) <= 1)
    np.testing.assert_array_equal(out.steps, np.where(out.finished, ends.argmax(-1) + 1, STEPS))
    for stream in ("text", "audio"):
        logp, mask = getattr(out, f"{stream}_logp"), getattr(out, f"{stream}_mask")
        assert np.all(logp[mask] < 0) and np.all(logp[~mask] == 0)
    # The fixture must exercise both ways to stop, and answers of a group must differ.
    assert out.finished.any() and not out.finished.all()
    assert len(np.unique(out.text_ids.reshape(12, -1), axis=0)) == 12


def test_scored_logp_equals_decoded_logp(rollout, scored):
    np.testing.assert_allclose(scored["text_logp"], rollout.text_logp, atol=1e-4)
    np.testing.assert_allclose(scored["audio_logp"], rollout.audio_logp, atol=1e-4)
    for stream in ("text", "audio"):
        mask = np.asarray(getattr(rollout, f"{stream}_mask"))
        entropy = np.asarray(scored[f"{stream}_entropy"])
        assert np.all((entropy[mask] > 0) & (entropy[mask] <= np.log(CONFIG.vocab_size)))


def test_logp_is_that_of_the_plain_forward(variables, prompt, rollout, scored):
    """Row by row: unpadded prompt and answer in one sequence, no prefix, no group."""
    streams = decode.rollout_streams(CONFIG, rollout)
    run = jax.jit(lambda a, t, kw: MODEL.apply(variables, a, t, **kw)[0])
    for p, g in ((0, 1), (1, 2)):
        n = int(prompt.length[p])
        row = {
            stream: np.concatenate(
                [getattr(prompt, f"{stream}_ids")[p, :n], streams[f"{stream}_in"][p, g]]
            )
            for stream in ("audio", "text")
        }
        heard = np.zeros((1, n + STEPS), bool)
        heard[0, :n] = prompt.continuous_mask[p, :n]
        assert not np.any(row["text"] == 0)  # text id 0 is special in steps
        logits = run(
            row["audio"][None],
            row["text"][None],
            {"whisper_input_feature": [prompt.features[p][None, 2:]], "is_continuous_mask": heard},
        )
        for stream, value in zip(("audio", "text"), logits, strict=True):
            logp = jax.nn.log_softmax(value[0, n:] / DRAW.temperature)
            want = np.take_along_axis(logp, streams[f"{stream}_out"][p, g][:, None], 1)[:, 0]
            mask = streams[f"{stream}_mask"][p, g]
            np.testing.assert_allclose(
                scored[f"{stream}_logp"][p, g], np.where(mask, want, 0), atol=1e-4
            )


def test_group_equals_separate_prompts(variables, prompt, rollout, scored):
    streams = decode.rollout_streams(CONFIG, rollout)
    single = jax.tree.map(lambda x: x.reshape(12, 1, STEPS), streams)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=0), prompt)
    got = _score(variables, repeated, single)
    for name in NAMES:
        np.testing.assert_allclose(got[name].reshape(3, 4, -1), scored[name], atol=1e-5)


def test_more_prompt_padding_changes_nothing(variables, prompt, rollout, scored):
    junk = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 5)] + [(0, 0)] * (x.ndim - 2)), prompt)
    got = _score(variables, junk, decode.rollout_streams(CONFIG, rollout))
    for name in NAMES:
        np.testing.assert_allclose(got[name], scored[name], atol=1e-5)


def test_chunks_change_no_gradient_and_never_hold_all_logits(variables, prompt, rollout):
    streams = decode.rollout_streams(CONFIG, rollout)

    def loss(inputs, chunk):
        heard = prompt.replace(features=inputs["features"])
        out = _score(inputs["variables"], heard, streams, chunk=chunk)
        return sum(jnp.sum(out[name]) for name in NAMES)

    inputs = {"variables": variables, "features": prompt.features}
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    whole, chunked = gradient(inputs, None), gradient(inputs, 50)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), whole, chunked)
    # 3 prompts * 4 answers * 14 steps = 168 positions: 4 chunks of 42, the least of up to 50.
    trace = jax.make_jaxpr(jax.grad(loss), static_argnums=1)
    assert "f32[168,168]" in str(trace(inputs, None))
    chunked_trace = str(trace(inputs, 50))
    assert "f32[42,168]" in chunked_trace
    for size in ("168,168", "200,168", "4,50,168"):
        assert f"f32[{size}]" not in chunked_trace
    # The prompt's features are reached through the shared prefix, and only where they count.
    reached = np.abs(whole["features"]).sum(-1)
    heard = np.asarray(prompt.continuous_mask)
    assert np.all(reached[heard] > 0) and np.all(reached[~heard] == 0)


def test_codes_and_text_are_moved_to_the_front_by_hand():
    offset, ids = CONFIG.kimia_token_offset, CONFIG.special
    blank, eos, end = ids.kimia_text_blank, ids.kimia_text_eos, ids.msg_end
    audio = [blank] * 6 + [offset + 3, 7, offset, end]  # id 7 is no code: left out
    text = [5, 6, eos] + [blank] * 7
    row = jnp.zeros((1, 1, 10), jnp.float32)
    rollout = Rollout(
        text_ids=jnp.array([[text]]),
        audio_ids=jnp.array([[audio]]),
        text_mask=jnp.arange(10)[None, None] < 3,
        audio_mask=jnp.arange(10)[None, None] >= 6,
        text_logp=row,
        audio_logp=row,
        steps=jnp.array([[10]]),
        finished=jnp.array([[True]]),
    )
    codes, len_codes = decode.codes_of(CONFIG, rollout)
    assert len_codes[0, 0] == 2 and codes[0, 0].tolist() == [3, 0] + [0] * 8
    words, len_text = decode.text_of(CONFIG, rollout)
    assert len_text[0, 0] == 2 and words[0, 0].tolist() == [5, 6] + [0] * 8


def test_unknown_output_type_is_refused(variables, prompt):
    with pytest.raises(ValueError, match="output_type"):
        decode.generate(
            MODEL,
            variables,
            prompt,
            jax.random.key(0),
            group_size=1,
            max_steps=2,
            text=DRAW,
            audio=DRAW,
            output_type="speech",
        )
