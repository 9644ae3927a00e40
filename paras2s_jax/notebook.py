"""What notebooks call: the command line, and pictures, tables and players of what it wrote.

    %load_ext paras2s_jax.notebook
    %paras2s align --config=configs/tiny.py:quick --workdir=runs/quick

A command runs in a process of its own, as in a terminal: its memory and the accelerator are free
again when it ends.
"""

from __future__ import annotations

import codecs
import html
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import HTML, Image, Markdown

from paras2s_jax.bench import charts, plots, tables
from paras2s_jax.bench.style_pairs import style_pairs
from paras2s_jax.train.metrics import read_metrics

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    # Progress bars write seldom enough for a page that keeps all they write.
    "TQDM_MININTERVAL": "1",
    "TQDM_NCOLS": "90",
    # Kernels ask for colours, at which tables squeeze themselves into a terminal of 80 columns.
    "FORCE_COLOR": "",
}
POLL_S = 0.2


class CommandError(RuntimeError):
    """A command failed; what it said stands above."""


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Gives the notebook the line magic `%paras2s`."""
    shell.register_magic_function(paras2s, "line", "paras2s")


def _never() -> bool:
    return False


def paras2s(line: str, stop: Callable[[], bool] = _never) -> None:
    """Runs a command of `paras2s` and shows what it says.

    Jupyter's stop button interrupts it as Ctrl-C does in a terminal.

    Args:
        line: what follows `paras2s` in a terminal.
        stop: asked now and then; once it says yes, the command gets SIGTERM, as from a scheduler
            that wants its machine back.

    Raises:
        CommandError: it ended with another status than 0.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "paras2s_jax.cli", *shlex.split(line)],
        bufsize=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | ENVIRONMENT,
        # Jupyter signals the whole group: the command would be interrupted twice.
        start_new_session=True,
    ) as process:
        _follow(process, stop)
    if process.returncode:
        command = line.split(maxsplit=1)[0]
        raise CommandError(f"paras2s {command} ended with status {process.returncode}.")


def _follow(process: subprocess.Popen, stop: Callable[[], bool]) -> None:
    """Prints what a process says until it ends."""
    try:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        while True:
            if stop():
                process.send_signal(signal.SIGTERM)
                stop = _never
            if select.select([process.stdout], [], [], POLL_S)[0]:
                said = process.stdout.read(1 << 16)
                if not said:
                    return
                print(decode(said), end="", flush=True)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        _follow(process, _never)


def preempted(line: str, metrics: str | Path, step: int) -> None:
    """Runs a command, and takes its machine away once it has logged a step, or a later one.

    metrics: the metrics.jsonl that it writes; what it holds already does not count.
    """

    def last() -> int:
        rows = read_metrics(metrics)
        return rows[-1]["step"] if rows else 0

    wanted = max(step, last() + 1)
    paras2s(line, lambda: last() >= wanted)


def devices() -> str:
    """What a command would compute on, asked in a process of its own, which leaves it free."""
    code = "from paras2s_jax.stages import registry; print(registry.device())"
    asked = [sys.executable, "-c", code]
    return subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def curves(metrics: str | Path) -> Image:
    """Reward, KL, spread and entropy over the steps of GRPO. metrics: its metrics.jsonl."""
    return Image(plots.png(plots.curves(charts.grpo_charts(Path(metrics)))))


def scores(bench: str | Path) -> Image:
    """Overall scores and style-swap gains with their intervals. bench: folder of a bench."""
    return Image(plots.png(plots.scores(tables.read_results(Path(bench)))))


def table(bench: str | Path) -> Markdown:
    """The table of a bench, and who judged what. bench: its folder."""
    return Markdown(tables.to_markdown(tables.read_results(Path(bench))))


def listen(bench: str | Path, queries: str | Path, per_dimension: int = 1) -> HTML:
    """Players: the same words in two styles, and what each system answered.

    bench: its folder. queries: folder of the queries' jsonl. per_dimension: how many sentences.
    """
    return HTML(style_pairs(Path(bench), Path(queries), per_dimension))


def page(path: str | Path, height_px: int = 800) -> HTML:
    """A page of a bench, in a frame of its own. path: for instance report/index.html."""
    text = html.escape(Path(path).read_text(encoding="utf-8"))
    title = html.escape(Path(path).parent.name)
    style = f"width: 100%; height: {height_px}px"
    return HTML(f'<div><iframe title="{title}" style="{style}" srcdoc="{text}"></iframe></div>')
