"""Layers against hand-derived values, numpy and peft."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.models import axes, layers


def test_dense_computes_x_kernel_plus_bias_and_names_its_axes():
    model = layers.Dense(2, kernel_axes=(axes.EMBED, axes.MLP))
    boxed = model.init(jax.random.key(0), jnp.zeros((1, 3)))
    assert boxed["params"]["kernel"].names == ("embed", "mlp")
    assert boxed["params"]["bias"].names == ("mlp",)
    kernel = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    params = {"kernel": kernel, "bias": jnp.array([0.5, -0.5])}
    # [1, 0, 2] @ kernel = [1 + 10, 2 + 12].
    y = model.apply({"params": params}, jnp.array([[[1.0, 0.0, 2.0]]]))
    np.testing.assert_allclose(y, [[[11.5, 13.5]]])


def test_dense_with_outputs_first_in_its_kernel():
    model = layers.Dense(2, kernel_axes=(axes.EMBED, axes.MLP), lora_rank=1, out_first=True)
    x = jax.random.normal(jax.random.key(1), (2, 4, 3))
    boxed = model.init(jax.random.key(0), x)
    assert boxed["params"]["kernel"].names == ("mlp", "embed")
    assert boxed["lora"]["a"].names == ("embed", "lora_rank")
    variables = nn.meta.unbox(boxed)
    assert variables["params"]["kernel"].shape == (2, 3)
    plain = {
        **variables,
        "params": variables["params"] | {"kernel": variables["params"]["kernel"].T},
    }
    want = model.clone(out_first=False).apply(plain, x)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), want, atol=1e-6)


def test_dense_out_dtype_keeps_the_accumulator():
    model = layers.Dense(1, use_bias=False, dtype=jnp.bfloat16, out_dtype=jnp.float32)
    params = {"kernel": jnp.array([[1.0], [1.0]])}
    # 256 + 1 needs 9 bits of mantissa; bfloat16 has 8 and would return 256.
    y = model.apply({"params": params}, jnp.array([[256.0, 1.0]]))
    assert y.dtype == jnp.float32
    assert y[0, 0] == 257.0


def test_fresh_lora_changes_nothing_and_trained_lora_adds_its_product():
    model = layers.Dense(3, lora_rank=2, lora_alpha=6.0)
    x = jax.random.normal(jax.random.key(1), (5, 4))
    variables = nn.meta.unbox(model.init(jax.random.key(0), x))
    a, b = variables["lora"]["a"], variables["lora"]["b"]
    assert a.shape == (4, 2) and b.shape == (2, 3)
    assert jnp.all(jnp.abs(a) <= 0.5) and jnp.any(jnp.abs(a) > 0.25)  # 1 / sqrt(4)
    plain = layers.Dense(3).apply({"params": variables["params"]}, x)
    np.testing.assert_array_equal(model.apply(variables, x), plain)
    variables["lora"]["b"] = jax.random.normal(jax.random.key(2), b.shape)
    want = plain + 3.0 * x @ a @ variables["lora"]["b"]  # alpha / r = 3
    np.testing.assert_allclose(model.apply(variables, x), want, atol=1e-5)


def test_rms_norm_by_hand():
    # rms([3, 4]) = sqrt(12.5); scale [2, 1].
    y = layers.RMSNorm(0.0).apply({"params": {"scale": jnp.array([2.0, 1.0])}}, jnp.array([3.0, 4]))
    np.testing.assert_allclose(y, [6 / 12.5**0.5, 4 / 12.5**0.5], rtol=1e-6)


def test_layer_norm_by_hand():
    # [1, 3]: mean 2, standard deviation 1 -> [-1, 1] * scale + bias.
    params = {"scale": jnp.array([2.0, 3.0]), "bias": jnp.array([0.0, 1.0])}
    y = layers.LayerNorm(0.0).apply({"params": params}, jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(y, [-2.0, 4.0], rtol=1e-6)


def test_rope_turns_half_split_pairs():
    # H = 4, theta = 100: angles at position 1 are 1 and 100^(-1/2) = 0.1; pairs (0, 2), (1, 3).
    cos, sin = layers.rope_angles(jnp.array([[1]]), 4, 100.0)
    y = layers.rope(jnp.array([[[[1.0, 0.0, 0.0, 1.0]]]]), cos, sin)
    np.testing.assert_allclose(
        y[0, 0, 0], [np.cos(1.0), -np.sin(0.1), np.sin(1.0), np.cos(0.1)], rtol=1e-6
    )


def test_rope_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    @jax.jit
    def score(at_q, at_k):
        turned_q = layers.rope(q, *layers.rope_angles(at_q[None, None], 8, 1e4))
        turned_k = layers.rope(k, *layers.rope_angles(at_k[None, None], 8, 1e4))
        return jnp.sum(turned_q * turned_k)

    at = jnp.arange(200)
    np.testing.assert_allclose(score(at[7], at[3]), score(at[104], at[100]), rtol=1e-4)
    assert abs(score(at[7], at[3]) - score(at[7], at[4])) > 1e-3


def test_rope_of_several_axes():
    """Head size 10, sections 2 + 1 + 1 + 1: frequencies 0 and 1 and the last follow the time."""
    positions = jnp.array([[[5]], [[7]], [[11]]])
    cos, sin = layers.rope_angles(positions, 10, 100.0, sections=(2, 1, 1, 1))
    assert cos.shape == (1, 1, 1, 5)
    frequencies = 100.0 ** (-np.arange(5) / 5)
    angles = np.array([5, 5, 7, 11, 5]) * frequencies
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin[0, 0, 0], np.sin(angles), atol=1e-5)
    plain = layers.rope_angles(jnp.array([[4]]), 10, 100.0)
    same = layers.rope_angles(jnp.full((3, 1, 1), 4), 10, 100.0, sections=(2, 1, 1, 1))
    np.testing.assert_array_equal(same, plain)


@pytest.mark.parametrize("sections", [None, (2, 2)])
def test_rope_of_several_axes_needs_fitting_sections(sections):
    with pytest.raises(ValueError, match="sum to 5"):
        layers.rope_angles(jnp.zeros((3, 1, 1), int), 10, 100.0, sections=sections)


def _attention_by_hand(q, k, v, mask):
    """Per-head numpy attention. q: [B, T, N, H]; k, v: [B, S, K, H]; mask: bool[B, T, S]."""
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = k[b, :, n // group] @ q[b, t, n] / q.shape[-1] ** 0.5
        weights = np.where(mask[b, t], np.exp(scores - scores.max()), 0)
        out[b, t, n] = weights @ v[b, :, n // group] / weights.sum()
    return out


def test_attend_matches_numpy_with_grouped_heads_and_mask():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, 6, 4)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 5, 2, 4)).astype(np.float32)
    mask = rng.random((2, 3, 5)) < 0.6
    mask[..., 0] = True
    got = jax.jit(layers.attend)(q, k, v, jnp.asarray(mask)[:, None])
    np.testing.assert_allclose(got, _attention_by_hand(q, k, v, mask), atol=1e-5)


def _heads_first(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.swapaxes(1, 2))


def _segments(rng, group: int, steps: int):
    """2 prompts of 5 keys with `group` rows each; by hand, the shared keys are repeated.

    Returns: (q, the segments, k, v, mask of the rows as one segment would have them).
    """
    rows = 2 * group
    q = rng.normal(size=(rows, steps, 4, 6)).astype(np.float32)
    shared_k, shared_v = rng.normal(size=(2, 2, 5, 2, 6)).astype(np.float32)
    own_k, own_v = rng.normal(size=(2, rows, 3, 2, 6)).astype(np.float32)
    shared_mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    own_mask = np.tril(np.ones((3, 3), bool))[-steps:]
    segments = [
        layers.Segment(_heads_first(shared_k), _heads_first(shared_v), shared_mask[:, None]),
        layers.Segment(_heads_first(own_k), _heads_first(own_v), own_mask[None]),
    ]
    k = np.concatenate([np.repeat(shared_k, group, 0), own_k], axis=1)
    v = np.concatenate([np.repeat(shared_v, group, 0), own_v], axis=1)
    seen = np.repeat(np.repeat(shared_mask, group, 0)[:, None], steps, 1)
    mask = np.concatenate([seen, np.repeat(own_mask[None], rows, 0)], axis=-1)
    return q, segments, k, v, mask


@pytest.mark.parametrize("form", ["cpu", "any", "blocks"])
@pytest.mark.parametrize(("group", "steps"), [(1, 3), (3, 3), (3, 1)])
def test_segments_share_one_softmax_and_never_mix_rows(monkeypatch, group, steps, form):
    if form == "any":
        monkeypatch.setattr(layers, "target", lambda: ("tpu", 1))
    if form == "blocks":
        monkeypatch.setattr(layers, "suits_blocks", lambda *_: True)
    q, segments, k, v, mask = _segments(np.random.default_rng(1), group, steps)
    got = jax.jit(layers.attend_segments)(q, segments)
    np.testing.assert_allclose(got, _attention_by_hand(q, k, v, mask), atol=1e-5)


def test_long_segment_is_attended_to_in_blocks():
    rng = np.random.default_rng(2)
    q = rng.normal(size=(1, 600, 4, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 600, 2, 6)).astype(np.float32)
    mask = np.tril(np.ones((1, 600, 600), bool))
    mask[:, 1:, 0] = False
    segment = layers.Segment(_heads_first(k), _heads_first(v), jnp.asarray(mask))
    got = jax.jit(lambda q, s: layers.attend_segments(q, [s]))(q, segment)
    want = jax.jit(jax.nn.dot_product_attention)(q, k, v, mask=mask[:, None])
    np.testing.assert_allclose(got, want, atol=1e-5)
