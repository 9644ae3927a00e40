"""A released audio language model as the reward model."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from paras2s_jax.convert import from_pretrained
from paras2s_jax.stages import audio_lm
from paras2s_jax.stages.registry import StageError
from paras2s_jax.train.sharding import Layout


@pytest.fixture
def section(load_config, omni):
    """distill.model of the 7B config, for the small checkpoint."""
    c = load_config("kimi_audio_7b").distill.model
    c.checkpoint = str(omni)
    c.text.num_hidden_layers = c.audio.encoder_layers = 2
    return c


def test_the_audios_stand_in_the_models_own_chat(section, omni):
    prompt = audio_lm.reward_model_of(section).prompt
    tokenizer = AutoTokenizer.from_pretrained(omni)
    before, between, after = (
        tokenizer.decode(ids) for ids in (prompt.before, prompt.between, prompt.after)
    )
    assert before.startswith("<|im_start|>system\nYou judge")
    assert before.endswith("The speaker: <|audio_bos|>")
    assert between == "<|audio_eos|>\nThe assistant: <|audio_bos|>"
    assert after.startswith("<|audio_eos|>\nHow well")
    assert after.endswith("(perfectly).<|im_end|>\n<|im_start|>assistant\n")
    # Control tokens are tokens, not text that looks like them.
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert prompt.before.count(start) == 2 and prompt.after.count(end) == 1
    assert [tokenizer.decode([i]) for i in prompt.digit_ids] == list("12345")


def test_it_scores_two_waveforms(section):
    section.dtype = section.param_dtype = "float32"
    reward_model = audio_lm.reward_model_of(section)
    variables = audio_lm.load(reward_model, Path(section.checkpoint), Layout())
    assert set(variables) == {"params", "lora"}
    boxed = reward_model.boxed()
    assert jax.tree.structure(jax.tree.map(np.shape, variables)) == jax.tree.structure(
        jax.tree.map(np.shape, audio_lm.unbox(boxed))
    )
    waves = np.random.default_rng(0).normal(0, 0.1, (2, 8000)).astype(np.float32)
    lens = np.full(2, 8000, np.int32)
    score = jax.jit(reward_model.score)(variables, waves, lens, waves[:, None], lens[:, None])
    assert score.shape == (2, 1) and np.all((score >= 1) & (score <= 5))


def test_a_plan_needs_no_checkpoint(section, tmp_path):
    """Sizes of Qwen2.5-Omni-7B's thinker, all but the depths that the config cuts."""
    section.checkpoint = str(tmp_path / "nowhere")
    shapes = audio_lm.unbox(audio_lm.outline(section).boxed())
    assert set(shapes) == {"params", "lora"}
    language_model = shapes["params"]["language_model"]
    kernel = language_model["stack"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (2, 3584, 18_944) and kernel.dtype == "bfloat16"
    assert language_model["lm_head"]["kernel"].shape == (3584, 152_064)
    tower = shapes["params"]["audio_tower"]["layers"]["mlp"]
    assert tower["fc1"]["kernel"].shape == (2, 1280, 5120)


def test_a_plan_takes_the_checkpoint_that_is_there(section):
    assert audio_lm.outline(section) == audio_lm.reward_model_of(section)


def another_family(folder, section):
    section.family = "qwen2_audio"


def other_depth(folder, section):
    section.text.num_hidden_layers = 3


def no_template(folder, section):
    (folder / "chat_template.jinja").unlink()


def another_slot(folder, section):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"audio_token_index": 3}))


def no_folder(folder, section):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (another_family, "holds a Qwen2_5OmniThinker, distill.model.family is 'qwen2_audio'"),
        (other_depth, r"distill\.model\.text\.num_hidden_layers is 3, that of .* 2"),
        (no_template, "lacks its tokenizer, preprocessor_config.json or chat template"),
        (another_slot, r"<\|AUDIO\|> is \d+ in the tokenizer and 3 in the model's config"),
        (no_folder, "no such folder; convert Qwen/Qwen2.5-Omni-7B to it"),
    ],
)
def test_what_does_not_fit_is_refused(section, omni, tmp_path, spoil, sentence):
    folder = Path(shutil.copytree(omni, tmp_path / "omni"))
    section.checkpoint = str(folder)
    spoil(folder, section)
    with pytest.raises(StageError, match=sentence) as error:
        audio_lm.reward_model_of(section)
    assert str(folder) in str(error.value)


def test_the_folder_is_loaded_as_any_other(omni):
    assert from_pretrained(omni)[2] is not None
