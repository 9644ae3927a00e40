"""wav2vec 2.0 against transformers, its own padding, and clips of extreme lengths."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from paras2s_jax.convert import wav2vec2 as table
from paras2s_jax.convert.rules import Checkpoint, import_params
from paras2s_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from paras2s_jax.models.wave_conv import receptive_field

# Distinct sizes, so that a wrong transpose fails. One frame hears 34 samples, every 20.
SIZES = {
    "conv_dim": [12, 14, 10],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 18,
}
CONFIGS = {
    "base": {},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
    "odd": {
        "feat_extract_norm": "layer",
        "num_conv_pos_embeddings": 7,
        "num_attention_heads": 6,
        "hidden_size": 30,
        "num_conv_pos_embedding_groups": 5,
        "use_weighted_layer_sum": True,
        "mask_time_prob": 0.0,
        "layer_norm_eps": 1e-3,
    },
    "weighted": {
        "do_stable_layer_norm": True,
        "use_weighted_layer_sum": True,
        "conv_bias": True,
        "conv_kernel": [7, 4, 3],
        "num_conv_pos_embedding_groups": 2,
    },
}
LENS = (393, 170, 60, 401)
# Lengths below one frame, one frame, and to the sample of the next.
SHORT_LENS = (7, 34, 53, 54)


class ModelHead(torch.nn.Module):
    def __init__(self, width, num_labels):
        super().__init__()
        self.dense = torch.nn.Linear(width, width)
        self.out_proj = torch.nn.Linear(width, num_labels)

    def forward(self, x):
        return self.out_proj(torch.tanh(self.dense(x)))


class AgeGenderModel(transformers.Wav2Vec2PreTrainedModel):
    """As the model card of audeering/wav2vec2-large-robust-24-ft-age-gender defines it."""

    def __init__(self, config):
        super().__init__(config)
        self.wav2vec2 = transformers.Wav2Vec2Model(config)
        self.age = ModelHead(config.hidden_size, 1)
        self.gender = ModelHead(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_values, attention_mask=None):
        pooled = self.wav2vec2(input_values, attention_mask)[0].mean(dim=1)
        return self.age(pooled), torch.softmax(self.gender(pooled), dim=1)


def expected_params(model):
    """Shapes of the model's parameters."""
    boxed = jax.eval_shape(functools.partial(table.init, model), jax.random.key(0))
    return nn.meta.unbox(boxed)["params"]


def build(hf_class, folder, **kwargs):
    """A reference with weights far from their start, and its conversion from what it saves."""
    torch.manual_seed(len(folder.name))
    hf = hf_class(transformers.Wav2Vec2Config(**{**SIZES, **kwargs})).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    hf.save_pretrained(folder)
    model = table.make_model(folder)
    tensors = Checkpoint(folder)
    params = import_params(
        tensors, table.rules(model.config), expected_params(model), ignore=table.IGNORE
    )
    return hf, model, {"params": params}


@functools.lru_cache
def applied(model, emit=()):
    return jax.jit(functools.partial(model.apply, **({"emit": emit} if emit else {})))


@pytest.fixture(scope="module", params=list(CONFIGS))
def encoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return build(transformers.Wav2Vec2Model, folder, **CONFIGS[request.param])


@pytest.fixture(scope="module", params=list(CONFIGS))
def classifier(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    kwargs = {**CONFIGS[request.param], "id2label": {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}}
    return build(transformers.Wav2Vec2ForSequenceClassification, folder, **kwargs)


@pytest.fixture(scope="module")
def age_gender(tmp_path_factory):
    return build(AgeGenderModel, tmp_path_factory.mktemp("age_gender"), **CONFIGS["large"])


def batch(lens=LENS, fill=0.0, size=None):
    """Rows of noise, past their lengths filled with a value, and their mask."""
    size = max(lens) if size is None else size
    waves = np.random.default_rng(0).normal(size=(len(lens), size)).astype(np.float32)
    mask = np.arange(size) < np.array(lens)[:, None]
    return np.where(mask, waves, np.float32(fill)), mask


def torched(hf, waves, mask=None, **kwargs):
    mask = None if mask is None else torch.tensor(mask).long()
    with torch.no_grad():
        return hf(torch.tensor(waves), attention_mask=mask, **kwargs)


def test_encoder_equals_transformers(encoder):
    hf, model, variables = encoder
    waves, _ = batch()
    want = torched(hf, waves, output_hidden_states=True)
    got, out = applied(model, ("hidden_states",))(variables, waves)
    np.testing.assert_allclose(got, want.last_hidden_state, atol=1e-4)
    np.testing.assert_allclose(out["extract_features"], want.extract_features, atol=1e-4)
    assert len(want.hidden_states) == len(out["hidden_states"]) == 4
    for mine, theirs in zip(out["hidden_states"], want.hidden_states, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_masked_encoder_equals_transformers(encoder):
    hf, model, variables = encoder
    waves, mask = batch()
    got, out = applied(model)(variables, waves, mask.astype(np.int32))
    assert out["mask"].sum(1).tolist() == [
        int(hf._get_feat_extract_output_lengths(length)) for length in LENS
    ]
    if model.config.feat_extract_norm == "layer":
        want = torched(hf, waves, mask).last_hidden_state
        np.testing.assert_allclose(got, np.where(out["mask"][..., None], want, 0), atol=1e-4)
    # With a group norm, transformers counts the padding; ours equals it on the row alone.
    for row, length in enumerate(LENS):
        want = torched(hf, waves[row : row + 1, :length]).last_hidden_state[0]
        np.testing.assert_allclose(got[row, : len(want)], want, atol=1e-4)
        assert not np.any(got[row, len(want) :])


def test_classifier_equals_transformers(classifier):
    hf, model, variables = classifier
    waves, mask = batch()
    logits, _ = applied(model)(variables, waves)
    np.testing.assert_allclose(logits, torched(hf, waves).logits, atol=1e-4)
    logits, out = applied(model)(variables, waves, mask)
    assert logits.shape == (4, 5) and out["pooled"].shape == (4, 18)
    if model.config.feat_extract_norm == "layer":
        np.testing.assert_allclose(logits, torched(hf, waves, mask).logits, atol=1e-4)
    for row, length in enumerate(LENS):
        want = torched(hf, waves[row : row + 1, :length]).logits[0]
        np.testing.assert_allclose(logits[row], want, atol=1e-4)


def test_age_and_gender_equal_the_model_card(age_gender):
    hf, model, variables = age_gender
    waves, mask = batch(fill=5.0)
    logits, out = applied(model)(variables, waves, mask)
    for row, length in enumerate(LENS):
        age, gender = torched(hf, waves[row : row + 1, :length])
        np.testing.assert_allclose(out["age"][row], age[0, 0], atol=1e-4)
        np.testing.assert_allclose(out["gender"][row], gender[0], atol=1e-4)
    assert logits.shape == (4, 4)
    np.testing.assert_array_equal(logits[:, 0], out["age"])
    np.testing.assert_allclose(jax.nn.softmax(logits[:, 1:]), out["gender"], atol=1e-6)
    unmasked = torched(hf, waves)
    np.testing.assert_allclose(
        applied(model)(variables, waves)[1]["gender"], unmasked[1], atol=1e-4
    )


def test_clip_below_one_frame_is_heard_with_silence_after_it(classifier):
    hf, model, variables = classifier
    least = receptive_field(model.config.conv_kernel, model.config.conv_stride)
    waves, mask = batch(SHORT_LENS, fill=9.0, size=100)
    logits, out = applied(model)(variables, waves, mask)
    assert out["mask"].sum(1).min() == 1
    for row, length in enumerate(SHORT_LENS):
        heard = np.zeros((1, max(length, least)), np.float32)
        heard[0, :length] = waves[row, :length]
        np.testing.assert_allclose(logits[row], torched(hf, heard).logits[0], atol=1e-4)
    shorter, _ = applied(model)(variables, waves[:1, : SHORT_LENS[0]])
    np.testing.assert_allclose(shorter[0], logits[0], atol=1e-5)


def test_hidden_frames_are_replaced(tmp_path):
    hf, model, variables = build(transformers.Wav2Vec2Model, tmp_path)
    waves, _ = batch()
    frames = int(hf._get_feat_extract_output_lengths(waves.shape[1]))
    hide = np.random.default_rng(1).random((4, frames)) < 0.3
    want = torched(hf, waves, mask_time_indices=torch.tensor(hide)).last_hidden_state
    got, _ = applied(model)(variables, waves, None, hide)
    np.testing.assert_allclose(got, want, atol=1e-4)
    plain = Wav2Vec2Model(dataclasses.replace(model.config, mask_time_prob=0.0))
    with pytest.raises(ValueError, match="mask_time_prob"):
        plain.apply(variables, waves, None, hide)


def test_bfloat16_unrolled_and_remat_is_close(classifier):
    _, model, variables = classifier
    waves, mask = batch()
    want, _ = applied(model)(variables, waves, mask)
    other = model.clone(dtype=jnp.bfloat16, remat="full", scan_unroll=3)
    got, _ = applied(other)(variables, waves, mask)
    assert got.dtype == jnp.float32
    assert np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want))) < 2e-2


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_clips_of_extreme_lengths(norm):
    # The released convolutions at a small width.
    config = Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        conv_dim=(4,) * 7,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
    )
    model = Wav2Vec2Model(config)
    rng = np.random.default_rng(1)
    variables = {
        "params": jax.tree.map(
            lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), expected_params(model)
        )
    }
    waves, mask = batch((800, 480_000, 1_520_000))
    waves[0] = 0.0
    x, out = applied(model)(variables, waves, mask)
    # 0.05 s of silence beside exactly 30 s and 95 s: (1520000 - 400) // 320 + 1 frames.
    assert out["mask"].sum(1).tolist() == [2, 1499, 4749] and np.isfinite(x).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "hubert"}, "model_type is 'hubert'"),
        ({"model_type": "wav2vec2", "hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "wav2vec2", "add_adapter": True}, "add_adapter is True"),
        ({"model_type": "wav2vec2", "feat_extract_norm": "batch"}, "group, layer"),
    ],
)
def test_foreign_config_is_refused(tmp_path, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        Wav2Vec2Config.from_json(path)
