"""Two-stream answers of the policy: sampling them, and their log-probabilities.

Each prompt is run once; the G answers of its group read its keys as a shared prefix.
Rules of the loop: the released generate loop (MoonshotAI/Kimi-Audio 2607d51, kimia.py).
"""

import jax
import jax.numpy as jnp
from flax import struct

from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig, init_cache
from paras2s_jax.models.kimi_layout import Prompt, shifted_inputs
from paras2s_jax.models.sampling import Sampling, chosen_logp, draw


class Rollout(struct.PyTreeNode):
    """G answers to each of P prompts; nothing is real past `steps`.

    text_ids, audio_ids: int32[P, G, R], as fed back (blanks where a rule overrode the draw);
    text_mask, audio_mask: bool[P, G, R], where the policy's own draw stands; text_logp,
    audio_logp: float32[P, G, R], of that draw under softmax(logits / temperature) over all
    ids (0 elsewhere); steps: int32[P, G], the last one included; finished: bool[P, G], False
    if cut by max_steps.
    """

    text_ids: jax.Array
    audio_ids: jax.Array
    text_mask: jax.Array
    audio_mask: jax.Array
    text_logp: jax.Array
    audio_logp: jax.Array
    steps: jax.Array
    finished: jax.Array


class _Loop(struct.PyTreeNode):
    """Carry of the decode loop; B = P * G. tokens: the next input of both streams."""

    step: jax.Array  # int32[]
    text_in: jax.Array  # int32[B]
    audio_in: jax.Array  # int32[B]
    text_done: jax.Array  # bool[B]
    done: jax.Array  # bool[B]
    cache: dict
    trace: dict  # of [R, B], what Rollout is made of


def generate(
    model: KimiAudio,
    variables: dict,
    prompt: Prompt,
    rng: jax.Array,
    *,
    group_size: int,
    max_steps: int,
    text: Sampling,
    audio: Sampling,
    output_type: str = "both",
) -> Rollout:
    """Samples `group_size` answers per prompt; pure, to be jitted by the caller.

    variables: {"params": …} and {"lora": …} if the model has adapters. output_type "both"
    stops a row at an audio end token past the delay; "text" at text_eos, without audio.
    """
    if output_type not in ("both", "text"):
        raise ValueError(f'generate: output_type is "both" or "text", not {output_type!r}')
    prefix = prefill(model, variables, prompt)
    rows = prompt.mask.shape[0] * group_size
    start = jnp.repeat(prompt.length, group_size)

    def body(loop: _Loop) -> _Loop:
        (audio_hidden, text_hidden), out = model.apply(
            variables,
            loop.audio_in[:, None],
            loop.text_in[:, None],
            positions=(start + loop.step)[:, None],
            cache=loop.cache,
            cache_index=loop.step,
            prefix=prefix,
            prefix_mask=prompt.mask,
            stepwise=True,
            method="hidden",
        )
        logits = {
            "text": model.apply(variables, text_hidden[:, 0], method="text_logits"),
            "audio": model.apply(variables, audio_hidden[:, 0], method="audio_logits"),
        }
        step_rng = jax.random.fold_in(rng, loop.step)
        samplings = {"text": text, "audio": audio}
        return _advance(model.config, loop, logits, out["cache"], step_rng, samplings, output_type)

    def goes_on(loop: _Loop):
        return (loop.step < max_steps) & ~jnp.all(loop.done)

    first = _first(model.config, rows, max_steps, model.dtype)
    return _rollout(jax.lax.while_loop(goes_on, body, first), group_size)


def prefill(model: KimiAudio, variables: dict, prompt: Prompt) -> dict:
    """Keys and values of the prompts: {stack: {"k", "v"}} of [layers, P, K, T, H]."""
    _, out = model.apply(
        variables,
        prompt.audio_ids,
        prompt.text_ids,
        features=prompt.features,
        continuous_mask=prompt.continuous_mask,
        mask=prompt.mask,
        emit=("kv",),
        method="hidden",
    )
    return out["kv"]


def _first(config: KimiAudioConfig, rows: int, max_steps: int, dtype) -> _Loop:
    ids, shape = config.special, (max_steps, rows)
    blank = jnp.full(shape, ids.kimia_text_blank, jnp.int32)
    trace = {"text_ids": blank, "audio_ids": blank}
    for stream in ("text", "audio"):
        trace[f"{stream}_mask"] = jnp.zeros(shape, bool)
        trace[f"{stream}_logp"] = jnp.zeros(shape, jnp.float32)
    trace["mask"] = jnp.zeros(shape, bool)
    return _Loop(
        step=jnp.int32(0),
        text_in=jnp.full(rows, ids.kimia_text_blank, jnp.int32),
        audio_in=jnp.full(rows, ids.kimia_assistant_msg_start, jnp.int32),
        text_done=jnp.zeros(rows, bool),
        done=jnp.zeros(rows, bool),
        cache=init_cache(config, rows, max_steps, dtype),
        trace=trace,
    )


def _advance(config, loop: _Loop, logits, cache, rng, samplings, output_type) -> _Loop:
    """Draws both streams from logits {stream: float32[B, V]} and applies the loop's rules."""
    draws = {}
    for stream, key in zip(("text", "audio"), jax.random.split(rng), strict=True):
        history = loop.trace[f"{stream}_ids"]
        draws[stream] = draw(key, logits[stream], history, loop.step, samplings[stream])
    now = _apply_rules(config, loop, draws["text"], draws["audio"], output_type)
    for stream, sampling in samplings.items():
        logp = chosen_logp(logits[stream], now[f"{stream}_ids"], sampling.logp_temperature)
        now[f"{stream}_logp"] = jnp.where(now[f"{stream}_mask"], logp, 0.0)
    return _Loop(
        step=loop.step + 1,
        text_in=now["text_ids"],
        audio_in=now["audio_ids"],
        text_done=loop.text_done | (now["text_ids"] == config.special.kimia_text_eos),
        done=now["done"],
        cache=cache,
        trace={key: loop.trace[key].at[loop.step].set(now[key]) for key in loop.trace},
    )


def _apply_rules(config: KimiAudioConfig, loop: _Loop, text_draw, audio_draw, output_type) -> dict:
    """What is fed back at this step, where the draws stand, and which rows are done."""
    ids, live = config.special, ~loop.done
    text_mask = live & ~loop.text_done
    speaks = (loop.step >= config.delay) & (output_type == "both")
    audio_mask = live & speaks
    text_ids = jnp.where(text_mask, text_draw, ids.kimia_text_blank)
    audio_ids = jnp.where(audio_mask, audio_draw, ids.kimia_text_blank)
    if output_type == "both":
        ends = (audio_ids == ids.msg_end) | (audio_ids == ids.media_end)
    else:
        ends = text_ids == ids.kimia_text_eos
    return {
        "text_ids": text_ids,
        "audio_ids": audio_ids,
        "text_mask": text_mask,
        "audio_mask": audio_mask,
        "mask": live,
        "done": loop.done | (live & ends),
    }


def _rollout(loop: _Loop, group_size: int) -> Rollout:
    def grouped(x):  # [R, B] -> [P, G, R]
        return x.T.reshape(-1, group_size, x.shape[0])

    trace = {key: grouped(value) for key, value in loop.trace.items()}
    steps = jnp.sum(trace.pop("mask"), axis=-1, dtype=jnp.int32)
    return Rollout(**trace, steps=steps, finished=loop.done.reshape(-1, group_size))


def _logp_and_entropy(logits: jax.Array, ids: jax.Array, temperature: float):
    """As chosen_logp, and the entropy of the same distribution (nats)."""
    logp_all = jax.nn.log_softmax(logits / temperature, axis=-1)
    logp = jnp.take_along_axis(logp_all, ids[..., None], axis=-1)[..., 0]
    return logp, -jnp.sum(jnp.exp(logp_all) * logp_all, axis=-1)


def stream_logp(
    model: KimiAudio,
    variables: dict,
    prompt: Prompt,
    streams: dict[str, jax.Array],
    *,
    text_temperature: float = 1.0,
    audio_temperature: float = 1.0,
    logp_chunk: int | None = None,
) -> dict[str, jax.Array]:
    """Log-probabilities of given answers, differentiable in `variables`.

    streams: rollout_streams or response_streams, each [P, G, R]. logp_chunk: how many
    positions have float32 logits [., V] at one time (recomputed in the backward pass);
    default all.
    Returns: text_logp, audio_logp, text_entropy, audio_entropy: float32[P, G, R], 0 where
    the stream's mask is False.
    """
    shape = streams["text_in"].shape
    steps, rows = shape[-1], shape[0] * shape[1]
    prefix = prefill(model, variables, prompt)
    positions = jnp.repeat(prompt.length, shape[1])[:, None] + jnp.arange(steps)
    (audio_hidden, text_hidden), _ = model.apply(
        variables,
        streams["audio_in"].reshape(rows, steps),
        streams["text_in"].reshape(rows, steps),
        positions=positions,
        prefix=prefix,
        prefix_mask=prompt.mask,
        stepwise=True,
        method="hidden",
    )
    out = {}
    for stream, hidden, temperature in (
        ("text", text_hidden, text_temperature),
        ("audio", audio_hidden, audio_temperature),
    ):

        def score(hidden, ids, stream=stream, temperature=temperature):
            logits = model.apply(variables, hidden, method=f"{stream}_logits")
            return _logp_and_entropy(logits, ids, temperature)

        hidden = hidden.reshape(-1, hidden.shape[-1])
        logp, entropy = _in_chunks(score, logp_chunk, hidden, streams[f"{stream}_out"].reshape(-1))
        mask = streams[f"{stream}_mask"]
        out[f"{stream}_logp"] = jnp.where(mask, logp.reshape(shape), 0.0)
        out[f"{stream}_entropy"] = jnp.where(mask, entropy.reshape(shape), 0.0)
    return out


def _in_chunks(function, chunk: int | None, *arrays: jax.Array):
    """function(*arrays), `chunk` rows at a time, each chunk recomputed in the backward pass."""
    size = arrays[0].shape[0]
    if chunk is None or chunk >= size:
        return function(*arrays)
    num = -(-size // chunk)

    def split(x):
        x = jnp.pad(x, [(0, num * chunk - size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(num, chunk, *x.shape[1:])

    run = jax.checkpoint(function, prevent_cse=False)
    results = jax.lax.map(lambda xs: run(*xs), tuple(split(x) for x in arrays))
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:size], results)


def rollout_streams(config: KimiAudioConfig, rollout: Rollout) -> dict[str, jax.Array]:
    """The rollout as response_streams would give it: [P, G, R] inputs, targets and masks."""
    step = jnp.arange(rollout.text_ids.shape[-1])
    return {
        **shifted_inputs(config, rollout.text_ids, rollout.audio_ids),
        "text_out": rollout.text_ids,
        "audio_out": rollout.audio_ids,
        "text_mask": rollout.text_mask,
        "audio_mask": rollout.audio_mask,
        "mask": step < rollout.steps[..., None],
    }


def codes_of(config: KimiAudioConfig, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    """Speech codes of the answers: (int32[P, G, R], zero-padded, and their number [P, G])."""
    keep = rollout.audio_mask & (rollout.audio_ids >= config.kimia_token_offset)
    return _compact(rollout.audio_ids - config.kimia_token_offset, keep)


def text_of(config: KimiAudioConfig, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    """Text ids of the answers, without text_eos: (int32[P, G, R], zero-padded, number [P, G])."""
    keep = rollout.text_mask & (rollout.text_ids < config.kimia_token_offset)
    return _compact(rollout.text_ids, keep & (rollout.text_ids != config.special.kimia_text_eos))


def _compact(ids: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves the kept ids of each row to its front, in order."""
    order = jnp.argsort(~keep, axis=-1, stable=True)
    length = jnp.sum(keep, axis=-1, dtype=jnp.int32)
    ids = jnp.take_along_axis(ids, order, axis=-1)
    return jnp.where(jnp.arange(ids.shape[-1]) < length[..., None], ids, 0), length
