import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from paras2s_jax.judge.interfaces import Failure, Heard
from paras2s_jax.judge.local_score import REPLY_START, LocalScorer
from paras2s_jax.judge.score_prompt import ScorePrompt
from tests.judge.conftest import TEMPLATE

PROMPT = ScorePrompt("t", "Rate.", dict.fromkeys(("emotion", "age"), "Be fair."))


def heard(answer, dimension="emotion"):
    return Heard(dimension, "My dog died.", "sad", answer, "gentle")


def scorer(model, tokenizer, **options):
    return LocalScorer(*model, tokenizer, PROMPT, name="small", **({"batch_size": 2} | options))


def test_score_is_the_mean_digit_of_the_next_token(model, tokenizer):
    item = heard("So sorry.")
    text = tokenizer.apply_chat_template(
        PROMPT.messages(item), tokenize=False, add_generation_prompt=True
    )
    ids = np.array([tokenizer.encode(text + REPLY_START, add_special_tokens=False)], np.int32)
    lm, params = model
    logits = np.asarray(lm.apply({"params": params}, ids)[0][0, -1], np.float64)
    weights = np.exp([logits[tokenizer.convert_tokens_to_ids(str(d))] for d in range(1, 6)])
    expected = float(weights / weights.sum() @ [1, 2, 3, 4, 5])
    ((_, found),) = scorer(model, tokenizer).score([item])
    assert found.score == pytest.approx(expected, abs=1e-4)
    assert sum(found.raw.values()) == pytest.approx(1.0, abs=1e-3)


def test_batches_and_padding_change_nothing(model, tokenizer):
    # Lengths on both sides of a multiple of 128 tokens, in batches of 2 with one row left over.
    items = [heard("x" * n) for n in (3, 90, 20)]
    together = dict(scorer(model, tokenizer).score(items))
    for index, item in enumerate(items):
        ((_, alone),) = scorer(model, tokenizer, batch_size=1).score([item])
        assert together[index].score == pytest.approx(alone.score, abs=1e-5)


def test_a_prompt_that_does_not_fit_is_a_failure_not_cut(model, tokenizer):
    found = dict(scorer(model, tokenizer, max_tokens=400).score([heard("x" * 500), heard("x")]))
    assert isinstance(found[0], Failure) and "more than 400" in found[0].reason
    assert found[1].score > 0


def test_weights_and_prompt_are_in_the_name(model, tokenizer):
    lm, params = model
    first = scorer(model, tokenizer)
    other = scorer((lm, jax.tree.map(lambda x: x + 1, params)), tokenizer)
    assert first.version != other.version and first.version.startswith("promptt-")
    assert first.settings_hash != scorer(model, tokenizer, max_tokens=7).settings_hash


def test_models_that_cannot_be_asked_are_refused(model, tokenizer):
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        scorer(model, plain)
    merged = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, '{"score": ': 1}, unk_token="<unk>")
    )
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=merged, unk_token="<unk>")
    words.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="1 is no token after"):
        scorer(model, words)


def test_no_finite_digits_is_a_failure(model, tokenizer):
    lm, params = model
    broken = jax.tree.map(functools.partial(jnp.full_like, fill_value=jnp.nan), params)
    ((_, found),) = scorer((lm, broken), tokenizer).score([heard("x")])
    assert isinstance(found, Failure) and "no finite" in found.reason
