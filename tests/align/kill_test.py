"""A GRPO run that is killed again and again. Run as a program, this file is the run.

The full measure, five times longer: PARAS2S_KILLS=20,5 python -m pytest tests/align/kill_test.py
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from paras2s_jax.align import grpo, health
from paras2s_jax.train import preemption
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.metrics import MetricWriter, read_metrics

ROOT = pathlib.Path(__file__).parents[2]
# SIGKILLs and SIGTERMs.
NUM_KILLS, NUM_TERMS = map(int, os.environ.get("PARAS2S_KILLS", "3,1").split(","))
# Neither divides the other: checkpoints fall between rows of metrics.
SAVE_EVERY, LOG_EVERY = 3, 2
# How much later than what was there at its start a run is killed, at most.
MOST_STEPS = 5
NUM_STEPS = MOST_STEPS * (NUM_KILLS + NUM_TERMS) + 5


def reward_fn(reward_variables, query, query_len, answers):
    total = answers.codes.sum(axis=-1) + jnp.abs(query).sum(axis=-1)[:, None] / 1e4
    return total / jnp.maximum(answers.len_codes, 1)


def train(folder):
    from conftest import Repeat, make_queries, make_tiny

    tiny = make_tiny(max_steps=6)
    return grpo.train(
        tiny.policy,
        tiny.variables,
        tiny.variables,
        tiny.frontend,
        reward_fn,
        {},
        Repeat([make_queries(2, seed) for seed in range(5)]),
        optimizer=optax.adam(1e-2),
        settings=grpo.Settings(group_size=2, num_epochs=2),
        num_steps=NUM_STEPS,
        rng=jax.random.key(7),
        checkpointer=Checkpointer(folder / "checkpoints"),
        save_every=SAVE_EVERY,
        writer=MetricWriter(folder),
        log_every=LOG_EVERY,
        # Raised and over many times in such a short run.
        monitor=health.Health(health.Limits(window=2, kl_text=0.05, zero_spread=0.1), folder),
    )


def main(folder):
    try:
        with preemption.watch():
            variables = train(folder)
    except preemption.Preempted:
        return
    leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(variables)}
    np.savez(folder / "final.npz", **leaves)


def start(folder, cache):
    environ = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'align'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder)], env=environ, stdout=log, stderr=log
        )


def last_row(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def last_checkpoint(folder):
    found = (folder / "checkpoints").glob("*")
    return max((int(path.name) for path in found if path.name.isdecimal()), default=0)


def is_writing(folder):
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def break_off(folder, cache, number, moments):
    """Starts the run and sends it a signal at a random moment; returns which and the status."""
    before = last_row(folder)
    process = start(folder, cache)
    moment = moments.choice(["start", "write", "write", "step", "step"])
    if moment == "start" and number == signal.SIGKILL:
        time.sleep(moments.uniform(0.0, 4.0))
    else:
        target = before + moments.randrange(1, MOST_STEPS)
        while process.poll() is None and last_row(folder) < target:
            time.sleep(0.002)
        while moment == "write" and process.poll() is None and not is_writing(folder):
            time.sleep(0.0005)
        # A step and a write each take some tens of milliseconds.
        time.sleep(moments.uniform(0.0, 0.05))
    # What an earlier kill left is swept at the start.
    writing = moment != "start" and is_writing(folder)
    process.send_signal(number)
    status = process.wait(timeout=120)
    return moment, writing, status


def outcome(folder):
    files = [(folder / name).read_bytes() for name in ("metrics.jsonl", "alarms.jsonl")]
    with np.load(folder / "final.npz") as found:
        params = {name: found[name].tobytes() for name in found.files}
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder / "checkpoints" / str(NUM_STEPS) / "state")
    return files, params, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_a_run_that_is_killed_ends_like_an_unbroken_one(tmp_path):
    whole, broken, cache = (tmp_path / name for name in ("whole", "broken", "cache"))
    whole.mkdir()
    broken.mkdir()
    assert start(whole, cache).wait() == 0, (whole / "log").read_text()
    seed = time.time_ns()
    moments = random.Random(seed)
    signals = [signal.SIGKILL] * NUM_KILLS + [signal.SIGTERM] * NUM_TERMS
    moments.shuffle(signals)
    history = []
    for number in signals:
        history.append((number.name, *break_off(broken, cache, number, moments)))
        said = f"seed {seed}: {history}\n" + (broken / "log").read_text()[-3000:]
        assert history[-1][-1] == (0 if number == signal.SIGTERM else -9), said
        assert not (broken / "final.npz").exists(), said
        if number == signal.SIGTERM:
            # Nothing is lost: every step of the record is in the checkpoint.
            assert last_checkpoint(broken) >= last_row(broken) > 0, said
    assert start(broken, cache).wait() == 0, said
    print(f"{history}, killed while writing: {sum(writing for _, _, writing, _ in history)}")
    assert b'"on": true' in (whole / "alarms.jsonl").read_bytes()
    for expected, found in zip(outcome(whole), outcome(broken), strict=True):
        assert found == expected, said
    assert not list((broken / "checkpoints").glob("*.torn"))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
