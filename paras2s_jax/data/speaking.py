"""Clips -> wavs: in parallel, resumable, each file named after all that shapes its sound."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from paras2s_jax.audio import synth, wave

_CHUNK = 32

# A synthesizer's name and options (a JSON object): hashable, and the same in every process.
Maker = tuple[str, str]


def maker_of(synthesizer: str, options: dict | None = None) -> Maker:
    """What `speak` takes, to make the synthesizer that `synth.make_synthesizer` knows."""
    return synthesizer, json.dumps(options or {}, sort_keys=True)


ESPEAK = maker_of("espeak")


class Clip(NamedTuple):
    """A clip to be: a record that still lacks `wav` and `dur_s`, and how to speak it."""

    row: Any
    folder: str
    name: str
    text: str
    delivery: synth.Delivery


def rng_of(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the names alone, on every machine."""
    key = "/".join([str(seed), *names]).encode()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()))


def speak(
    clips: Sequence[Clip],
    out_dir: Path,
    maker: Maker = ESPEAK,
    *,
    num_workers: int = 1,
    progress: bool = False,
) -> tuple[list, int]:
    """Makes the clips' wavs (16 kHz PCM16) where missing or damaged, in parallel.

    Args:
        maker: of `maker_of`.

    Returns: (records with `wav` and `dur_s`, in the clips' order; number of wavs made).
    """
    work = functools.partial(_speak_chunk, Path(out_dir), maker)
    chunks = [clips[at : at + _CHUNK] for at in range(0, len(clips), _CHUNK)]
    rows, num_made = [], 0
    with tqdm.tqdm(total=len(clips), desc="synthesize", unit="clip", disable=not progress) as bar:
        for part, made in _parallel(work, chunks, num_workers):
            rows += part
            num_made += made
            bar.update(len(part))
    return rows, num_made


def _parallel(work: Callable, chunks: Sequence, num_workers: int) -> Iterator:
    """Results of work(chunk) in order."""
    if num_workers <= 1:
        yield from map(work, chunks)
        return
    # Spawned, because a fork of a process that runs JAX or TensorFlow threads can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as executor:
        yield from executor.map(work, chunks)


def _speak_chunk(out_dir: Path, maker: Maker, clips: Sequence[Clip]) -> tuple:
    """Returns: (records of the chunk, number of wavs made)."""
    rows, num_made = [], 0
    for clip in clips:
        # The name holds a digest of all that shapes the sound: a wav of an earlier bank, seed or
        # style table is never taken for the one wanted now.
        spoken = repr((maker, clip.text, dataclasses.astuple(clip.delivery))).encode()
        digest = hashlib.blake2b(spoken, digest_size=4).hexdigest()
        relative = f"wavs/{clip.folder}/{clip.name}-{digest}.wav"
        num_samples = _num_samples(out_dir / relative)
        if not num_samples:
            synthesizer = _synthesizer(*maker)
            sound = synthesizer.speak(clip.text, clip.delivery)
            sound = wave.resample(sound, synthesizer.rate_hz, wave.RATE_HZ)
            wave.save(out_dir / relative, sound, wave.RATE_HZ)
            num_samples = len(sound)
            num_made += 1
        dur_s = round(num_samples / wave.RATE_HZ, 4)
        rows.append(dataclasses.replace(clip.row, wav=relative, dur_s=dur_s))
    return rows, num_made


def _num_samples(path: Path) -> int:
    """Length of a sound file, or 0 if it is missing or damaged and must be made again."""
    if not path.is_file():
        return 0
    try:
        return len(wave.load(path, wave.RATE_HZ))
    except wave.AudioError:
        return 0


@functools.cache
def _synthesizer(name: str, options: str) -> synth.Synthesizer:
    return synth.make_synthesizer(name, **json.loads(options))
