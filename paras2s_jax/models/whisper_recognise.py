"""Speech of any length -> tokens, with a released Whisper: windows, second tries, times.

The algorithm is that of transformers' generation_whisper.py (WhisperGenerationMixin.generate),
after section 4.5 of the paper: windows of 30 s one after the other, each said greedily and then
at rising temperatures until it looks sound; the next window starts where the last whole
segment ended. What it does not have: beams, and conditioning on what was said before.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.audio.mel import HOP, whisper_log_mel
from paras2s_jax.models.whisper import WhisperASR
from paras2s_jax.models.whisper_decode import detect_language, say
from paras2s_jax.models.whisper_ids import WhisperIds

STEP_S = 0.02  # Between two timestamp tokens: one encoder frame.
STEP_FRAMES = 2  # The same in mel frames.


@dataclass(frozen=True)
class Fallback:
    """When a window is said once more, and how (whisper/transcribe.py: the defaults).

    temperatures: tried in this order; the last one is taken as it is.
    compression_ratio_threshold: tokens that compress better than this repeat themselves.
    logprob_threshold: a mean log-probability below this is a guess.
    no_speech_threshold: a guess with more than this probability of no speech is left out.
    None leaves out a test.
    """

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6


GREEDY = Fallback((0.0,), None, None, None)


@dataclass(frozen=True)
class Attempt:
    """A window said once: tokens without the end; finished: whether the end was said."""

    tokens: tuple[int, ...]
    finished: bool
    mean_logp: float
    no_speech_prob: float
    temperature: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech, seconds from the start of the audio. tokens include its times."""

    start_s: float
    end_s: float
    tokens: tuple[int, ...]
    attempt: Attempt


@dataclass(frozen=True)
class Recognition:
    """What was heard in one audio. language_id: None for a model of English only."""

    segments: tuple[Segment, ...]
    language_id: int | None

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for segment in self.segments for token in segment.tokens)


def recognise(
    model: WhisperASR,
    variables: dict,
    input_features: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    ids: WhisperIds,
    language: str | Sequence[str] | None = None,
    task: str = "transcribe",
    return_timestamps: bool = False,
    max_new_tokens: int | None = None,
    fallback: Fallback = Fallback(),
    rng: jax.Array | None = None,
) -> list[Recognition]:
    """Transcribes (or translates) log-mel spectrograms, all rows at once.

    Args:
      input_features: float[B, M, A], 100 frames a second. Up to the encoder's 30 s, all of it is
        heard in one window; longer ones are cut, which needs times.
      attention_mask: [B, A], which frames of longer ones are real, from the left; None: all.
      language: "en", "<|en|>", "English", or one for each row; None detects it per row.
      task: "transcribe", or "translate" into English.
      return_timestamps: let times be said for short audio too.
      max_new_tokens: per window, the end included; None: as many as the decoder has room for.
      rng: for the draws at temperatures above 0; None is key 0.

    Returns:
      one Recognition per row.
    """
    rows, _, total = input_features.shape
    size = 2 * model.config.max_source_positions
    timestamps = return_timestamps or total > size
    ends = np.full(rows, total)
    if attention_mask is not None and total > size:
        ends = np.asarray(attention_mask).astype(int).sum(axis=1)
    rng = jax.random.key(0) if rng is None else rng
    mel = _with_room(input_features, size)
    seek, heard, speaker = np.zeros(rows, int), [[] for _ in range(rows)], None
    while (is_open := seek < ends).any():
        len_frames = np.clip(ends - seek, 0, size)
        encoded = _encode_window(model, variables, mel, seek, len_frames)
        if speaker is None:
            languages = _languages(model, variables, encoded, ids, language)
            prompts = [ids.prompt(row, task, timestamps) for row in languages]
            speaker = _Speaker(model, ids, fallback, timestamps, max_new_tokens, prompts)
        rng, key = jax.random.split(rng)
        for row, said in speaker.say(variables, encoded, is_open, key).items():
            segments, step = [], len_frames[row]
            if said is not None:
                segments, step = cut(said, ids, step, seek[row] / STEP_FRAMES * STEP_S)
            heard[row] += segments
            seek[row] += step
    return [Recognition(tuple(row), language) for row, language in zip(heard, languages)]


def recognise_waves(
    model: WhisperASR, variables: dict, waves: Sequence[np.ndarray], **options
) -> list[Recognition]:
    """`recognise` for waves at 16 kHz, float32[L] each, of any length; options: its others.

    A row does not depend on its company: waves of up to 30 s, which are padded to that as the
    released extractor does it, and longer ones are heard in two batches.
    """
    size = 2 * model.config.max_source_positions * HOP
    results: list[Recognition | None] = [None] * len(waves)
    for is_long in (False, True):
        members = [row for row, wave in enumerate(waves) if (len(wave) > size) == is_long]
        if not members:
            continue
        lens = np.array([len(waves[row]) for row in members], np.int32)
        # Whole windows, so that few lengths are compiled.
        padded = np.zeros((len(members), max(1, -(-lens.max() // size)) * size), np.float32)
        for at, row in enumerate(members):
            padded[at, : lens[at]] = waves[row]
        features, mask = _features(padded, lens, model.config.num_mel_bins, is_long)
        heard = recognise(model, variables, features, mask, **options)
        for row, recognition in zip(members, heard):
            results[row] = recognition
    return results


@functools.partial(jax.jit, static_argnames=("num_mels", "is_long"))
def _features(waves, lens, num_mels: int, is_long: bool) -> tuple[jax.Array, jax.Array]:
    """Returns: (float32[B, M, A], bool[B, A])."""
    if is_long:
        mel, len_frames = whisper_log_mel(waves, lens, num_mels, mirror_ends=True)
    else:
        mel, len_frames = whisper_log_mel(waves, None, num_mels)
    return jnp.swapaxes(mel, 1, 2), jnp.arange(mel.shape[1]) < len_frames[:, None]


@functools.partial(jax.jit, static_argnames="size")
def _with_room(input_features: jax.Array, size: int) -> jax.Array:
    """float[B, M, A] -> float[B, A', M], a whole number of windows and an empty one."""
    mel = jnp.swapaxes(input_features, 1, 2)
    return jnp.pad(mel, ((0, 0), (0, -mel.shape[1] % size + size), (0, 0)))


@functools.partial(jax.jit, static_argnames="model")
def _encode_window(model: WhisperASR, variables, mel, seek, len_frames) -> jax.Array:
    """Hears len_frames: int[B] from seek: int[B] on; zeros fill up the window, as there."""
    size = 2 * model.config.max_source_positions
    window = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(mel, seek)
    is_real = jnp.arange(size) < len_frames[:, None]
    return model.apply(variables, jnp.where(is_real[..., None], window, 0), method="encode")[0]


def _languages(model, variables, encoded, ids: WhisperIds, language) -> list[int | None]:
    """One language id per row."""
    rows = len(encoded)
    if language is None:
        if not ids.lang_to_id:
            return [None] * rows
        return detect_language(model, variables, encoded, ids=ids).tolist()
    names = [language] * rows if isinstance(language, str) else list(language)
    if len(names) != rows:
        raise ValueError(f"{len(names)} languages for {rows} rows: give one, or one for each")
    return [ids.language(name) for name in names]


@dataclass(frozen=True)
class _Speaker:
    """Says windows. prompts: one tuple of ids per row, all of one length."""

    model: WhisperASR
    ids: WhisperIds
    fallback: Fallback
    timestamps: bool
    max_tokens: int | None
    prompts: list[tuple[int, ...]]

    def say(self, variables, encoded, is_open: np.ndarray, rng) -> dict[int, Attempt | None]:
        """Tries rising temperatures until every open row sounds right.

        encoded: float[B, S, D]; is_open: bool[B].
        Returns: per open row the attempt that stands, None where there is no speech.
        """
        room = self.model.config.max_target_positions - len(self.prompts[0])
        prompts, max_tokens = np.array(self.prompts, np.int32), self.max_tokens or room
        options = {"ids": self.ids, "timestamps": self.timestamps, "max_tokens": max_tokens}
        results, waits = {}, is_open.copy()
        for number, temperature in enumerate(self.fallback.temperatures):
            hot = ()
            if temperature > 0:
                hot = (jnp.float32(temperature), jax.random.fold_in(rng, number))
            heard = say(self.model, variables, encoded, prompts, ~waits, *hot, **options)
            transcript, no_speech = jax.device_get(heard)
            for row in np.flatnonzero(waits):
                said = Attempt(
                    tuple(transcript.tokens[row, : transcript.lens[row]].tolist()),
                    bool(transcript.finished[row]),
                    float(transcript.mean_logp[row]),
                    float(no_speech[row]),
                    temperature,
                )
                vocab_size = self.model.config.vocab_size
                waits[row], is_silent = judge(said, self.fallback, self.ids, vocab_size)
                results[int(row)] = None if is_silent else said
            if not waits.any():
                break
        return results


def judge(said: Attempt, fallback: Fallback, ids: WhisperIds, vocab_size: int) -> tuple[bool, bool]:
    """Whether to try again, and whether this is no speech (_need_fallback)."""
    is_guess = (
        fallback.logprob_threshold is not None and said.mean_logp < fallback.logprob_threshold
    )
    if (
        is_guess
        and fallback.no_speech_threshold is not None
        and said.no_speech_prob > fallback.no_speech_threshold
    ):
        return False, True
    limit = fallback.compression_ratio_threshold
    tokens = said.tokens + (ids.eos_token_id,) * said.finished
    return is_guess or (limit is not None and compression_ratio(tokens, vocab_size) > limit), False


def compression_ratio(tokens: Sequence[int], vocab_size: int) -> float:
    """Bytes of the ids by bytes of them after zlib (_retrieve_compression_ratio)."""
    width = int(math.log2(vocab_size) / 8) + 1
    data = b"".join(token.to_bytes(width, "little") for token in tokens)
    return len(data) / len(zlib.compress(data))


def cut(
    said: Attempt, ids: WhisperIds, len_frames: int, start_s: float
) -> tuple[list[Segment], int]:
    """Segments of a window, and the frames to go on by (_retrieve_segment).

    len_frames: of the window; start_s: where it starts.
    """
    tokens, none = said.tokens, ids.no_timestamps_token_id
    is_time = [none is not None and token > none for token in tokens]

    def at(token: int) -> float:
        return start_s + (token - none - 1) * STEP_S

    # Two times in a row: an end, and a start.
    cuts = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]
    if not cuts:
        times = [token for token, yes in zip(tokens, is_time) if yes]
        says_end = bool(times) and times[-1] != none + 1
        end_s = at(times[-1]) if says_end else start_s + len_frames // STEP_FRAMES * STEP_S
        return ([Segment(start_s, end_s, tokens, said)] if tokens else []), len_frames
    # A single time at the end: nothing is said after it.
    ends_quietly = is_time[-2:] == [False, True]
    if ends_quietly:
        cuts.append(len(tokens))
    else:
        # What follows the last pair is cut off in the middle: the next window hears it anew.
        cuts[-1] += 1
    pieces = [tokens[begin:end] for begin, end in zip([0, *cuts], cuts)]
    segments = [Segment(at(piece[0]), at(piece[-1]), piece, said) for piece in pieces]
    if ends_quietly:
        return segments, len_frames
    last = pieces[-1]
    segments[-1] = Segment(at(last[0]), at(last[-2]), last, said)
    # Where times were not asked for they follow no rule, and the last may be the start.
    return segments, (last[-2] - none - 1) * STEP_FRAMES or len_frames
