"""Forward passes against torch: Whisper encoder, Qwen2 decoding, log-mel (fp32, same threads).

Every race uses random weights that both sides share, and compares the answers first.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.models.whisper import modeling_whisper

from paras2s_jax.audio.mel import RATE_HZ, whisper_log_mel
from paras2s_jax.convert import whisper
from paras2s_jax.models.whisper import WhisperEncoder
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.perf.decode import greedy
from paras2s_jax.perf.race import (
    Race,
    RaceError,
    check_equal,
    pin,
    race,
    shared_variables,
    with_lengths,
)
from paras2s_jax.stages.registry import Figures

WHISPER_TINY = WhisperConfig(384, 4, 6, 1536)


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
    variables = shared_variables(
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
    return with_lengths(result, lambda mask: encode(variables, mel, mask), masks[1:], extra)


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
    return with_lengths(result, lambda lens: mel(waves, lens), lens[1:], extra)


RACES = {"whisper_encoder": whisper_encoder, "decode": greedy, "log_mel": log_mel}


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
