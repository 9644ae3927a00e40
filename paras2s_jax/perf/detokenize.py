"""Detokenizing a batch of answers against one after the other, and what approximations change.

One after the other is done in two ways: as streams of 30-code chunks whose conditions are computed
for every frame, which is how the release speaks, and whole, with all that is saved in the batch, in
the smallest of a few padded lengths. Random weights, released architecture.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.convert import bigvgan, flow_matching
from paras2s_jax.models.bigvgan import BigVGAN, BigVGANConfig, log_mel
from paras2s_jax.models.detokenizer import FlowMatchingDetokenizer
from paras2s_jax.models.detokenizer_chunks import draw_noise, frame_mask
from paras2s_jax.models.flow_matching import FRAMES_PER_CODE, FlowMatchingConfig, FlowMatchingDiT
from paras2s_jax.perf.race import Race, check_equal, pin, race, with_lengths
from paras2s_jax.stages.registry import Figures

DIT = FlowMatchingConfig(hidden_size=128, depth=4, num_heads=4, semantic_vocab_size=1024)
VOCODER = BigVGANConfig(
    upsample_rates=(5, 4, 4, 3, 2),
    upsample_kernel_sizes=(9, 8, 8, 5, 4),
    upsample_initial_channel=32,
    resblock_kernel_sizes=(3, 7, 11),
    resblock_dilation_sizes=((1, 3, 5),) * 3,
    num_mels=80,
    sampling_rate=24_000,
    hop_size=480,
    n_fft=1920,
    win_size=1920,
)
INIT_SCALE = 0.02  # Of the modules' kernels and embeddings.
ODE_STEPS = (15, 10, 5)  # Instead of the release's 30.


@dataclasses.dataclass(frozen=True)
class Work:
    """answers: how many, of min_codes to max_codes (12.5 a second). rows_at_once: of the batch."""

    dit: FlowMatchingConfig = DIT
    vocoder: BigVGANConfig = VOCODER
    answers: int = 6
    min_codes: int = 10
    max_codes: int = 60
    rows_at_once: int = 3
    first: int = 30
    chunk: int = 30
    look_ahead: int = 12
    max_kv: int = 900

    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """int32[N, S] and their lengths, spread evenly from the shortest to the longest."""
        rng = np.random.default_rng(0)
        lens = np.linspace(self.min_codes, self.max_codes, self.answers).round().astype(np.int32)
        shape = (self.answers, self.max_codes)
        codes = rng.integers(0, self.dit.semantic_vocab_size, shape).astype(np.int32)
        return codes, rng.permutation(lens)


def make(work: Work) -> FlowMatchingDetokenizer:
    """A float32 detokenizer of random weights that keep the size of what goes through them."""
    dit, vocoder = FlowMatchingDiT(work.dit), BigVGAN(work.vocoder, folded=True)
    settings = {name: getattr(work, name) for name in ("first", "chunk", "look_ahead", "max_kv")}
    return FlowMatchingDetokenizer.from_models(
        dit,
        _random(functools.partial(flow_matching.init, dit), num_in_axes=1),
        vocoder,
        _random(functools.partial(bigvgan.init, vocoder), num_in_axes=2),
        **settings,
    )


def _random(init: Callable, num_in_axes: int) -> dict:
    """Fresh parameters; kernels [..., in axes, out] get the scale in ** -0.5, embeddings 1."""

    def scaled(path, x):
        size = {"kernel": math.prod(x.shape[-1 - num_in_axes : -1]), "embedding": 1}
        return x * (size[path[-1].key] ** -0.5 / INIT_SCALE) if path[-1].key in size else x

    fresh = nn.meta.unbox(jax.jit(init)(jax.random.key(0)))["params"]
    return jax.tree_util.tree_map_with_path(scaled, fresh)


class PerFrame(FlowMatchingDetokenizer):
    """Adaptive norms for every frame, as in the release, not once for the four of a code."""

    def _velocity(self, prefix, codes, mask=None, emit=()):
        return super()._velocity(prefix, jnp.repeat(codes, FRAMES_PER_CODE, axis=1), mask, emit)


class Streams:
    """Answers one after the other, each a stream of chunks; compiled once per kind of chunk."""

    def __init__(self, detokenizer: FlowMatchingDetokenizer):
        fields = dataclasses.fields(detokenizer)
        self._detokenizer = PerFrame(**{f.name: getattr(detokenizer, f.name) for f in fields})
        num_mels = detokenizer.dit.config.input_size

        def chunk(detokenizer, state, codes, key, number, is_final, len_codes):
            held = state.held.shape[1]
            noise = draw_noise(key[None], number, held + codes.shape[1], num_mels)
            state, _, wave = detokenizer.stream_chunk(state, codes, noise, is_final, len_codes)
            return state, wave[0]

        self._chunk = jax.jit(chunk, static_argnums=5)

    def __call__(self, codes: np.ndarray, lens: np.ndarray, keys: jax.Array) -> list[jax.Array]:
        """codes: int32[N, S]. Returns: N waves."""
        return [self._speak(row[:size], key) for row, size, key in zip(codes, lens, keys)]

    def _speak(self, codes: np.ndarray, key: jax.Array) -> jax.Array:
        made, state, waves = self._detokenizer, self._detokenizer.start(1), []
        pieces = np.split(codes, np.arange(made.first, len(codes), made.chunk))
        for number, piece in enumerate(pieces):
            is_final, len_codes = number + 1 == len(pieces), None
            if is_final:
                whole = made.chunk if number else made.first
                len_codes = np.array([len(piece)], np.int32)
                piece = np.pad(piece, (0, whole - len(piece)))
            state, wave = self._chunk(
                made, state, piece[None], key, np.int32(number), is_final, len_codes
            )
            waves.append(wave)
        return jnp.concatenate(waves)[: len(codes) * made.samples_per_code]


@jax.jit
def decode(detokenizer, codes, lens, keys):
    """Whole answers: waves float32[B, L]."""
    return detokenizer.decode(codes, lens, keys)[0]


def one_by_one(detokenizer, codes, lens, keys) -> list[jax.Array]:
    """Answers whole, one after the other, each in the next multiple of a chunk. Returns: waves."""
    waves = []
    for row, size in enumerate(lens):
        room = -(-size // detokenizer.chunk) * detokenizer.chunk
        padded = np.pad(codes[row, :size], (0, room - size))
        wave = decode(detokenizer, padded[None], lens[row : row + 1], keys[row : row + 1])[0]
        waves.append(wave[: size * detokenizer.samples_per_code])
    return waves


def measure(work: Work, repeats: int = 3) -> Race:
    """Races the batch against streams and against whole answers, once all waves agree."""
    detokenizer, (codes, lens) = make(work), work.codes()
    keys = jax.random.split(jax.random.key(0), work.answers)
    batched, streams = detokenizer.replace(rows_at_once=work.rows_at_once), Streams(detokenizer)
    separate_keys = list(keys)

    def ours(lens=lens):
        return decode(batched, codes, lens, keys)

    def theirs():
        return streams(codes, lens, separate_keys)

    def whole():
        return one_by_one(detokenizer, codes, lens, keys)

    made = ours()
    heard = [wave[: n * detokenizer.samples_per_code] for wave, n in zip(made, lens)]
    together = np.concatenate(heard)
    difference = max(
        check_equal("detokenize", together, np.concatenate(other()), 1e-3)
        for other in (theirs, whole)
    )
    result = race("detokenize", ours, theirs, repeats=repeats, warmup=1)
    against_whole = race("detokenize", ours, whole, repeats=max(1, repeats // 2), warmup=1)
    extra = {
        "whole_ratio": against_whole.ratio,
        "audio_s_per_s": len(together) / work.vocoder.sampling_rate / min(result.ours_s),
        "max_difference": difference,
        "level": float(np.sqrt(np.mean(np.square(together)))),
    }
    return with_lengths(result, ours, (lens[::-1].copy(), np.maximum(lens // 2, 1)), extra)


def options(detokenizer: FlowMatchingDetokenizer) -> dict[str, FlowMatchingDetokenizer]:
    """The detokenizer under every approximation."""

    def halve(tree):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    half = detokenizer.replace(
        dit=detokenizer.dit.clone(**types),
        dit_params=halve(detokenizer.dit_params),
        vocoder=detokenizer.vocoder.clone(**types),
        vocoder_params=halve(detokenizer.vocoder_params),
    )
    fewer = {f"steps_{n}": detokenizer.replace(ode_steps=n) for n in ODE_STEPS}
    return fewer | {"bfloat16": half}


def approximations(work: Work) -> dict[str, float]:
    """What each option changes in answers of up to one chunk, against float32 and all steps.

    Returns: for each, `mel_error`: root mean square of the change in units of the mel's standard
    deviation; `log_mel_distance`: mean absolute change of the waves' log-mel, in nats;
    `speed`: in units of the exact one's.
    """
    exact, (codes, lens) = make(work), work.codes()
    lens = np.minimum(lens, work.first)
    codes = codes[:, : work.first]
    keys = jax.random.split(jax.random.key(0), work.answers)
    real = np.asarray(frame_mask(lens, work.first))

    @jax.jit
    def solve(detokenizer):
        def noise(number, size):
            return draw_noise(keys, number, size, work.dit.input_size)

        return detokenizer.render(codes, lens, noise)[0]

    # Compiled for each vocoder, not for each number of steps.
    @functools.partial(jax.jit, static_argnums=0)
    def speak(vocoder, params, mel):
        return vocoder.apply({"params": params}, mel, FRAMES_PER_CODE * lens, method="wave")[0]

    hear = jax.jit(functools.partial(log_mel, config=work.vocoder))

    def timed(detokenizer):
        def run():
            mel = solve(detokenizer)
            return mel, speak(detokenizer.vocoder, detokenizer.vocoder_params, mel)

        (mel, wave), seconds = jax.block_until_ready(run()), []
        for _ in range(2):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - start)
        return *(np.asarray(x)[real] for x in (mel, hear(wave))), min(seconds)

    mel, heard, seconds = timed(exact)
    figures = {}
    for name, detokenizer in options(exact).items():
        other_mel, other_heard, other_seconds = timed(detokenizer)
        error = np.sqrt(np.mean(np.square(other_mel - mel))) / np.std(mel)
        figures |= {
            f"{name}/mel_error": float(error),
            f"{name}/log_mel_distance": float(np.mean(np.abs(other_heard - heard))),
            f"{name}/speed": seconds / other_seconds,
        }
    return figures


def run(
    answers: int = Work.answers,
    width: int = DIT.hidden_size,
    depth: int = DIT.depth,
    channels: int = VOCODER.upsample_initial_channel,
    threads: int = 1,
) -> Figures:
    """Races a batch of answers of 0.8 to 4.8 s, then measures the approximations.

    Returns: figures "detokenize/ratio" (speed in units of the streams'), "detokenize/whole_ratio"
    (of one whole answer after the other), "detokenize/<option>/mel_error" and others.
    """
    pin(threads)
    work = Work(
        dit=dataclasses.replace(DIT, hidden_size=width, depth=depth),
        vocoder=dataclasses.replace(VOCODER, upsample_initial_channel=channels),
        answers=answers,
    )
    result = measure(work)
    changed = {f"detokenize/{name}": value for name, value in approximations(work).items()}
    print(
        f"{answers} answers of {work.min_codes} to {work.max_codes} codes, {depth} layers of "
        f"{width}, vocoder of {channels} channels: {result.ratio:.2f} times the speed of one "
        f"stream of {work.chunk}-code chunks after the other, "
        f"{result.extra['whole_ratio']:.2f} times that of one whole answer after the other",
        flush=True,
    )
    for name in options(make(work)):
        error, distance, speed = (
            changed[f"detokenize/{name}/{what}"]
            for what in ("mel_error", "log_mel_distance", "speed")
        )
        print(
            f"{name}: mel off by {error:.3g} of its deviation, log-mel of the wave by "
            f"{distance:.3g}, {speed:.2f} times as fast (random weights)",
            flush=True,
        )
    return result.figures() | changed
