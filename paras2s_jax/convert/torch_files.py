"""Releases that exist only as torch files (.pt): read once, into safetensors.

The one place in the package that may import torch, which the extra [convert] installs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from paras2s_jax.convert.checkpoint import ConversionError, write_checkpoint

SUFFIXES = (".pt", ".pth")
# Where releases keep their tensors: Kimi-Audio's detokenizer, its vocoder, funasr's emotion2vec.
ENTRIES = ("state_dict", "generator", "model")


def to_safetensors(source: str | Path, target: str | Path) -> None:
    """Writes the tensors of a torch file to `target`/model.safetensors.

    Raises:
        ConversionError: torch is not installed, or the file is not one of plain tensors.
    """
    write_checkpoint(target, read(source))


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Tensors of a torch file by name. Only tensors are unpickled (weights_only), never code.

    Raises:
        ConversionError: torch is not installed, or the file is not one of plain tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{path} is a torch file: install torch once with pip install 'paras2s-jax[convert]'"
        ) from error
    # What torch raises for a file that asks for more than tensors; torch brings the name.
    refused = torch.serialization.pickle.UnpicklingError
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (refused, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"{path} is not a torch file of plain tensors ({reason}); download it again"
        ) from error
    while isinstance(loaded, Mapping) and not _is_flat(loaded, torch):
        inner = [entry for entry in ENTRIES if isinstance(loaded.get(entry), Mapping)]
        if not inner:
            raise ConversionError(
                f"{path} holds {sorted(map(str, loaded))[:10]}; tensors were looked for at the top "
                f"and under {', '.join(ENTRIES)}"
            )
        loaded = loaded[inner[0]]
    if not isinstance(loaded, Mapping):
        raise ConversionError(f"{path} holds a {type(loaded).__name__}, not tensors by name")
    return {str(key): _numpy(value, torch) for key, value in loaded.items()}


def _is_flat(loaded: Mapping, torch) -> bool:
    return bool(loaded) and all(isinstance(value, torch.Tensor) for value in loaded.values())


def _numpy(value, torch) -> np.ndarray:
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
