"""Safetensors files: against the library's own reader and writer, and broken in every way."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paras2s_jax.convert.checkpoint import (
    DTYPES,
    Checkpoint,
    ConversionError,
    write_checkpoint,
    write_file,
)


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {
        "a.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "a.bias": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "b": np.arange(7, dtype=np.int64),
        "flag": np.array([True]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float16),
    }
    return made


def _same(found, wanted):
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape
        np.testing.assert_array_equal(found[key], value)


def test_reads_what_the_library_writes(tmp_path):
    save_file(_tensors(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    _same(checkpoint, _tensors())
    assert checkpoint.shapes == {key: value.shape for key, value in _tensors().items()}
    assert checkpoint.dtypes == {key: value.dtype for key, value in _tensors().items()}
    assert checkpoint.nbytes == sum(value.nbytes for value in _tensors().values())


def test_the_library_reads_what_is_written(tmp_path):
    told = []
    write_checkpoint(tmp_path / "out", _tensors(), on_bytes=told.append)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    _same(load_file(tmp_path / "out" / "model.safetensors"), _tensors())
    assert sum(told) == sum(value.nbytes for value in _tensors().values())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_type_comes_back(tmp_path, dtype):
    value = np.arange(6).reshape(2, 3).astype(DTYPES[dtype])
    write_file(tmp_path / "x.safetensors", {"odd": np.zeros(3, bool), "x": value})
    found = Checkpoint(tmp_path / "x.safetensors")["x"]
    assert found.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(found, value)


def test_a_type_without_a_name_is_an_error(tmp_path):
    with pytest.raises(ConversionError, match="x is complex64"):
        write_file(tmp_path / "x.safetensors", {"x": np.zeros(2, np.complex64)})


def test_shards_and_their_index(tmp_path):
    write_checkpoint(tmp_path, _tensors(), max_shard_bytes=80)
    files = {path.name for path in tmp_path.iterdir()}
    assert "model-00001-of-00002.safetensors" in files and "model.safetensors" not in files
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(_tensors())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in _tensors().values())
    _same(Checkpoint(tmp_path), _tensors())
    # Files that the index does not name belong to somebody else.
    save_file({"y": np.ones(1)}, tmp_path / "adapter_model.safetensors")
    _same(Checkpoint(tmp_path), _tensors())


def test_a_folder_without_an_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file here"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file here"):
        Checkpoint(tmp_path / "none.safetensors")
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    save_file({"y": np.ones(1, np.float32)}, tmp_path / "b.safetensors")
    assert set(Checkpoint(tmp_path)) == {"x", "y"}
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "c.safetensors")
    with pytest.raises(ConversionError, match=r"c\.safetensors: x is in a\.safetensors too; keep"):
        Checkpoint(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    """A good sharded checkpoint, and its index to be spoilt."""
    write_checkpoint(tmp_path, _tensors(), max_shard_bytes=80)
    path = tmp_path / "model.safetensors.index.json"
    return tmp_path, path, json.loads(path.read_text())


def test_an_index_that_is_no_json(sharded):
    folder, path, _ = sharded
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ConversionError, match=r"index\.json is not an index.*download"):
        Checkpoint(folder)
    path.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(ConversionError, match="a given twice"):
        Checkpoint(folder)
    path.write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(ConversionError, match="weight_map must give a file"):
        Checkpoint(folder)
    path.write_text("[]")
    with pytest.raises(ConversionError, match="is not an index"):
        Checkpoint(folder)


def test_an_index_that_names_what_is_not_there(sharded):
    folder, path, index = sharded
    spoilt = index["weight_map"] | {"ghost": "model-00001-of-00002.safetensors"}
    path.write_text(json.dumps({"weight_map": spoilt}))
    with pytest.raises(ConversionError, match=r"ghost is not in model-00001-of-00002"):
        Checkpoint(folder)
    spoilt = {key: file for key, file in index["weight_map"].items() if key != "b"}
    path.write_text(json.dumps({"weight_map": spoilt}))
    with pytest.raises(ConversionError, match=r"b of model-0000\d-of-00002.safetensors is not lis"):
        Checkpoint(folder)
    files = sorted(set(index["weight_map"].values()))
    other = files[index["weight_map"]["b"] == files[0]]
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"b": other}}))
    with pytest.raises(ConversionError, match=r"b is in model-0000\d-of-00002.safetensors, not"):
        Checkpoint(folder)


def test_a_shard_that_is_not_there(sharded):
    folder, *_ = sharded
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"not there: model-00002-of-00002.safetensors; down"):
        Checkpoint(folder)


def _header(path, **changed):
    """Rewrites the header of a file whose data stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for key, entry in changed.items():
        header[key] = header[key] | entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


BROKEN = [
    (lambda p: p.write_bytes(b""), "header is incomplete"),
    (lambda p: p.write_bytes(p.read_bytes()[:20]), "header is incomplete"),
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"truncated: y ends at byte \d+, the file at"),
    (lambda p: p.write_bytes(p.read_bytes() + b"0"), "1 bytes follow its last tensor"),
    (lambda p: p.write_bytes(p.read_bytes()[:9] + b"}" + p.read_bytes()[10:]), "corrupt header"),
    (lambda p: _header(p, x={"shape": [3]}), r"x has 8 bytes, its shape \[3\] needs others"),
    (lambda p: _header(p, x={"shape": [-1, -2]}), "x has 8 bytes"),
    (lambda p: _header(p, x={"dtype": "F31"}), "unknown type F31"),
    (lambda p: _header(p, y={"data_offsets": [4, 16]}), "y starts at byte"),
    (lambda p: _header(p, y={"data_offsets": None}), "corrupt header"),
    (lambda p: _header(p, y={"shape": None}), "corrupt header"),
]


@pytest.mark.parametrize(("spoil", "message"), BROKEN)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, spoil, message):
    path = tmp_path / "x.safetensors"
    write_file(path, {"x": np.zeros(2, np.float32), "y": np.zeros(3, np.float32)})
    assert len(Checkpoint(path)) == 2
    spoil(path)
    with pytest.raises(ConversionError, match=message) as error:
        Checkpoint(path)
    assert str(path) in str(error.value) and "again" in str(error.value)


def test_a_key_given_twice(tmp_path):
    text = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    text += b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"0")
    with pytest.raises(ConversionError, match="x given twice"):
        Checkpoint(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_pages_are_given_back(tmp_path):
    path = tmp_path / "big.safetensors"
    write_file(path, {"a": np.ones(64 << 20, np.uint8), "b": np.ones(8, np.uint8)})

    def mapped():
        with open("/proc/self/maps") as maps:
            return sum("big.safetensors" in line for line in maps)

    checkpoint = Checkpoint(path)
    value = checkpoint["a"]
    assert value[::4096].sum() == 16 << 10 and mapped() == 1
    del value
    assert mapped() == 0
