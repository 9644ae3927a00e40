"""Two real processes by local.sh, through the command line, with small stages."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.launch.conftest import LAUNCH, ROOT

# Seconds of silence after which a process counts as dead, and some to notice it.
HEARTBEAT_S, SLACK_S = 10, 20

PROGRAM = f"""#!{sys.executable}
import os, signal, sys, time, types
sys.path.insert(0, {str(ROOT)!r})
import jax
import numpy as np
from jax.experimental import multihost_utils
from paras2s_jax import cli
from paras2s_jax.stages.registry import Stage, StageError

def alone(config, workdir):
    with open(workdir / "alone" / "who", "a") as file:
        file.write(str(jax.process_index()))
    return {{"alone/seed": config.seed}}

def together(config, workdir):
    mine = np.array([jax.process_index() + 1])
    total = multihost_utils.process_allgather(mine).sum()
    return {{"together/total": float(total), "together/devices": jax.device_count()}}

def broken(config, workdir):
    if jax.process_index() == 1:
        raise StageError("a file is missing; run alone.")
    time.sleep(300)

def stopped(config, workdir):
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(300)

def killed(config, workdir):
    if jax.process_index() == 1:
        print("dying", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)

stages = (
    Stage("alone", "on process 0", alone, sections=("seed",)),
    Stage("together", "on all", together, needs=("alone",), on_all=True),
    Stage("broken", "fails on one", broken, on_all=True),
    Stage("stopped", "is told to stop", stopped, on_all=True),
    Stage("killed", "dies on one", killed, on_all=True),
)
stages = {{stage.name: stage for stage in stages}}
sys.modules["paras2s_jax.stages.recipe"] = types.SimpleNamespace(
    STAGES=stages, stages_of=lambda config: stages
)
sys.exit(cli.main(["paras2s", *sys.argv[1:]]))
"""


@pytest.fixture
def run(tmp_path):
    """Runs a stage in two processes with two devices each, in a workdir of its own."""
    program = tmp_path / "paras2s"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict(dict(seed=3))\n"
    )

    def run_stage(stage: str, *flags: str) -> subprocess.CompletedProcess:
        command = [
            LAUNCH / "local.sh", "--devices=2", f"--paras2s={program}", "--", stage,
            f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path}", *flags,
        ]  # fmt: skip
        return subprocess.run(
            list(map(str, command)),
            # Not the eight devices of the tests.
            env=os.environ | {"XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            timeout=60 + HEARTBEAT_S + SLACK_S,
            check=False,
        )

    return run_stage


def test_stages_run_alone_or_together_and_are_written_once(run, tmp_path):
    done = run("together")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "alone" / "who").read_text() == "0"
    figures = json.loads((tmp_path / "together" / "summary.json").read_text())["figures"]
    assert figures == {"together/total": 3.0, "together/devices": 4.0}
    # Process 0 tells what is done; the other one is quiet.
    told = [line for line in done.stdout.splitlines() if "▶" in line]
    assert [line[:5] for line in told] == ["0: ▶ ", "0: ▶ "]
    again = run("together")
    assert again.returncode == 0 and "0: ✓ together: already finished" in again.stdout


def test_one_failure_ends_both_with_its_message(run):
    done = run("broken")
    assert done.returncode == 2
    sentence = "paras2s: a file is missing; run alone."
    lines = done.stderr.splitlines()
    assert f"1: {sentence}" in lines
    (told,) = [line for line in lines if line.startswith("0: process 1 of 2 (")]
    assert told.endswith(f") failed, so this one ends: {sentence}")
    assert "Traceback" not in done.stderr


def test_a_stage_that_one_is_told_to_stop_is_to_be_started_again(run):
    done = run("stopped")
    assert done.returncode == 75
    sentence = "paras2s: stopped by SIGTERM; what was done is saved, and the same command goes on."
    lines = done.stderr.splitlines()
    assert f"1: {sentence}" in lines
    assert any(line.endswith(f" was stopped, so this one ends: {sentence}") for line in lines)
    again = "stage.sh: stopped was stopped before its end; the same command goes on."
    assert {f"0: {again}", f"1: {again}"} <= set(lines)


def test_one_death_ends_the_other(run):
    done = run("killed", f"--heartbeat_timeout={HEARTBEAT_S}")
    # The first of the two that ends without success: aborted by JAX, by number of the signal.
    assert done.returncode == 128 + signal.SIGABRT
    assert "1: dying" in done.stdout
    assert "unhealthy (stopped sending heartbeats)" in done.stderr
