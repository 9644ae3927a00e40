"""Text that a Qwen2LM adds to prompts: the prompts once, then one token per row and step."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from paras2s_jax.models.kv_cache import with_room
from paras2s_jax.models.qwen2 import Qwen2LM, last_real
from paras2s_jax.models.sampling import Sampling, chosen_logp, draw
from paras2s_jax.models.unrolled import decoding_form, unroll_kv

GREEDY = Sampling(temperature=0.0)


class Generated(struct.PyTreeNode):
    """What `generate` wrote.

    tokens: int32[B, R], without prompt and end token, 0 past lens: int32[B].
    mean_logp: float32[B], of the chosen tokens, the end token included, under
    softmax(logits / temperature) over all ids (temperature 1 when greedy).
    finished: bool[B], whether an end token came before the limit.
    """

    tokens: jax.Array
    lens: jax.Array
    mean_logp: jax.Array
    finished: jax.Array


def generate(
    model: Qwen2LM,
    variables: dict,
    *,
    input_ids: jax.Array | None = None,
    inputs_embeds: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    position_ids: jax.Array | None = None,
    max_new_tokens: int,
    group_size: int = 1,
    eos_token_ids: int | Sequence[int] = (),
    sampling: Sampling = GREEDY,
    rng: jax.Array | None = None,
) -> Generated:
    """Continues every prompt until its end token; stops when all answers have ended.

    Compiled once per shape of the prompts and per setting; lengths within a shape are free.

    Args:
      model, variables: {"params": …} and {"lora": …} if the model has adapters; either as they
        are or in decoding_form.
      input_ids: int32[P, T], or inputs_embeds: float[P, T, D] (give one).
      attention_mask: bool or int[P, T], which prompt tokens are real, at least one per row;
        padding may stand on either side. Default all.
      position_ids: int32[P, T] or, as multimodal RoPE has them, [3, P, T]. By default each
        row's real tokens count 0, 1, 2, …; new tokens go on from the largest one.
      max_new_tokens: at most R tokens per row, the end token included.
      group_size: G answers to each prompt, which is run once: B = P * G rows, prompt by prompt.
      eos_token_ids: any of them ends its row.
      sampling: how tokens are drawn.
      rng: needed unless greedy.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("generate: give input_ids or inputs_embeds, and not both")
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}, not at least 1")
    if rng is None and not sampling.is_greedy:
        raise ValueError(f"generate: drawing at temperature {sampling.temperature} needs an rng")
    ends = (eos_token_ids,) if isinstance(eos_token_ids, int) else tuple(map(int, eos_token_ids))
    prompt = {
        "input_ids": input_ids,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }
    return _generate(model, variables, prompt, rng, max_new_tokens, group_size, ends, sampling)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _generate(
    model, variables, prompt, rng, max_new_tokens, group_size, ends, sampling
) -> Generated:
    prompt = _complete(prompt)
    hidden, kv = _prefill(model, variables, prompt)
    hidden = jnp.repeat(hidden, group_size, axis=0)
    rows = hidden.shape[0]
    if not model.unrolled:
        model, variables = decoding_form(model, variables)
        kv = unroll_kv(kv) if model.unrolled else kv
    cache, first, seen = _memory(model, kv, prompt["attention_mask"], max_new_tokens, group_size)

    def choose(state: Generated, step, hidden) -> Generated:
        logits = model.apply(variables, hidden, method="logits")
        step_rng = None if rng is None else jax.random.fold_in(rng, step)
        token = draw(step_rng, logits, state.tokens, step, sampling)
        logp = chosen_logp(logits, token, sampling.logp_temperature)
        return _append(state, step, token, logp, ends)

    start = jnp.repeat(_next_positions(prompt), group_size, axis=-2)

    def goes_on(carry):
        step, state, _ = carry
        return (step < max_new_tokens) & ~jnp.all(state.finished)

    def extend(carry):
        step, state, cache = carry
        _, out = model.apply(
            variables,
            state.tokens[step - 1][:, None],
            position_ids=start + step - 1,
            cache=cache,
            cache_index=first + step - 1,
            **seen,
        )
        return step + 1, choose(state, step, out["hidden"][:, 0]), out["cache"]

    state = choose(_empty(rows, max_new_tokens), 0, hidden)
    _, state, _ = jax.lax.while_loop(goes_on, extend, (jnp.int32(1), state, cache))
    return state.replace(
        tokens=state.tokens.T,
        mean_logp=state.mean_logp / jnp.maximum(state.lens + state.finished, 1),
    )


def _memory(model: Qwen2LM, kv: dict, mask: jax.Array, steps: int, group_size: int):
    """What the steps see of the past: (cache, its slots in use, further arguments of the model).

    A group reads its prompt as a prefix; a prompt's only answer goes on in the same cache.
    """
    if group_size == 1:
        seen = jnp.pad(mask, ((0, 0), (0, steps)), constant_values=True)
        return with_room(kv, steps), mask.shape[1], {"attention_mask": seen}
    cache = model.init_cache(mask.shape[0] * group_size, steps)
    return cache, 0, {"prefix": kv, "prefix_mask": mask}


def _complete(prompt: dict) -> dict:
    """The prompt with a bool mask and positions."""
    given = prompt["inputs_embeds"] if prompt["input_ids"] is None else prompt["input_ids"]
    mask = prompt["attention_mask"]
    mask = jnp.ones(given.shape[:2], bool) if mask is None else mask.astype(bool)
    positions = prompt["position_ids"]
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return prompt | {"attention_mask": mask, "position_ids": positions}


def _prefill(model: Qwen2LM, variables: dict, prompt: dict) -> tuple[jax.Array, dict]:
    """Hidden state of each row's last real token, float[P, D], and the prompt's {"k", "v"}."""
    _, out = model.apply(variables, emit=("kv",), **prompt)
    return last_real(out["hidden"], prompt["attention_mask"]), out["kv"]


def _next_positions(prompt: dict) -> jax.Array:
    """Position of each row's first new token: int32[P, 1], or [3, P, 1] as the prompt's."""
    positions = prompt["position_ids"]
    largest = jnp.max(jnp.where(prompt["attention_mask"], positions, -1), axis=-1, keepdims=True)
    if positions.ndim == 3:
        largest = jnp.broadcast_to(jnp.max(largest, axis=0), largest.shape)
    return largest + 1


def _empty(rows: int, steps: int) -> Generated:
    """Nothing written yet. In the loop, tokens is [R, B] and mean_logp holds the sum."""
    return Generated(
        tokens=jnp.zeros((steps, rows), jnp.int32),
        lens=jnp.zeros(rows, jnp.int32),
        mean_logp=jnp.zeros(rows, jnp.float32),
        finished=jnp.zeros(rows, bool),
    )


def _append(state: Generated, step, token, logp, ends: tuple[int, ...]) -> Generated:
    """Takes over the token of every open row; an end token only closes its row."""
    is_open = ~state.finished
    closes = is_open & jnp.isin(token, jnp.array(ends, jnp.int32))
    writes = is_open & ~closes
    return Generated(
        tokens=state.tokens.at[step].set(jnp.where(writes, token, 0)),
        lens=state.lens + writes,
        mean_logp=state.mean_logp + jnp.where(is_open, logp, 0.0),
        finished=state.finished | closes,
    )
