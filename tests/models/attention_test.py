"""Every kernel against the whole score matrix, and which one is chosen."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from paras2s_jax.models import attention, blocked
from paras2s_jax.train import sharding

ROWS, STEPS, KEYS, HEADS, KV_HEADS, WIDTH = 2, 7, 11, 6, 2, 5


def _inputs(heads=HEADS, steps=STEPS, keys=KEYS, dtype=np.float32):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(ROWS, steps, heads, WIDTH)).astype(dtype)
    k, v = rng.normal(size=(2, ROWS, keys, KV_HEADS, WIDTH)).astype(dtype)
    return q, k, v


def _masks() -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(1)
    shapes = {
        "key": (ROWS, 1, 1, KEYS),
        "query": (1, 1, STEPS, KEYS),
        "head": (ROWS, HEADS, STEPS, KEYS),
    }
    masks = {name: rng.random(shape) < 0.6 for name, shape in shapes.items()}
    for mask in masks.values():
        mask[..., 0] = True
    return masks | {"none": None}


in_blocks = functools.partial(attention.attend, kernel="blocked")


@pytest.mark.parametrize("block", [2, 3, 7, 512])
@pytest.mark.parametrize("mask", ["none", "key", "query", "head"])
def test_blocks_change_nothing(monkeypatch, block, mask):
    monkeypatch.setattr(blocked, "QUERY_BLOCK", block)
    q, k, v = _inputs()
    mask = _masks()[mask]
    bias = np.random.default_rng(2).normal(size=(1, HEADS, STEPS, KEYS)).astype(np.float32)
    for scale, added in ((None, None), (0.3, bias)):
        want = jax.jit(jax.nn.dot_product_attention)(q, k, v, added, mask, scale=scale)
        got = jax.jit(in_blocks)(q, k, v, mask, scale, added)
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "key", "query", "head"])
def test_blocks_have_the_same_gradient(monkeypatch, mask):
    monkeypatch.setattr(blocked, "QUERY_BLOCK", 3)
    q, k, v = _inputs()
    mask = _masks()[mask]
    bias = np.random.default_rng(2).normal(size=(1, HEADS, STEPS, KEYS)).astype(np.float32)

    def gradient(kernel, bias, scale):
        def loss(qkv):
            out = attention.attend(*qkv, mask, scale, bias, kernel=kernel)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss))((q, k, v))

    for args in ((None, 0.3), (bias, None)):
        for got, want in zip(gradient("blocked", *args), gradient("xla", *args)):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_query_that_sees_nothing_gives_finite_gradients():
    q, k, v = _inputs()
    mask = np.ones((1, 1, STEPS, KEYS), bool)
    mask[:, :, 2] = False

    def loss(qkv):
        return jnp.sum(jnp.sin(in_blocks(*qkv, mask)))

    for gradient in jax.jit(jax.grad(loss))((q, k, v)):
        assert np.isfinite(gradient).all()


def test_bfloat16_blocks_stay_near_float32():
    q, k, v = _inputs()
    want = jax.jit(in_blocks)(q, k, v)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    got = jax.jit(in_blocks)(*half)
    assert got.dtype == jnp.bfloat16
    error = np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want)))
    assert error < 2e-2


def _on(platform: str, num_devices: int):
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = AbstractMesh((num_devices,), ("data",), (AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def _shaped(steps, keys, width=64, dtype=jnp.bfloat16):
    return (jax.ShapeDtypeStruct((2, size, 4, width), dtype) for size in (steps, keys))


def test_short_sequences_keep_the_plain_form():
    for platform, steps, keys in (("cpu", 90, 100), ("tpu", 2000, 512), ("gpu", 2000, 512)):
        with _on(platform, 1):
            mask = jnp.ones((2, 1, 1, keys), bool)
            assert attention.choose(*_shaped(steps, keys), mask) == "xla"


def test_many_queries_of_few_keys_are_too_much_for_the_caches_of_a_cpu():
    with _on("cpu", 1):
        assert attention.choose(*_shaped(100, 100)) == "blocked"
    with _on("cpu", 8):
        assert attention.choose(*_shaped(100, 100)) == "xla"


@pytest.mark.parametrize(
    ("platform", "num_devices", "mask", "bias", "kernel"),
    [
        ("cpu", 1, None, None, "blocked"),
        ("cpu", 1, (2, 1, 1500, 1500), (1, 4, 1500, 1500), "blocked"),
        ("cpu", 8, None, None, "xla"),
        ("tpu", 8, None, None, "pallas"),
        ("tpu", 8, (2, 1, 1, 1500), None, "pallas"),
        ("tpu", 8, (2, 1, 1500, 1500), None, "xla"),
        ("tpu", 8, None, (1, 4, 1500, 1500), "xla"),
    ],
)
def test_long_sequences_take_the_kernel_of_the_platform(platform, num_devices, mask, bias, kernel):
    mask = None if mask is None else jax.ShapeDtypeStruct(mask, bool)
    with _on(platform, num_devices):
        assert attention.choose(*_shaped(1500, 1500), mask, bias) == kernel


@pytest.mark.parametrize(
    ("version", "capability", "dtype", "width", "keys", "masked", "kernel"),
    [
        ("cuda 12090", "9.0", jnp.bfloat16, 64, 1500, True, "cudnn"),
        ("cuda 12090", "9.0", jnp.bfloat16, 64, 1501, False, "cudnn"),
        ("cuda 12090", "9.0", jnp.bfloat16, 64, 1501, True, "xla"),
        ("cuda 12090", "9.0", jnp.float32, 64, 1500, False, "xla"),
        ("cuda 12090", "9.0", jnp.bfloat16, 60, 1500, False, "xla"),
        ("cuda 12090", "7.5", jnp.float16, 64, 1500, False, "xla"),
        ("rocm 60", "gfx942", jnp.bfloat16, 64, 1500, False, "xla"),
    ],
)
def test_what_cudnn_can_do(monkeypatch, version, capability, dtype, width, keys, masked, kernel):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(client=client, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    mask = jax.ShapeDtypeStruct((2, 1, 1, keys), bool) if masked else None
    with _on("gpu", 8):
        assert attention.choose(*_shaped(1500, keys, width, dtype), mask) == kernel


@pytest.mark.parametrize("mask", ["none", "key"])
def test_tpu_kernel_interpreted(mask):
    # 130 queries and 140 keys fill two blocks of 128 in part.
    from jax.experimental.pallas import tpu as pltpu

    q, k, v = _inputs(steps=130, keys=140)
    mask = None if mask == "none" else np.random.default_rng(1).random((ROWS, 1, 1, 140)) < 0.6
    want = jax.jit(jax.nn.dot_product_attention)(q, k, v, None, mask)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(attention.pallas_flash)(q, k, v, mask)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_tpu_kernel_spreads_rows_and_heads_over_the_mesh():
    q, k, v = (x.astype(jnp.bfloat16) for x in _inputs(steps=1500, keys=1500))
    mask = np.ones((ROWS, 1, 1, 1500), bool)
    # 2 rows over 2 devices; 6 heads do not go over 4, so every device has them all.
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    rules = [("act_batch", ("data", "fsdp")), ("act_heads", "tensor")]
    with sharding.activate(mesh, rules):
        traced = jax.jit(attention.pallas_flash).trace(q, k, v, mask)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    # The kernel works on one row of 6 heads and 1500 positions, filled up to blocks.
    assert "tpu_custom_call" in text and "tensor<1x6x1536x5xbf16>" in text
