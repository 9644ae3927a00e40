"""Checkpoints of Qwen2 and Llama: released sizes, and files that come back bit by bit."""

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from paras2s_jax.convert import qwen2
from paras2s_jax.convert.rules import (
    Checkpoint,
    check_shapes,
    export_params,
    import_params,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# hidden, intermediate, layers, heads, key heads, vocabulary, tied, number of parameters: the
# models' config.json, and the counts that their model cards round (0.49B, 7.61B, 14.7B, 32.5B).
RELEASED = {
    "Qwen2.5-0.5B-Instruct": (896, 4864, 24, 14, 2, 151_936, True, 494_032_768),
    "Qwen2.5-7B-Instruct": (3584, 18_944, 28, 28, 4, 152_064, False, 7_615_616_512),
    "Qwen2.5-14B-Instruct": (5120, 13_824, 48, 40, 8, 152_064, False, 14_770_033_664),
    "Qwen2.5-32B-Instruct": (5120, 27_648, 64, 40, 8, 152_064, False, 32_763_876_352),
    "Llama-3.1-8B-Instruct": (4096, 14_336, 32, 32, 8, 128_256, False, 8_030_261_248),
}
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}


def _reference(kind: str, **settings):
    config = getattr(transformers, f"{kind}Config")(**settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def _expected(model):
    shapes = jax.eval_shape(lambda: qwen2.init(model, jax.random.key(0)))
    return nn.meta.unbox(shapes)["params"]


@pytest.mark.parametrize("name", RELEASED)
def test_released_size(name, tmp_path):
    hidden, inner, layers, heads, kv_heads, vocab, tied, count = RELEASED[name]
    kind = name.split("-")[0].rstrip("0123456789.")
    rope = LLAMA3 if kind == "Llama" else {"rope_type": "default", "rope_theta": 1_000_000.0}
    with torch.device("meta"):
        hf = _reference(
            "Qwen2" if kind == "Qwen" else kind,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocab,
            tie_word_embeddings=tied,
            rope_parameters=rope,
        )
    hf.config.save_pretrained(tmp_path)
    model = qwen2.make_model(tmp_path)
    shapes = {key: tuple(value.shape) for key, value in hf.state_dict().items()}
    expected = _expected(model)
    check_shapes(shapes, qwen2.rules(model.config), expected, ignore=qwen2.IGNORE, name=name)
    assert sum(leaf.size for leaf in jax.tree.leaves(expected)) == count


@pytest.mark.parametrize(
    ("kind", "settings", "dtype"),
    [
        ("Qwen2", {"tie_word_embeddings": True}, torch.float32),
        ("Qwen2", {"tie_word_embeddings": False}, torch.bfloat16),
        ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}, torch.bfloat16),
    ],
)
def test_import_and_export_give_back_every_bit(tmp_path, kind, settings, dtype):
    torch.manual_seed(0)
    _reference(kind, **SMALL, **settings).to(dtype).save_pretrained(tmp_path)
    model, tensors = qwen2.make_model(tmp_path), Checkpoint(tmp_path)
    kept = np.float32 if dtype == torch.float32 else ml_dtypes.bfloat16
    rules = qwen2.rules(model.config)
    params = import_params(tensors, rules, _expected(model), ignore=qwen2.IGNORE, dtype=kept)
    back = export_params(params, rules)
    assert set(back) == set(tensors)
    for key, value in back.items():
        assert value.dtype == tensors[key].dtype
        np.testing.assert_array_equal(value.view(np.uint8), tensors[key].view(np.uint8), key)


def test_tokenizer_comes_from_the_folder(tmp_path):
    assert qwen2.load_processor(tmp_path) is None
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert qwen2.load_processor(tmp_path)("b a c")["input_ids"] == [1, 0, 2]
