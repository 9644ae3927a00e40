"""GRPO in two processes that share every large array: the curve of one process, and hard to kill.

Run as a program, this file is one of the processes.
"""

import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

from paras2s_jax.align import grpo
from paras2s_jax.audio import wave
from paras2s_jax.data.batches import Batches
from paras2s_jax.models import axes
from paras2s_jax.train import distributed, sharding
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.metrics import MetricWriter, read_metrics
from tests.align.conftest import make_tiny

NUM_PROMPTS, NUM_STEPS, SAVE_EVERY = 8, 5, 2
# When it is asked for, the second checkpoint is on its way, and so the first is whole.
DEADLY_BATCH = 5
HEARTBEAT_S = 10
# Within which the other process has ended: the heartbeats' silence, and some time to notice.
END_S = HEARTBEAT_S + 20


def mean_code(reward_variables, query, query_len, answers):
    """Mean code number of an answer, in small units."""
    return answers.codes.sum(axis=-1) / jnp.maximum(answers.len_codes, 1) / 10.0


class Deadly:
    """Batches that kill their process in the middle of a run."""

    def __init__(self, batches: Batches, at: int):
        self._batches, self._at = batches, at
        self.state, self.restore = batches.state, batches.restore

    def __iter__(self):
        for number, batch in enumerate(self._batches, 1):
            if number == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def run(folder: pathlib.Path, wavs: pathlib.Path, deadly: bool = False) -> dict:
    """Parameters after all steps, gathered."""
    tiny = make_tiny()
    layouts = sharding.make_layouts(
        {"fsdp": 8}, axes.TRAIN_RULES, {"fsdp": 4, "tensor": 2}, axes.DECODE_RULES
    )
    batches = Batches(
        [{"query": path.name} for path in sorted(wavs.glob("*.wav"))],
        root=wavs,
        audio_keys=grpo.AUDIO_KEYS,
        batch_size=NUM_PROMPTS,
        len_buckets_s=(0.4,),
        seed=3,
        shuffle=True,
        repeat=True,
        local_rows=layouts.train.local_rows(NUM_PROMPTS),
    )
    trained = grpo.train(
        tiny.policy,
        tiny.variables,
        tiny.variables,
        tiny.frontend,
        mean_code,
        {},
        Deadly(batches, DEADLY_BATCH) if deadly else batches,
        optimizer=optax.sgd(0.3),
        settings=grpo.Settings(group_size=2),
        num_steps=NUM_STEPS,
        rng=jax.random.key(7),
        layouts=layouts,
        checkpointer=Checkpointer(folder / "checkpoints"),
        save_every=SAVE_EVERY,
        writer=MetricWriter(folder),
    )
    sharded = [x for x in jax.tree.leaves(trained) if not x.sharding.is_fully_replicated]
    assert sharded, "no parameter is spread"
    return multihost_utils.process_allgather(trained, tiled=True)


def main(folder: str, wavs: str, address: str, index: str, deadly: str) -> None:
    settings = distributed.Settings("on", address, 2, int(index), heartbeat_s=HEARTBEAT_S)
    with distributed.joined(settings):
        found = run(pathlib.Path(folder), pathlib.Path(wavs), deadly == index)
        if distributed.is_main():
            leaves = jax.tree.leaves(found)
            np.savez(pathlib.Path(folder) / "params.npz", *leaves)


@pytest.fixture(scope="module")
def wavs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wavs")
    rng = np.random.default_rng(0)
    for number in range(20):
        samples = rng.normal(0, 0.1, 3000 + 150 * number).astype(np.float32)
        wave.save(folder / f"{number:02d}.wav", samples, wave.RATE_HZ)
    return folder


def start(folder, wavs, cache, deadly="") -> list[subprocess.Popen]:
    """Both processes, with four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": (
            "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true"
        ),
    }
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(wavs), address, index, deadly],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in "01"
    ]


def end(processes, timeouts) -> list[str]:
    """What they wrote to stderr, waiting for each in turn for so many seconds."""
    try:
        return [
            process.communicate(timeout=timeout_s)[1]
            for process, timeout_s in zip(processes, timeouts, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_equal_one_also_after_one_was_killed(tmp_path, wavs):
    one, two = tmp_path / "one", tmp_path / "two"
    expected = run(one, wavs)
    survivor, victim = start(two, wavs, tmp_path / "cache", deadly="1")
    death, log = end((victim, survivor), (300, END_S))
    assert victim.returncode == -signal.SIGKILL, death
    assert survivor.returncode not in (0, -signal.SIGKILL), "did not end by itself"
    assert "died" in log or "Gloo" in log or "heartbeat" in log, log
    assert (two / "checkpoints" / str(SAVE_EVERY)).is_dir()
    assert not (two / "params.npz").exists()

    both = start(two, wavs, tmp_path / "cache")
    logs = end(both, (300, 60))
    assert [process.returncode for process in both] == [0, 0], "\n".join(logs)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (one, two)]
    assert [row["step"] for row in rows[1]] == list(range(1, NUM_STEPS + 1))
    for mine, theirs in zip(*rows, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (
                name,
                json.dumps(mine),
            )
    with np.load(two / "params.npz") as found:
        compare = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
        for value, name in zip(jax.tree.leaves(expected), found.files, strict=True):
            compare(found[name], value)


if __name__ == "__main__":
    main(*sys.argv[1:])
