"""The distilled reward model as a scorer of the judge: two waveforms -> a score of 1..5.

It reads no transcript, so that words in an answer cannot speak to it as to a language model; what
is said aloud still sounds, and how far that leads it is measured (`judge.attack`). It gives no
reason and no parts, agrees with the judge that taught it only on speech like that of its training,
and hears nothing that this judge did not.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from paras2s_jax.align.rewards import RewardModel
from paras2s_jax.audio.mel import HOP
from paras2s_jax.audio.wave import RATE_HZ
from paras2s_jax.judge.buckets import Buckets
from paras2s_jax.judge.interfaces import Failure, Score, Sounds
from paras2s_jax.judge.ledger import digest, params_digest
from paras2s_jax.judge.waves import load_or_failure
from paras2s_jax.models.qwen2_audio import Qwen2Audio

NAME = "reward"
# Mel frames per position of the tower.
CONV_STRIDE = 2
# Batches whose waves are in memory at once, and whose scores are lost when a run is cut off.
BATCHES_AT_ONCE = 4


class RewardScorer:
    """Expected scores of (query, answer), batched and jitted.

    Args:
        reward_model, variables: after distillation.
        len_buckets_s: lengths that both waves of a pair are padded to; a pair with a longer wave
            is a failure, not cut: the end of an answer may be what is wrong with it.
        batch_size: pairs per call.

    Raises:
        ValueError: a length is beyond what the model hears.
    """

    name = NAME

    def __init__(
        self,
        reward_model: RewardModel,
        variables: Mapping[str, Any],
        *,
        len_buckets_s: Sequence[float],
        batch_size: int = 32,
    ):
        model = reward_model.model
        # Other families hear in windows, as many as there are.
        if type(model) is Qwen2Audio:
            limit_s = CONV_STRIDE * model.config.audio.max_source_positions * HOP / RATE_HZ
            if max(len_buckets_s) > limit_s:
                raise ValueError(
                    f"the reward model hears {limit_s:.2f} s, not {max(len_buckets_s):g} s"
                )
        self._variables, self._batch_size = variables, batch_size
        self._buckets = Buckets(len_buckets_s, batch_size)
        prompt = reward_model.prompt
        self.version = params_digest(variables)[:12]
        self.settings_hash = digest([prompt.before, prompt.between, prompt.after, prompt.digit_ids])

        @jax.jit
        def scores(variables, query, query_len, answer, answer_len):
            answers = answer[:, None], answer_len[:, None]
            return reward_model.score(variables, query, query_len, *answers)[:, 0]

        self._scores = scores

    def score_waves(
        self, pairs: Sequence[Sounds], repeat: int = 0
    ) -> Iterator[tuple[int, Score | Failure]]:
        """(index, answer) of every pair; repeats are equal."""
        del repeat
        step = self._batch_size * BATCHES_AT_ONCE
        for start in range(0, len(pairs), step):
            yield from self._score(start, pairs[start : start + step])

    def _score(self, start: int, pairs: Sequence[Sounds]) -> Iterator[tuple[int, Score | Failure]]:
        """Of the pairs from number `start` on."""
        fit: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for index, pair in enumerate(pairs, start=start):
            waves = [
                load_or_failure(path, self._buckets.max_dur_s)
                for path in (pair.query_wav, pair.answer_wav)
            ]
            failure = next((wave for wave in waves if isinstance(wave, Failure)), None)
            if failure is not None:
                yield index, failure
            else:
                fit[index] = (waves[0], waves[1])
        if not fit:
            return
        queries, answers = zip(*fit.values())
        found = self._buckets.run(
            lambda *batch: self._scores(self._variables, *batch), queries, answers
        )
        for index, score in zip(fit, found, strict=True):
            if np.isfinite(score):
                yield index, Score(float(score), None, None, "heard in both waveforms")
            else:
                yield index, Failure("the reward model's score is not finite; distill it again")
