"""Safetensors files: read tensor by tensor, written tensor by tensor, checked before either.

Format: 8 bytes little-endian header length, a JSON header {key: {dtype, shape, data_offsets}},
then the data without gaps (https://github.com/huggingface/safetensors, "Format"). Read here rather
than by the library, because pages that its one map of the whole file has touched stay resident.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A header longer than this is no header (the library's own limit).
_MAX_HEADER = 100_000_000
_AGAIN = "download or write the file again"


class ConversionError(ValueError):
    """A checkpoint is broken or does not fit; the message says where, and what to do."""


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Mapping):
    """Tensors of a safetensors file, or of a folder of shards; read when they are used.

    checkpoint[key] is a read-only array on the file: what is touched of it is read, and given back
    to the system when the array is dropped. Headers, file sizes and the index are checked at once.

    Args:
        path: a .safetensors file, or a folder with one or more of them and perhaps their
            model.safetensors.index.json.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: a file is truncated or corrupt, two shards hold the same key, or the index
            names files or tensors that are not there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        index = self._read_index()
        if index is not None:
            self._check_files(index, {file.name for file in files})
            named = set(index.values())
            files = [file for file in files if file.name in named]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{path}: no .safetensors file here; give a file or its folder")
        self._places: dict[str, _Place] = {}
        for file in files:
            for key, place in _read_header(file).items():
                if key in self._places:
                    other = self._places[key].file.name
                    raise ConversionError(
                        f"{file}: {key} is in {other} too; keep one of the two files in the folder"
                    )
                self._places[key] = place
        if index is not None:
            self._check_index(index)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; reads no data."""
        return {key: place.shape for key, place in self._places.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Type of every tensor; reads no data."""
        return {key: place.dtype for key, place in self._places.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors together."""
        return sum(place.nbytes for place in self._places.values())

    def __getitem__(self, key: str) -> np.ndarray:
        place = self._places[key]
        if place.nbytes == 0:
            return np.zeros(place.shape, place.dtype)
        # A map has at least one axis, a scalar none.
        made = np.memmap(place.file, place.dtype, "r", place.offset, place.shape or (1,))
        return np.asarray(made).reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _read_index(self) -> dict[str, str] | None:
        path = self.path / INDEX
        if not self.path.is_dir() or not path.is_file():
            return None
        try:
            weight_map = json.loads(path.read_text(), object_pairs_hook=_unique)["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{path} is not an index ({error!r}); {_AGAIN}") from error
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise ConversionError(f"{path}: weight_map must give a file for each key; {_AGAIN}")
        return weight_map

    def _check_files(self, index: Mapping[str, str], present: set[str]) -> None:
        missing = sorted(set(index.values()) - present)
        if missing:
            raise ConversionError(
                f"{self.path / INDEX} names files that are not there: {', '.join(missing)}; "
                "download them too"
            )

    def _check_index(self, index: Mapping[str, str]) -> None:
        problems = []
        for key in sorted(set(index) | set(self._places)):
            if key not in self._places:
                problems.append(f"{key} is not in {index[key]}")
            elif key not in index:
                problems.append(f"{key} of {self._places[key].file.name} is not listed")
            elif self._places[key].file.name != index[key]:
                problems.append(f"{key} is in {self._places[key].file.name}, not {index[key]}")
        if problems:
            raise ConversionError(
                f"{self.path / INDEX} and the files beside it differ: {'; '.join(problems)}; "
                "download index and files from the same release"
            )


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object in which no name occurs twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(twice)} given twice")
    return made


def _read_header(file: Path) -> dict[str, _Place]:
    """Places of a file's tensors, after checking that they tile its data exactly."""

    def broken(what: str) -> ConversionError:
        return ConversionError(f"{file}: {what}; {_AGAIN}")

    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise broken("truncated or not a safetensors file: its header is incomplete")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        places = {key: _place(file, 8 + length, key, entry) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(f"corrupt header ({error})") from error
    end = 8 + length
    for key, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if place.offset != end:
            raise broken(f"corrupt header: {key} starts at byte {place.offset}, not {end}")
        end += place.nbytes
        if end > size:
            raise broken(f"truncated: {key} ends at byte {end}, the file at {size}")
    if end != size:
        raise broken(f"{size - end} bytes follow its last tensor")
    return places


def _place(file: Path, start: int, key: str, entry: Mapping) -> _Place:
    """Where the tensor of one header entry lies. Raises ValueError, KeyError or TypeError."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{key} has the unknown type {entry['dtype']}")
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    place = _Place(file, start + begin, DTYPES[entry["dtype"]], shape)
    if min((*shape, 0)) < 0 or end - begin != place.nbytes:
        raise ValueError(f"{key} has {end - begin} bytes, its shape {list(shape)} needs others")
    return place


def write_checkpoint(
    folder: str | Path,
    tensors: Mapping[str, np.ndarray],
    *,
    max_shard_bytes: int = 4 << 30,
    name: str = WHOLE,
    on_bytes=lambda count: None,
) -> None:
    """Writes model.safetensors, or numbered shards with the index that Hugging Face reads.

    tensors: arrays, or anything with shape, dtype and `__array__`, which is called once, when the
    tensor's turn comes. name: of the file if it is one. on_bytes: told how much was written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        key: math.prod(value.shape) * np.dtype(value.dtype).itemsize
        for key, value in tensors.items()
    }
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    if len(shards) == 1:
        write_file(folder / name, tensors, on_bytes=on_bytes)
        return
    weight_map = {}
    stem = name.removesuffix(".safetensors")
    for number, keys in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {key: tensors[key] for key in keys}, on_bytes=on_bytes)
        weight_map |= dict.fromkeys(keys, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_file(
    path: Path, tensors: Mapping[str, np.ndarray], *, on_bytes=lambda count: None
) -> None:
    """Writes one safetensors file; see write_checkpoint.

    Raises:
        ConversionError: a tensor has a type that the format lacks.
    """
    # Wide types first: every tensor then starts where its type may be read in place.
    keys = sorted(tensors, key=lambda key: -np.dtype(tensors[key].dtype).itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        dtype = np.dtype(tensors[key].dtype)
        if dtype not in _NAMES:
            raise ConversionError(f"{path}: {key} is {dtype}, which safetensors files cannot hold")
        start, end = end, end + math.prod(tensors[key].shape) * dtype.itemsize
        shape = [int(size) for size in tensors[key].shape]
        header[key] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for key in keys:
            value = np.ascontiguousarray(tensors[key])
            stream.write(value.reshape(-1).view(np.uint8).data)
            on_bytes(value.nbytes)
