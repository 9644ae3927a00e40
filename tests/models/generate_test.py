"""Generated text against transformers' generate, and what ends, padding and drawing do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from paras2s_jax.convert import qwen2
from paras2s_jax.convert.rules import Checkpoint, import_params
from paras2s_jax.models import unrolled
from paras2s_jax.models.generate import generate
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.models.unrolled import decoding_form

ROWS, PROMPT, STEPS, PAD = 3, 7, 64, 0
torch.set_num_threads(1)  # Thousands of tiny operations: threads would only wait.

# Each row has its padding elsewhere; transformers wants it on the left.
LENGTHS = np.array([7, 4, 1])
IDS = np.random.default_rng(0).integers(1, 40, (ROWS, PROMPT)).astype(np.int32)


def _reference(kind: str, **sizes):
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        num_hidden_layers=2, pad_token_id=PAD, bos_token_id=None, eos_token_id=None, **sizes
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # layers that outweigh the embedding, or a tied model repeats its input
        for name, parameter in model.named_parameters():
            scale = 0.4 if "layers" in name else 0.1
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


GROUPED = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "vocab_size": 61,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
TIED = {
    "hidden_size": 20,
    "intermediate_size": 44,
    "vocab_size": 53,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
LLAMA = {
    "hidden_size": 28,
    "intermediate_size": 30,
    "vocab_size": 41,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
MODELS = {"grouped": ("Qwen2", GROUPED), "tied": ("Qwen2", TIED), "llama": ("Llama", LLAMA)}


def _converted(hf, folder):
    hf.save_pretrained(folder)
    model = qwen2.make_model(folder)
    shapes = nn.meta.unbox(jax.eval_shape(lambda: qwen2.init(model, jax.random.key(0))))["params"]
    rules = qwen2.rules(model.config)
    params = import_params(Checkpoint(folder), rules, shapes, ignore=qwen2.IGNORE)
    return model, {"params": params}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    hf = _reference(MODELS["grouped"][0], **MODELS["grouped"][1])
    return hf, *_converted(hf, tmp_path_factory.mktemp("small"))


def _left_padded() -> tuple[np.ndarray, np.ndarray]:
    mask = np.arange(PROMPT) >= PROMPT - LENGTHS[:, None]
    return np.where(mask, IDS, PAD), mask.astype(np.int32)


def _generate_torch(hf, ids, mask, **settings):
    with torch.no_grad():
        out = hf.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=STEPS,
            **settings,
        )
    return out[:, ids.shape[1] :].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    hf = _reference(MODELS[name][0], **MODELS[name][1])
    model, variables = _converted(hf, tmp_path)
    ids, mask = _left_padded()
    want = _generate_torch(hf, ids, mask)
    got = generate(model, variables, input_ids=ids, attention_mask=mask, max_new_tokens=STEPS)
    np.testing.assert_array_equal(got.tokens, want)
    assert len(np.unique(want)) > 8  # not one id over and over
    assert got.lens.tolist() == [STEPS] * ROWS and not got.finished.any()


def test_padding_may_stand_anywhere(small):
    _, model, variables = small
    ids, mask = _left_padded()
    settings = {"max_new_tokens": 12, "eos_token_ids": ()}
    want = generate(model, variables, input_ids=ids, attention_mask=mask, **settings)
    right = np.stack([np.roll(row, n) for row, n in zip(ids, LENGTHS - PROMPT)])
    is_real = np.arange(PROMPT) < LENGTHS[:, None]
    got = generate(model, variables, input_ids=right, attention_mask=is_real, **settings)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.mean_logp, want.mean_logp, atol=1e-5)
    # A row on its own, without any padding and as embeddings.
    alone = jnp.asarray(right[1:2, : LENGTHS[1]])
    embeds = model.apply(variables, alone, method="embed")
    one = generate(model, variables, inputs_embeds=embeds, **settings)
    np.testing.assert_array_equal(one.tokens[0], want.tokens[1])


@pytest.mark.parametrize("group_size", [1, 2])
def test_unrolled_layers_write_the_same(small, monkeypatch, group_size):
    _, model, variables = small
    settings = {"input_ids": IDS, "max_new_tokens": 6, "group_size": group_size}
    want = generate(model, variables, **settings)
    assert decoding_form(model, variables) == (model, variables)  # too small to gain by it
    monkeypatch.setattr(unrolled, "SMALL_BYTES", 0)
    form = decoding_form(model, variables)
    assert form[0].unrolled and decoding_form(*form) == form
    # Brought there in the call (by another model, so that it is traced anew), or before it.
    for made in ((model.clone(scan_unroll=2), variables), form):
        np.testing.assert_array_equal(generate(*made, **settings).tokens, want.tokens)
    monkeypatch.setattr(unrolled, "target", lambda: ("cpu", 8))
    assert not decoding_form(model, variables)[0].unrolled


def test_rows_end_at_their_end_token_and_stay_finished(small):
    hf, model, variables = small
    ids, mask = _left_padded()
    free = _generate_torch(hf, ids, mask)
    # Two ids that end rows at different steps, and leave one open if there is such a pair.
    ends = (int(free[0, 5]), int(free[1, 20]))
    want = _generate_torch(hf, ids, mask, eos_token_id=list(ends), pad_token_id=PAD)
    got = generate(
        model,
        variables,
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=STEPS,
        eos_token_ids=ends,
    )
    lens = []
    for row, tokens in enumerate(want):
        hits = np.flatnonzero(np.isin(tokens, ends))
        lens.append(hits[0] if len(hits) else STEPS)
        np.testing.assert_array_equal(got.tokens[row, : lens[-1]], tokens[: lens[-1]])
        assert not got.tokens[row, lens[-1] :].any()
    assert got.lens.tolist() == lens and len(set(lens)) > 1
    assert got.finished.tolist() == [n < STEPS for n in lens]


def test_mean_logp_is_that_of_the_whole_sequence(small):
    _, model, variables = small
    ids, end = IDS[:1, :5], None
    free = generate(model, variables, input_ids=ids, max_new_tokens=6)
    end = int(free.tokens[0, 4])
    got = generate(model, variables, input_ids=ids, max_new_tokens=6, eos_token_ids=end)
    steps = int(got.lens[0]) + 1  # the end token is scored as well
    assert got.finished[0] and steps <= 5
    whole = np.concatenate([ids, free.tokens[:, :steps]], axis=1)
    logp = jax.nn.log_softmax(jax.jit(model.apply)(variables, whole)[0])
    want = np.mean([logp[0, 4 + i, whole[0, 5 + i]] for i in range(steps)])
    np.testing.assert_allclose(got.mean_logp[0], want, atol=1e-5)


def test_a_group_shares_its_prompt(small):
    _, model, variables = small
    ids, mask = _left_padded()
    settings = {"sampling": Sampling(1.5), "rng": jax.random.key(2), "max_new_tokens": 5}
    got = generate(model, variables, input_ids=ids, attention_mask=mask, group_size=4, **settings)
    each = {"input_ids": np.repeat(ids, 4, 0), "attention_mask": np.repeat(mask, 4, 0)}
    want = generate(model, variables, **each, **settings)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.mean_logp, want.mean_logp, atol=1e-5)
    assert len(np.unique(got.tokens, axis=0)) > ROWS


def test_positions_go_on_from_the_largest(small):
    _, model, variables = small
    positions = np.array([[0, 1, 5, 6, 7]], np.int32)
    ids = IDS[:1, :5]
    got = generate(model, variables, input_ids=ids, position_ids=positions, max_new_tokens=3)
    whole = np.concatenate([ids, got.tokens[:, :2]], axis=1)
    after = np.concatenate([positions, [[8, 9]]], axis=1).astype(np.int32)
    logits, _ = jax.jit(model.apply)(variables, whole, position_ids=after)
    assert jnp.argmax(logits[0, 4:], axis=-1).tolist() == got.tokens[0].tolist()


def test_drawn_tokens_depend_on_the_rng_alone(small):
    _, model, variables = small
    ids = np.tile(IDS[:1], (64, 1))

    def draw(seed, **settings):
        settings = {"sampling": Sampling(1.5), "max_new_tokens": 4} | settings
        out = generate(model, variables, input_ids=ids, rng=jax.random.key(seed), **settings)
        return np.asarray(out.tokens)

    first = draw(0)
    np.testing.assert_array_equal(draw(0), first)
    assert (draw(1) != first).any() and len(np.unique(first[:, 0])) > 4
    greedy = generate(model, variables, input_ids=ids, max_new_tokens=4).tokens
    np.testing.assert_array_equal(draw(0, sampling=Sampling(1.5, top_k=1)), greedy)
    with pytest.raises(ValueError, match="needs an rng"):
        generate(model, variables, input_ids=ids, max_new_tokens=1, sampling=Sampling(1.0))


def test_what_cannot_be_generated_is_refused(small):
    _, model, variables = small
    with pytest.raises(ValueError, match="not both"):
        generate(model, variables, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, variables, input_ids=IDS, max_new_tokens=0)
