"""Kimi-Audio against the reference fixture, row by row and in padded batches."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.convert import kimi_audio as table
from paras2s_jax.convert.rules import Checkpoint, export_params, import_params
from paras2s_jax.models.kimi_audio import (
    STACKS,
    KimiAudio,
    KimiAudioConfig,
    audio_prompt,
    collate_prompts,
    init_cache,
    prompt_layout,
    response_streams,
    special_ids,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "kimi_lm"
CONFIG = KimiAudioConfig.from_json(GOLDENS / "config.json")
ATOL = 2e-5  # the fixture's own tolerance on logits


@pytest.fixture(scope="module")
def io():
    return np.load(GOLDENS / "io.npz")


@pytest.fixture(scope="module")
def variables():
    init = functools.partial(table.init, KimiAudio(CONFIG))
    shapes = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))
    tensors = Checkpoint(GOLDENS / "model.safetensors")
    params = import_params(tensors, table.rules(CONFIG), shapes["params"])
    back = export_params(params, table.rules(CONFIG))
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    return {"params": params}


@pytest.fixture(scope="module")
def run():
    """Compiled forward under the reference's names, with everything emitted."""
    model = KimiAudio(CONFIG)
    return jax.jit(lambda variables, kw: model.apply(variables, emit=("kv", "input"), **kw))


NAMES = {"audio_ids": "input_ids", "text_ids": "text_input_ids"}


def _case(io, case: str) -> dict:
    """One row of the fixture as the reference is called: [1, T] and features [1, n + 1, 96]."""
    row = {NAMES.get(k, k): io[f"{case}/{k}"] for k in (*NAMES, "is_continuous_mask")}
    segments = np.sum(row["input_ids"] == CONFIG.special.media_begin)
    features = [io[f"{case}/whisper_feature_{k}"] for k in range(segments)]
    return row | {"whisper_input_feature": features}


def _padded_pair(io, left: bool) -> dict:
    """Rows a (25 tokens, two segments) and b (15, one segment) in one batch of 25."""
    rows = [_case(io, "a"), _case(io, "b")]
    widths = ((0, 0), (10, 0) if left else (0, 10))
    batch = {}
    for key in (*NAMES.values(), "is_continuous_mask"):
        fill = CONFIG.special.pad if key.endswith("_ids") else 0
        short = np.pad(rows[1][key], widths, constant_values=fill)
        batch[key] = np.concatenate([rows[0][key], short])
    features = [row["whisper_input_feature"] for row in rows]
    longest = max(x.shape[1] for x in features[0] + features[1])
    placed = np.full((2, 2, longest, 96), 9.0, np.float32)  # junk where nothing is heard
    for row in range(2):
        for k, x in enumerate(features[row]):
            placed[k, row, : x.shape[1]] = x[0]
    mask = [np.ones(25, int), np.arange(25) >= 10 if left else np.arange(25) < 15]
    return batch | {"whisper_input_feature": list(placed), "attention_mask": np.stack(mask)}


def test_special_ids_and_sizes_follow_config_json():
    raw = json.loads((GOLDENS / "config.json").read_text())
    assert vars(CONFIG.special) == raw["special_tokens"]
    assert CONFIG.stack_sizes == {"trunk": 3, "text_tail": 2, "audio_tail": 2}
    assert CONFIG.num_codes == 32
    prompts = json.loads((GOLDENS / "prompts.json").read_text())
    assert vars(KimiAudioConfig().special) == prompts["special_tokens"]


def test_from_json_names_missing_keys(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"vocab_size": 7}')
    with pytest.raises(ValueError, match=r"config\.json: keys missing .*rope_theta.* 10000"):
        KimiAudioConfig.from_json(path)


def test_from_json_checks_where_the_special_ids_lie(tmp_path):
    values = json.loads((GOLDENS / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values | {"kimia_media_end": 117}))
    with pytest.raises(ValueError, match=r"kimia_media_end is 117, .* bos_token_id 96 .* 116"):
        KimiAudioConfig.from_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not readable as JSON"):
        KimiAudioConfig.from_json(path)


def test_branch_must_leave_a_text_tail():
    with pytest.raises(ValueError, match="text tail"):
        KimiAudioConfig(num_hidden_layers=4, kimia_mimo_transformer_from_layer_index=3)


@pytest.mark.parametrize("case", ["a", "b"])
def test_every_module_matches_the_reference(io, variables, run, case):
    (audio, text), out = run(variables, _case(io, case))
    layers = [out["input"][name] for name in ("trunk", "text_tail")]
    keys = [out["kv"][name]["k"] for name in STACKS]
    got = {
        "inputs_embeds": out["inputs_embeds"],
        "layer_inputs": jnp.concatenate(layers),
        "branch_hidden": out["branch_hidden"],
        "audio_final": out["audio_final"],
        "text_final": out["text_final"],
        "audio_logits": audio,
        "text_logits": text,
        "k_cache": jnp.concatenate(keys),
    }
    for name, value in got.items():
        np.testing.assert_allclose(value, io[f"{case}/{name}"], atol=ATOL, err_msg=name)
    frames = io[f"{case}/whisper_feature_0"]
    adapted = jax.jit(lambda f: KimiAudio(CONFIG).apply(variables, f, method="adapt"))(frames)
    np.testing.assert_allclose(adapted, io[f"{case}/adaptor_out_0"], atol=ATOL)


@pytest.mark.parametrize("left", [False, True])
def test_padded_batch_with_features_equals_its_rows(io, variables, run, left):
    batch = _padded_pair(io, left)
    mask = batch["attention_mask"] == 1
    (audio, text), _ = run(variables, batch)
    for row, case in enumerate("ab"):
        for name, value in (("audio_logits", audio), ("text_logits", text)):
            want = io[f"{case}/{name}"][0]
            np.testing.assert_allclose(value[row][mask[row]], want, atol=ATOL)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batch_without_features_matches_the_reference(io, variables, run, side):
    case = f"batch2_{side}"
    mask = io[f"{case}/attention_mask"] == 1
    inputs = {name: io[f"{case}/{key}"] for key, name in NAMES.items()}
    inputs["attention_mask"] = io[f"{case}/attention_mask"]
    (audio, text), out = run(variables, inputs)
    got = {"audio_logits": audio, "text_logits": text, "branch_hidden": out["branch_hidden"]}
    for name, value in got.items():
        np.testing.assert_allclose(value[mask], io[f"{case}/{name}"][mask], atol=ATOL)


def test_cached_steps_match_the_reference(io, variables):
    model = KimiAudio(CONFIG)
    step = jax.jit(lambda cache, i, kw: model.apply(variables, cache=cache, cache_index=i, **kw))
    _, out = step(init_cache(CONFIG, rows=1, size=24), jnp.int32(0), _case(io, "b"))
    assert io["decode/first_position"] == 15
    for i in range(8):
        ids = {name: io[f"decode/{key}"][i].reshape(1, 1) for key, name in NAMES.items()}
        ids["position_ids"] = np.array([[15 + i]])
        (audio, text), out = step(out["cache"], jnp.int32(15 + i), ids)
        np.testing.assert_allclose(audio[0, 0], io["decode/audio_logits"][i], atol=ATOL)
        np.testing.assert_allclose(text[0, 0], io["decode/text_logits"][i], atol=ATOL)


def test_layouts_match_the_prompt_manager():
    prompts = json.loads((GOLDENS / "prompts.json").read_text())
    config = KimiAudioConfig()
    for name, case in prompts["cases"].items():
        got = prompt_layout(config, case["messages"], case["output_type"])
        for key in ("audio_ids", "text_ids", "is_continuous_mask", "feature_frames"):
            assert [int(x) for x in got[key]] == case[key], f"{name}: {key}"
        assert len(got["feature_frames"]) == case["n_continuous_features"]


def test_audio_prompt_equals_the_general_layout():
    codes = np.random.default_rng(0).integers(0, 32, (3, 4))
    lengths = np.array([4, 2, 0])
    features = np.random.default_rng(1).normal(size=(3, 4, 96)).astype(np.float32)
    got = jax.jit(lambda *x: audio_prompt(CONFIG, *x))(codes, lengths, features)
    layouts, frames = [], []
    for row, n in enumerate(lengths):
        message = {"role": "user", "message_type": "audio", "content": codes[row, :n].tolist()}
        layouts.append(prompt_layout(CONFIG, [message]))
        frames.append([features[row, :n]])
    want = collate_prompts(CONFIG, layouts, frames)
    np.testing.assert_array_equal(got.length, [9, 7, 5])
    for name in ("audio_ids", "text_ids", "continuous_mask", "mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    heard = got.continuous_mask[..., None]
    np.testing.assert_array_equal(got.features * heard, want.features * heard)


def test_collate_wants_one_feature_per_segment(io):
    layout = {key: io[f"a/{key}"][0] for key in ("audio_ids", "text_ids", "is_continuous_mask")}
    with pytest.raises(ValueError, match="prompt 0 has 1 features for 2 media_begin"):
        collate_prompts(CONFIG, [layout], [[np.zeros((7, 96))]])


def test_features_without_their_mask_are_refused(io, variables, run):
    row = _case(io, "b")
    del row["is_continuous_mask"]
    with pytest.raises(ValueError, match="needs is_continuous_mask"):
        run(variables, row)


def test_text_may_be_left_out(io, variables, run):
    row = _case(io, "b")
    alone, _ = run(variables, {k: v for k, v in row.items() if k != "text_input_ids"})
    zeros, _ = run(variables, row | {"text_input_ids": np.zeros_like(row["text_input_ids"])})
    jax.tree.map(np.testing.assert_array_equal, alone, zeros)


def test_response_streams_by_hand():
    ids, offset = CONFIG.special, CONFIG.kimia_token_offset
    blank, eos, end = ids.kimia_text_blank, ids.kimia_text_eos, ids.msg_end
    out = response_streams(
        CONFIG,
        text_ids=jnp.array([[11, 12, 0], [13, 0, 0], [21, 22, 23]]),
        len_text=jnp.array([2, 1, 3]),
        codes=jnp.array([[3, 4], [5, 0], [0, 0]]),
        len_codes=jnp.array([2, 1, 0]),
        steps=10,
    )
    # Row 0: audio = 6 blanks, 2 codes, msg_end at step 8; step 9 is not real.
    tail = [blank] * 7
    np.testing.assert_array_equal(out["text_out"][0], [11, 12, eos, *tail])
    codes = [offset + 3, offset + 4]
    np.testing.assert_array_equal(out["audio_out"][0], [*[blank] * 6, *codes, end, blank])
    np.testing.assert_array_equal(out["text_in"][0], [blank, 11, 12, eos, *tail[1:]])
    start = ids.kimia_assistant_msg_start
    np.testing.assert_array_equal(out["audio_in"][0], [start, *[blank] * 6, *codes, end])
    np.testing.assert_array_equal(np.flatnonzero(out["text_mask"][0]), [0, 1, 2])
    np.testing.assert_array_equal(np.flatnonzero(out["audio_mask"][0]), [6, 7, 8])
    np.testing.assert_array_equal(out["mask"].sum(-1), [9, 8, 7])
    # Row 2: no codes; the answer is over at step 6, where the end token stands.
    assert out["audio_out"][2, 6] == end
    np.testing.assert_array_equal(np.flatnonzero(out["audio_mask"][2]), [6])


def test_response_streams_cut_what_does_not_fit():
    out = response_streams(
        CONFIG,
        text_ids=jnp.arange(1, 13)[None],
        len_text=jnp.array([12]),
        codes=jnp.zeros((1, 5), jnp.int32),
        len_codes=jnp.array([1]),
        steps=9,
    )
    # The audio ends at step 7, before the text: the text is cut with it.
    np.testing.assert_array_equal(out["mask"][0], [True] * 8 + [False])
    np.testing.assert_array_equal(out["text_mask"][0], out["mask"][0])
    assert out["text_out"].shape == (1, 9)


def test_text_id_zero_adds_nothing_in_a_decoding_step(variables):
    model = KimiAudio(CONFIG)
    embed = jax.jit(
        lambda t, stepwise: model.apply(
            variables, jnp.full_like(t, 140), t, stepwise=stepwise, method="embed"
        ),
        static_argnums=1,
    )
    text = jnp.array([[0, 5]])
    table_ = variables["params"]["embed_tokens"]["embedding"]
    np.testing.assert_allclose(embed(text, True)[0], [table_[140], table_[140] + table_[5]])
    np.testing.assert_allclose(embed(text, False)[0, 0], table_[140] + table_[0])


def test_special_block_moves_as_one():
    assert special_ids(96, 135) == CONFIG.special
