"""Folders of trained models: the folder they were trained from, with what was trained in its place.

    config.json, …   copies of the base's small files
    params/          every parameter (Orbax), where any was trained; otherwise a link to the base's
    adapter/         the adapters ("lora" collection, Orbax), where there are any
    other folders    links to the base's: the other networks of a release

`from_pretrained`, `load_variables` and `paras2s export` read them as any converted folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paras2s_jax.convert import stored
from paras2s_jax.convert.adapters import ADAPTER
from paras2s_jax.convert.checkpoint import INDEX
from paras2s_jax.convert.pretrained import KEPT_SUFFIXES

CONFIG = "config.json"


def lay_out(
    folder: Path,
    *,
    base: Path | None = None,
    config: Mapping[str, Any] | None = None,
    keeps_params: bool = False,
) -> None:
    """Prepares a folder for `save`: all but what was trained. To be called by one process.

    base: the folder that the model was made from. config: what its config.json is to hold, where
    there is no base. keeps_params: the base's parameters are not trained, and only linked to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        # A link must not be written through.
        if path.is_symlink():
            path.unlink()
    if not keeps_params:
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    if base is None:
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        return
    for path in sorted(base.resolve().iterdir()):
        if path.is_file() and path.suffix in KEPT_SUFFIXES and path.name != INDEX:
            shutil.copyfile(path, folder / path.name)
        elif path.name != ADAPTER and (keeps_params or not _holds_params(path)):
            os.symlink(path, folder / path.name)


def _holds_params(path: Path) -> bool:
    return path.name in (stored.PARAMS, INDEX) or path.suffix == ".safetensors"


def save(
    folder: Path,
    variables: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    keeps_params: bool = False,
) -> None:
    """Saves what was trained into a folder of `lay_out`. To be called by every process.

    meta: of the adapters, with their {"lora": {"alpha": …}}, if there are any.
    """
    if not keeps_params:
        stored.save_params(folder / stored.PARAMS, {"params": variables["params"]}, {})
    if "lora" in variables:
        stored.save_params(folder / ADAPTER, {"lora": variables["lora"]}, meta)
