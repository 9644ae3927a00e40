"""BigVGAN against the Kimi-Audio fixture and against the copy of it inside transformers."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

from paras2s_jax.convert import bigvgan as table
from paras2s_jax.convert.rules import Checkpoint, export_params, import_params
from paras2s_jax.models import bigvgan, snake
from paras2s_jax.models.bigvgan import BigVGAN, BigVGANConfig, fold_weight_norm

GOLDENS = Path(__file__).parents[1] / "goldens" / "bigvgan"
ATOL = 1e-5


@pytest.fixture(scope="module")
def io():
    return np.load(GOLDENS / "io.npz")


@pytest.fixture(scope="module")
def released():
    """(model, params) of the fixture, weight norm in place."""
    assert table.matches(GOLDENS)
    model = table.make_model(GOLDENS, dtype=jnp.float32)
    return model, _import(model, Checkpoint(GOLDENS / "model.safetensors"))


@pytest.fixture(scope="module")
def generate(released):
    """The folded generator, compiled once: (mel [B, M, A], lens or None) -> (wave, out)."""
    model, params = released
    model, params = model.clone(folded=True), fold_weight_norm(params)
    emit = ("conv_pre", "up0", "resblock0", "resblock2", "conv_post")
    run = jax.jit(lambda mel, lens: model.apply({"params": params}, mel, lens, emit=emit))
    return lambda mel, lens=None: run(jnp.asarray(mel), lens)


def _import(model, tensors):
    shapes = nn.meta.unbox(jax.eval_shape(lambda: table.init(model, jax.random.key(0))))
    rules = table.rules(model.config)
    params = import_params(tensors, rules, shapes["params"], ignore=table.IGNORE)
    back = export_params(params, rules)
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    return params


def test_wave_equals_the_fixture_at_every_step(generate, io):
    wave, out = generate(io["mel"])
    assert wave.shape == (1, 1, 6720) and wave.dtype == jnp.float32
    for name in ("conv_pre", "up0", "resblock0", "resblock2"):
        np.testing.assert_allclose(out[name], io[f"mid/{name}"], atol=ATOL)
    head = io["mid/conv_post_head"].ravel()
    np.testing.assert_allclose(out["conv_post"].ravel()[: len(head)], head, atol=ATOL)
    np.testing.assert_allclose(wave, io["wav"], atol=ATOL)


def test_a_padded_batch_equals_its_rows(generate, io):
    """Rows of mel_b2 beside a shorter one, in frames as many as `mel` has; the rest is noise."""
    rows, _, size = io["mel_b2"].shape
    mel = np.random.default_rng(0).normal(size=(rows + 1, *io["mel"].shape[1:])).astype(np.float32)
    mel[:rows, :, :size] = io["mel_b2"]
    mel[rows, :, :6] = io["mel"][0, :, :6]
    wave, _ = generate(mel, jnp.array([size] * rows + [6]))
    np.testing.assert_allclose(wave[:rows, :, : 480 * size], io["wav_b2"], atol=ATOL)
    assert not np.any(wave[:rows, :, 480 * size :]) and not np.any(wave[rows, :, 480 * 6 :])
    alone = mel[rows:, :, :14].copy()
    alone[:, :, 6:] = -3.0
    other, _ = generate(np.concatenate([alone] * (rows + 1)), jnp.full(rows + 1, 6))
    np.testing.assert_allclose(other[0], wave[rows], atol=ATOL)


def test_tanh_and_bias_with_weight_norm_in_place(released, io):
    params = released[1]
    config = json.loads((GOLDENS / "config.json").read_text())
    config |= {"use_tanh_at_final": True, "use_bias_at_final": True}
    config = BigVGANConfig(**{key: bigvgan._frozen(value) for key, value in config.items()})
    params = params | {
        "conv_post": params["conv_post"] | {"bias": jnp.asarray(io["tanh_bias_value"].reshape(1))}
    }
    run = jax.jit(lambda mel: BigVGAN(config).apply({"params": params}, mel)[0])
    np.testing.assert_allclose(run(io["mel"][:, :, :6]), io["wav_tanh_bias"], atol=ATOL)


def test_folded_kernels(released, io):
    folded = fold_weight_norm(released[1])
    kernel = np.transpose(folded["conv_pre"]["kernel"], np.argsort((2, 1, 0)))
    np.testing.assert_allclose(kernel, io["folded/conv_pre"], atol=1e-6)
    kernel = np.transpose(folded["ups_0"]["kernel"], np.argsort(table.TRANSPOSED))
    np.testing.assert_allclose(kernel, io["folded/up0"], atol=1e-6)


def _first_activation(params):
    model = bigvgan.Activations(6, 32)
    weights = model.apply({"params": params["resblocks_0"]["activations"]})
    return {name: value[0] for name, value in weights.items()}


def test_activation_alone(released, io):
    np.testing.assert_allclose(snake.lowpass_filter(), io["filter"].ravel(), atol=1e-7)
    weights = _first_activation(released[1])
    x = jnp.asarray(io["act/x"]).swapaxes(1, 2)
    assert x.shape[1] == 13
    up = jnp.stack(snake.upsample(x, weights["up"]), axis=2).reshape(x.shape[0], -1, x.shape[2])
    np.testing.assert_allclose(up.swapaxes(1, 2), io["act/up"], atol=ATOL)
    y = snake.snake_beta(x, weights["alpha"], weights["beta"], True)
    np.testing.assert_allclose(y.swapaxes(1, 2), io["act/snake"], atol=ATOL)
    y = snake.activate(x, weights, None, True)
    np.testing.assert_allclose(y.swapaxes(1, 2), io["act/y"], atol=ATOL)
    y = snake.activate(jnp.asarray(io["mid/act0_in"]).swapaxes(1, 2), weights, None, True)
    np.testing.assert_allclose(y.swapaxes(1, 2), io["mid/act0_out"], atol=ATOL)


def test_activation_does_not_hear_padding(released, io):
    weights = _first_activation(released[1])
    x = jnp.asarray(io["act/x"]).swapaxes(1, 2)
    padded = jnp.pad(x, ((0, 0), (0, 7), (0, 0)), constant_values=5.0)
    y = snake.activate(padded, weights, jnp.full(x.shape[0], 13), True)
    np.testing.assert_allclose(y[:, :13].swapaxes(1, 2), io["act/y"], atol=ATOL)
    assert not np.any(y[:, 13:])


def test_mel_analysis_equals_the_fixture(released, io):
    wave = io["melspec/wav"].reshape(1, -1)
    found = jax.jit(lambda wave: bigvgan.log_mel(wave, released[0].config))(wave)
    wanted = io["melspec/mel"].reshape(80, -1).T
    assert found.shape == (1, *wanted.shape)
    np.testing.assert_allclose(found[0], wanted, atol=1e-4)


def test_bfloat16_is_near_float32(released, generate, io):
    model, params = released
    half = model.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, folded=True)
    params = fold_weight_norm(params)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    run = jax.jit(lambda mel: half.apply({"params": params}, mel)[0])
    found, exact = run(io["mel"]), np.asarray(generate(io["mel"])[0])
    error = np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact)))
    assert 1e-4 < error < 2e-2


SIZES = [
    # rates, kernels, channels, block kernels, dilations (transformers has three of them)
    ((2, 3), (4, 7), 12, (3, 5), (1, 3, 5)),
    ((5, 2), (11, 2), 8, (7,), (1, 2, 4)),
    ((3, 2, 2), (3, 6, 4), 16, (3, 5, 9), (2, 1, 3)),
]


def _reference(number):
    """A generator of transformers with weight norm and random weights, and all its tensors."""
    rates, sizes, channels, kernels, dilations = SIZES[number]
    torch.manual_seed(number)
    config = omni.Qwen2_5OmniBigVGANConfig(
        mel_dim=7,
        upsample_initial_channel=channels,
        resblock_kernel_sizes=list(kernels),
        resblock_dilation_sizes=[list(dilations)] * len(kernels),
        upsample_rates=list(rates),
        upsample_kernel_sizes=list(sizes),
    )
    model = omni.Qwen2_5OmniToken2WavBigVGANModel(config).eval()
    model.process_mel_spectrogram = lambda mel: mel
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            torch.nn.utils.weight_norm(module)
        for kind, key in (("UpSample1d", "filter"), ("DownSample1d", "lowpass.filter")):
            if type(module).__name__.endswith(kind):
                tensors[f"{name}.{key}"] = module.filter.numpy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, tensors | {key: value.numpy() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("number", range(3))
def test_wave_equals_transformers(number):
    reference, tensors = _reference(number)
    rates, sizes, channels, kernels, dilations = SIZES[number]
    hop = int(np.prod(rates))
    config = BigVGANConfig(
        upsample_rates=rates,
        upsample_kernel_sizes=sizes,
        upsample_initial_channel=channels,
        resblock_kernel_sizes=kernels,
        resblock_dilation_sizes=(dilations,) * len(kernels),
        num_mels=7,
        sampling_rate=8000,
        hop_size=hop,
        n_fft=4 * hop,
        win_size=4 * hop,
        use_tanh_at_final=False,
        use_bias_at_final=False,
    )
    params = _import(BigVGAN(config), tensors)
    rng = np.random.default_rng(number)
    lens, mel = (9, 5), rng.normal(size=(2, 7, 9)).astype(np.float32)
    run = jax.jit(lambda mel, lens: BigVGAN(config).apply({"params": params}, mel, lens)[0])
    wave = run(mel, jnp.array(lens))
    assert wave.shape == (2, 1, 9 * hop)
    for row, size in enumerate(lens):
        with torch.no_grad():
            wanted = reference(torch.tensor(mel[row : row + 1, :, :size]))
        assert np.std(wanted.numpy()) > 0.01 and np.mean(np.abs(wanted.numpy()) == 1) < 0.5
        np.testing.assert_allclose(wave[row, 0, : size * hop], wanted, atol=1e-4)


def test_config_says_what_is_wrong(tmp_path):
    path = tmp_path / "config.json"
    good = json.loads((GOLDENS / "config.json").read_text())

    def read(**changes):
        path.write_text(json.dumps(good | changes))
        return BigVGANConfig.from_json(path)

    config = read()
    assert config.resblock_dilation_sizes == ((1, 3, 5),) * 3 and config.fmax is None
    with pytest.raises(ValueError, match=r"config\.json.*snakebeta"):
        read(activation="snake")
    with pytest.raises(ValueError, match="hop_size 479"):
        read(hop_size=479)
    with pytest.raises(ValueError, match="by even numbers"):
        read(upsample_kernel_sizes=[10, 8, 5, 4, 4, 4])
    path.write_text("{}")
    with pytest.raises(ValueError, match="missing from the config: upsample_rates"):
        BigVGANConfig.from_json(path)
    assert not table.matches(tmp_path) and not table.matches(tmp_path / "nowhere")
