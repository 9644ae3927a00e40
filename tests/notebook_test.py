"""What notebooks call, on a command that says little and traps its signals."""

import json
import signal

import pytest
from IPython.core.interactiveshell import InteractiveShell

from paras2s_jax import notebook
from paras2s_jax.train.metrics import read_metrics

SCRIPT = """#!/bin/sh
trap 'echo "gespeichert · saved"; exit 0' TERM
trap 'echo interrupted; exit 130' INT
echo "$3 of $2"
[ -z "$METRICS" ] || echo '{"step": 4}' >> "$METRICS"
while :; do sleep 0.05; done
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """In place of Python; it ends by a signal only."""
    script = tmp_path / "python"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.setattr(notebook.sys, "executable", str(script))


def test_a_command_is_told_to_stop_and_ends_well(command, capsys):
    notebook.paras2s("'one word'", stop=lambda: "one word" in capsys.readouterr().out)
    assert capsys.readouterr().out == "gespeichert · saved\n"


def test_a_machine_is_taken_away_at_a_new_step(command, tmp_path, monkeypatch, capsys):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 3}) + "\n")
    monkeypatch.setenv("METRICS", str(metrics))
    notebook.preempted("grpo", metrics, step=3)
    assert read_metrics(metrics)[-1] == {"step": 4}
    assert capsys.readouterr().out.startswith("grpo of paras2s_jax.cli\n")


@pytest.fixture
def interruptible():
    """Tests in the background of a shell ignore SIGINT, and so would the command."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_stop_button_interrupts_the_command(command, interruptible, capsys):
    def press():
        if "grpo" in capsys.readouterr().out:
            raise KeyboardInterrupt
        return False

    with pytest.raises(notebook.CommandError, match="paras2s grpo ended with status 130"):
        notebook.paras2s("grpo", press)
    assert capsys.readouterr().out == "interrupted\n"


def test_the_magic_runs_the_command_line(capsys):
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "paras2s_jax.notebook")
    name = "statge"
    with pytest.raises(notebook.CommandError, match="status 2"):
        shell.run_line_magic("paras2s", name)
    assert "there is no stage or command 'statge'" in capsys.readouterr().out


def test_devices_are_asked_for_elsewhere():
    assert notebook.devices() == "8 x cpu (cpu)"


def test_a_page_keeps_to_its_frame(tmp_path):
    page = tmp_path / "index.html"
    page.write_text('<p title="a">1 < 2</p>')
    assert "&lt;p title=&quot;a&quot;&gt;1 &lt; 2" in notebook.page(page).data
