"""Two-stream answers of the policy: sampling them, and their log-probabilities.

Each prompt is run once; the G answers of its group read its keys as a shared prefix.
Rules of the loop: the released generate loop (MoonshotAI/Kimi-Audio 2607d51, kimia.py).
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig, init_cache
from paras2s_jax.models.kimi_layout import Prompt, shifted_inputs
from paras2s_jax.models.sampling import Sampling, chosen_logp, draw
from paras2s_jax.models.unrolled import decoding_form, unroll_kv
from paras2s_jax.models.vocab import token_logp


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
    """Carry of the decode loop over b of all B = P * G rows, some answers of each prompt.

    row: their numbers, None for all. trace: what Rollout is made of.
    """

    step: jax.Array  # int32[]
    row: jax.Array | None  # int32[b]
    start: jax.Array  # int32[b], position of the first step
    text_in: jax.Array  # int32[b], the next input
    audio_in: jax.Array  # int32[b]
    text_done: jax.Array  # bool[b]
    cache: dict
    done: jax.Array  # bool[B]
    trace: dict  # of [R, B]

    def of_rows(self, x: jax.Array) -> jax.Array:
        """The loop's rows of an array [..., B]."""
        return x if self.row is None else x[..., self.row]

    def set_rows(self, x: jax.Array, new: jax.Array, *index) -> jax.Array:
        """x: [..., B] with new: [b] in the loop's rows, at index."""
        at = index if self.row is None else (*index, self.row)
        return x.at[at].set(new) if at else new


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
    halvings: int = 0,
) -> Rollout:
    """Samples `group_size` answers per prompt; pure, to be jitted by the caller.

    variables: {"params": …} and {"lora": …} if the model has adapters; either as they are or in
    decoding_form. output_type "both" stops a row at an audio end token past the delay; "text" at
    text_eos, without audio. Steps end when all answers have. halvings: as soon as at most half of
    every prompt's answers go on, so do the steps with half of the rows; so often, while there is an
    even number of answers. It changes no answer, pays where a step's time grows with its rows, and
    each compiles the step once more.
    """
    if output_type not in ("both", "text"):
        raise ValueError(f'generate: output_type is "both" or "text", not {output_type!r}')
    prefix = prefill(model, variables, prompt)
    if not model.unrolled:
        model, variables = decoding_form(model, variables)
        prefix = unroll_kv(prefix) if model.unrolled else prefix

    def body(loop: _Loop) -> _Loop:
        (audio_hidden, text_hidden), out = model.apply(
            variables,
            loop.audio_in[:, None],
            loop.text_in[:, None],
            positions=(loop.start + loop.step)[:, None],
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

    def goes_on(loop: _Loop, most_done: int):
        done = loop.of_rows(loop.done).reshape(prompt.mask.shape[0], -1)
        num_done = jnp.sum(done, axis=1)
        return (loop.step < max_steps) & jnp.any(num_done < most_done)

    sizes = [group_size]
    while len(sizes) <= halvings and sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    loop = _first(model, prompt, group_size, max_steps)
    for size in sizes:
        loop = loop if size == group_size else _halved(loop, prompt.mask.shape[0])
        most_done = size if size == sizes[-1] else size // 2
        loop = jax.lax.while_loop(functools.partial(goes_on, most_done=most_done), body, loop)
    return _rollout(loop, group_size)


def _halved(loop: _Loop, num_prompts: int) -> _Loop:
    """Goes on with half as many answers of each prompt: all that are live, filled up with others.

    Rows stay with their prompts, so that keys stay shared, and on the devices that hold them.
    """
    done = loop.of_rows(loop.done).reshape(num_prompts, -1)
    kept = jnp.argsort(done, axis=1, stable=True)[:, : done.shape[1] // 2]

    def keep(x, axis=0):
        lead, rest = x.shape[:axis], x.shape[axis + 1 :]
        index = jnp.expand_dims(kept, [*range(axis), *range(axis + 2, x.ndim + 1)])
        taken = jnp.take_along_axis(x.reshape(*lead, *done.shape, *rest), index, axis=axis + 1)
        return taken.reshape(*lead, -1, *rest)

    return loop.replace(
        row=keep(jnp.arange(done.size) if loop.row is None else loop.row),
        **{name: keep(getattr(loop, name)) for name in ("start", "text_in", "audio_in")},
        text_done=keep(loop.text_done),
        # Stacked or by layers, rows are the fourth axis from the end.
        cache=jax.tree.map(lambda x: keep(x, x.ndim - 4), loop.cache),
    )


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


def _first(model: KimiAudio, prompt: Prompt, group_size: int, max_steps: int) -> _Loop:
    config, rows = model.config, prompt.mask.shape[0] * group_size
    ids, shape = config.special, (max_steps, rows)
    blank = jnp.full(shape, ids.kimia_text_blank, jnp.int32)
    trace = {"text_ids": blank, "audio_ids": blank}
    for stream in ("text", "audio"):
        trace[f"{stream}_mask"] = jnp.zeros(shape, bool)
        trace[f"{stream}_logp"] = jnp.zeros(shape, jnp.float32)
    trace["mask"] = jnp.zeros(shape, bool)
    return _Loop(
        step=jnp.int32(0),
        row=None,
        start=jnp.repeat(prompt.length, group_size),
        text_in=jnp.full(rows, ids.kimia_text_blank, jnp.int32),
        audio_in=jnp.full(rows, ids.kimia_assistant_msg_start, jnp.int32),
        text_done=jnp.zeros(rows, bool),
        cache=init_cache(config, rows, max_steps, model.dtype, model.unrolled),
        done=jnp.zeros(rows, bool),
        trace=trace,
    )


def _advance(config, loop: _Loop, logits, cache, rng, samplings, output_type) -> _Loop:
    """Draws both streams from logits {stream: float32[b, V]} and applies the loop's rules."""
    draws = {}
    for stream, key in zip(("text", "audio"), jax.random.split(rng), strict=True):
        history = loop.of_rows(loop.trace[f"{stream}_ids"])
        among = None if loop.row is None else (loop.row, loop.done.size)
        draws[stream] = draw(key, logits[stream], history, loop.step, samplings[stream], among)
    now = _apply_rules(config, loop, draws["text"], draws["audio"], output_type)
    for stream, sampling in samplings.items():
        logp = chosen_logp(logits[stream], now[f"{stream}_ids"], sampling.logp_temperature)
        now[f"{stream}_logp"] = jnp.where(now[f"{stream}_mask"], logp, 0.0)
    return loop.replace(
        step=loop.step + 1,
        text_in=now["text_ids"],
        audio_in=now["audio_ids"],
        text_done=loop.text_done | (now["text_ids"] == config.special.kimia_text_eos),
        cache=cache,
        done=loop.set_rows(loop.done, now["done"]),
        trace={key: loop.set_rows(x, now[key], loop.step) for key, x in loop.trace.items()},
    )


def _apply_rules(config: KimiAudioConfig, loop: _Loop, text_draw, audio_draw, output_type) -> dict:
    """What is fed back at this step, where the draws stand, and which rows are done."""
    ids, done = config.special, loop.of_rows(loop.done)
    live = ~done
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
        "done": done | (live & ends),
    }


def _rollout(loop: _Loop, group_size: int) -> Rollout:
    def grouped(x):  # [R, B] -> [P, G, R]
        return x.T.reshape(-1, group_size, x.shape[0])

    trace = {key: grouped(value) for key, value in loop.trace.items()}
    steps = jnp.sum(trace.pop("mask"), axis=-1, dtype=jnp.int32)
    return Rollout(**trace, steps=steps, finished=loop.done.reshape(-1, group_size))


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

    streams: rollout_streams or response_streams, each [P, G, R]. logp_chunk: see
    vocab.token_logp.
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
        logp, entropy = token_logp(
            hidden,
            variables["params"][f"{stream}_head"]["kernel"],
            streams[f"{stream}_out"].reshape(rows, steps),
            temperature=temperature,
            chunk=logp_chunk,
            dtype=model.dtype,
        )
        mask = streams[f"{stream}_mask"]
        out[f"{stream}_logp"] = jnp.where(mask, logp.reshape(shape), 0.0)
        out[f"{stream}_entropy"] = jnp.where(mask, entropy.reshape(shape), 0.0)
    return out


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
