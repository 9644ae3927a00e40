"""The programs of a step: what moves, what they are lowered with, what they give."""

import jax

from paras2s_jax.align import phases
from paras2s_jax.models.codec import PATCH_SAMPLES


def test_respond_batch_gives_what_a_bench_wants(tiny, queries):
    respond = phases.make_respond_batch(tiny.policy, tiny.variables, tiny.frontend, tiny.tokenizer)
    waves, lens, texts, finished = respond(
        queries["query"][:2], queries["query_len"][:2], jax.random.key(0)
    )
    assert waves.shape == (2, tiny.policy.max_steps * PATCH_SAMPLES)
    assert lens.shape == (2,) and finished.dtype == bool
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
