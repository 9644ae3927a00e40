import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.models.placement import unbox
from paras2s_jax.models.qwen2 import Qwen2Config, Qwen2LM
from paras2s_jax.models.whisper_layers import WhisperConfig

# A "word" is a steady sound of its own frequency.
WORDS_HZ = {"low": 300.0, "high": 1900.0}


def sound(words: str, dur_s: float = 0.16, level: float = 0.3) -> np.ndarray:
    """float32[L]: the words, one after the other, with short gaps."""
    time_s = np.arange(round(dur_s * wave_lib.RATE_HZ)) / wave_lib.RATE_HZ
    gap = np.zeros(round(0.04 * wave_lib.RATE_HZ))
    parts = [np.sin(2 * np.pi * WORDS_HZ[word] * time_s) for word in words.split()]
    return level * np.concatenate([x for part in parts for x in (gap, part)]).astype(np.float32)


@pytest.fixture(scope="session")
def tiny_whisper() -> WhisperConfig:
    return WhisperConfig(
        d_model=24,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=20,
        max_source_positions=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_target_positions=32,
        classifier_proj_size=16,
    )


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def model(tokenizer):
    lm = Qwen2LM(Qwen2Config(len(tokenizer), 16, 24, 2, 2, 1))
    init = jax.jit(lm.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    # Large enough for the digits to differ.
    return lm, jax.tree.map(lambda x: 4.0 * x if x.ndim > 1 else x, unbox(init)["params"])
