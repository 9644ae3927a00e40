"""Scores per second of the reward model: a group's query heard once, against every pair in full."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.align.rewards import RewardModel, ScorePrompt
from paras2s_jax.audio.mel import RATE_HZ
from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.models.qwen2_audio import Qwen2Audio, Qwen2AudioConfig
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.perf.forward import WHISPER_TINY
from paras2s_jax.perf.race import Race, check_equal, pin, race, with_lengths
from paras2s_jax.stages.registry import Figures

TEXT = Qwen2Config(600, 384, 1024, 6, 6, 2)
# As many tokens as the template of align.rewards and its tokenizer make; which does not matter.
PROMPT = ScorePrompt((1, 2, 3), (4, 5, 6, 7), (8, 9, 10), tuple(range(20, 25)), (), ())


@dataclasses.dataclass(frozen=True)
class Work:
    """prompts: P, group: G; query_s, answer_s: the paper's 160 prompt positions, and 15 s."""

    audio: WhisperConfig = WHISPER_TINY
    text: Qwen2Config = TEXT
    prompts: int = 1
    group: int = 8
    query_s: float = 12.8
    answer_s: float = 15.0


def measure(work: Work, repeats: int = 5) -> Race:
    """Races `RewardModel` on whole groups against itself on pairs, once their logits agree."""
    model = Qwen2Audio(Qwen2AudioConfig(work.audio, work.text, work.text.vocab_size - 1))
    judge = RewardModel(model, PROMPT)
    variables = judge.init(jax.random.key(0))
    rng = np.random.default_rng(0)

    def noise(*shape, seconds):
        waves = rng.normal(size=(*shape, int(seconds * RATE_HZ)), scale=0.1)
        return jnp.asarray(waves, jnp.float32), np.full(shape, waves.shape[-1], np.int32)

    queries, query_lens = noise(work.prompts, seconds=work.query_s)
    answers, answer_lens = noise(work.prompts, work.group, seconds=work.answer_s)
    score = jax.jit(lambda *args: judge.readings(*args).score[..., jnp.array(PROMPT.digit_ids)])

    def grouped(answer_lens=answer_lens):
        return score(variables, queries, query_lens, answers, answer_lens)

    pairs = (
        jnp.repeat(queries, work.group, axis=0),
        jnp.repeat(query_lens, work.group, axis=0),
        answers.reshape(-1, 1, answers.shape[-1]),
        answer_lens.reshape(-1, 1),
    )

    def pairwise():
        return score(variables, *pairs)

    difference = check_equal("reward", grouped().reshape(-1), pairwise().reshape(-1), 1e-3)
    result = race("reward", grouped, pairwise, repeats=repeats)
    scores = work.prompts * work.group
    extra = {
        "scores_per_s": scores / min(result.ours_s),
        "pairwise_scores_per_s": scores / min(result.theirs_s),
        "max_difference": difference,
    }
    return with_lengths(result, grouped, [answer_lens // share for share in (2, 3)], extra)


def run(prompts: int = 1, group: int = 8, threads: int = 1) -> Figures:
    """Races groups against pairs.

    Returns: figures "reward/ratio", "reward/scores_per_s" and others.
    """
    pin(threads)
    work = Work(prompts=prompts, group=group)
    result = measure(work)
    figures = result.figures()
    print(
        f"{prompts} queries of {work.query_s} s, {group} answers of {work.answer_s} s to each: "
        f"{result.ratio:.2f} times the speed of pairs, {figures['reward/scores_per_s']:.2f} "
        f"scores/s against {figures['reward/pairwise_scores_per_s']:.2f}",
        flush=True,
    )
    return figures
