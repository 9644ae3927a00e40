"""The detokenizer against the Kimi-Audio fixture: at once, in chunks, in padded batches."""

import dataclasses
import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.convert import bigvgan as vocoder_table
from paras2s_jax.convert import flow_matching as dit_table
from paras2s_jax.convert.rules import Checkpoint, import_params
from paras2s_jax.models.bigvgan import BigVGAN, BigVGANConfig
from paras2s_jax.models.detokenizer import FlowMatchingDetokenizer
from paras2s_jax.models.detokenizer_chunks import (
    Prefix,
    by_length,
    chunk_plan,
    cross_fade,
    draw_noise,
    hand_over,
    row_keys,
    window_plan,
)
from paras2s_jax.models.flow_matching import FlowMatchingConfig, FlowMatchingDiT

GOLDENS = Path(__file__).parents[1] / "goldens" / "kimi_detokenizer_dit"
MEL_ATOL, WAV_ATOL = 5e-4, 2e-5  # The fixture's own tolerances.
SMALL = {"first": 6, "chunk": 7, "look_ahead": 2, "max_kv": 50}


@pytest.fixture(scope="module")
def io():
    return np.load(GOLDENS / "io.npz")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(dit, its params, vocoder, its params) of the fixture."""
    folder = tmp_path_factory.mktemp("released")
    config = json.loads((GOLDENS / "config.json").read_text())
    (folder / "config.yaml").write_text(json.dumps(config["audio_detokenizer"]))
    (folder / "config.json").write_text(json.dumps(config["vocoder"]))
    found = []
    for table, file in ((dit_table, "model"), (vocoder_table, "vocoder")):
        model = table.make_model(folder)
        shapes = jax.eval_shape(functools.partial(table.init, model), jax.random.key(0))
        params = import_params(
            Checkpoint(GOLDENS / f"{file}.safetensors"),
            table.rules(model.config),
            nn.meta.unbox(shapes)["params"],
        )
        found += [model, jax.tree.map(jnp.asarray, params)]
    return found


@pytest.fixture(scope="module")
def detokenizer(parts):
    return FlowMatchingDetokenizer.from_models(*parts)


def _random_params(table, model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(table.init, model), jax.random.key(0))
    leaves = nn.meta.unbox(shapes)["params"]
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), leaves)


def _quick_vocoder(num_mels):
    """(vocoder, params) with one stage, of hop 2, which compiles in no time."""
    config = BigVGANConfig(
        upsample_rates=(2,),
        upsample_kernel_sizes=(4,),
        upsample_initial_channel=8,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((2,),),
        num_mels=num_mels,
        sampling_rate=100,
        hop_size=2,
        n_fft=8,
        win_size=8,
    )
    vocoder = BigVGAN(config, folded=True)
    return vocoder, _random_params(vocoder_table, vocoder)


@pytest.fixture(scope="module")
def small():
    """A detokenizer of random weights that compiles quickly."""
    config = FlowMatchingConfig(
        hidden_size=12, depth=1, num_heads=2, semantic_vocab_size=32, input_size=5
    )
    dit = FlowMatchingDiT(config)
    return FlowMatchingDetokenizer.from_models(
        dit, _random_params(dit_table, dit), *_quick_vocoder(5), **SMALL, ode_steps=4
    )


@jax.jit
def render(detokenizer, codes, lens, noise):
    """noise: float32[chunks, B, A, M]."""
    return detokenizer.render(codes, lens, lambda number, size: noise[number][:, : 4 * size])


@jax.jit
def decode(detokenizer, codes, lens, rng):
    return detokenizer.decode(codes, lens, rng)


next_chunk = jax.jit(lambda d, s, codes, noise: d.stream_chunk(s, codes, noise))
last_chunk = jax.jit(lambda d, s, codes, noise, lens: d.stream_chunk(s, codes, noise, True, lens))


def test_all_frames_at_once_equal_the_fixture(detokenizer, io):
    codes = io["oneshot/tokens"].reshape(1, -1)[:, ::4]
    noise = io["oneshot/noise"].reshape(1, 1, -1, 80)
    assert codes.shape == (1, 10) and noise.shape[2] == 40
    mel, wave, lens = render(detokenizer.replace(chunked=False), codes, jnp.array([10]), noise)
    assert wave.shape == (1, 19_200) and lens.tolist() == [19_200]
    np.testing.assert_allclose(mel[0], io["oneshot/mel"].reshape(-1, 80), atol=MEL_ATOL)
    np.testing.assert_allclose(wave[0], io["oneshot/wav"].ravel(), atol=WAV_ATOL)


def _chunks(values, lengths):
    """Splits [T, …] at the lengths of a fixture."""
    return np.split(values.reshape(int(np.sum(lengths)), -1), np.cumsum(lengths)[:-1])


@pytest.mark.parametrize("case", ["stream", "stream_small", "stream_prompt"])
def test_streams_equal_the_fixture(parts, io, case):
    """Every chunk's mel and cache; waves where they are quick to compile (stream_small)."""
    names = {"first": "first", "chunk": "chunk", "look_ahead": "look", "max_kv": "max_kv"}
    settings = {ours: int(io[f"{case}/{name}"]) for ours, name in names.items()}
    vocoder = parts[2:] if case == "stream_small" else _quick_vocoder(80)
    detokenizer = FlowMatchingDetokenizer.from_models(*parts[:2], *vocoder, **settings)
    codes = io[f"{case}/codes"].reshape(1, -1)
    edges = np.arange(settings["first"], codes.shape[1], settings["chunk"])
    pieces = np.split(codes, edges, axis=1)
    noises = _chunks(io[f"{case}/noise"], io[f"{case}/noise_lengths"])
    mels = _chunks(io[f"{case}/mel"], io[f"{case}/mel_lengths"])
    state, waves = detokenizer.start(1), []
    if case == "stream_prompt":
        start = jax.jit(lambda d, m, t: d.start_with_voice(m, t, int(io[f"{case}/prompt_chunk"])))
        prompt = io[f"{case}/prompt_mel"].reshape(1, -1, 80)
        state = start(detokenizer, prompt, io[f"{case}/prompt_tokens"].reshape(1, -1))
        assert int(state.prefix.length) == int(state.prefix.position) == 30
    assert len(pieces) == len(noises) == len(mels) > 1
    for number, (codes, noise, wanted) in enumerate(zip(pieces, noises, mels)):
        if number + 1 < len(pieces):
            state, mel, wave = next_chunk(detokenizer, state, codes, noise[None])
        else:
            # Padded to a whole chunk, as a service would.
            spare = settings["chunk"] - codes.shape[1]
            real = jnp.array([codes.shape[1]])
            codes = np.pad(codes, ((0, 0), (0, spare)))
            noise = np.pad(noise, ((0, 4 * spare), (0, 0)), constant_values=9.0)
            state, mel, wave = last_chunk(detokenizer, state, codes, noise[None], real)
            assert not np.any(mel[0, len(wanted) :])
            mel = mel[:, : len(wanted)]
        assert int(state.prefix.length) == int(io[f"{case}/kv_after_chunk"][number])
        np.testing.assert_allclose(mel[0], wanted, atol=MEL_ATOL)
        waves.append(wave[0])
    assert state.pre_wav.shape == (1, 0) and state.voice is None
    if case == "stream_small":
        lengths = io["stream_small/wav_lengths"]
        assert [len(wave) for wave in waves[:-1]] == lengths[:-1].tolist()
        assert not np.any(waves[-1][lengths[-1] :])
        heard = np.concatenate(waves)[: int(lengths.sum())]
        np.testing.assert_allclose(heard, io["stream_small/wav"].ravel(), atol=WAV_ATOL)


def test_whole_answers_by_chunks_equal_the_streams(detokenizer, io):
    """The fixture's 62 codes beside rows that end earlier, at the released settings."""
    lens = np.array([62, 45, 20, 0])
    codes = np.tile(io["stream/codes"].reshape(1, -1), (4, 1)).astype(np.int32)
    codes = np.where(np.arange(62) < lens[:, None], codes, 7)
    noise = np.zeros((3, 4, 168, 80), np.float32)
    for number, part in enumerate(_chunks(io["stream/noise"], io["stream/noise_lengths"])):
        noise[number, :, : len(part)] = part
    mel, wave, len_waves = render(detokenizer, codes, lens, noise)
    assert wave.shape == (4, 62 * 1920) and len_waves.tolist() == (1920 * lens).tolist()
    np.testing.assert_allclose(mel[0], io["stream/mel"].reshape(-1, 80), atol=MEL_ATOL)
    np.testing.assert_allclose(wave[0], io["stream/wav"].ravel(), atol=WAV_ATOL)
    # What was settled before the second row's end is the same; of its waves, half a chunk less.
    np.testing.assert_allclose(mel[1, :72], mel[0, :72], atol=MEL_ATOL)
    np.testing.assert_allclose(wave[1, : 36 * 480], wave[0, : 36 * 480], atol=WAV_ATOL)
    for row in range(1, 4):
        assert not np.any(mel[row, 4 * lens[row] :]) and not np.any(wave[row, len_waves[row] :])


@pytest.mark.parametrize("chunked", [True, False])
def test_decode_does_not_depend_on_padding_or_neighbours(small, chunked):
    """Rows that end in the third chunk, in the second, on its edge, and in the first."""
    small = small.replace(chunked=chunked)
    codes = np.random.default_rng(0).integers(0, 33, (4, 15)).astype(np.int32)
    lens = np.array([15, 9, 13, 4])
    keys = jax.random.split(jax.random.key(3), 4)
    waves, len_waves = decode(small, codes, lens, keys)
    # Four frames of two samples for each code.
    assert waves.shape == (4, 120) and len_waves.tolist() == [120, 72, 104, 32]
    for row in (1, 2, 3):
        size = lens[row]
        alone, _ = decode(small, codes[row : row + 1, :size], lens[row : row + 1], keys[row:][:1])
        assert np.std(alone) > 0.01
        np.testing.assert_allclose(waves[row, : 8 * size], alone[0], atol=WAV_ATOL)
        assert not np.any(waves[row, 8 * size :])
    if not chunked:
        some, some_lens = decode(small.replace(rows_at_once=3), codes, lens, keys)
        np.testing.assert_array_equal(some_lens, len_waves)
        np.testing.assert_allclose(some, waves, atol=WAV_ATOL)
    # Codes past the length, and the key of another row, change nothing.
    other = np.where(np.arange(15) < lens[:, None], codes, 3)
    again, _ = decode(small, other, lens, keys.at[0].set(jax.random.key(9)))
    np.testing.assert_array_equal(again[1:], waves[1:])
    assert np.any(again[0] != waves[0])


def test_every_device_speaks_its_own_rows(small):
    codes = np.random.default_rng(0).integers(0, 32, (4, 15)).astype(np.int32)
    lens, keys = np.array([15, 9, 13, 4]), jax.random.split(jax.random.key(3), 4)
    waves, _ = decode(small, codes, lens, keys)
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"), axis_types=kinds)
    with jax.set_mesh(mesh), nn.logical_axis_rules((("act_batch", "data"), ("mlp", "tensor"))):
        run = jax.jit(FlowMatchingDetokenizer.decode)
        apart, _ = run(small, codes, lens, keys)
        text = run.lower(small, codes, lens, keys).as_text()
    assert apart.sharding.shard_shape(apart.shape)[0] == 1
    np.testing.assert_allclose(apart, waves, atol=WAV_ATOL)
    assert "all_reduce" not in text


def test_bfloat16_is_near_float32(parts, io):
    dit, params, vocoder, vocoder_params = parts
    half = [m.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16) for m in (dit, vocoder)]
    cast = [
        jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree) for tree in (params, vocoder_params)
    ]
    made = FlowMatchingDetokenizer.from_models(half[0], cast[0], half[1], cast[1], chunked=False)
    codes = io["oneshot/tokens"].reshape(1, -1)[:, ::4]
    noise = io["oneshot/noise"].reshape(1, 1, -1, 80)
    mel, wave, _ = render(made, codes, jnp.array([10]), noise)
    assert wave.dtype == jnp.float32
    for found, name in ((mel, "mel"), (wave, "wav")):
        wanted = io[f"oneshot/{name}"].reshape(found.shape)
        error = np.sqrt(np.mean(np.square(found - wanted)) / np.mean(np.square(wanted)))
        assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("devices", [1, 4])
def test_rows_by_length(devices):
    """Ten rows, four at a time: like lengths come together, and every result to its row."""
    lens = jnp.array([5, 9, 1, 7, 3, 8, 2, 6, 4, 10])

    def longest(rows):
        lens, keys = rows
        return lens, jnp.broadcast_to(jnp.max(lens), lens.shape), jax.random.key_data(keys)

    def run(lens, keys):
        return by_length(longest, lens, (lens, keys), 4)

    keys = jax.random.split(jax.random.key(0), 10)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), nn.logical_axis_rules((("act_batch", "data"),)):
        own, of_batch, data = jax.jit(run)(lens, keys)
    np.testing.assert_array_equal(own, lens)
    # 10, 9, 8, 7 together, then 6, 5, 4, 3, then 2, 1.
    np.testing.assert_array_equal(of_batch, [6, 10, 2, 10, 6, 10, 2, 6, 6, 10])
    np.testing.assert_array_equal(data, jax.random.key_data(keys))


def test_noise_is_drawn_code_by_code():
    keys = row_keys(None, 2)
    np.testing.assert_array_equal(
        jax.random.key_data(keys),
        jax.random.key_data(row_keys(jax.random.PRNGKey(0), 2)),
    )
    noise = draw_noise(keys, jnp.int32(1), 40, 20)
    assert noise.shape == (2, 160, 20)
    np.testing.assert_array_equal(draw_noise(keys[1:], jnp.int32(1), 5, 20)[0], noise[1, :20])
    assert abs(np.mean(noise)) < 0.05 and abs(np.std(noise) - 1) < 0.05
    flat = np.concatenate([np.ravel(noise), np.ravel(draw_noise(keys, jnp.int32(2), 40, 20))])
    assert len(np.unique(flat)) > 0.99 * flat.size


def test_plan_of_the_release():
    # 30 codes, 12 held: 72 frames, half of them heard. Then 120 more and twice what was held
    # back, as far as that is less than all.
    assert chunk_plan(95, 30, 30, 12) == [
        (0, 72, 36),
        (36, 192, 72),
        (108, 312, 168),
        (276, 432, 72),
    ]
    assert chunk_plan(90, 30, 30, 12)[-1] == (108, 312, 168)
    assert hand_over(0, 10) == (5, 5)
    assert hand_over(3, 10) == (6, 4)
    assert hand_over(6, 10) == (5, 5)


def test_prefixes_are_as_long_as_what_they_hold():
    # 72 frames before chunk 1, 120 more before each later one. 2: 192 before the last.
    assert window_plan(1, 72, 120, 900) == [(1, 2, 72)]
    assert window_plan(2, 72, 120, 900) == [(1, 3, 192)]
    # 16 * 72 is more than is ever kept: all later chunks of the release are one run.
    assert window_plan(12, 72, 120, 900) == [(1, 13, 900)]
    # 64 = 16 * 4 holds the 44 before chunk 2, but not the 84 before chunk 3.
    assert window_plan(4, 4, 40, 100) == [(1, 2, 64), (2, 5, 100)]
    # Of little that grows fast, the next chunk's: 1 + 40.
    assert window_plan(3, 1, 40, 50) == [(1, 2, 41), (2, 4, 50)]


def test_cross_fade_by_hand():
    # Periodic Hamming window of 4: 0.54 - 0.46 cos(pi t / 2) = 0.08, 0.54, 1, 0.54.
    faded = cross_fade(jnp.array([[1.0, 2.0, 7.0]]), jnp.array([[10.0, 20.0, 30.0, 40.0]]))
    np.testing.assert_allclose(faded, [[1.0 + 0.8, 1.08 + 10.8, 30, 40]], rtol=1e-6)
    # The same in a longer piece, of a size that is known when it runs.
    piece = jnp.array([[10.0, 20.0, 30.0, 40.0, 50.0]])
    faded = cross_fade(jnp.array([[1.0, 2.0]]), piece, jnp.int32(4))
    np.testing.assert_allclose(faded, [[1.8, 11.88, 30, 40, 50]], rtol=1e-6)


def test_prefix_slides_and_restarts():
    def frames(*values):
        return jnp.array(values, jnp.float32).reshape(1, 1, -1, 1, 1)

    prefix = Prefix(frames(0, 0, 0), frames(0, 0, 0), jnp.int32(0), jnp.int32(0))
    assert not np.any(prefix.mask)
    prefix = prefix.append({"k": frames(1, 2), "v": frames(5, 6)})
    assert prefix.mask.tolist() == [[False, True, True]]
    longer = prefix.append({"k": frames(3, 4), "v": frames(7, 8)})
    assert longer.k.ravel().tolist() == [2, 3, 4] and longer.v.ravel().tolist() == [6, 7, 8]
    assert int(longer.length) == 3 and int(longer.position) == 4
    # 4 + 2 * 2 frames still fit 8 positions, but not 7.
    assert int(longer.restart(2, 8).position) == 4
    grown = prefix.append({"k": frames(3, 4), "v": frames(7, 8)}, 5)
    assert grown.k.ravel().tolist() == [0, 1, 2, 3, 4] and int(grown.length) == 4
    np.testing.assert_array_equal(prefix.resized(5).mask, [[False, False, False, True, True]])
    assert prefix.resized(5).v.ravel().tolist() == [0, 0, 0, 5, 6]
    empty = longer.restart(2, 7)
    assert int(empty.position) == 0 and not np.any(empty.mask)
    voice = longer.restart(2, 7, prefix)
    assert int(voice.position) == 2 and voice.k.ravel().tolist() == [0, 1, 2]


def test_a_long_answer_restarts(small):
    """With 60 positions, chunks of 28 frames restart after the second: 16 + 28 + 2 * 28 > 60."""
    dit = small.dit.clone(config=dataclasses.replace(small.dit.config, max_seq_len=60))
    small = small.replace(dit=dit)
    codes = np.arange(22)[None]
    noise = jax.random.normal(jax.random.key(0), (4, 1, 36, 5))
    state, _, first = next_chunk(small, small.start(1), codes[:, :6], noise[0, :, :24])
    assert int(state.prefix.position) == int(state.prefix.length) == 16
    state, _, second = next_chunk(small, state, codes[:, 6:13], noise[1])
    assert int(state.prefix.position) == int(state.prefix.length) == 0
    _, _, third = last_chunk(small, state, codes[:, 13:20], noise[2], jnp.array([5]))
    _, waves, _ = render(small, codes[:, :18], jnp.array([18]), noise[:3])
    heard = np.concatenate([first, second, third], axis=1)[:, : 18 * 8]
    np.testing.assert_allclose(waves, heard, atol=WAV_ATOL)
    with pytest.raises(ValueError, match="22 codes exceed 60 frames"):
        small.replace(chunked=False).decode(codes, jnp.array([22]))


def test_without_look_ahead_the_last_evaluation_is_remembered(small):
    small = small.replace(look_ahead=0)
    codes = np.arange(6)[None]
    noise = jax.random.normal(jax.random.key(0), (1, 24, 5))
    state, mel, _ = next_chunk(small, small.start(1), codes, noise)
    assert mel.shape == (1, 24, 5) and state.held.shape == (1, 0)
    assert int(state.prefix.length) == 24
    # Three steps of a third; the last velocity is that at t = 666 of what two steps give.
    variables, x = {"params": small.dit_params}, noise
    run = jax.jit(lambda x, t: small.dit.apply(variables, x, codes, t, emit=("kv",)))
    for t in (0, 333, 666):
        v, out = run(x, jnp.array([t]))
        x = x + v / 3
    np.testing.assert_allclose(mel, x, atol=1e-4)
    np.testing.assert_allclose(state.prefix.k[:, :, 26:], out["kv"]["k"], atol=1e-4)


def test_what_does_not_fit_is_refused(parts):
    with pytest.raises(ValueError, match="look_ahead < first"):
        FlowMatchingDetokenizer.from_models(*parts, first=12)
    with pytest.raises(ValueError, match=r"first <= look_ahead \+ 2 \* chunk"):
        FlowMatchingDetokenizer.from_models(*parts, chunk=8)
    config = dataclasses.replace(parts[2].config, num_mels=79)
    with pytest.raises(ValueError, match="makes 80 mels, the vocoder reads 79"):
        FlowMatchingDetokenizer.from_models(*parts[:2], BigVGAN(config), parts[3])
    detokenizer = FlowMatchingDetokenizer.from_models(*parts)
    assert detokenizer.rate_hz == 24_000 and detokenizer.codebook_size == 32
    assert detokenizer.samples_per_code == 1920 and detokenizer.vocoder.folded
    with pytest.raises(ValueError, match="more than 12 codes, all real"):
        detokenizer.stream_chunk(detokenizer.start(1), jnp.zeros((1, 12), jnp.int32), None)
