"""Whisper against transformers, the Kimi-Audio fixture, and its own padding."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from paras2s_jax.audio.mel import whisper_log_mel
from paras2s_jax.convert import whisper as table
from paras2s_jax.convert.rules import Checkpoint, import_params
from paras2s_jax.models import whisper
from paras2s_jax.models.lora import LoRA

GOLDENS = Path(__file__).parents[1] / "goldens" / "whisper_frontend"

# Distinct sizes, so that a wrong transpose fails. 40 mel frames at most.
CONFIG = whisper.WhisperConfig(
    d_model=24,
    encoder_layers=2,
    encoder_attention_heads=3,
    encoder_ffn_dim=40,
    num_mel_bins=10,
    max_source_positions=20,
    vocab_size=50,
    decoder_layers=3,
    decoder_attention_heads=4,
    decoder_ffn_dim=36,
    max_target_positions=16,
    classifier_proj_size=18,
)


def hf_config(**kwargs):
    names = whisper.WhisperConfig.__dataclass_fields__
    values = {name: getattr(CONFIG, name) for name in names}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    return transformers.WhisperConfig(
        **values, **ids, begin_suppress_tokens=None, suppress_tokens=None, **kwargs
    )


def build(hf_class, **kwargs):
    """A transformers model with weights far from their start (its tensors, the model)."""
    torch.manual_seed(0)
    model = hf_class(hf_config(**kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, {key: value.numpy() for key, value in model.state_dict().items()}


def unboxed_shapes(model, *args):
    boxed = jax.eval_shape(model.init, jax.random.key(0), *args)
    return whisper.nn.meta.unbox(boxed)["params"]


def convert(model, rules, tensors, *args, ignore=()):
    shapes = unboxed_shapes(model, *args)
    return {"params": import_params(tensors, rules, shapes, ignore=ignore)}


@pytest.fixture(scope="module")
def mel():
    return np.random.default_rng(0).normal(size=(2, 40, 10)).astype(np.float32)


@pytest.fixture(scope="module")
def asr(mel):
    hf, tensors = build(transformers.WhisperForConditionalGeneration)
    model = whisper.WhisperASR(CONFIG)
    tokens = np.zeros((2, 3), np.int32)
    rules = table.asr_rules(CONFIG)
    return hf, model, convert(model, rules, tensors, mel, tokens, ignore=[table.TIED_HEAD])


def test_asr_equals_transformers(asr, mel):
    hf, model, variables = asr
    tokens = np.random.default_rng(1).integers(0, 50, (2, 7))
    with torch.no_grad():
        expected = hf(
            input_features=torch.tensor(mel).transpose(1, 2), decoder_input_ids=torch.tensor(tokens)
        )
    logits, out = model.apply(variables, mel, tokens)
    assert logits.shape == (2, 7, 50)
    np.testing.assert_allclose(out["encoded"], expected.encoder_last_hidden_state, atol=1e-4)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)


def test_classifier_equals_transformers(mel):
    hf, tensors = build(transformers.WhisperForAudioClassification, num_labels=5)
    model = whisper.WhisperForAudioClassification(CONFIG, num_labels=5)
    variables = convert(model, table.classification_rules(CONFIG), tensors, mel)
    with torch.no_grad():
        expected = hf(input_features=torch.tensor(mel).transpose(1, 2)).logits
    np.testing.assert_allclose(model.apply(variables, mel)[0], expected, atol=1e-4)


def pad_rows(mel, len_frames, num_frames, fill):
    """Cuts row b to len_frames[b] and fills up with a value that must not matter."""
    padded = np.full((len(mel), num_frames, mel.shape[2]), fill, np.float32)
    for row, size in enumerate(len_frames):
        padded[row, :size] = mel[row, :size]
    return padded, np.arange(num_frames) < np.array(len_frames)[:, None]


@pytest.mark.parametrize("pool", [1, 2])
def test_padded_encoder_equals_unpadded(asr, mel, pool):
    variables = {"params": asr[2]["params"]["encoder"]}
    encoder = whisper.WhisperEncoder(CONFIG, pool=pool)
    padded, mask = pad_rows(mel, (40, 21), 40, fill=7.0)
    x, out = encoder.apply(variables, padded, mask)
    alone, _ = encoder.apply(variables, mel[1:, :21])
    # 21 mel frames -> 11 steps; pooled by two, the odd one is dropped -> 5.
    size = 11 // pool
    assert alone.shape[1] == size and out["mask"].sum(1).tolist() == [20 // pool, size]
    np.testing.assert_allclose(x[1, :size], alone[0], atol=1e-5)
    assert not np.any(x[1, size:])


def test_padded_asr_and_classifier_equal_unpadded(asr, mel):
    _, model, variables = asr
    padded, mask = pad_rows(mel, (40, 21), 40, fill=-3.0)
    tokens = np.random.default_rng(1).integers(0, 50, (2, 7))
    token_mask = np.arange(7) < np.array([[7], [4]])
    logits, _ = model.apply(variables, padded, tokens, mask, token_mask)
    alone, _ = model.apply(variables, mel[1:, :21], tokens[1:, :4])
    np.testing.assert_allclose(logits[1, :4], alone[0], atol=1e-5)

    classifier = whisper.WhisperForAudioClassification(CONFIG, num_labels=3)
    variables = classifier.init(jax.random.key(1), mel)
    alone, _ = classifier.apply(variables, mel[1:, :21])
    np.testing.assert_allclose(classifier.apply(variables, padded, mask)[0][1], alone[0], atol=1e-5)


def test_too_many_frames_are_refused(asr):
    mel = np.zeros((1, 41, 10), np.float32)
    with pytest.raises(ValueError, match="41 mel frames"):
        whisper.WhisperEncoder(CONFIG).apply({"params": asr[2]["params"]["encoder"]}, mel)


@pytest.fixture(scope="module")
def greedy(asr):
    """A recogniser that says many tokens, and different ones for different rows."""
    _, model, variables = asr
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda x: x, variables["params"])
    decoder = params["decoder"]
    decoder["embed_tokens"]["embedding"] = 0.3 * rng.normal(size=(50, 24)).astype(np.float32)
    decoder["embed_positions"] = 4 * rng.normal(size=(16, 24)).astype(np.float32)
    cross = decoder["layers"]["encoder_attn"]["out_proj"]
    cross["kernel"] = 3 * cross["kernel"]
    return model, {"params": params}


def test_cached_greedy_decoding_equals_full_forward(greedy, mel):
    model, variables = greedy
    padded, mask = pad_rows(mel, (40, 21), 40, fill=5.0)
    options = {"prompt": (2, 9), "max_tokens": 6, "suppress_first": (4,)}
    said = whisper.transcribe_greedy(model, variables, padded, mask, eos_id=-1, **options)
    assert said.lens.tolist() == [6, 6] and not np.any(said.finished)
    assert len(np.unique(said.tokens)) > 4 and said.tokens[0].tolist() != said.tokens[1].tolist()
    # Teacher forcing the same tokens: each must be the most likely one at its place.
    tokens = np.concatenate([np.tile([2, 9], (2, 1)), said.tokens], axis=1)
    logits = model.apply(variables, padded, tokens, mask)[0][:, 1:-1]
    logp = jax.nn.log_softmax(logits)
    np.testing.assert_array_equal(logits.at[:, 0, 4].set(-jnp.inf).argmax(-1), said.tokens)
    chosen = np.take_along_axis(np.asarray(logp), np.asarray(said.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(said.mean_logp, chosen.mean(1), atol=1e-5)

    # With the first row's third token as the end, it says two; the mean counts three.
    eos_id = int(said.tokens[0, 2])
    assert eos_id not in np.asarray(said.tokens[0, :2])
    ended = whisper.transcribe_greedy(model, variables, padded, mask, eos_id=eos_id, **options)
    assert ended.tokens[0].tolist() == [*said.tokens[0, :2].tolist(), 0, 0, 0, 0]
    assert int(ended.lens[0]) == 2 and bool(ended.finished[0])
    np.testing.assert_allclose(ended.mean_logp[0], chosen[0, :3].mean(), atol=1e-5)


def test_suppressed_tokens_are_never_chosen(greedy, mel):
    model, variables = greedy
    options = {"prompt": (2,), "eos_id": 49, "max_tokens": 3}
    free = whisper.transcribe_greedy(model, variables, mel, **options)
    first = int(free.tokens[0, 0])
    held = whisper.transcribe_greedy(model, variables, mel, suppress=(first,), **options)
    assert held.lens[0] > 0 and first not in np.asarray(held.tokens)
    with pytest.raises(ValueError, match="max_target_positions"):
        whisper.transcribe_greedy(model, variables, mel, prompt=(2,), eos_id=1, max_tokens=16)


def test_lora_starts_without_effect_remat_and_unroll_change_nothing(asr, mel):
    variables = {"params": asr[2]["params"]["encoder"]}
    plain, _ = whisper.WhisperEncoder(CONFIG).apply(variables, mel)
    lora = LoRA(rank=2, targets=("v_proj", "fc1"))
    adapted = whisper.WhisperEncoder(CONFIG, lora, remat="full", scan_unroll=2)
    boxed = adapted.init(jax.random.key(0), mel)
    lora = whisper.nn.meta.unbox(boxed)["lora"]
    # Layers are stacked: [layers, in, rank].
    assert lora["layers"]["self_attn"]["v_proj"]["a"].shape == (2, 24, 2)
    x, _ = adapted.apply({**variables, "lora": lora}, mel)
    np.testing.assert_allclose(x, plain, atol=1e-6)
    lora["layers"]["mlp"]["fc1"]["b"] += 0.1
    assert np.abs(adapted.apply({**variables, "lora": lora}, mel)[0] - plain).max() > 1e-3


def test_kimi_features_side_by_side():
    # Two rows, five encoder frames of width 1 -> two steps of width 4, the last filled by zeros.
    encoded = jnp.arange(10.0).reshape(2, 5, 1)
    features, lens = whisper.kimi_features(encoded, jnp.array([9, 8]))
    assert features.tolist() == [[[0, 1, 2, 3], [4, 0, 0, 0]], [[5, 6, 7, 8], [9, 0, 0, 0]]]
    # 9 mel frames -> ceil(9 / 8) = 2 steps of 80 ms; 8 -> 1.
    assert lens.tolist() == [2, 1]


@pytest.fixture(scope="module")
def fixture():
    config = whisper.WhisperConfig.from_json(GOLDENS / "config.json")
    encoder = whisper.WhisperEncoder(config)
    tensors = Checkpoint(GOLDENS / "model.safetensors")
    mel = np.zeros((1, 8, config.num_mel_bins), np.float32)
    variables = convert(encoder, table.encoder_rules(config), tensors, mel)
    return encoder, variables, np.load(GOLDENS / "io.npz")


@pytest.mark.parametrize("clip", ["exact", "ragged"])
def test_encoder_equals_kimi_audio_reference(fixture, clip):
    encoder, variables, io = fixture
    wave = np.pad(io[f"{clip}/wave"].ravel(), (0, 480_000 - io[f"{clip}/wave"].size))
    mel, _ = whisper_log_mel(jnp.asarray(wave)[None], None, 128)
    # From the reference's own mel: what is cut off is constant.
    head, tail = io[f"{clip}/log_mel_head"], io[f"{clip}/log_mel_tail_value"]
    np.testing.assert_allclose(mel[0, :200], head.T, atol=1e-4)
    exact = np.full((1, 3000, 128), tail, np.float32)
    exact[0, :200] = head.T
    x, out = encoder.apply(variables, exact, emit=("layer_out",))
    wanted = io[f"{clip}/after_conv_head"]
    wanted = wanted.reshape(-1, wanted.shape[-1])
    np.testing.assert_allclose(out["after_conv"][0, : len(wanted)], wanted, atol=1e-5)
    wanted = io[f"{clip}/layer0_out_head"]
    wanted = wanted.reshape(-1, wanted.shape[-1])
    np.testing.assert_allclose(out["layer_out"][0, 0, : len(wanted)], wanted, atol=1e-5)
    wanted = io[f"{clip}/encoder_out_head"]
    wanted = wanted.reshape(-1, wanted.shape[-1])
    np.testing.assert_allclose(x[0, : len(wanted)], wanted, atol=1e-5)
    wanted = io[f"{clip}/encoder_out_last"].reshape(-1, wanted.shape[-1])
    np.testing.assert_allclose(x[0, -4:], wanted, atol=1e-5)


@pytest.mark.parametrize("clip", ["exact", "ragged"])
def test_speech_features_equal_kimi_audio_reference(fixture, clip):
    encoder, variables, io = fixture
    wave = io[f"{clip}/wave"].reshape(1, -1)
    lens = jnp.array([wave.shape[1]])
    # Noise in the padding must not be heard.
    padded = np.concatenate([wave, np.ones((1, 500), np.float32)], axis=1)
    features, len_features = whisper.kimi_speech_features(encoder, variables, padded, lens)
    assert len_features.tolist() == [int(io[f"{clip}/token_len"])] == [20]
    np.testing.assert_allclose(features[:, :20], io[f"{clip}/feature"], atol=1e-4)


def test_long_clip_is_heard_in_pieces(fixture):
    encoder, variables, io = fixture
    second = io["long/second"].ravel()
    wave = np.concatenate([np.tile(second, 31), second[:777]])[None]
    assert wave.shape[1] == int(io["long/n_samples"])
    lens = jnp.array([wave.shape[1]])
    features, len_features = whisper.kimi_speech_features(encoder, variables, wave, lens)
    features = features[:, : int(len_features[0])]
    assert features.shape == tuple(io["long/feature_shape"])
    np.testing.assert_allclose(features[0, :6], io["long/feature_head"].reshape(6, -1), atol=1e-4)
    boundary = io["long/feature_30s_boundary"].reshape(-1, features.shape[-1])
    assert len(boundary) > 3
    np.testing.assert_allclose(features[0, 372 : 372 + len(boundary)], boundary, atol=1e-4)
