"""The flow-matching network against the Kimi-Audio fixture and a plain rendering of its rules."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from paras2s_jax.convert import flow_matching as table
from paras2s_jax.convert.rules import Checkpoint, export_params, import_params
from paras2s_jax.models.flow_matching import (
    FlowMatchingConfig,
    FlowMatchingDiT,
    euler,
    time_points,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "kimi_detokenizer_dit"


@pytest.fixture(scope="module")
def io():
    return np.load(GOLDENS / "io.npz")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(model, params) of the fixture, from a folder in the release's layout."""
    folder = tmp_path_factory.mktemp("audio_detokenizer")
    config = json.loads((GOLDENS / "config.json").read_text())["audio_detokenizer"]
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML.
    assert table.matches(folder)
    model = table.make_model(folder)
    return model, _import(model, Checkpoint(GOLDENS / "model.safetensors"))


def _import(model, tensors):
    shapes = nn.meta.unbox(jax.eval_shape(lambda: table.init(model, jax.random.key(0))))
    params = import_params(
        tensors, table.rules(model.config), shapes["params"], ignore=table.IGNORE
    )
    back = export_params(params, table.rules(model.config))
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    return params


def _run(model, params, x, condition, t, emit=(), **inputs):
    def apply(params, x, condition, t, inputs):
        return model.apply({"params": params}, x, condition, t, emit=emit, **inputs)

    return jax.jit(apply)(params, x, condition, t, inputs)


# The last bit of a frequency depends on the machine's exp, and a time of 999 multiplies it: up to
# 5e-5 of the velocity.
ATOL = 1e-4


def test_velocity_equals_the_fixture(released, io):
    t, start = io["velocity/t"], io["velocity/start_position"]
    rows, steps = len(t), io["velocity/x"].shape[1]
    v, out = _run(
        *released,
        np.repeat(io["velocity/x"], rows, axis=0),
        np.repeat(io["velocity/tokens"], rows, axis=0),
        t,
        emit=("attn_out", "block_out"),
        position_ids=start[:, None] + np.arange(steps),
    )
    assert v.shape == io["velocity/v"].shape and v.dtype == jnp.float32
    np.testing.assert_allclose(v, io["velocity/v"], atol=ATOL)
    row = int(np.flatnonzero((t == 500) & (start == 0))[0])
    t_emb = io["velocity/t_emb_500"].ravel()
    np.testing.assert_allclose(out["t_emb"][row], t_emb, atol=ATOL)
    for name, fixture in (("attn_out", "attn0_out_500"), ("block_out", "block0_out_500")):
        wanted = io[f"velocity/{fixture}"].reshape(steps, -1)
        # Block outputs reach 94, where float32 has steps of 8e-6.
        np.testing.assert_allclose(out[name][0, row], wanted, rtol=1e-5, atol=ATOL)


def test_a_condition_per_code_equals_one_per_frame(released, io):
    x, tokens = io["velocity/x"], io["velocity/tokens"]
    np.testing.assert_array_equal(tokens, np.repeat(tokens[:, ::4], 4, axis=1))
    v, _ = _run(*released, x, tokens[:, ::4], np.array([500]))
    row = int(np.flatnonzero((io["velocity/t"] == 500) & (io["velocity/start_position"] == 0))[0])
    np.testing.assert_allclose(v[0], io["velocity/v"][row], atol=ATOL)
    with pytest.raises(ValueError, match="5 codes do not divide 24 frames"):
        released[0].apply({"params": released[1]}, x, tokens[:, :5], np.array([500]))


def test_time_points_are_those_of_the_fixture(io):
    np.testing.assert_array_equal(
        time_points(30, "neural_ode_euler")[0], io["oneshot/timesteps"].ravel()
    )
    np.testing.assert_array_equal(
        time_points(30, "naive_euler")[0], io["oneshot/timesteps_naive"].ravel()
    )
    # Three points 0, 0.5, 1: two steps of a half; or three of (1 - 1e-4) / 3.
    t, step = time_points(3, "neural_ode_euler")
    assert t.tolist() == [0, 500] and step.tolist() == [0.5, 0.5]
    t, step = time_points(3, "naive_euler")
    assert t.tolist() == [0, 500, 1000]
    np.testing.assert_allclose(step, 0.3333, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown ODE solver 'rk4'"):
        time_points(3, "rk4")


def test_euler_adds_up_steps_and_keeps_the_last_output():
    # v = t: 0 * 0.5 + 500 * 0.5 = 250.
    def velocity(x, t):
        return jnp.full_like(x, t[0]), {"t": t}

    x, out = euler(velocity, jnp.ones((1, 1, 1)), 3)
    assert float(x[0, 0, 0]) == 251 and out is None
    x, out = euler(velocity, jnp.ones((1, 1, 1)), 3, keep_last=True)
    assert float(x[0, 0, 0]) == 251 and out["t"].tolist() == [500]


def test_naive_euler_equals_the_fixture(released, io):
    model, params = released
    codes, noise = io["oneshot/tokens"].reshape(1, -1)[:, ::4], io["oneshot/noise"]

    @jax.jit
    def solve(noise):
        def velocity(x, t):
            return model.apply({"params": params}, x, codes, t)

        return euler(velocity, noise, solver="naive_euler")[0]

    mel = model.config.denormalize(solve(noise.reshape(1, -1, 80)))
    np.testing.assert_allclose(mel, io["oneshot/mel_naive_euler"].reshape(mel.shape), atol=5e-4)


def plain_velocity(tensors, config, x, tokens, t, start, past=None):
    """One row of the fixture's README in torch. past: [(k, v)] per block, each [C, N, H]."""
    w = {key.partition(".")[2]: torch.tensor(value) for key, value in tensors.items()}

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    heads, width = config.num_heads, config.width_per_head
    freqs = (-np.log(10_000) * torch.arange(128) / 128).double().exp().float()
    e = torch.cat([torch.cos(t * freqs), torch.sin(t * freqs)])
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", e)))
    c = F.silu(time + w["semantic_token_embedding.weight"][tokens])
    angles = torch.outer(start + torch.arange(len(x)), 1e4 ** -(torch.arange(0, width, 2) / width))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    h, own = linear("input_linear", x), []
    for i in range(config.depth):
        name = f"blocks.{i}"
        modulation = linear(f"{name}.adaLN_modulation.1", c).chunk(6, dim=-1)
        qkv = linear(f"{name}.attn.qkv", norm(h, *modulation[:2])).reshape(len(x), 3, heads, width)
        q, k, v = rotate(qkv[:, 0]), rotate(qkv[:, 1]), qkv[:, 2]
        own.append((k, v))
        if past is not None:
            k, v = torch.cat([past[i][0], k]), torch.cat([past[i][1], v])
        probs = torch.softmax(torch.einsum("tnh,snh->nts", q, k) * width**-0.5, dim=-1)
        y = torch.einsum("nts,snh->tnh", probs, v).reshape(len(x), -1)
        h = h + modulation[2] * linear(f"{name}.attn.proj", y)
        y = F.gelu(linear(f"{name}.mlp.fc1", norm(h, *modulation[3:5])), approximate="tanh")
        h = h + modulation[5] * linear(f"{name}.mlp.fc2", y)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=-1)
    return linear("final_layer.linear", norm(h, shift, scale)), own


def key_shapes(hidden, depth, codes, mels, ratio):
    """Every key of a release and its shape, from the fixture's README."""
    linears = {
        "input_linear": (hidden, mels),
        "t_embedder.mlp.0": (hidden, 256),
        "t_embedder.mlp.2": (hidden, hidden),
        "final_layer.linear": (mels, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * hidden, hidden),
            f"blocks.{i}.attn.proj": (hidden, hidden),
            f"blocks.{i}.mlp.fc1": (ratio * hidden, hidden),
            f"blocks.{i}.mlp.fc2": (hidden, ratio * hidden),
            f"blocks.{i}.adaLN_modulation.1": (6 * hidden, hidden),
        }
    shapes = {"speech_model.semantic_token_embedding.weight": (codes + 1, hidden)}
    for name, shape in linears.items():
        shapes |= {f"speech_model.{name}.weight": shape, f"speech_model.{name}.bias": shape[:1]}
    return shapes


CONFIGS = [
    FlowMatchingConfig(hidden_size=24, depth=2, num_heads=3, semantic_vocab_size=7, input_size=5),
    FlowMatchingConfig(
        hidden_size=20, depth=3, num_heads=1, semantic_vocab_size=11, input_size=8, mlp_ratio=3.0
    ),
    FlowMatchingConfig(
        hidden_size=36, depth=1, num_heads=2, semantic_vocab_size=3, input_size=6, mlp_ratio=2.0
    ),
]


def _random(config, seed):
    rng = np.random.default_rng(seed)
    shapes = key_shapes(
        config.hidden_size,
        config.depth,
        config.semantic_vocab_size,
        config.input_size,
        int(config.mlp_ratio),
    )
    tensors = {
        key: rng.normal(0, 0.2, shape).astype(np.float32) for key, shape in sorted(shapes.items())
    }
    model = FlowMatchingDiT(config)
    return rng, tensors, model, _import(model, tensors)


@pytest.mark.parametrize("number", range(3))
def test_rows_equal_a_plain_rendering(number):
    """Padded rows of 13 and 9 frames, at different times, after a padded cache of 6 and 4."""
    config = CONFIGS[number]
    rng, tensors, model, params = _random(config, number)
    x = rng.normal(size=(2, 13, config.input_size)).astype(np.float32)
    tokens = rng.integers(0, config.semantic_vocab_size + 1, (2, 13))
    shape = (config.depth, 2, 6, config.num_heads, config.width_per_head)
    cache = {name: rng.normal(size=shape).astype(np.float32) for name in ("k", "v")}
    lens, lens_cache, t, start = (13, 9), (6, 4), (37, 965), (6, 104)
    v, out = _run(
        model,
        params,
        x,
        tokens,
        np.array(t),
        emit=("kv",),
        position_ids=np.array(start)[:, None] + np.arange(13),
        mask=np.arange(13) < np.array(lens)[:, None],
        cache=cache,
        cache_mask=np.arange(6) >= 6 - np.array(lens_cache)[:, None],
    )
    for row in range(2):
        size = lens[row]
        # Our keys lie in the order 0, 2, 4, …, 1, 3, 5, …: undo it for the reference.
        order = np.argsort(np.r_[0 : config.width_per_head : 2, 1 : config.width_per_head : 2])
        past = [
            (
                torch.tensor(cache["k"][i, row, 6 - lens_cache[row] :][..., order]),
                torch.tensor(cache["v"][i, row, 6 - lens_cache[row] :]),
            )
            for i in range(config.depth)
        ]
        wanted, own = plain_velocity(
            tensors,
            config,
            torch.tensor(x[row, :size]),
            torch.tensor(tokens[row, :size]),
            t[row],
            start[row],
            past,
        )
        np.testing.assert_allclose(v[row, :size], wanted, atol=1e-4)
        for i, (k, value) in enumerate(own):
            np.testing.assert_allclose(out["kv"]["k"][i, row, :size][..., order], k, atol=1e-4)
            np.testing.assert_allclose(out["kv"]["v"][i, row, :size], value, atol=1e-4)


def test_without_cache_padding_is_not_seen():
    config = CONFIGS[0]
    rng, tensors, model, params = _random(config, 3)
    x = rng.normal(size=(2, 12, config.input_size)).astype(np.float32)
    codes = rng.integers(0, config.semantic_vocab_size, (2, 3))
    mask = np.arange(12) < np.array([12, 8])[:, None]
    v, _ = _run(model, params, x, codes, np.array([100]), mask=mask)
    for row, size in enumerate((12, 8)):
        tokens = torch.tensor(np.repeat(codes[row], 4)[:size])
        wanted, _ = plain_velocity(tensors, config, torch.tensor(x[row, :size]), tokens, 100, 0)
        np.testing.assert_allclose(v[row, :size], wanted, atol=1e-4)


def test_bfloat16_is_near_float32(released, io):
    model, params = released
    x, tokens = io["velocity/x"], io["velocity/tokens"]
    exact, _ = _run(model, params, x, tokens, np.array([500]))
    half = model.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    found, _ = _run(half, params, x, tokens, np.array([500]))
    error = np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact)))
    assert 1e-4 < error < 2e-2


def test_config_says_what_is_wrong(tmp_path):
    path = tmp_path / "config.yaml"
    good = json.loads((GOLDENS / "config.json").read_text())["audio_detokenizer"]

    def read(**dit):
        path.write_text(json.dumps(good | {"model": {"dit": good["model"]["dit"] | dit}}))
        return FlowMatchingConfig.from_yaml(path)

    config = read()
    assert dataclasses.asdict(config) == {
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "semantic_vocab_size": 32,
        "input_size": 80,
        "mlp_ratio": 4.0,
        "max_seq_len": 4096,
        "rope_base": 10_000.0,
        "normalize_mel": True,
        "mel_mean": -4.479605,
        "mel_std": 3.4584913,
    }
    np.testing.assert_allclose(config.denormalize(config.normalize(3.0)), 3.0, rtol=1e-6)
    with pytest.raises(ValueError, match=r"ffn_type='conv1d_conv1d'"):
        read(ffn_type="conv1d_conv1d")
    path.write_text("model: {dit: {depth: 3}}\nnormalize_mel: true")
    with pytest.raises(ValueError, match=r"missing.*model\.dit\.hidden_size.*mel_mean"):
        FlowMatchingConfig.from_yaml(path)
    path.write_text("model: Emotion2vec")
    with pytest.raises(ValueError, match=r"no model\.dit"):
        FlowMatchingConfig.from_yaml(path)
    assert not table.matches(tmp_path)
