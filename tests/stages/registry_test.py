"""The runner of stages, with stages that only count; and the real list of stages."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from paras2s_jax import cli
from paras2s_jax.stages import registry
from paras2s_jax.stages.registry import Lazy, Runner, Stage, StageError, figures_of

ROOT = Path(__file__).resolve().parents[2]


class Work:
    """Stages a -> b -> d and a -> c -> d that note in which order they ran."""

    def __init__(self):
        self.ran = []
        self.broken = None
        self.stages = {
            stage.name: stage
            for stage in (
                self.stage("a", sections=("seed",)),
                self.stage("b", needs=("a",), sections=("b",)),
                self.stage("c", needs=("a",)),
                self.stage("d", needs=("b", "c"), sections=("d",)),
            )
        }

    def stage(self, name, **kwargs):
        def run(config, workdir):
            self.ran.append(name)
            (workdir / name / "part").write_text("made")
            if self.broken == name:
                raise InterruptedError
            return {f"{name}/seed": config.seed + 0.5}

        return Stage(name, f"stage {name}", run, **kwargs)


@pytest.fixture
def work():
    return Work()


def make_config(**changes):
    config = {"seed": 3, "b": {"lr": 0.1, "buckets": (1, 2)}, "d": {"x": None}, "other": 1}
    return ConfigDict(config | changes)


def summary(workdir, name):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((workdir / name / "summary.json").read_text(), parse_constant=refuse)


def test_runs_what_a_stage_needs_once_and_in_order(work, tmp_path):
    figures = Runner(work.stages, make_config(), tmp_path).run("d")
    assert work.ran == ["a", "b", "c", "d"]
    assert figures == {"d/seed": 3.5}


def test_skips_finished_stages(work, tmp_path, capsys):
    Runner(work.stages, make_config(), tmp_path).run("b")
    work.ran.clear()
    assert Runner(work.stages, make_config(), str(tmp_path)).run("d") == {"d/seed": 3.5}
    assert work.ran == ["c", "d"]
    work.ran.clear()
    capsys.readouterr()
    assert Runner(work.stages, make_config(), tmp_path).run("d") == {"d/seed": 3.5}
    assert work.ran == []
    assert capsys.readouterr().out == f"✓ d: already finished in {tmp_path / 'd'}\n"


def test_says_once_that_a_stage_is_finished(work, tmp_path, capsys):
    Runner(work.stages, make_config(), tmp_path).run("a")
    capsys.readouterr()
    Runner(work.stages, make_config(), tmp_path).run("d")  # b and c both need a
    assert capsys.readouterr().out.count("✓ a: already finished") == 1


def test_a_failed_stage_leaves_no_summary_and_continues(work, tmp_path):
    work.broken = "c"
    with pytest.raises(InterruptedError):
        Runner(work.stages, make_config(), tmp_path).run("d")
    assert work.ran == ["a", "b", "c"]
    assert not (tmp_path / "c" / "summary.json").exists()
    assert (tmp_path / "c" / "part").exists()
    work.broken = None
    Runner(work.stages, make_config(), tmp_path).run("d")
    assert work.ran == ["a", "b", "c", "c", "d"]


def test_summary(work, tmp_path):
    Runner(work.stages, make_config(), tmp_path).run("b")
    found = summary(tmp_path, "b")
    names = ["stage", "config", "commit", "device", "wall_s", "peak_rss_gb", "figures"]
    assert list(found) == names
    assert found["stage"] == "b"
    # What b depends on: its own section and that of a; tuples become lists.
    assert found["config"] == {"seed": 3, "b": {"lr": 0.1, "buckets": [1, 2]}}
    assert found["figures"] == {"b/seed": 3.5}
    assert "cpu" in found["device"]
    assert 0 <= found["wall_s"] < 60
    # This process has imported JAX: more than 50 MB, less than any machine for tests has.
    assert 0.05 < found["peak_rss_gb"] < 64


def test_commit_is_that_of_the_source_tree(monkeypatch):
    registry.source_commit.cache_clear()
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode == 0:
        assert head.stdout.startswith(registry.source_commit().removesuffix("-dirty"))
    registry.source_commit.cache_clear()
    monkeypatch.setenv("PATH", "")  # a machine without git
    assert registry.source_commit() == "v0.1.0"
    registry.source_commit.cache_clear()


def test_what_is_not_a_number_is_null(tmp_path):
    figures = {"x/nan": math.nan, "x/inf": math.inf, "x/int": 2}
    stages = {"x": Stage("x", "not numbers", lambda config, workdir: figures)}
    Runner(stages, make_config(), tmp_path).run("x")
    assert summary(tmp_path, "x")["figures"] == {"x/nan": None, "x/inf": None, "x/int": 2.0}
    again = figures_of(tmp_path / "x")
    assert math.isnan(again["x/nan"]) and again["x/int"] == 2.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"b": {"lr": 0.2, "buckets": (1, 2)}}, "config.b.lr: 0.1 then, 0.2 now"),
        ({"b": {"lr": 0.1, "buckets": (1, 3)}}, "config.b.buckets: [1, 2] then, [1, 3] now"),
        ({"b": {"lr": 0.1, "buckets": (1, 2), "new": 5}}, "config.b.new: None then, 5 now"),
        ({"seed": 4}, "config.seed: 3 then, 4 now"),
    ],
)
def test_refuses_other_settings(work, tmp_path, changes, named):
    Runner(work.stages, make_config(), tmp_path).run("b")
    work.ran.clear()
    runner = Runner(work.stages, make_config(**changes), tmp_path)
    for name in ("b", "d"):
        with pytest.raises(StageError) as error:
            runner.run(name)
        message = str(error.value)
        assert named in message and str(tmp_path / "b") in message and "--workdir" in message
    # d needs c as well, which has not run: the refusal comes before any work.
    assert work.ran == []


def test_settings_that_a_stage_does_not_read_may_change(work, tmp_path):
    Runner(work.stages, make_config(), tmp_path).run("b")
    Runner(work.stages, make_config(other=2, d={"x": 1}), tmp_path).run("d")
    assert work.ran == ["a", "b", "c", "d"]


def test_refuses_other_settings_for_a_stage_that_has_begun(work, tmp_path):
    work.broken = "b"
    with pytest.raises(InterruptedError):
        Runner(work.stages, make_config(), tmp_path).run("b")
    # What b left (a checkpoint, say) comes from lr = 0.1.
    changed = make_config(b={"lr": 0.2, "buckets": (1, 2)})
    with pytest.raises(StageError, match=r"b was made with other settings .*config\.b\.lr: 0\.1"):
        Runner(work.stages, changed, tmp_path).run("b")
    (tmp_path / "b" / "part").unlink()  # nothing made: nothing to protect
    work.broken = None
    Runner(work.stages, changed, tmp_path).run("b")
    assert summary(tmp_path, "b")["config"]["b"]["lr"] == 0.2


def test_names_a_section_that_the_config_lacks(work, tmp_path):
    config = ConfigDict({"seed": 0, "b": {}})
    with pytest.raises(StageError, match=r"no 'd', which stage d reads"):
        Runner(work.stages, config, tmp_path).run("d")
    assert work.ran == []


def test_names_a_workdir_that_cannot_be_written(work, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StageError, match=r"cannot write in .*file/a .*--workdir"):
        Runner(work.stages, make_config(), tmp_path / "file").run("a")


def test_sigkill_leaves_no_summary_and_the_next_run_continues(work, tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from ml_collections import ConfigDict
        from paras2s_jax.stages.registry import Runner, Stage

        def die(config, workdir):
            (workdir / "a" / "part").write_text("made")
            os.kill(os.getpid(), signal.SIGKILL)

        Runner({"a": Stage("a", "dies", die)}, ConfigDict(), sys.argv[1]).run("a")
    """)
    died = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"settings.json", "part"}
    stages = {"a": Stage("a", "continues", lambda config, workdir: {"a/x": 1.0})}
    assert Runner(stages, ConfigDict(), tmp_path).run("a") == {"a/x": 1.0}


def test_lazy_calls_the_function_it_names():
    lazy = Lazy("operator", "truediv")
    assert lazy(3, 2) == 1.5


def test_the_real_stages_fit_together_and_the_tiny_config():
    from paras2s_jax.stages.recipe import stages_of

    config = cli.load_config(str(ROOT / "configs" / "tiny.py"))
    stages = stages_of(config)
    runner = Runner(stages, config, "nowhere")
    order = list(stages)
    for name, stage in stages.items():
        assert stage.name == name and stage.help
        assert callable(stage.run.load() if isinstance(stage.run, Lazy) else stage.run)
        assert set(stage.needs) <= set(stages)
        if name != "align":  # the whole loop comes first in --help
            assert all(order.index(needed) < order.index(name) for needed in stage.needs)
        assert runner._relevant(stage)
    # A section that no stage names could change unnoticed under finished results. Where arrays
    # live changes none, and a run may go on on other devices.
    placement = {"topology", "mesh", "decode_mesh", "rules", "decode_rules"}
    sections = {key for stage in stages.values() for key in stage.sections}
    assert sections == set(config.keys()) - placement


def test_how_fast_a_stage_works_may_change(work, tmp_path):
    Runner(work.stages, make_config(b={"lr": 0.1, "num_workers": 1}), tmp_path).run("b")
    Runner(work.stages, make_config(b={"lr": 0.1, "num_workers": 2}), tmp_path).run("b")
    assert work.ran == ["a", "b"]
    with pytest.raises(StageError, match=r"config\.b\.lr"):
        Runner(work.stages, make_config(b={"lr": 0.2, "num_workers": 1}), tmp_path).run("b")
