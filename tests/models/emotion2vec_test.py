"""emotion2vec against what funasr made of small random models, and its own padding."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from paras2s_jax.convert import emotion2vec as table
from paras2s_jax.convert.rules import Checkpoint, import_params
from paras2s_jax.models.emotion2vec import Emotion2vec, Emotion2vecConfig, alibi_slopes

GOLDENS = Path(__file__).parents[1] / "goldens" / "emotion2vec"
CASES = ("base", "per_layer", "group_norm", "no_head")


@functools.lru_cache
def applied(model):
    return jax.jit(model.apply)


def expected_params(model):
    """Shapes of the model's parameters."""
    boxed = jax.eval_shape(functools.partial(table.init, model), jax.random.key(0))
    return nn.meta.unbox(boxed)["params"]


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    """(processor, model, variables, arrays) of a fixture."""
    folder = GOLDENS / request.param
    model = table.make_model(folder)
    params = import_params(Checkpoint(folder), table.rules(model.config), expected_params(model))
    return table.load_processor(folder), model, {"params": params}, np.load(folder / "io.npz")


def clips(arrays) -> list[np.ndarray]:
    return [arrays[f"{index}/wave"] for index in range(4)]


def test_clip_without_a_mask_equals_funasr(golden):
    processor, model, variables, arrays = golden
    source = processor([arrays["3/wave"]])["source"]
    logits, out = applied(model)(variables, source)
    np.testing.assert_allclose(out["x"][0], arrays["3/x"], atol=1e-4)
    np.testing.assert_allclose(out["feats"][0], arrays["3/feats"], atol=1e-4)
    if processor.labels:
        np.testing.assert_allclose(logits[0], arrays["3/logits"], atol=1e-4)
    else:
        assert logits is None


def test_padded_batch_equals_funasr_on_each_clip(golden):
    processor, model, variables, arrays = golden
    inputs = processor(clips(arrays))
    # Noise in the padding must not be heard.
    inputs["source"] = np.where(inputs["padding_mask"], np.float32(9), inputs["source"])
    logits, out = applied(model)(variables, **inputs)
    for index in range(4):
        want = arrays[f"{index}/x"]
        np.testing.assert_allclose(out["x"][index, : len(want)], want, atol=1e-4)
        assert not np.any(out["x"][index, len(want) :])
        assert int(out["mask"][index].sum()) == len(want)
        np.testing.assert_allclose(out["feats"][index], arrays[f"{index}/feats"], atol=1e-4)
        if processor.labels:
            np.testing.assert_allclose(logits[index], arrays[f"{index}/logits"], atol=1e-4)


def test_bfloat16_unrolled_and_remat_is_close(golden):
    processor, model, variables, arrays = golden
    inputs = processor(clips(arrays))
    want = applied(model)(variables, **inputs)[1]["feats"]
    other = model.clone(dtype=jnp.bfloat16, remat="full", scan_unroll=2)
    got = applied(other)(variables, **inputs)[1]["feats"]
    assert np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want))) < 2e-2


def test_slopes():
    # Powers of two: 2 ** -(8 / n * i); else every other slope of twice the power below.
    assert alibi_slopes(4).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(6).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def tiny_config(**kwargs) -> Emotion2vecConfig:
    """The released shape at a small width."""
    values = {
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "norm_eps": 1e-5,
        "normalize": True,
        "prenet_depth": 1,
        "num_extra_tokens": 10,
        "extractor_mode": "layer_norm",
        "feature_encoder_spec": ((4, 10, 5), *[(4, 3, 2)] * 4, *[(4, 2, 2)] * 2),
        "conv_pos_width": 95,
        "conv_pos_groups": 4,
        "conv_pos_depth": 5,
        "use_alibi_encoder": True,
        "num_alibi_heads": 2,
        "learned_alibi_scale_per_head": True,
        "learned_alibi_scale_per_layer": False,
    }
    return Emotion2vecConfig(**{**values, **kwargs})


def test_clips_of_extreme_lengths():
    model = Emotion2vec(tiny_config(num_heads=1, num_alibi_heads=1, token_list=("a", "b", "c")))
    params = expected_params(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), params)
    variables = {"params": params}
    # 0.05 s of silence, 10 ms that are heard as one frame, exactly 30 s, and 95 s:
    # (1520000 - 400) // 320 + 1 frames.
    lens = np.array([800, 160, 480_000, 1_520_000])
    source = np.random.default_rng(0).normal(size=(4, lens[-1])).astype(np.float32)
    source[0] = 0.0
    logits, out = applied(model)(variables, source, np.arange(lens[-1]) >= lens[:, None])
    assert out["mask"].sum(1).tolist() == [2, 1, 1499, 4749]
    assert np.isfinite(logits).all() and np.isfinite(out["x"]).all()
    alone, _ = applied(model)(variables, source[1:2, :160])
    np.testing.assert_allclose(logits[1], alone[0], atol=1e-5)
