"""How fast a host feeds waveforms: seconds of audio that one core delivers per second."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from paras2s_jax.audio import wave
from paras2s_jax.data.batches import Batches
from paras2s_jax.stages.registry import Figures

# Lengths of spoken queries, and the rate of many public recordings.
SHORTEST_S, LONGEST_S = 2.0, 12.4
OTHER_HZ = 44_100
BATCH_SIZE = 32


def run(clips: int, epochs: int) -> Figures:
    """Feeds synthetic wav files through the training pipeline, on one core.

    Every epoch reads, decodes, pads and batches all files anew; the first is not counted, and
    files come from the system's cache.

    Args:
        clips: how many files, of 2 to 12.4 s.
        epochs: how many are timed.

    Returns:
        data/realtime_factor: seconds of audio per second, files of 16 kHz, median over epochs;
        data/realtime_factor_resampled: the same for files of 44.1 kHz; with _cpu: per second of
        processor time, which other work on the machine hardly changes. data/clip_ms: time per clip
        of 16 kHz. data/load: of the machine before and after, the larger.
    """
    load = os.getloadavg()[0]
    figures = {}
    with _one_core(), tempfile.TemporaryDirectory() as folder:
        for rate_hz, suffix in ((wave.RATE_HZ, ""), (OTHER_HZ, "_resampled")):
            root = Path(folder) / str(rate_hz)
            rows = _write_clips(root, clips, rate_hz)
            wall, processor, clip_s = _feed(rows, root, epochs)
            figures[f"data/realtime_factor{suffix}"] = wall
            figures[f"data/realtime_factor{suffix}_cpu"] = processor
            figures[f"data/clip_ms{suffix}"] = 1e3 * clip_s
    return figures | {"data/load": max(load, os.getloadavg()[0])}


def _write_clips(root: Path, clips: int, rate_hz: int) -> list[dict]:
    """Noises of 16 bits. Returns: rows of a manifest."""
    root.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number, dur_s in enumerate(np.linspace(SHORTEST_S, LONGEST_S, clips)):
        samples = rng.normal(0, 0.1, int(dur_s * rate_hz)).astype(np.float32)
        soundfile.write(root / f"{number}.wav", samples, rate_hz, subtype="PCM_16")
        rows.append({"wav": f"{number}.wav"})
    return rows


def _feed(rows: list[dict], root: Path, epochs: int) -> tuple[float, float, float]:
    """Returns: seconds of audio per second and per second of processor time; seconds per clip."""
    batches = Batches(
        rows,
        root=root,
        audio_keys=("wav",),
        batch_size=BATCH_SIZE,
        len_buckets_s=(LONGEST_S / 3, 2 * LONGEST_S / 3, LONGEST_S + 0.1),
        shuffle=True,
    )
    wall, processor, clip_s = [], [], []
    for epoch in range(1 + epochs):
        start, start_cpu, samples, num_clips = time.perf_counter(), time.process_time(), 0, 0
        for batch in batches:
            samples += int(batch["wav_len"][batch["valid"]].sum())
            num_clips += int(batch["valid"].sum())
        passed = time.perf_counter() - start
        if epoch:
            wall.append(samples / wave.RATE_HZ / passed)
            processor.append(samples / wave.RATE_HZ / (time.process_time() - start_cpu))
            clip_s.append(passed / num_clips)
    batches.close()
    return statistics.median(wall), statistics.median(processor), statistics.median(clip_s)


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Keeps this thread, and those that it starts, on one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
