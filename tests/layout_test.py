"""The package's layout: which way imports point, and what no module may hold."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "paras2s_jax"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
FILES = sorted(ROOT.rglob("*.py"))
# Data flows down this list; imports point up it.
ORDER = (
    "audio", "data", "models", "convert", "train", "judge", "align", "bench", "stages", "plan",
    "perf", "allocator", "cli", "notebook",
)  # fmt: skip
# The bench measures what align made, but must be usable without it.
NEVER = {("bench", "align")}
MAX_LINES = 400
VAGUE_NAMES = {"utils", "util", "common", "helpers", "misc"}
# Modules that run code found in data.
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
# Where torch may be imported: to read released .pt files, and to race against it.
TORCH_PLACES = (f"{PACKAGE}.convert.torch_files", f"{PACKAGE}.perf.")
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen"}
FORBIDDEN_OPTIONS = {"trust_remote_code", "shell", "allow_pickle"}


def imported(tree: ast.Module, module: str) -> Iterator[str]:
    """Full names of all that a module imports, inside functions too.

    `from a.b import c` gives a.b and a.b.c: c may be a module or a thing inside one.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def part(module: str) -> str | None:
    """The entry of ORDER that a module belongs to; None for the package itself and for others."""
    names = module.split(".")
    return names[1] if names[0] == PACKAGE and len(names) > 1 and names[1] in ORDER else None


def wrong_imports(tree: ast.Module, module: str) -> list[str]:
    """What a module imports although it lies below it, or must stay apart."""
    here, wrong = part(module), []
    for name in imported(tree, module):
        there = part(name)
        if here and there:
            down = ORDER.index(there) > ORDER.index(here)
            if down or (here, there) in NEVER:
                wrong.append(name)
    return wrong


def forbidden(tree: ast.Module, module: str) -> list[str]:
    """Constructs that would run code or commands taken from data."""
    banned = FORBIDDEN_IMPORTS | (set() if module.startswith(TORCH_PLACES) else {"torch"})
    found = [n for n in imported(tree, module) if n.split(".", 1)[0] in banned]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in FORBIDDEN_CALLS else []
            found += [
                f"{called}({option.arg}=…)"
                for option in node.keywords
                if option.arg in FORBIDDEN_OPTIONS
                and not (isinstance(option.value, ast.Constant) and option.value.value is False)
            ]
    return found


def module_of(path: Path) -> str:
    names = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(names)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {module_of(path): ast.parse(path.read_text()) for path in FILES}


def test_every_part_of_the_package_has_its_place(trees):
    unplaced = {name for name in trees if part(name) is None} - {f"{PACKAGE}.__init__"}
    assert not unplaced
    assert {part(name) for name in trees} - {None} == set(ORDER)


def test_imports_point_up(trees):
    wrong = {name: wrong_imports(tree, name) for name, tree in trees.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_nothing_runs_code_from_data(trees):
    wrong = {name: forbidden(tree, name) for name, tree in trees.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_every_module_says_what_it_is(trees):
    # An empty __init__.py only marks a folder.
    silent = [name for name, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    assert not silent


def test_files_are_short_and_named_after_what_they_hold():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
    assert not [name for name in lines if Path(name).stem in VAGUE_NAMES]


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("models.codec", "from paras2s_jax.audio import mel", []),
        ("models.codec", "from paras2s_jax.train import state", ["train", "train.state"]),
        ("models.codec", "import paras2s_jax.align.sft as s", ["align.sft"]),
        ("models.codec", "def f():\n    from ..judge.chain import Judge", ["judge.chain"]),
        ("bench.run", "from paras2s_jax.align import grpo", ["align", "align.grpo"]),
        ("bench.run", "from paras2s_jax.judge import chain", []),
        ("stages.policy", "from paras2s_jax.align import grpo", []),
        ("stages.policy", "from paras2s_jax import cli", ["cli"]),
        ("audio.mel", "import jax.numpy as jnp", []),
    ],
)
def test_wrong_imports_are_found(module, source, wrong):
    found = wrong_imports(ast.parse(source), f"{PACKAGE}.{module}")
    # `from x.y import Name` lists x.y and x.y.Name; Name only counts where it may be a module.
    found = [name for name in found if not name.rpartition(".")[2][0].isupper()]
    assert found == [f"{PACKAGE}.{name}" for name in wrong]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("def f():\n    from torch import nn", 2),
        ("eval(text)", 1),
        ("subprocess.run(text, shell=True)", 1),
        ("subprocess.run(text, shell=False)", 0),
        ("AutoModel.from_pretrained(name, trust_remote_code=flag)", 1),
        ("ast.literal_eval(text); model.eval(); jax.eval_shape(f)", 0),
        ("import pickle_free", 0),
    ],
)
def test_code_from_data_is_found(source, count):
    assert len(forbidden(ast.parse(source), f"{PACKAGE}.x")) == count


def test_torch_has_its_places():
    tree = ast.parse("import torch")
    assert forbidden(tree, f"{PACKAGE}.models.qwen2") == ["torch"]
    assert forbidden(tree, f"{PACKAGE}.convert.torch_files") == []
    assert forbidden(tree, f"{PACKAGE}.perf.forward") == []
