"""What a Whisper says, on the device: token by token, greedy or drawn, with or without times.

The rules of speaking are those of transformers (generation/logits_process.py:
SuppressTokens…, WhisperTimeStampLogitsProcessor, WhisperNoSpeechDetection) and of
whisper/decoding.py. `whisper_recognise.py` decides what to do with the result.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from paras2s_jax.models.whisper import WhisperASR
from paras2s_jax.models.whisper_ids import WhisperIds


class Transcript(struct.PyTreeNode):
    """What was said.

    tokens: int32[B, R], without prompt and end token, 0 past lens: int32[B].
    mean_logp: float32[B], of the chosen tokens, the end token included: near 0 for speech like
    that of training, far below for noise or garbage.
    finished: bool[B], whether the end token came before the limit.
    """

    tokens: jax.Array
    lens: jax.Array
    mean_logp: jax.Array
    finished: jax.Array


# (logits float32[B, V], tokens int32[B, R] so far, their number, whether that is 0)
# -> (token int32[B], logp float32[B]).
Choose = Callable[[jax.Array, jax.Array, jax.Array, bool], tuple[jax.Array, jax.Array]]


@functools.partial(
    jax.jit,
    static_argnames=("model", "prompt", "eos_id", "max_tokens", "suppress", "suppress_first"),
)
def transcribe_greedy(
    model: WhisperASR,
    variables: dict,
    mel: jax.Array,
    mel_mask: jax.Array | None = None,
    *,
    prompt: tuple[int, ...],
    eos_id: int,
    max_tokens: int,
    suppress: tuple[int, ...] = (),
    suppress_first: tuple[int, ...] = (),
) -> Transcript:
    """Most likely token by token, all rows at once; stops when every row has ended.

    mean_logp is that of the free softmax, whatever is suppressed.

    Args:
      model: must have max_target_positions >= len(prompt) + max_tokens.
      variables: of the model.
      mel: float[B, A, M].
      mel_mask: bool[B, A] or None.
      prompt: ids that start every row (start of transcript, language, task, no timestamps).
      eos_id: ends a row.
      max_tokens: at most this many tokens follow the prompt, the end token included.
      suppress: ids that are never chosen.
      suppress_first: ids that cannot come first (transformers: begin_suppress_tokens).
    """
    never, first = _biases(model.config.vocab_size, suppress, suppress_first)

    def choose(logits, _tokens, _count, is_first):
        token = jnp.argmax(logits + (first if is_first else never), axis=-1).astype(jnp.int32)
        return token, _logp_of(token, logits)

    encoded, encoded_mask = model.apply(variables, mel, mel_mask, method="encode")
    prompts = jnp.broadcast_to(jnp.array(prompt, jnp.int32), (mel.shape[0], len(prompt)))
    open_rows = jnp.zeros(mel.shape[0], bool)
    return _say(
        model, variables, encoded, encoded_mask, prompts, open_rows, choose, eos_id, max_tokens
    )[0]


@functools.partial(jax.jit, static_argnames=("model", "ids", "timestamps", "max_tokens"))
def say(
    model: WhisperASR,
    variables: dict,
    encoded: jax.Array,
    prompts: jax.Array,
    skip: jax.Array,
    temperature: jax.Array | None = None,
    rng: jax.Array | None = None,
    *,
    ids: WhisperIds,
    timestamps: bool,
    max_tokens: int,
) -> tuple[Transcript, jax.Array]:
    """One attempt at a window, under the rules of a released Whisper.

    Args:
      encoded: float[B, S, D] of the model's `encode`.
      prompts: int32[B, T]; the first id is the start of transcript.
      skip: bool[B], rows that need not be said (their result means nothing).
      temperature: float32[]; None takes the most likely token. A token is drawn from
        softmax(logits / temperature) over all that is allowed, as in whisper/decoding.py
        (transformers keeps only the 50 likeliest, unless told otherwise).
      rng: for the draws.
      timestamps: let times be said, in pairs around the text.
      max_tokens: at most, the end token included.

    Returns:
      transcript: its mean_logp is under softmax(allowed logits), whatever the temperature.
      no_speech_prob: float32[B], of the no-speech token right after the start of transcript.
    """
    never, first = _biases(model.config.vocab_size, ids.suppress_tokens, ids.begin_suppress_tokens)

    def choose(logits, tokens, count, is_first):
        logits = logits + (first if is_first else never)
        if timestamps:
            logits = allow_timestamps(logits, tokens, count, is_first, ids)
        if temperature is None:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            key = jax.random.fold_in(rng, count)
            token = jax.random.categorical(key, logits / temperature).astype(jnp.int32)
        return token, _logp_of(token, logits)

    transcript, logits = _say(
        model, variables, encoded, None, prompts, skip, choose, ids.eos_token_id, max_tokens
    )
    if ids.no_speech_token_id is None:
        return transcript, jnp.zeros(len(prompts))
    return transcript, jax.nn.softmax(logits[:, 0])[:, ids.no_speech_token_id]


def allow_timestamps(
    logits: jax.Array, tokens: jax.Array, count: jax.Array, is_first: bool, ids: WhisperIds
) -> jax.Array:
    """Forbids what would break the order of times (WhisperTimeStampLogitsProcessor).

    Times come in pairs (end of a segment, start of the next) but for the first and the last
    one, never go back, and are said whenever together they are likelier than any one word.

    logits: float32[B, V], already without suppressed ids; tokens: int32[B, R], of which `count`
    are said. Returns: float32[B, V].
    """
    begin, vocab = ids.no_timestamps_token_id + 1, jnp.arange(logits.shape[-1])
    is_time = vocab >= begin
    forbidden = (vocab == ids.no_timestamps_token_id)[None]
    if is_first:
        forbidden |= ~is_time
        if ids.max_initial_timestamp_index is not None:
            forbidden |= vocab > begin + ids.max_initial_timestamp_index
    else:

        def is_time_at(at):
            said = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(at, 0), 1, axis=1)
            return said >= begin

        after_time = is_time_at(count - 1)
        after_pair = after_time & (is_time_at(count - 2) | (count < 2))
        after_end = after_time & ~after_pair
        forbidden |= after_pair & is_time
        forbidden |= after_end & (vocab < ids.eos_token_id)
        latest = jnp.max(tokens, axis=1, keepdims=True)
        # A segment lasts: only the start of the next may repeat a time.
        forbidden |= is_time & (latest >= begin) & (vocab < latest + ~after_end)
    logits = jnp.where(forbidden, -jnp.inf, logits)
    logp = jax.nn.log_softmax(logits)
    time_logp = jax.nn.logsumexp(logp[:, begin:], axis=-1, keepdims=True)
    must_be_time = time_logp > jnp.max(logp[:, :begin], axis=-1, keepdims=True)
    return jnp.where(must_be_time & ~is_time, -jnp.inf, logits)


@functools.partial(jax.jit, static_argnames=("model", "ids"))
def detect_language(
    model: WhisperASR, variables: dict, encoded: jax.Array, *, ids: WhisperIds
) -> jax.Array:
    """The likeliest language token of each row (WhisperGenerationMixin.detect_language).

    encoded: float[B, S, D]. Returns: int32[B].
    """
    start = jnp.full((len(encoded), 1), ids.decoder_start_token_id, jnp.int32)
    logits, _ = model.apply(variables, start, encoded, method="decode")
    languages = jnp.array([token for _, token in ids.lang_to_id], jnp.int32)
    return languages[jnp.argmax(logits[:, 0, languages], axis=-1)]


def _biases(vocab_size: int, suppress, suppress_first) -> tuple[jax.Array, jax.Array]:
    """-inf at the ids that are never said, and at those that are not said first."""
    never = jnp.zeros(vocab_size).at[jnp.array(suppress, int)].set(-jnp.inf)
    return never, never.at[jnp.array(suppress_first, int)].set(-jnp.inf)


def _logp_of(token: jax.Array, logits: jax.Array) -> jax.Array:
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]


def _say(
    model: WhisperASR,
    variables: dict,
    encoded: jax.Array,
    encoded_mask: jax.Array | None,
    prompts: jax.Array,
    skip: jax.Array,
    choose: Choose,
    eos_id: int,
    max_tokens: int,
) -> tuple[Transcript, jax.Array]:
    """Continues the prompts: int32[B, T]. Returns: also their logits, float32[B, T, V]."""
    rows, start = prompts.shape
    if start + max_tokens > model.config.max_target_positions:
        raise ValueError(
            f"prompt ({start}) + max_tokens ({max_tokens}) exceed the decoder's "
            f"max_target_positions ({model.config.max_target_positions})"
        )

    def run(*args, **kwargs):
        return model.apply(variables, *args, method="decode", emit=True, **kwargs)

    prompt_logits, out = run(prompts, encoded, encoded_mask)
    room = ((0, 0), (0, 0), (0, max_tokens), (0, 0), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x, room), out["kv"])

    def more(carry):
        step, _, _, state, _ = carry
        return (step < max_tokens) & ~jnp.all(state.finished)

    def extend(carry):
        step, token, logp, state, cache = carry
        state = _append(state, step, token, logp, eos_id)
        logits, new = run(
            token[:, None],
            encoded_mask=encoded_mask,
            cache=cache,
            cache_index=start + step,
            cross_kv=out["cross_kv"],
        )
        at = (0, 0, start + step, 0, 0)
        cache = jax.tree.map(
            lambda old, kv: jax.lax.dynamic_update_slice(old, kv, at), cache, new["kv"]
        )
        return step + 1, *choose(logits[:, -1], state.tokens, step + 1, False), state, cache

    state = Transcript(
        tokens=jnp.zeros((rows, max_tokens), jnp.int32),
        lens=jnp.zeros(rows, jnp.int32),
        mean_logp=jnp.zeros(rows, jnp.float32),
        finished=skip,
    )
    chosen = choose(prompt_logits[:, -1], state.tokens, jnp.int32(0), True)
    carry = (jnp.int32(0), *chosen, state, cache)
    state = jax.lax.while_loop(more, extend, carry)[3]
    mean_logp = state.mean_logp / jnp.maximum(state.lens + state.finished, 1)
    return state.replace(mean_logp=mean_logp), prompt_logits


def _append(state: Transcript, step, token, logp, eos_id: int) -> Transcript:
    """Takes over the token of every unfinished row; mean_logp holds the sum meanwhile."""
    is_open = ~state.finished
    ends = is_open & (token == eos_id)
    written = jnp.where(is_open & ~ends, token, 0)
    return Transcript(
        tokens=jax.lax.dynamic_update_slice(state.tokens, written[:, None], (0, step)),
        lens=state.lens + (is_open & ~ends),
        mean_logp=state.mean_logp + jnp.where(is_open, logp, 0.0),
        finished=state.finished | ends,
    )
