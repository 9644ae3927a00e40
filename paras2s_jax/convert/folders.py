"""Folder to folder: a release to Orbax, and Orbax back to what was released."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tqdm

from paras2s_jax.convert import adapters, families, stored, torch_files
from paras2s_jax.convert.checkpoint import INDEX, Checkpoint, ConversionError, write_checkpoint
from paras2s_jax.convert.pretrained import KEPT_SUFFIXES, local_folder
from paras2s_jax.convert.rules import Parameter, export_tensors, plan
from paras2s_jax.models.placement import unbox

DTYPES = ("float32", "bfloat16", "float16")
# Where the tensors of a torch file wait, inside the folder that is being made.
SCRATCH = "released"


def convert(source: str, target: str, dtype: str | None = None) -> None:
    """A released checkpoint -> `target`/params (Orbax) beside its config and processor files.

    The parameters are never in memory together: they are read and written piece by piece. Parts of
    a release that lie in sub-folders are converted along with it.
    source: folder with safetensors or one .pt file, that file, or a hub id. dtype: of the
    parameters, by default as stored.

    Raises:
        ConversionError: the checkpoint is broken or does not fit, or `target` exists; nothing is
            left behind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    file = Path(source) if Path(source).is_file() else None
    folder = file.parent if file else local_folder(source, torch_files.SUFFIXES)
    if stored.is_converted(folder):
        raise ConversionError(f"{folder} is converted already; give the released folder")
    with appearing(Path(target)) as partial:
        works = [_Work.of(file or folder, partial, dtype)]
        for part in parts_of(works[0].family):
            if (folder / part).is_dir():
                works.append(_Work.of(folder / part, partial / part, dtype))
        with _progress("convert", [p for work in works for p in work.planned.values()]) as bar:
            for work in works:
                work.run(bar.update)


@dataclass(frozen=True)
class _Work:
    """One checkpoint that fits its model, and where it is to go."""

    family: ModuleType
    folder: Path
    target: Path
    tensors: Checkpoint
    planned: dict[str, Parameter]

    @classmethod
    def of(cls, source: Path, target: Path, dtype: str | None) -> _Work:
        """Checks a checkpoint. source: its folder, or its file beside the config."""
        target.mkdir(parents=True, exist_ok=True)
        folder = source if source.is_dir() else source.parent
        pickled = torch_file(source)
        if pickled is not None:
            _copy_beside(folder, target / SCRATCH)
            folder = source = target / SCRATCH
            torch_files.to_safetensors(pickled, folder)
        tensors = Checkpoint(source)
        family = families.family_of(folder)
        model = families.make_model(family, folder)
        planned = plan(
            tensors,
            family.rules(model.config),
            unbox(families.abstract_variables(family, model))["params"],
            ignore=family.IGNORE,
            dtype=dtype or "stored",
            name=str(pickled or source),
        )
        return cls(family, folder, target, tensors, planned)

    def run(self, on_bytes: Callable[[int], object]) -> None:
        """Writes the parameters, and copies the small files."""
        name = self.family.__name__.rpartition(".")[2]
        meta = {"family": name, "released": sorted(self.tensors)}
        stored.save_streamed(self.target / stored.PARAMS, self.planned, meta, on_bytes=on_bytes)
        _copy_beside(self.folder, self.target)
        shutil.rmtree(self.target / SCRATCH, ignore_errors=True)


def torch_file(source: Path) -> Path | None:
    """The torch file that is to be converted; None where there are safetensors.

    Raises:
        ConversionError: there are several.
    """
    if source.is_file():
        return source if source.suffix in torch_files.SUFFIXES else None
    found = sorted(path for path in source.iterdir() if path.suffix in torch_files.SUFFIXES)
    if not found or any(source.glob("*.safetensors")):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConversionError(
            f"{source} has several torch files ({names}); give the one to convert"
        )
    return found[0]


def export(source: str, target: str, lora: str = "merged") -> None:
    """A converted (and perhaps trained) folder -> safetensors as they were released.

    What conversion ignored (buffers, towers that no model here has) is not in it.
    lora: what becomes of adapters: "merged" into the weights, or alone as a PEFT "adapter".

    Raises:
        ConversionError: `source` was not converted, has no adapters to write, or `target` exists;
            nothing is left behind.
    """
    folder = Path(source)
    if not stored.is_converted(folder):
        raise ConversionError(
            f"{folder} was not made by `paras2s convert`: it lacks {stored.PARAMS}/"
        )
    family, config = _family_and_config(folder)
    if lora == "adapter":
        directory = adapters.saved_in(folder)
        if directory is None:
            raise ConversionError(f"{folder} has no adapters to write; use --lora=merged")
        alpha = adapters.alpha_of(directory)
        with appearing(Path(target)) as partial:
            adapters.write_adapter(
                partial,
                _adapters(directory),
                family.rules(config),
                alpha=alpha,
                base=str(folder),
                renames=families.memory_names(family, config),
            )
        return
    parts = [part for part in parts_of(family) if stored.is_converted(folder / part)]
    tensors = {part: _plain_tensors(folder / part) for part in (".", *parts)}
    every = [tensor for of_part in tensors.values() for tensor in of_part.values()]
    with appearing(Path(target)) as partial, _progress("export", every) as bar:
        for part, of_part in tensors.items():
            write_checkpoint(partial / part, of_part, on_bytes=bar.update)
            _copy_beside(folder / part, partial / part)


def _family_and_config(folder: Path) -> tuple[ModuleType, Any]:
    family = families.family_of(folder)
    return family, families.make_model(family, folder).config


def _adapters(directory: Path) -> dict[str, np.ndarray]:
    leaves = stored.Stored(directory, "lora")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def _plain_tensors(folder: Path) -> dict:
    """What is exported of one converted folder, with its adapters folded in; made when used."""
    params, directory = stored.Stored(folder / stored.PARAMS), adapters.saved_in(folder)
    if directory is not None:
        params = adapters.merged(params, _adapters(directory), adapters.alpha_of(directory))
    family, config = _family_and_config(folder)
    return export_tensors(params, family.rules(config))


def parts_of(family: ModuleType) -> tuple[str, ...]:
    """Sub-folders of a family's release that hold checkpoints of other families."""
    return getattr(family, "PARTS", ())


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends, and vanishes if it fails.

    A run that was killed leaves it beside the target as NAME.partial; the next one sweeps it.

    Raises:
        ConversionError: `target` is there already.
    """
    if target.exists():
        raise ConversionError(f"{target} is there already; delete it, or give another --to")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _progress(title: str, tensors: Iterable) -> tqdm.tqdm:
    total = sum(
        int(np.prod(value.shape, dtype=np.int64)) * np.dtype(value.dtype).itemsize
        for value in tensors
    )
    return tqdm.tqdm(total=total, desc=title, unit="B", unit_scale=True)


def _copy_beside(folder: Path, target: Path) -> None:
    """Copies config, tokenizer and processor files: data, never code."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in KEPT_SUFFIXES and path.name != INDEX:
            shutil.copyfile(path, target / path.name)
