"""A transformers Whisper with random weights, and ours with the same; control tokens for both."""

import dataclasses

import jax
import numpy as np
import torch
import transformers
from flax import linen as nn

from paras2s_jax.convert import whisper as table
from paras2s_jax.convert.rules import import_params
from paras2s_jax.models.whisper import WhisperASR, WhisperConfig
from paras2s_jax.models.whisper_ids import WhisperIds

# Distinct sizes, so that a wrong transpose fails. 40 mel frames at most.
CONFIG = WhisperConfig(
    d_model=24,
    encoder_layers=2,
    encoder_attention_heads=3,
    encoder_ffn_dim=40,
    num_mel_bins=10,
    max_source_positions=20,
    vocab_size=50,
    decoder_layers=3,
    decoder_attention_heads=4,
    decoder_ffn_dim=36,
    max_target_positions=16,
    classifier_proj_size=18,
)
# Heads of 7, one layer, wider than its feed-forward; heads of 16, more encoder than decoder.
CONFIGS = (
    CONFIG,
    dataclasses.replace(
        CONFIG,
        d_model=14,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=9,
        num_mel_bins=6,
        max_source_positions=17,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=11,
    ),
    dataclasses.replace(
        CONFIG,
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=20,
        num_mel_bins=13,
        max_source_positions=23,
        decoder_layers=2,
        decoder_attention_heads=8,
        decoder_ffn_dim=44,
    ),
)


def hf_config(config: WhisperConfig, **kwargs) -> transformers.WhisperConfig:
    values = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    values |= dataclasses.asdict(config)
    values |= {"begin_suppress_tokens": None, "suppress_tokens": None}
    return transformers.WhisperConfig(**values | kwargs)


def build(hf_class, config: WhisperConfig, seed: int = 0, **kwargs):
    """A transformers model with weights far from their start: (the model, its tensors)."""
    torch.manual_seed(seed)
    model = hf_class(hf_config(config, **kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, tensors_of(model)


def tensors_of(model) -> dict[str, np.ndarray]:
    return {key: value.numpy().copy() for key, value in model.state_dict().items()}


def convert(model, rules, tensors, *args, ignore=(), **kwargs) -> dict:
    """Variables of ours from tensors of theirs; args, kwargs: what the model is called with."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), *args, **kwargs)
    return {"params": import_params(tensors, rules, nn.unbox(boxed)["params"], ignore=ignore)}


def convert_asr(config: WhisperConfig, tensors) -> tuple[WhisperASR, dict]:
    model = WhisperASR(config)
    features = np.zeros((1, config.num_mel_bins, 8), np.float32)
    ids = {"decoder_input_ids": np.zeros((1, 1), np.int32)}
    variables = convert(
        model, table.asr_rules(config), tensors, features, ignore=table.IGNORE, **ids
    )
    return model, variables


def speaking(config: WhisperConfig, num_words: int, seed: int = 0, **suppressed):
    """A pair that says much, and different things about different sounds.

    num_words: ids below the end token; behind it follow the control tokens in the order of the
    release, and a time for every encoder frame.
    Returns: (theirs, ours, its variables, WhisperIds); config with the vocabulary's size is
    that of ours.
    """
    eos = num_words
    ids = WhisperIds(
        decoder_start_token_id=eos + 1,
        eos_token_id=eos,
        lang_to_id=(("<|en|>", eos + 2), ("<|zh|>", eos + 3), ("<|de|>", eos + 4)),
        task_to_id=(("translate", eos + 5), ("transcribe", eos + 6)),
        no_timestamps_token_id=eos + 10,
        max_initial_timestamp_index=5,
        **suppressed,
    )
    config = dataclasses.replace(config, vocab_size=eos + 12 + config.max_source_positions)
    special = {"pad_token_id": eos, "bos_token_id": eos, "eos_token_id": eos}
    special["decoder_start_token_id"] = eos + 1
    hf, _ = build(transformers.WhisperForConditionalGeneration, config, seed, **special)
    decoder = hf.model.decoder
    with torch.no_grad():
        decoder.embed_tokens.weight.copy_(0.3 * torch.randn_like(decoder.embed_tokens.weight))
        decoder.embed_positions.weight.copy_(4 * torch.randn_like(decoder.embed_positions.weight))
        for layer in decoder.layers:
            layer.encoder_attn.out_proj.weight.mul_(10)
    values = dataclasses.asdict(ids)
    values |= {key: dict(values[key]) for key in ("lang_to_id", "task_to_id")}
    values |= {key: list(values[key]) for key in ("suppress_tokens", "begin_suppress_tokens")}
    hf.generation_config = transformers.GenerationConfig(
        **special | values, is_multilingual=True, return_timestamps=False
    )
    return hf, *convert_asr(config, tensors_of(hf)), ids
