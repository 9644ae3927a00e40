"""Qwen2-Audio against transformers, its own padding, and shared prefixes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from paras2s_jax.convert import qwen2_audio as table
from paras2s_jax.convert.rules import Checkpoint, export_params, import_params
from paras2s_jax.models.lora import LoRA
from paras2s_jax.models.qwen2_audio import Qwen2Audio, Qwen2AudioConfig, num_slots

AUDIO = 50  # Id of an audio slot.
NUM_FRAMES = 40
LENS = np.array([40, 21, 34, 7])  # Two audios per row; 21 frames -> 11 -> 5 slots, 7 -> 4 -> 2.
TEXTS = [[[3, 4], [5], [6, 7, 8]], [[9], [10, 11], [12]]]  # Before, between and after the audios.


def test_number_of_slots():
    assert [num_slots(n) for n in (*LENS, 3000)] == [10, 5, 8, 2, 750]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A transformers model, saved as released checkpoints are, and its conversion."""
    audio = {
        "encoder_layers": 2,
        "d_model": 24,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 40,
        "num_mel_bins": 10,
        "max_source_positions": NUM_FRAMES // 2,
    }
    text = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(0)
    config = transformers.Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=AUDIO
    )
    hf = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("released")
    hf.save_pretrained(folder)
    config = Qwen2AudioConfig.from_json(folder / "config.json")
    assert config.text.rope_theta == 5000.0 and config.audio.d_model == 24
    model = Qwen2Audio(config)
    mel, ids = np.zeros((1, NUM_FRAMES, 10), np.float32), np.full((1, 12), AUDIO, np.int32)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), mel, ids, method="init_all"))
    tensors = Checkpoint(folder / "model.safetensors")
    params = import_params(tensors, table.rules(config), nn.meta.unbox(boxed)["params"])
    back = export_params(params, table.rules(config))
    assert set(back) == set(tensors)
    np.testing.assert_array_equal(
        back["audio_tower.conv1.weight"], hf.model.audio_tower.conv1.weight.detach()
    )
    return hf, model, {"params": params}


@pytest.fixture(scope="module")
def mel():
    return np.random.default_rng(0).normal(size=(4, NUM_FRAMES, 10)).astype(np.float32)


def layout(slots):
    """ids and mask of TEXTS with slots[row][i] audio slots for each audio, padded on the right."""
    rows = []
    for (before, between, after), (first, second) in zip(TEXTS, slots, strict=True):
        rows.append([*before, *[AUDIO] * first, *between, *[AUDIO] * second, *after])
    width = max(map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows])
    return ids, np.arange(width) < np.array([[len(row)] for row in rows])


def at_text(values, ids, mask):
    """The values at real text positions, of both rows in turn."""
    return np.asarray(values)[np.asarray(mask) & (ids != AUDIO)]


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, mel, lens, ids, mask):
    embeds, audio_mask = model.apply(variables, mel, lens, method="audio_embeds")
    embeds = embeds.reshape(len(ids), -1, embeds.shape[-1])
    return model.apply(variables, ids, embeds, audio_mask.reshape(len(ids), -1), mask)


def test_logits_equal_transformers(released, mel):
    hf, model, variables = released
    counts = np.array([num_slots(n) for n in LENS]).reshape(2, 2)
    exact_ids, exact_mask = layout(counts)
    assert exact_mask[0].sum() != exact_mask[1].sum()  # One row is padded.
    frames = np.arange(NUM_FRAMES) < np.array(LENS)[:, None]
    with torch.no_grad():
        expected = hf(
            input_ids=torch.tensor(exact_ids),
            attention_mask=torch.tensor(exact_mask).long(),
            input_features=torch.tensor(mel).transpose(1, 2),
            feature_attention_mask=torch.tensor(frames).long(),
        ).logits
    ids, mask = layout([[10, 10], [10, 10]])
    logits, out = run(model.clone(mask_inputs=False), variables, mel, LENS, ids, mask)
    assert logits.shape == (2, ids.shape[1], 60)
    assert out["mask"].sum(1).tolist() == exact_mask.sum(1).tolist()
    wanted = at_text(expected, exact_ids, exact_mask)
    np.testing.assert_allclose(at_text(logits, ids, mask), wanted, atol=1e-4)


def test_padded_equals_unpadded(released, mel):
    _, model, variables = released
    ids, mask = layout([[10, 10], [10, 10]])
    logits, _ = run(model, variables, mel, LENS, ids, mask)
    # The second row on its own, each of its audios cut to its length.
    embeds = [
        model.apply(
            variables, mel[i : i + 1, : LENS[i]], jnp.array([LENS[i]]), method="audio_embeds"
        )
        for i in (2, 3)
    ]
    short_ids, short_mask = layout([[10, 5], [8, 2]])
    size = short_mask[1].sum()
    alone, _ = model.apply(
        variables,
        short_ids[1:, :size],
        jnp.concatenate([x for x, _ in embeds], axis=1),
        jnp.concatenate([m for _, m in embeds], axis=1),
    )
    alone = at_text(alone, short_ids[1:, :size], short_mask[1:, :size])
    np.testing.assert_allclose(at_text(logits[1:], ids[1:], mask[1:]), alone, atol=1e-5)


def test_shared_prefix_equals_full_rows(released, mel):
    """Two prompts (text and query), two answers each: the prompt is run once."""
    _, model, variables = released
    queries, answers = mel[:2], np.concatenate([mel, mel[::-1]])[:4]
    query_lens, answer_lens = jnp.array([40, 21]), jnp.array([40, 13, 34, 8])
    query, query_mask = model.apply(variables, queries, query_lens, method="audio_embeds")
    answer, answer_mask = model.apply(variables, answers, answer_lens, method="audio_embeds")
    head = np.tile([3, 4, *[AUDIO] * 10, 5], (2, 1))
    tail = np.tile([6, *[AUDIO] * 10, 7, 8], (4, 1))
    _, shared = model.apply(variables, head, query, query_mask, emit=("kv",))
    logits, _ = model.apply(
        variables, tail, answer, answer_mask, prefix=shared["kv"], prefix_mask=shared["mask"]
    )
    twice = lambda x: jnp.repeat(x, 2, axis=0)
    full, _ = model.apply(
        variables,
        np.concatenate([twice(head), tail], axis=1),
        jnp.stack([twice(query), answer], axis=1),
        jnp.stack([twice(query_mask), answer_mask], axis=1),
    )
    np.testing.assert_allclose(logits[:, -2:], full[:, -2:], atol=1e-5)


def test_adapters_of_both_parts(released, mel):
    _, model, variables = released
    targets = ("q_proj", "v_proj")
    adapted = model.clone(lora=LoRA(rank=2, targets=targets), audio_lora=LoRA(2, 4.0, targets))
    ids, mask = layout([[10, 10], [10, 10]])
    init = jax.jit(functools.partial(adapted.init, method="init_all"))
    lora = nn.meta.unbox(init(jax.random.key(0), mel[:2], ids[:, :12]))["lora"]
    assert lora["audio_tower"]["layers"]["self_attn"]["q_proj"]["a"].shape == (2, 24, 2)
    plain, _ = run(model, variables, mel, LENS, ids, mask)
    same, _ = run(adapted, {**variables, "lora": lora}, mel, LENS, ids, mask)
    np.testing.assert_allclose(same, plain, atol=1e-6)

    def loss(lora):
        return jnp.mean(run(adapted, {**variables, "lora": lora}, mel, LENS, ids, mask)[0] ** 2)

    gradient = jax.grad(loss)(lora)
    for part in ("audio_tower", "language_model"):
        b = [
            x
            for path, x in jax.tree_util.tree_leaves_with_path(gradient[part])
            if path[-1].key == "b"
        ]
        assert len(b) == 2 and all(np.abs(x).max() > 0 for x in b)


def test_config_without_audio_part_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"text_config": {}}')
    with pytest.raises(ValueError, match="audio_config"):
        Qwen2AudioConfig.from_json(path)
    path.write_text('{"text_config": {}, "audio_config": {"d_model": 8}}')
    config = Qwen2AudioConfig.from_json(path)
    # The defaults that the released 7B config leaves out (its text_config states the rest).
    assert (config.audio.d_model, config.audio.num_mel_bins) == (8, 128)
    assert (config.text.hidden_size, config.text.rope_theta) == (4096, 10_000.0)
