"""Every script: its help, its refusals, and that --dry-run prints what a real run does."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.conftest import LAUNCH, STAGE

SCRIPTS = sorted(
    path
    for path in LAUNCH.rglob("*")
    if path.suffix in (".sh", ".sbatch") and os.access(path, os.X_OK)
)
PLACE = ("--name=run1", "--zone=us-x1-a")
SLICE = ("--topology=v5p-4x4x4", "--spot")
CLUSTER = ("--name=run1", "--topology=v6e-8x8", "--image=reg/im:1")
# Script, its arguments, and how many programs of others it calls.
USES = [
    ("tpu_vm.sh", ("create", *PLACE, *SLICE), 2),
    ("tpu_vm.sh", ("install", *PLACE, "--share=10.0.0.2:/vol", "--project=p"), 3),
    ("tpu_vm.sh", ("run", *PLACE, *STAGE), 1),
    ("tpu_vm.sh", ("logs", *PLACE, "--worker=all"), 1),
    ("tpu_vm.sh", ("status", *PLACE), 1),
    ("tpu_vm.sh", ("stop", *PLACE), 1),
    ("tpu_vm.sh", ("delete", *PLACE), 1),
    ("slurm.sbatch", STAGE, 1),
    ("slurm.sbatch", ("--gpus=4", "--paras2s=/opt/p", *STAGE), 1),
    ("gke/jobset.sh", (*CLUSTER, "--claim=c", *STAGE), 1),
    ("gke/jobset.sh", (*CLUSTER, "--claim=c", "--spot", "--max-restarts=0", *STAGE), 1),
    ("gke/xpk.sh", (*CLUSTER, "--cluster=c", "--zone=z", "--storage=s", *STAGE), 1),
]


def test_all_scripts_are_here():
    names = [str(path.relative_to(LAUNCH)) for path in SCRIPTS]
    assert names == [
        "gke/jobset.sh", "gke/xpk.sh", "local.sh", "slurm.sbatch", "stage.sh", "tpu_vm.sh",
    ]  # fmt: skip


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    done = subprocess.run(
        [program, "-x", *SCRIPTS, LAUNCH / "flags.sh"],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_names_every_flag(shell, script):
    done = shell.run(script, "--help")
    assert done.returncode == 0 and not done.stderr
    assert "usage: " in done.stdout and "#" not in done.stdout and "SBATCH" not in done.stdout
    flags = set(re.findall(r"\bflag_(\w+)=", script.read_text()))
    for flag in flags:
        assert f"--{flag.replace('_', '-')}" in done.stdout, flag
    assert "--dry-run" in done.stdout
    assert not shell.calls()


@pytest.mark.parametrize("script, arguments, num_calls", USES)
def test_a_dry_run_prints_what_a_run_does(shell, script, arguments, num_calls):
    first, rest = arguments[:1], arguments[1:]
    flags = ("--dry-run", *arguments) if first[0].startswith("-") else (*first, "--dry-run", *rest)
    dry = shell.run(LAUNCH / script, *flags)
    assert dry.returncode == 0, dry.stderr
    assert not shell.calls()
    done = shell.run(LAUNCH / script, *arguments, SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    calls = shell.calls()
    assert len(calls) == num_calls
    # The printed commands, run by a shell, are the same calls.
    printed = dry.stdout.split("# status 75")[0]
    assert shell.run("bash", "-euc", printed).returncode == 0
    assert shell.calls() == calls


def test_resume_replaces_a_slice_that_is_gone(shell):
    arguments = (*PLACE, *SLICE, "--share=s:/v", *STAGE)
    dry = shell.run(LAUNCH / "tpu_vm.sh", "resume", "--dry-run", *arguments)
    order = [" delete ", " create ", " describe ", " scp ", "tar -xzf", "stage.sh"]
    at = [dry.stdout.index(word) for word in order]
    assert at == sorted(at)
    # One that is there only gets its stage again.
    assert shell.run(LAUNCH / "tpu_vm.sh", "resume", *arguments).returncode == 0
    described, ran = [call["argv"] for call in shell.calls()]
    assert "describe" in described and "stage.sh" in ran[-1]
    gone = shell.run(LAUNCH / "tpu_vm.sh", "create", *PLACE, *SLICE, FAKE_SAYS="SUSPENDED")
    assert gone.returncode == 2 and "ended as SUSPENDED" in gone.stderr


@pytest.mark.parametrize(
    "topology, accelerator, runtime",
    [
        ("v5e-8x8", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5e-16x16", "v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-4x4x4", "v5p-128", "v2-alpha-tpuv5"),
        ("v6e-8x8", "v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_names_of_slices(shell, topology, accelerator, runtime):
    shell.run(LAUNCH / "tpu_vm.sh", "create", *PLACE, f"--topology={topology}")
    created = shell.calls()[0]["argv"]
    assert created[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "run1"]
    assert {f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"} <= set(created)
    assert "--spot" not in created


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("tpu_vm.sh", (), "no command given; --help lists them."),
        ("tpu_vm.sh", ("creat",), "unknown command 'creat'; --help lists them."),
        ("tpu_vm.sh", ("create", "--name=a"), "no --zone given; --help tells what it is."),
        ("tpu_vm.sh", ("create", *PLACE), "no --topology given; --help tells what it is."),
        ("tpu_vm.sh", ("create", *PLACE, "--topology=v4-8"), "--topology=v4-8 is none of v5e-8x8,"),
        ("tpu_vm.sh", ("install", *PLACE), "no --share given; --help tells what it is."),
        ("tpu_vm.sh", ("run", *PLACE), "no stage given, as in: tpu_vm.sh … -- grpo --config=…"),
        ("tpu_vm.sh", ("resume", *PLACE, *STAGE), "no --topology given"),
        ("slurm.sbatch", (), "no stage given"),
        ("slurm.sbatch", STAGE, "this is a job: sbatch launch/slurm.sbatch …"),
        ("slurm.sbatch", ("--root=/nowhere",), "no launch/flags.sh under /nowhere"),
        ("gke/jobset.sh", ("--name=a", *STAGE), "no --topology given"),
        ("gke/jobset.sh", (*CLUSTER, *STAGE), "no --claim given"),
        ("gke/xpk.sh", (*CLUSTER, *STAGE), "no --cluster given"),
        ("local.sh", (), "no stage given"),
        ("local.sh", ("--nodes=2", *STAGE), "unknown flag --nodes; --help lists them."),
        ("local.sh", ("grpo",), "unexpected argument 'grpo'; what paras2s gets follows --."),
        ("local.sh", ("--", "--config=x"), "the stage comes first after --"),
        ("local.sh", ("--", "grpo", "--workdir=x"), "no --config=… given after --."),
        ("local.sh", ("--", "grpo", "--config=x"), "no --workdir=… given after --"),
        ("stage.sh", ("--", "grpo", "--config=x"), "no --workdir=… given after --"),
    ],
)
def test_what_is_missing_is_told_in_one_sentence(shell, script, arguments, message):
    done = shell.run(LAUNCH / script, *arguments)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{script.rpartition('/')[2]}: {message}")
    assert not shell.calls()


@pytest.mark.parametrize("status, requeued", [(0, False), (75, True), (1, False)])
def test_a_job_that_was_stopped_queues_itself_again(shell, status, requeued):
    done = shell.run(LAUNCH / "slurm.sbatch", *STAGE, FAKE_STATUS=str(status), SLURM_JOB_ID="7")
    calls = [call["argv"] for call in shell.calls()]
    assert calls[0][:3] == ["srun", "--wait=300", "env"]
    assert calls[1:] == ([["scontrol", "requeue", "7"]] if requeued else [])
    assert done.returncode == status


def program(tmp_path, body: str):
    """A stand-in for paras2s; $w is its workdir, $i the number of its process."""
    path = tmp_path / "paras2s"
    path.write_text(
        "#!/usr/bin/env bash\n"
        'for a in "$@"; do case $a in --workdir=*) w=${a#*=};; --process_id=*) i=${a#*=};; esac\n'
        "done\n"
        f"{body}\n"
    )
    path.chmod(0o755)
    return f"--paras2s={path}", "--", "grpo", "--config=c", f"--workdir={tmp_path}"


FINISH = 'mkdir -p "$w/grpo"; touch "$w/grpo/summary.json"'
# Ends well when it is told to stop, some time later.
STOPPABLE = "trap 'sleep 0.3; echo saved; exit 0' TERM; echo ready; while :; do sleep 0.1; done"


@pytest.mark.parametrize("body, status", [(FINISH, 0), ("true", 75), ("exit 3", 3)])
def test_a_stage_tells_how_it_ended(shell, tmp_path, body, status):
    done = shell.run(LAUNCH / "stage.sh", *program(tmp_path, body))
    assert done.returncode == status
    assert ("was stopped before its end" in done.stderr) == (status == 75)


@pytest.mark.parametrize("script", ["stage.sh", "local.sh"])
def test_sigterm_reaches_the_program_and_is_waited_for(shell, tmp_path, script):
    process = subprocess.Popen(
        [str(LAUNCH / script), *program(tmp_path, STOPPABLE)],
        env=shell.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline().endswith("ready\n")
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75
    assert out.count("saved") == (2 if script == "local.sh" else 1)


def test_processes_of_one_machine_know_each_other(shell, tmp_path):
    body = f'{FINISH}; echo "$@"; [ "$i" != 1 ] || exit 4'
    done = shell.run(LAUNCH / "local.sh", "--processes=3", "--port=77", *program(tmp_path, body))
    assert done.returncode == 4
    lines = sorted(done.stdout.splitlines())
    for i, line in enumerate(lines):
        assert line.startswith(f"{i}: grpo --config=c --workdir=")
        assert line.endswith(f"--coordinator=localhost:77 --num_processes=3 --process_id={i}")
    assert len(lines) == 3
