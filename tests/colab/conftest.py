"""Runs notebooks as they stand, with a cell of other parameters behind their own."""

import base64
import os
import re
import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
COLAB = ROOT / "colab"
PARAMETERS = "parameters"
TIMEOUT_S = 600

# The quick recipe with next to nothing of everything: a run that only shows that it runs.
LEAST = """
    synthesize.sizes.sentences=2 synthesize.sizes.train_voices=1 synthesize.num_workers=1
    synthesize.sizes.polytone_texts=0 synthesize.sizes.plain_takes=0
    synthesize.sizes.contrary_takes=0
    judge.analyzers.emotion= judge.analyzers.sarcasm= judge.analyzers.age= judge.analyzers.gender=
    judge.batch_size=8 policy.max_steps=24
    sft.num_steps=2 sft.warmup_steps=1 sft.num_demonstrations=8 sft.batch_size=4
    distill.num_queries=8 distill.num_samples=2 distill.sample_batch_size=2
    distill.audio_sampling.temperature=0.5 distill.trainable=lora
    distill.held_out_share=0.5 distill.num_steps=2 distill.warmup_steps=1 distill.batch_size=4
    distill.pair_buckets_s=(4.0,)
    grpo.num_steps=3 grpo.warmup_steps=1 grpo.num_prompts=2 grpo.group_size=2 grpo.num_epochs=1
    grpo.audit_every=0
    bench.systems=('sft','grpo') bench.batch_size=8 bench.num_probes=2 bench.num_workers=1
    bench.sentences_in_report=1 bench.use_labels=true
"""


def overrides(text: str) -> str:
    """`key=value …` as flags."""
    return shlex.join(f"--config.{part}" for part in text.split())


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


def place_of_parameters(notebook) -> int:
    """Index of the one cell that is tagged so, as papermill has it."""
    (place,) = [
        index
        for index, cell in enumerate(notebook.cells)
        if PARAMETERS in cell.metadata.get("tags", ())
    ]
    return place


class Run:
    """A notebook that was executed from top to bottom."""

    def __init__(self, notebook: nbformat.NotebookNode):
        self.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        self.outputs = [output for cell in self.cells for output in cell.outputs]

    @property
    def printed(self) -> str:
        return "".join(part.text for part in self.outputs if part.output_type == "stream")

    def shown(self, mime: str) -> list[str]:
        """What was displayed in a format."""
        return [part.data[mime] for part in self.outputs if mime in part.get("data", {})]

    def check(self) -> None:
        """Every cell ran once, in order, and none failed or installed anything."""
        assert [cell.execution_count for cell in self.cells] == list(range(1, len(self.cells) + 1))
        assert not [part for part in self.outputs if part.output_type == "error"]
        assert "paras2s_jax is installed." in self.printed
        assert "Traceback" not in self.printed
        for picture in self.shown("image/png"):
            assert base64.b64decode(picture).startswith(b"\x89PNG")
        for page in self.shown("text/html"):
            # Players have their sound inside.
            sources = re.findall(r'<audio[^>]* src="([^"]{11})', page)
            assert set(sources) <= {"data:audio/"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name, **parameters): executes colab/<name>.ipynb in its place, and checks it."""
    # A checkout whose package can be imported, be it installed or not.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def execute(name: str, **parameters) -> Run:
        notebook = read(name)
        place = place_of_parameters(notebook)
        own = notebook.cells[place].source
        for key in parameters:
            assert re.search(rf"^{key} = ", own, re.MULTILINE), f"{name} has no parameter {key}"
        source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
        NotebookClient(
            notebook, timeout=TIMEOUT_S, kernel_name="python3",
            resources={"metadata": {"path": str(COLAB)}},
        ).execute()  # fmt: skip
        done = Run(notebook)
        done.check()
        return done

    return execute
