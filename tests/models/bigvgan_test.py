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
    """The folded generator: (mel [B, M, A], lens) -> (wave, out)."""
    model, params = released
    model, params = model.clone(folded=True), fold_weight_norm(params)
    emit = ("conv_pre", "up0", "resblock0", "resblock1", "resblock2", "conv_post")
    return jax.jit(lambda mel, lens: model.apply({"params": params}, mel, lens, emit=emit))


def _import(model, tensors):
    shapes = nn.meta.unbox(jax.eval_shape(lambda: table.init(model, jax.random.key(0))))
    rules = table.rules(model.config)
    params = import_params(tensors, rules, shapes["params"], ignore=table.IGNORE)
    back = export_params(params, rules)
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    return params


@pytest.fixture(scope="module")
def batch(io):
    """(mel, lens): `mel`, the rows of `mel_b2`, and the start of `mel`; what is over is noise."""
    lens = [io["mel"].shape[2], *[io["mel_b2"].shape[2]] * 2, 9]
    rows = [io["mel"][0], *io["mel_b2"], io["mel"][0, :, :9]]
    mel = np.random.default_rng(0).normal(size=(4, 80, 14)).astype(np.float32)
    for padded, row in zip(mel, rows, strict=True):
        padded[:, : row.shape[1]] = row
    assert len(set(lens)) == 3
    return mel, np.array(lens)


def test_waves_equal_the_fixture_at_every_step(generate, batch, io):
    wave, out = generate(*batch)
    assert wave.shape == (4, 1, 6720) and wave.dtype == jnp.float32
    for name in ("conv_pre", "up0", "resblock2"):
        np.testing.assert_allclose(out[name][:1], io[f"mid/{name}"], atol=ATOL)
    # The fixture's "resblock0" is a buffer to which the reference went on to add the others.
    added = out["resblock0"] + out["resblock1"] + out["resblock2"]
    np.testing.assert_allclose(added[:1], io["mid/resblock0"], atol=ATOL)
    head = io["mid/conv_post_head"].ravel()
    np.testing.assert_allclose(out["conv_post"][0].ravel()[: len(head)], head, atol=ATOL)
    np.testing.assert_allclose(wave[:1], io["wav"], atol=ATOL)
    size = io["wav_b2"].shape[2]
    np.testing.assert_allclose(wave[1:3, :, :size], io["wav_b2"], atol=ATOL)


def test_padding_is_silent_and_not_heard(generate, batch):
    mel, lens = batch
    wave, _ = generate(mel, lens)
    other, _ = generate(np.where(np.arange(14) < lens[:, None, None], mel, -3.0), lens)
    np.testing.assert_array_equal(other, wave)
    for row, size in enumerate(480 * lens):
        assert np.any(wave[row, :, size - 1]) and not np.any(wave[row, :, size:])


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


@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (3, 5), (7, 3), (11, 5)])
def test_convolution_with_a_dilation_of_the_moment(size, dilation):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 9, 4)), rng.normal(size=(size, 4, 3))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    found = jax.jit(lambda d: bigvgan.spread_conv(x, kernel, d, 5))(jnp.int32(dilation))
    np.testing.assert_allclose(found, bigvgan.conv(x, kernel, None, dilation), atol=ATOL)


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


def test_bfloat16_is_near_float32(released, io):
    model, params = released
    half = model.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, folded=True)
    params = fold_weight_norm(params)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    run = jax.jit(lambda mel: half.apply({"params": params}, mel)[0])
    found, exact = run(io["mel"]), io["wav"]
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
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("weight_g"):  # Neither so soft nor so loud that nothing is compared.
                parameter.uniform_(0.5, 1.5).mul_(0.03 if "post" in name else 1.0)
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
    emit = ("conv_post",)
    run = jax.jit(lambda m, n: BigVGAN(config).apply({"params": params}, m, n, emit=emit))
    wave, out = run(mel, jnp.array(lens))
    assert wave.shape == (2, 1, 9 * hop)
    unclipped = []
    reference.conv_post.register_forward_hook(lambda *args: unclipped.append(args[-1][0]))
    for row, size in enumerate(lens):
        with torch.no_grad():
            wanted = reference(torch.tensor(mel[row : row + 1, :, :size]))
        assert np.std(wanted.numpy()) > 0.01
        np.testing.assert_allclose(
            out["conv_post"][row, :, : size * hop], unclipped[row], atol=1e-4
        )
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
