"""Folder to folder: a release to Orbax, and Orbax back to what was released."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tqdm

from paras2s_jax.convert import adapters, families, stored, torch_files
from paras2s_jax.convert.checkpoint import INDEX, Checkpoint, ConversionError, write_checkpoint
from paras2s_jax.convert.pretrained import KEPT_SUFFIXES, PARAMS, is_converted, local_folder
from paras2s_jax.convert.rules import export_tensors, plan
from paras2s_jax.models.placement import unbox

DTYPES = ("float32", "bfloat16", "float16")


def convert(source: str, target: str, dtype: str | None = None) -> None:
    """A released checkpoint -> `target`/params (Orbax) beside its config and processor files.

    The parameters are never in memory together: they are read and written piece by piece.
    source: folder with safetensors or one .pt file, that file, or a hub id. dtype: of the
    parameters, by default as stored.

    Raises:
        ConversionError: the checkpoint is broken or does not fit, or `target` exists; nothing is
            left behind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    file = Path(source) if Path(source).is_file() else None
    folder = file.parent if file else local_folder(source)
    if is_converted(folder):
        raise ConversionError(f"{folder} is converted already; give the released folder")
    with contextlib.ExitStack() as stack:
        tensors = stack.enter_context(_released(file or folder, Path(target)))
        family = families.family_of(folder)
        model = family.make_model(folder)
        planned = plan(
            tensors,
            family.rules(model.config),
            unbox(families.abstract_variables(family, model))["params"],
            ignore=family.IGNORE,
            dtype=dtype or "stored",
            name=str(file or folder),
        )
        partial = stack.enter_context(appearing(Path(target)))
        bar = stack.enter_context(_progress("convert", planned))
        meta = {"family": family.__name__.rpartition(".")[2], "released": sorted(tensors)}
        stored.save_streamed(partial / PARAMS, planned, meta, on_bytes=bar.update)
        _copy_beside(folder, partial)


def export(source: str, target: str, lora: str = "merged") -> None:
    """A converted (and perhaps trained) folder -> safetensors as they were released.

    lora: what becomes of adapters: "merged" into the weights, or alone as a PEFT "adapter".

    Raises:
        ConversionError: `source` was not converted, has no adapters to write, or `target` exists;
            nothing is left behind.
    """
    folder = Path(source)
    if not is_converted(folder):
        raise ConversionError(f"{folder} was not made by `paras2s convert`: it has no {PARAMS}/")
    family = families.family_of(folder)
    table = family.rules(family.make_model(folder).config)
    params = stored.Stored(folder / PARAMS)
    leaves = stored.Stored(folder / PARAMS, "lora")
    lora_params = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    if lora == "adapter":
        if not lora_params:
            raise ConversionError(f"{folder} has no adapters to write; use --lora=merged")
        alpha = adapters.alpha_of(folder / PARAMS)
        with appearing(Path(target)) as partial:
            adapters.write_adapter(partial, lora_params, table, alpha=alpha, base=str(folder))
        return
    if lora_params:
        params = adapters.merged(params, lora_params, adapters.alpha_of(folder / PARAMS))
    tensors = export_tensors(params, table)
    with appearing(Path(target)) as partial, _progress("export", tensors) as bar:
        write_checkpoint(partial, tensors, on_bytes=bar.update)
        _copy_beside(folder, partial)


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


@contextlib.contextmanager
def _released(path: Path, target: Path) -> Iterator[Checkpoint]:
    """The tensors of a release; those of a .pt file pass through a safetensors file."""
    pickled = [path] if path.suffix in torch_files.SUFFIXES else []
    if path.is_dir() and not any(path.glob("*.safetensors")):
        pickled = sorted(p for p in path.iterdir() if p.suffix in torch_files.SUFFIXES)
    if len(pickled) > 1:
        names = ", ".join(file.name for file in pickled)
        raise ConversionError(f"{path} has several checkpoints ({names}); give the file to convert")
    if not pickled:
        yield Checkpoint(path)
        return
    scratch = target.with_name(f"{target.name}.released")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        torch_files.to_safetensors(pickled[0], scratch)
        yield Checkpoint(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _progress(title: str, tensors: Mapping) -> tqdm.tqdm:
    total = sum(
        int(np.prod(value.shape, dtype=np.int64)) * np.dtype(value.dtype).itemsize
        for value in tensors.values()
    )
    return tqdm.tqdm(total=total, desc=title, unit="B", unit_scale=True)


def _copy_beside(folder: Path, target: Path) -> None:
    """Copies config, tokenizer and processor files: data, never code."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in KEPT_SUFFIXES and path.name != INDEX:
            shutil.copyfile(path, target / path.name)
