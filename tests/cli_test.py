"""The command line: every wrong request gets one sentence and exit status 2, and no work."""

import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from paras2s_jax import cli
from paras2s_jax.perf import registry as perf
from paras2s_jax.stages.commands import Command, Flag
from paras2s_jax.stages.registry import Stage, StageError
from paras2s_jax.train import distributed

ROOT = Path(__file__).resolve().parents[1]
TINY = "--config=configs/tiny.py"


@pytest.fixture(autouse=True)
def whole_process():
    """The command line sets these for its whole process."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, on_sigterm)
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture
def ran(monkeypatch):
    """Stands small stages in for the real ones; lists the (config, workdir) they ran with."""
    calls = []

    def work(config, workdir):
        calls.append((config, workdir))
        return {"x/beta": config.grpo.beta}

    def missing(config, workdir):
        raise FileNotFoundError("queries.jsonl is not there; run synthesize.")

    def defect(config, workdir):
        raise RuntimeError("a defect")

    def interrupted(config, workdir):
        raise KeyboardInterrupt

    stages = [
        Stage("grpo", "reinforce", work, sections=("seed", "grpo")),
        Stage("bench", "measure", work, needs=("grpo",)),
        Stage("missing", "lacks a file", missing),
        Stage("defect", "has a defect", defect),
        Stage("interrupted", "is interrupted", interrupted),
    ]
    stages = {stage.name: stage for stage in stages}
    recipe = types.SimpleNamespace(STAGES=stages, stages_of=lambda config: stages)
    monkeypatch.setitem(sys.modules, "paras2s_jax.stages.recipe", recipe)
    monkeypatch.chdir(ROOT)
    return calls


def call(*args):
    return cli.main(["paras2s", *args])


def sentence(capsys) -> str:
    """What stderr says, after checking that it is one line and that stdout is empty."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("paras2s: ") and err.count("\n") == 1 and "Traceback" not in err
    return err.removeprefix("paras2s: ").strip()


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["help"]])
def test_help(ran, capsys, args):
    assert call(*args) == 0
    out, err = capsys.readouterr()
    assert out.startswith("paras2s STAGE --config=") and not err
    assert re.search(r"^  grpo +reinforce$", out, re.M)
    assert re.search(r"^  bench +measure$", out, re.M)


@pytest.mark.parametrize("args", [["grpo", "--help"], ["grpo", TINY, "-h"]])
def test_help_of_a_stage(ran, capsys, args):
    assert call(*args) == 0
    assert capsys.readouterr().out.startswith("paras2s grpo: reinforce\n")
    assert not ran


def test_no_arguments(ran, capsys):
    assert call() == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("paras2s STAGE")


WRONG = [
    (
        ["gpro", TINY],
        "there is no stage or command 'gpro'; did you mean grpo? `paras2s --help` lists them.",
    ),
    (["xyz", TINY], "there is no stage or command 'xyz'; `paras2s --help` lists them."),
    ([TINY, "grpo"], f"the stage comes first, as in `paras2s align {TINY}`."),
    (["grpo"], "no --config given, for example --config=configs/tiny.py"),
    (["grpo", "--config="], "no --config given, for example --config=configs/tiny.py"),
    (["grpo", "--config"], "Missing value for flag --config"),
    (
        ["grpo", "--config=configs/tinny.py"],
        "there is no config file 'configs/tinny.py'; did you mean configs/tiny.py?",
    ),
    (["grpo", "--config=none/x.py"], "there is no config file 'none/x.py'."),
    (
        ["grpo", "--config=configs/tiny.py:nope"],
        "configs/tiny.py takes no argument, :from_scratch or :quick, not :nope.",
    ),
    (
        ["grpo", TINY, "--config.grpo.betta=0"],
        "there is no config key config.grpo.betta; did you mean config.grpo.beta?",
    ),
    (
        ["grpo", TINY, "--config.grpo.betta", "0"],
        "there is no config key config.grpo.betta; did you mean config.grpo.beta?",
    ),
    (
        ["grpo", TINY, "--noconfig.grpo.scale_by_stdd"],
        "there is no config key config.grpo.scale_by_stdd; did you mean config.grpo.scale_by_std?",
    ),
    (
        ["grpo", TINY, "--config.beta=0"],  # the right key without its section
        "there is no config key config.beta; did you mean config.grpo.beta?",
    ),
    (["grpo", TINY, "--config.qqq=0"], "there is no config key config.qqq."),
    (["grpo", TINY, "stray"], "unexpected argument 'stray': overrides are --config.key=value."),
    (
        ["grpo", TINY, "--workdirr=x"],
        "Unknown command line flag 'workdirr'. Did you mean: workdir ?",
    ),
    (
        ["grpo", TINY, "--config.seed=abc"],
        "flag --config.seed=abc: invalid literal for int() with base 10: 'abc'",
    ),
    (
        ["grpo", TINY, "--config.grpo.len_buckets_s=abc"],
        "flag --config.grpo.len_buckets_s: 'abc' is not of the type of 3.2, "
        "as in --config.grpo.len_buckets_s='(3.2,)'.",
    ),
]


@pytest.mark.parametrize(("args", "message"), WRONG)
def test_what_is_wrong_is_said_in_one_sentence(ran, capsys, tmp_path, args, message):
    stage, *flags = args
    assert call(stage, f"--workdir={tmp_path}", *flags) == 2
    assert sentence(capsys) == message
    assert not ran and not list(tmp_path.iterdir())


def test_a_section_is_not_a_key(ran, capsys):
    assert call("grpo", TINY, "--config.grpo=1") == 2
    assert sentence(capsys).startswith(
        "config.grpo is a section: set its keys one by one, for example --config.grpo."
    )
    assert not ran


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a recipe: of tea", "invalid syntax"),
        ("seed = 0", "it has no get_config()"),
    ],
)
def test_names_a_file_that_is_no_config(ran, capsys, tmp_path, text, part):
    path = tmp_path / "x.py"
    path.write_text(text)
    assert call("grpo", f"--config={path}") == 2
    found = sentence(capsys)
    assert found.startswith(f"{path} is not a config file: ") and part in found


def test_runs_a_stage_with_overrides(ran, tmp_path):
    overrides = [
        "--config.grpo.beta=0",
        "--config.seed",
        "7",
        "--noconfig.grpo.scale_by_std",
        "--config.grpo.len_buckets_s=(1,2.5)",
    ]
    assert call("bench", *overrides, TINY, f"--workdir={tmp_path}") == 0
    assert len(ran) == 2  # grpo, which bench needs, then bench
    config, workdir = ran[0]
    assert workdir == tmp_path and (tmp_path / "bench" / "summary.json").exists()
    assert (config.grpo.beta, config.seed, config.grpo.scale_by_std) == (0.0, 7, False)
    assert config.grpo.len_buckets_s == (1, 2.5)
    with pytest.raises(AttributeError):  # locked: the library cannot read a key that is not there
        config.grpo.betta = 0


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_compiled_programs_are_kept_in_the_workdir_unless_told_otherwise(ran, tmp_path, given):
    jax.config.update("jax_compilation_cache_dir", given)
    assert call("grpo", TINY, f"--workdir={tmp_path}") == 0
    assert jax.config.jax_compilation_cache_dir == (given or str(tmp_path / "compiled"))


def test_workdir_is_named_after_the_config(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.parse(["paras2s", TINY])[1] == os.path.join("runs", "tiny")
    assert cli.parse(["paras2s", f"{TINY}:from_scratch"])[1] == os.path.join(
        "runs", "tiny_from_scratch"
    )
    assert cli.parse(["paras2s", TINY, "--workdir", "x"])[1] == "x"


def test_flags_of_several_processes(monkeypatch):
    monkeypatch.chdir(ROOT)
    given = ["--coordinator=host:1", "--num_processes", "3", "--process_id=2"]
    found = cli.parse(["paras2s", TINY, *given, "--heartbeat_timeout=7", "--distributed=on"])[2]
    assert distributed.Settings(**found) == distributed.Settings(
        "on", "host:1", 3, 2, start_s=300, heartbeat_s=7, barrier_s=600
    )
    monkeypatch.setenv("PARAS2S_COORDINATOR", "other:2")
    monkeypatch.setenv("PARAS2S_NUM_PROCESSES", "4")
    monkeypatch.setenv("PARAS2S_PROCESS_ID", "0")
    assert distributed.Settings(**cli.parse(["paras2s", TINY])[2]) == distributed.Settings(
        "auto", "other:2", 4, 0
    )


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--num_processes=2"], "give all of --coordinator, --num_processes and --process_id"),
        (["--process_id=-1"], "flag --process_id=-1"),
        (["--distributed=maybe"], "value should be one of <auto|on|off>"),
    ],
)
def test_wrong_flags_of_several_processes(ran, capsys, args, part):
    assert call("grpo", TINY, *args) == 2
    assert part in sentence(capsys)
    assert not ran


def test_a_preempted_run_ends_well(ran, capsys, monkeypatch, tmp_path):
    def stop(self, name):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("paras2s_jax.stages.registry.Runner.run", stop)
    assert call("grpo", TINY, f"--workdir={tmp_path}") == 0
    assert sentence(capsys).startswith("stopped by SIGTERM; what was done is saved")


def test_refuses_a_workdir_made_with_other_settings(ran, capsys, tmp_path):
    assert call("grpo", TINY, f"--workdir={tmp_path}") == 0
    capsys.readouterr()
    assert call("grpo", TINY, f"--workdir={tmp_path}", "--config.grpo.beta=0.5") == 2
    found = sentence(capsys)
    assert "config.grpo.beta: 0.2 then, 0.5 now" in found and "another --workdir" in found
    assert len(ran) == 1


def test_user_errors_are_one_sentence_and_defects_show_their_trace(ran, capsys, tmp_path):
    assert call("missing", TINY, f"--workdir={tmp_path}") == 2
    assert capsys.readouterr().err == "paras2s: queries.jsonl is not there; run synthesize.\n"
    assert StageError in cli._user_errors()
    with pytest.raises(RuntimeError, match="a defect"):
        call("defect", TINY, f"--workdir={tmp_path}")


def test_interrupt(ran, capsys, tmp_path):
    assert call("interrupted", TINY, f"--workdir={tmp_path}") == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_real_program_refuses_an_unknown_key():
    done = subprocess.run(
        [sys.executable, "-m", "paras2s_jax.cli", "grpo", TINY, "--config.grpo.betta=0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "paras2s: there is no config key config.grpo.betta; did you mean config.grpo.beta?\n"
    )


@pytest.mark.parametrize(
    "args",
    [["--help"], ["convert", "--help"], ["export"], ["grpo", TINY, "--config.grpo.betta=0"]],
)
def test_help_and_wrong_flags_wait_for_no_large_import(args):
    script = (
        "import sys; from paras2s_jax import cli; cli.main(sys.argv);"
        "print('imported', sorted({'jax', 'tensorflow', 'orbax'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *args], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "imported []"


@pytest.fixture
def greet(monkeypatch):
    """A small command and a small measure; lists what they were called with."""
    calls = []

    def run(**given):
        calls.append(given)
        return {"greet/speed": 2.0}

    flags = (
        Flag("from", "who greets", argument="source"),
        Flag("times", "how often", 1, int),
        Flag("manner", "how", "kind", choices=("kind", "curt")),
        Flag("loud", "shouting", False, bool),
    )
    monkeypatch.setitem(cli.COMMANDS, "greet", Command("greet", "say hello", flags, run))
    measure = Command("greet", "how fast", (Flag("n", "how many", 3, int), perf.WORKDIR), run)
    monkeypatch.setitem(perf.MEASURES, "greet", measure)
    return calls


def test_a_command_gets_its_flags(greet):
    assert call("greet", "--from=me", "--times", "2", "--loud") == 0
    assert greet == [{"source": "me", "times": 2, "manner": "kind", "loud": True}]


def test_help_of_a_command(greet, capsys):
    assert call("greet", "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("paras2s greet --from=… [--times=1] [--manner=kind|curt] [--loud]\n")
    assert "  --times   how often\n" in out and not greet


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["greet"], "no --from given: paras2s greet --from=…"),
        (["greet", "--from="], "no --from given"),
        (["greet", "--from=me", "--tims=2"], "Unknown command line flag 'tims'"),
        (["greet", "--from=me", "--times=x"], "flag --times=x"),
        (["greet", "--from=me", "--manner=x"], "value should be one of <kind|curt>"),
        (["greet", "--from=me", "stray"], "unexpected argument 'stray'"),
        (["gret", "--from=me"], "there is no stage or command 'gret'; did you mean greet?"),
        (["perf"], "no measure given; there are convert"),
        (["perf", "gret"], "there is no measure 'gret'; did you mean greet?"),
        (["perf", "greet", "--m=2"], "Unknown command line flag 'm'"),
    ],
)
def test_wrong_flags_of_commands_are_told_in_one_sentence(greet, capsys, args, part):
    assert call(*args) == 2
    assert part in sentence(capsys)
    assert not greet


def test_a_measure_leaves_its_summary(greet, tmp_path):
    assert call("perf", "greet", f"--workdir={tmp_path}", "--n=5") == 0
    assert greet == [{"n": 5}]
    summary = json.loads((tmp_path / "greet" / "summary.json").read_text())
    assert summary["stage"] == "perf greet" and summary["config"] == {"n": 5}
    assert summary["figures"] == {"greet/speed": 2.0} and summary["wall_s"] >= 0


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_its_help(capsys, name):
    assert call(name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"paras2s {name} ")
