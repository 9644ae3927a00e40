"""Orbax folders: saved whole and streamed, loaded whole, spread and leaf by leaf."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from paras2s_jax.convert import stored
from paras2s_jax.convert.rules import CONV1D, LINEAR, Rule, import_params, plan
from paras2s_jax.convert.stored import Stored, load_params, save_params, save_streamed

VARIABLES = {
    "params": {"kernel": jnp.arange(8.0).reshape(4, 2), "half": jnp.ones(3, jnp.bfloat16)},
    "lora": {"a": jnp.zeros((2, 1))},
}
RULES = [
    Rule("blocks.{i}.fc.weight", "blocks/fc/kernel", LINEAR, range(3)),
    Rule("blocks.{i}.gain", "blocks/gain", over=range(3)),
    Rule("conv.weight", "conv/kernel", CONV1D),
    Rule("table", "table"),
]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def mesh_of_two():
    return jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])


def test_a_relative_folder(tmp_path, monkeypatch):
    save_params(tmp_path / "p", VARIABLES, {"vocab": 512})
    monkeypatch.chdir(tmp_path)
    assert_same(load_params("p")[0], VARIABLES)
    found = stored.saved_shapes("p/variables")
    assert found["params"]["kernel"].shape == VARIABLES["params"]["kernel"].shape


def test_params_with_meta(tmp_path):
    save_params(tmp_path / "p", VARIABLES, {"vocab": 512})
    save_params(tmp_path / "p", VARIABLES, {"vocab": 513})
    loaded, meta = load_params(tmp_path / "p")
    assert meta == {"vocab": 513} == stored.saved_meta(tmp_path / "p")
    assert_same(loaded, VARIABLES)
    assert loaded["params"]["half"].dtype == jnp.bfloat16
    mesh = mesh_of_two()
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), VARIABLES)
    shardings["params"]["kernel"] = NamedSharding(mesh, P("fsdp"))
    spread, _ = load_params(tmp_path / "p", shardings)
    assert spread["params"]["kernel"].sharding.spec == P("fsdp")
    assert_same(spread, VARIABLES)
    narrow, _ = load_params(tmp_path / "p", dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(stored.CheckpointError, match="none: no such checkpoint"):
        load_params(tmp_path / "none")


def _tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"blocks.{i}.fc.weight": (7, 5) for i in range(3)} | {
        **{f"blocks.{i}.gain": () for i in range(3)},
        "conv.weight": (4, 3, 6),
        "table": (11, 5),
    }
    made = {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}
    made["table"][:] = 0  # pieces of zeros must be stored too
    return made


def _expected() -> dict:
    def of(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    return {
        "blocks": {"fc": {"kernel": of(3, 5, 7)}, "gain": of(3)},
        "conv": {"kernel": of(6, 3, 4)},
        "table": of(11, 5),
    }


@pytest.mark.parametrize("limit", [1 << 20, 100, 24, 4])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_streamed_is_what_would_be_saved_whole(tmp_path, monkeypatch, limit, dtype):
    monkeypatch.setattr(stored, "PIECE_BYTES", limit)
    tensors, written = _tensors(dtype), []
    parameters = plan(tensors, RULES, _expected(), dtype="stored")
    save_streamed(tmp_path / "s", parameters, {"n": 1}, on_bytes=written.append)
    variables, meta = load_params(tmp_path / "s")
    assert meta == {"n": 1}
    assert_same(variables["params"], import_params(tensors, RULES, _expected(), dtype="stored"))
    assert variables["params"]["conv"]["kernel"].dtype == dtype
    assert sum(written) == sum(value.nbytes for value in tensors.values())
    assert max(written) <= max(limit, np.dtype(dtype).itemsize)
    mesh = mesh_of_two()
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), variables)
    shardings["params"]["conv"]["kernel"] = NamedSharding(mesh, P("fsdp"))
    assert_same(load_params(tmp_path / "s", shardings)[0], variables)


def test_pieces_follow_the_files():
    parameters = plan(_tensors(), RULES, _expected())
    kernel = parameters["blocks/fc/kernel"]  # [3 layers, in 5, out 7], stored as [out, in]
    assert stored.piece_shape(kernel, 3 * 5 * 7 * 4) == (3, 5, 7)
    assert stored.piece_shape(kernel, 2 * 5 * 7 * 4) == (2, 5, 7)
    # Less than a layer: whole stored rows, that is whole columns of the kernel.
    assert stored.piece_shape(kernel, 3 * 5 * 4 + 1) == (1, 5, 3)
    assert stored.piece_shape(kernel, 1) == (1, 1, 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_leaves_are_read_one_at_a_time(tmp_path, streamed):
    params = import_params(_tensors(), RULES, _expected())
    if streamed:
        save_streamed(tmp_path / "s", plan(_tensors(), RULES, _expected()), {})
    else:
        save_params(tmp_path / "s", {"params": params, "lora": {"a": np.ones(2)}}, {})
    leaves = Stored(tmp_path / "s")
    assert set(leaves) == {"blocks/fc/kernel", "blocks/gain", "conv/kernel", "table"}
    kernel = leaves["blocks/fc/kernel"]
    assert kernel.shape == (3, 5, 7) and kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], params["blocks"]["fc"]["kernel"][1])
    np.testing.assert_array_equal(leaves["table"], params["table"])
    assert len(Stored(tmp_path / "s", "lora")) == (0 if streamed else 1)
