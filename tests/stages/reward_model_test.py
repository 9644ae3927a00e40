"""Which model the reward model's config asks for."""

import jax
import numpy as np
import pytest

from paras2s_jax import cli
from paras2s_jax.models.placement import unbox
from paras2s_jax.models.qwen2_5_omni import Qwen2_5OmniThinker
from paras2s_jax.stages.judging import make_scorer
from paras2s_jax.stages.registry import StageError
from paras2s_jax.stages.reward_model import (
    load_reward_model,
    make_reward_model,
    outline_reward_model,
    save_reward_model,
)
from paras2s_jax.train.sharding import Layouts


def test_the_thinker_is_a_config_away(load_config, tmp_path):
    config = load_config("tiny")
    config.distill.model.family = "qwen2_5_omni"
    made = []

    def variables():
        made.append(make_reward_model(config, tmp_path, Layouts()))
        return made[0][1]

    params = jax.eval_shape(variables)["params"]
    assert isinstance(made[0][0].model, Qwen2_5OmniThinker)
    assert {"layers", "ln_post", "proj"} < set(params["audio_tower"])
    assert outline_reward_model(config) == made[0][0]
    config.distill.model.family = "whisper"
    with pytest.raises(ValueError, match="qwen2_5_omni"):
        make_reward_model(config, tmp_path, Layouts())


def test_a_reward_model_is_loaded_and_scores_wherever_it_lies(tmp_path):
    config = cli.load_config("configs/judge.py:reward").unlock()
    reward_model, folder = outline_reward_model(config), tmp_path / "elsewhere"
    shapes = unbox(reward_model.boxed())
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    save_reward_model(config, reward_model, zeros, folder)
    loaded, variables = load_reward_model(config, tmp_path, Layouts(), folder)
    assert loaded == reward_model
    jax.tree.map(np.testing.assert_array_equal, variables, zeros)
    config.judge.reward.folder = str(folder)
    assert make_scorer(config, tmp_path).name == "reward"
    config.judge.reward.len_buckets_s = (5.0,)
    with pytest.raises(StageError, match=r"len_buckets_s = \(5\.0,\): .* hears 4\.32 s"):
        make_scorer(config, tmp_path)
    config.distill.model.text.hidden_size = 48
    with pytest.raises(StageError, match="no reward model there"):
        load_reward_model(config, tmp_path, Layouts(), tmp_path)
    with pytest.raises(StageError, match=r"of other sizes than config\.distill\.model \(first at"):
        load_reward_model(config, tmp_path, Layouts(), folder)


def test_the_judge_of_the_7b_takes_the_model_of_its_config(load_config):
    judge, trained = load_config("judge", "reward_7b"), load_config("kimi_audio_7b", "v5p-4x4x4")
    assert judge.distill.model == trained.distill.model
    assert judge.judge.reward.len_buckets_s == trained.distill.pair_buckets_s
