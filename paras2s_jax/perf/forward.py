"""Forward passes against torch: Whisper encoder, Qwen2 decoding, log-mel (fp32, same threads).

Every race uses random weights that both sides share, and compares the answers first.
"""

import dataclasses
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.models.whisper import modeling_whisper

from paras2s_jax.audio.mel import RATE_HZ, whisper_log_mel
from paras2s_jax.convert import qwen2, whisper
from paras2s_jax.convert.rules import import_params
from paras2s_jax.models.generate import generate
from paras2s_jax.models.qwen2 import Qwen2Config, Qwen2LM
from paras2s_jax.models.unrolled import decoding_form
from paras2s_jax.models.whisper import WhisperEncoder
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.perf.race import Race, RaceError, check_equal, compilations, pin, race
from paras2s_jax.stages.registry import Figures

WHISPER_TINY = WhisperConfig(384, 4, 6, 1536)
QWEN2_47M = Qwen2Config(16_384, 512, 1536, 10, 8, 2)


def _shared(module, tensors: torch.nn.Module, rules, init: Callable[[], dict]) -> dict:
    """The torch module's weights as variables of ours."""
    shapes = nn.meta.unbox(jax.eval_shape(init))["params"]
    state = {key: value.numpy() for key, value in tensors.state_dict().items()}
    params = import_params(state, rules, shapes, name=type(module).__name__)
    return {"params": jax.tree.map(jnp.asarray, params)}


def _complete(result: Race, call: Callable, lengths: Iterable, extra: dict[str, float]) -> Race:
    """Adds figures, and the programs compiled by calls with other lengths of the same shape."""
    with compilations() as compiled:
        for length in lengths:
            jax.block_until_ready(call(length))
    return dataclasses.replace(result, compiled=result.compiled + len(compiled), extra=extra)


def whisper_encoder(config: WhisperConfig = WHISPER_TINY, rows: int = 1, repeats: int = 9) -> Race:
    """Whisper-tiny's encoder on 30 s of mel, against transformers' with sdpa attention."""
    frames = 2 * config.max_source_positions
    torch.manual_seed(0)
    settings = transformers.WhisperConfig(
        d_model=config.d_model,
        encoder_layers=config.encoder_layers,
        encoder_attention_heads=config.encoder_attention_heads,
        encoder_ffn_dim=config.encoder_ffn_dim,
        num_mel_bins=config.num_mel_bins,
        max_source_positions=config.max_source_positions,
        attn_implementation="sdpa",
    )
    reference = modeling_whisper.WhisperEncoder(settings).eval()
    model = WhisperEncoder(config)
    mel = np.random.default_rng(0).normal(size=(rows, frames, config.num_mel_bins))
    mel = jnp.asarray(mel, jnp.float32)
    variables = _shared(
        model,
        reference,
        whisper.encoder_rules(config, prefix=""),
        lambda: model.init(jax.random.key(0), mel),
    )
    features = torch.tensor(np.asarray(mel)).transpose(1, 2).contiguous()
    encode = jax.jit(lambda v, mel, mask: model.apply(v, mel, mask)[0])

    def ours():
        return encode(variables, mel, None)

    @torch.no_grad()
    def theirs():
        return reference(features).last_hidden_state.numpy()

    difference = check_equal("whisper_encoder", ours(), theirs(), 1e-3)
    masks = [jnp.arange(frames) < n for n in (frames, frames - 7, frames // 2, 11)]
    masks = [jnp.tile(mask, (rows, 1)) for mask in masks]
    jax.block_until_ready(encode(variables, mel, masks[0]))
    result = race("whisper_encoder", ours, theirs, repeats=repeats)
    extra = {"max_difference": difference}
    return _complete(result, lambda mask: encode(variables, mel, mask), masks[1:], extra)


def decode(
    config: Qwen2Config = QWEN2_47M,
    rows: int = 8,
    prompt: int = 32,
    steps: int = 128,
    repeats: int = 5,
) -> Race:
    """Greedy tokens of a 47M Qwen2 after short prompts, against transformers' generate."""
    torch.manual_seed(0)
    settings = transformers.Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    reference = transformers.Qwen2ForCausalLM(settings).eval()
    model = Qwen2LM(config)
    variables = _shared(
        model, reference, qwen2.rules(config), lambda: qwen2.init(model, jax.random.key(0))
    )
    model, variables = decoding_form(model, variables)
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (rows, prompt)).astype(np.int32)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape)}

    def answer(mask):
        return generate(
            model, variables, input_ids=ids, attention_mask=mask, max_new_tokens=steps
        ).tokens

    def ours():
        return answer(np.ones(ids.shape, bool))

    @torch.no_grad()
    def theirs():
        out = reference.generate(**inputs, do_sample=False, max_new_tokens=steps)
        return out[:, prompt:].numpy()

    check_equal("decode", ours(), theirs(), 0.0)
    lengths = [np.arange(prompt) >= prompt - n for n in (prompt - 1, prompt // 2, 1)]
    lengths = [np.tile(mask, (rows, 1)) for mask in lengths]
    result = race("decode", ours, theirs, repeats=repeats)
    extra = {"tokens_per_s": rows * steps / min(result.ours_s)}
    return _complete(result, answer, lengths, extra)


def log_mel(n_mels: int = 80, rows: int = 8, seconds: int = 30, repeats: int = 9) -> Race:
    """Whisper's log-mel of noise, against transformers' feature extractor (torch and numpy)."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=n_mels)
    waves = np.random.default_rng(0).normal(size=(rows, seconds * RATE_HZ), scale=0.1)
    waves = waves.astype(np.float32)
    mel = jax.jit(lambda waves, lens: whisper_log_mel(waves, lens, n_mels)[0])

    def ours():
        return mel(waves, None)

    def theirs():
        return extractor._torch_extract_fbank_features(waves)

    def theirs_numpy():
        return extractor._np_extract_fbank_features(waves, "cpu")

    answer = np.swapaxes(ours(), 1, 2)
    difference = check_equal("log_mel", answer, theirs(), 1e-4)
    check_equal("log_mel (numpy)", answer, theirs_numpy(), 1e-4)
    size = waves.shape[1]
    lens = [np.full(rows, n, np.int32) for n in (size, size - 1, size // 3, 800)]
    jax.block_until_ready(mel(waves, lens[0]))
    result = race("log_mel", ours, theirs, repeats=repeats)
    numpy_race = race("log_mel", ours, theirs_numpy, repeats=max(2, repeats // 3), warmup=1)
    rate = rows * seconds / min(result.ours_s)
    extra = {"numpy_ratio": numpy_race.ratio, "audio_s_per_s": rate, "max_difference": difference}
    return _complete(result, lambda lens: mel(waves, lens), lens[1:], extra)


RACES = {"whisper_encoder": whisper_encoder, "decode": decode, "log_mel": log_mel}


def run(races: str = ",".join(RACES), threads: int = 1) -> Figures:
    """Runs the named races (commas between) on `threads` cores and prints a line for each.

    Returns: figures "forward/<race>/ratio" (our speed in units of the reference's) and others.
    """
    names = races.split(",")
    unknown = sorted(set(names) - set(RACES))
    if unknown:
        raise RaceError(f"there is no race {', '.join(unknown)}; there are {', '.join(RACES)}")
    pin(threads)
    figures = {}
    for name in names:
        result = RACES[name]()
        made = result.figures()
        print(
            f"{name}: {result.ratio:.2f} times the reference's speed (fastest calls "
            f"{result.best_ratio:.2f}, in processor time {result.cpu_ratio:.2f}), "
            f"{made[f'{name}/ours_ms']:.1f} ms against {made[f'{name}/theirs_ms']:.1f} ms, "
            f"{result.compiled} recompilations, load {result.load[0]:.1f} to {result.load[1]:.1f}",
            flush=True,
        )
        figures |= {f"forward/{key}": value for key, value in made.items()}
    return figures
