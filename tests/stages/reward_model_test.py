"""Which model the reward model's config asks for."""

import jax
import pytest

from paras2s_jax.models.qwen2_5_omni import Qwen2_5OmniThinker
from paras2s_jax.stages.reward_model import make_reward_model, outline_reward_model
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
