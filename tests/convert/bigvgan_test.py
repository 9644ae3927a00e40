"""Kimi-Audio's vocoder: the table against the released sizes, and its folder."""

import json

import jax
import numpy as np
import torch

from paras2s_jax.convert import bigvgan, families, folders, from_pretrained
from paras2s_jax.convert.rules import Checkpoint, check_shapes
from paras2s_jax.models.placement import unbox

# Sizes of the release as tests/goldens/bigvgan/README.md reports them; it does not know the
# dilations (BigVGAN's own), win_size, fmin and fmax, which change no shape here.
RATES, KERNELS, CHANNELS = (5, 2, 2, 2, 2, 3, 2), (9, 4, 4, 4, 4, 5, 4), 2048
BLOCK_KERNELS = (3, 5, 7, 11)
RELEASED = {
    "resblock": "1",
    "num_mels": 80,
    "upsample_rates": RATES,
    "upsample_kernel_sizes": KERNELS,
    "upsample_initial_channel": CHANNELS,
    "resblock_kernel_sizes": BLOCK_KERNELS,
    "resblock_dilation_sizes": [[1, 3, 5]] * 4,
    "activation": "snakebeta",
    "snake_logscale": True,
    "sampling_rate": 24_000,
    "hop_size": 480,
    "n_fft": 1024,
    "win_size": 1024,
    "fmin": 0,
    "fmax": None,
}


def released_shapes(use_bias_at_final: bool) -> dict[str, tuple[int, ...]]:
    """Keys and shapes in torch's layout: Conv1d [out, in, k], ConvTranspose1d [in, out, k]."""
    shapes = {}

    def conv(name, first, second, size, width):
        shapes[f"{name}.weight_g"] = (first, 1, 1)
        shapes[f"{name}.weight_v"] = (first, second, size)
        if width:
            shapes[f"{name}.bias"] = (width,)

    def activation(name, width):
        for kind in ("act.alpha", "act.beta"):
            shapes[f"{name}.{kind}"] = (width,)
        for kind in ("upsample.filter", "downsample.lowpass.filter"):
            shapes[f"{name}.{kind}"] = (1, 1, 12)

    conv("conv_pre", CHANNELS, 80, 7, CHANNELS)
    for stage, size in enumerate(KERNELS):
        width = CHANNELS >> (stage + 1)
        conv(f"ups.{stage}.0", 2 * width, width, size, width)
        for j, block_size in enumerate(BLOCK_KERNELS):
            block = f"resblocks.{4 * stage + j}"
            for n in range(3):
                conv(f"{block}.convs1.{n}", width, width, block_size, width)
                conv(f"{block}.convs2.{n}", width, width, block_size, width)
            for n in range(6):
                activation(f"{block}.activations.{n}", width)
    activation("activation_post", 16)
    conv("conv_post", 1, 16, 7, 1 if use_bias_at_final else None)
    return shapes


def test_released_size(tmp_path):
    for bias in (True, False):
        config = RELEASED | {"use_bias_at_final": bias}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert families.family_of(tmp_path) is bigvgan
        model = bigvgan.make_model(tmp_path)
        expected = unbox(families.abstract_variables(bigvgan, model))["params"]
        shapes = released_shapes(bias)
        check_shapes(shapes, bigvgan.rules(model.config), expected, ignore=bigvgan.IGNORE)
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(expected))
        assert count == sum(int(np.prod(shape)) for shape in shapes.values())
    assert len(shapes) == 3 + 7 * 3 + 28 * (18 + 24) + 4 + 2


def test_the_released_pt_file(release, tmp_path):
    """config.json and a .pt with the tensors under "generator"."""
    folder, _ = release("bigvgan")
    source = tmp_path / "vocoder"
    source.mkdir()
    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {key: torch.tensor(value) for key, value in Checkpoint(folder).items()}
    torch.save({"generator": tensors}, source / "model.pt")
    folders.convert(str(source), str(tmp_path / "converted"))
    _, params, _ = from_pretrained(tmp_path / "converted")
    jax.tree.map(np.testing.assert_array_equal, params, from_pretrained(folder)[1])
    folders.export(str(tmp_path / "converted"), str(tmp_path / "back"))
    back = Checkpoint(tmp_path / "back")
    assert set(back) == set(tensors)
    assert all(back[key].tobytes() == Checkpoint(folder)[key].tobytes() for key in back)


def test_other_configs_are_not_mistaken(tmp_path):
    assert not bigvgan.matches(tmp_path)
    for text in ("{", "[]", '{"architectures": ["Qwen2ForCausalLM"]}'):
        (tmp_path / "config.json").write_text(text)
        assert not bigvgan.matches(tmp_path)
