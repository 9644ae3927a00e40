"""Tiny releases of each family, written by the reference libraries."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers


def _moved(model: torch.nn.Module) -> torch.nn.Module:
    """Far from the start, where biases are 0 and norms are 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def qwen2(folder: Path, *, shards: bool = False, **changed) -> torch.nn.Module:
    """Qwen2ForCausalLM; all sizes differ."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    model = _moved(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes | changed)))
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    return model


def whisper(folder: Path) -> torch.nn.Module:
    """WhisperForConditionalGeneration with its feature extractor."""
    config = transformers.WhisperConfig(
        vocab_size=61,
        num_mel_bins=8,
        d_model=24,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=44,
        max_source_positions=20,
        max_target_positions=18,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = _moved(transformers.WhisperForConditionalGeneration(config))
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    return model


RELEASES: dict[str, Callable[..., torch.nn.Module]] = {"qwen2": qwen2, "whisper": whisper}


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """`release(family, **options)` -> (folder, the reference's model); written once, read only."""
    made = {}

    def get(family: str, **options):
        key = (family, json.dumps(options, sort_keys=True))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = (folder, RELEASES[family](folder, **options))
        return made[key]

    return get
