"""Which convert module reads which checkpoint. To add a family: write its module, list it here.

Each module has ARCHITECTURES (names in config.json "architectures"), IGNORE, make_model, rules,
init and load_processor. One whose release has no such config.json has `matches(folder)` too; one
whose release has checkpoints of other families in sub-folders names those in PARTS; one whose
reference calls modules otherwise in memory than in checkpoints has memory_names(config):
beginnings in memory -> in checkpoints, of which the first that fits counts.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax

from paras2s_jax.convert.checkpoint import ConversionError

FAMILIES = (
    "bigvgan",
    "emotion2vec",
    "flow_matching",
    "kimi_audio",
    "qwen2",
    "qwen2_5_omni",
    "qwen2_audio",
    "speech_tokenizer",
    "wav2vec2",
    "whisper",
    "whisper_classifier",
)


def load(name: str) -> ModuleType:
    """The module of a family."""
    return importlib.import_module(f"paras2s_jax.convert.{name}")


def family_of(folder: str | Path) -> ModuleType:
    """The module that reads the checkpoint in a folder.

    Raises:
        ConversionError: no family reads what config.json names, or there is none.
    """
    folder = Path(folder)
    modules = [load(name) for name in FAMILIES]
    named = _architectures(folder)
    for module in modules:
        if set(named or ()) & set(module.ARCHITECTURES):
            return module
    for module in modules:
        if hasattr(module, "matches") and module.matches(folder):
            return module
    if named is None:
        raise ConversionError(f"{folder / 'config.json'} is missing; put the released one there")
    known = sorted(name for module in modules for name in module.ARCHITECTURES)
    near = [close for name in named for close in difflib.get_close_matches(name, known, n=1)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConversionError(
        f"{folder / 'config.json'} names {', '.join(named) or 'no architecture'}, which no family "
        f"reads; {hint}known are {', '.join(known)}"
    )


def _architectures(folder: Path) -> list[str] | None:
    """What config.json names; None where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        named = json.loads(path.read_text()).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{path} is not a config ({error}); download it again") from error
    return [str(name) for name in named]


def memory_names(family: ModuleType, config: Any) -> Mapping[str, str]:
    """memory_names of a family, or none."""
    return family.memory_names(config) if hasattr(family, "memory_names") else {}


def make_model(family: ModuleType, folder: str | Path, **types: Any) -> nn.Module:
    """The model of a folder; types: dtype, param_dtype, scan_unroll, remat.

    Raises:
        ConversionError: its config cannot be read, or asks for what there is not.
    """
    try:
        return family.make_model(Path(folder), **types)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ConversionError(str(error)) from error


def abstract_variables(family: ModuleType, model: nn.Module) -> Any:
    """Shapes, types and logical axes (boxed) of all that a model's init makes."""
    return jax.eval_shape(functools.partial(family.init, model), jax.random.key(0))
