"""Groups against pairs on a reward model so small that speed means nothing."""

import pytest

from paras2s_jax.align.rewards import RewardModel
from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.perf import reward
from paras2s_jax.perf.race import RaceError

SMALL = reward.Work(
    WhisperConfig(12, 1, 3, 20, num_mel_bins=5, max_source_positions=24),
    Qwen2Config(31, 16, 20, 1, 4, 2),
    prompts=2,
    group=3,
    query_s=0.2,
    answer_s=0.3,
)


def test_groups_and_pairs_agree():
    figures = reward.measure(SMALL, repeats=1).figures()
    assert figures["reward/ratio"] > 0 and figures["reward/recompilations"] == 0
    assert figures["reward/scores_per_s"] > 0 and figures["reward/pairwise_scores_per_s"] > 0


def test_scores_that_differ_are_refused(monkeypatch):
    readings = RewardModel.readings

    def of_other_answers(self, variables, *args):
        made = readings(self, variables, *args)
        return made._replace(score=made.score + args[-1].shape[-1])

    monkeypatch.setattr(RewardModel, "readings", of_other_answers)
    with pytest.raises(RaceError, match="reward: answers differ"):
        reward.measure(SMALL, repeats=1)
