"""The command line: every wrong request gets one sentence and exit status 2, and no work."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from paras2s_jax import cli
from paras2s_jax.stages.registry import Stage, StageError

ROOT = Path(__file__).resolve().parents[1]
TINY = "--config=configs/tiny.py"


@pytest.fixture(autouse=True)
def cache_dir():
    """The command line sets the folder of compiled programs for its whole process."""
    yield
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
    recipe = types.SimpleNamespace(STAGES={stage.name: stage for stage in stages})
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
    assert "  grpo         reinforce\n" in out and "  bench        measure\n" in out


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
    (["gpro", TINY], "there is no stage 'gpro'; did you mean grpo? `paras2s --help` lists them."),
    (["xyz", TINY], "there is no stage 'xyz'; `paras2s --help` lists them."),
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
        "configs/tiny.py takes no argument or :from_scratch, not :nope.",
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


@pytest.mark.parametrize("args", [["--help"], ["grpo", TINY, "--config.grpo.betta=0"]])
def test_help_and_wrong_flags_wait_for_no_large_import(args):
    script = (
        "import sys; from paras2s_jax import cli; cli.main(sys.argv);"
        "print('imported', sorted({'jax', 'tensorflow', 'orbax'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *args], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "imported []"
