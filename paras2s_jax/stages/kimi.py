"""Kimi-Audio assembled from a folder in the released layout: speech in, speech and text out.

The folder is moonshotai/Kimi-Audio-7B-Instruct with THUDM/glm-4-voice-tokenizer inside it, as
`paras2s convert` has made it readable without torch:
    config.json, weights          the language model
    tiktoken.model                its text vocabulary
    whisper-large-v3/             a Whisper, whose encoder gives the continuous features
    glm-4-voice-tokenizer/        the speech tokenizer
    audio_detokenizer/ vocoder/   speech codes -> mel -> wave
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from paras2s_jax.align.policy import Frontend, SpeechPolicy, texts_of
from paras2s_jax.convert import families
from paras2s_jax.convert.kimi_audio import DETOKENIZER, SPEECH_TOKENIZER, VOCODER, WHISPER
from paras2s_jax.convert.pretrained import load_variables
from paras2s_jax.convert.torch_files import SUFFIXES
from paras2s_jax.data.tiktoken_vocabulary import TiktokenVocabulary
from paras2s_jax.models import decode
from paras2s_jax.models.bigvgan import BigVGAN, BigVGANConfig
from paras2s_jax.models.decode import Rollout
from paras2s_jax.models.detokenizer import FlowMatchingDetokenizer
from paras2s_jax.models.flow_matching import FlowMatchingConfig, FlowMatchingDiT
from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig
from paras2s_jax.models.placement import Rules
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.models.speech_tokenizer import (
    SpeechTokenizerConfig,
    WhisperVQEncoder,
    WhisperVQTokenizer,
)
from paras2s_jax.models.whisper import STACK, WhisperASR, WhisperEncoder
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.stages.registry import StageError

_IN_RELEASE = "it comes with moonshotai/Kimi-Audio-7B-Instruct"
SOURCES = {
    WHISPER: _IN_RELEASE,
    DETOKENIZER: _IN_RELEASE,
    VOCODER: _IN_RELEASE,
    SPEECH_TOKENIZER: "download THUDM/glm-4-voice-tokenizer into it, then convert the whole",
}
# Prompt and answer together: 12.5 Hz * 120 s (MoonshotAI/Kimi-Audio 2607d51, kimia.py: generate).
MAX_TOKENS = 1500


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The configs of all networks of a Kimi-Audio."""

    model: KimiAudioConfig
    whisper: WhisperConfig
    speech_tokenizer: SpeechTokenizerConfig
    dit: FlowMatchingConfig
    vocoder: BigVGANConfig

    @classmethod
    def of(cls, folder: Path) -> Sizes:
        """Reads every part's config.

        Raises:
            StageError: a part is missing, or is something else.
            ConversionError: a config cannot be read.
        """
        _check_parts(folder)
        kinds = {
            "model": (folder, KimiAudio),
            "whisper": (folder / WHISPER, WhisperASR),
            "speech_tokenizer": (folder / SPEECH_TOKENIZER, WhisperVQEncoder),
            "dit": (folder / DETOKENIZER, FlowMatchingDiT),
            "vocoder": (folder / VOCODER, BigVGAN),
        }
        return cls(**{name: _config_of(*place) for name, place in kinds.items()})


# Kimi-Audio-7B-Instruct and its parts, as the fixtures of the tests report them: enough to plan a
# run without its weights. What changes no shape (the vocoder's dilations, fmin) is BigVGAN's own.
RELEASED = Sizes(
    model=KimiAudioConfig(),
    whisper=WhisperConfig(
        1280,
        32,
        20,
        5120,
        num_mel_bins=128,
        vocab_size=51_866,
        decoder_layers=32,
        decoder_attention_heads=20,
        decoder_ffn_dim=5120,
    ),
    speech_tokenizer=SpeechTokenizerConfig(
        d_model=1280,
        encoder_attention_heads=20,
        encoder_ffn_dim=5120,
        quantize_position=16,
        quantize_vocab_size=16_384,
        quantize_causal_block_size=200,
    ),
    dit=FlowMatchingConfig(
        hidden_size=2304,
        depth=16,
        num_heads=18,
        semantic_vocab_size=16_384,
        normalize_mel=True,
        mel_mean=-4.479605,
        mel_std=3.4584913,
    ),
    vocoder=BigVGANConfig(
        upsample_rates=(5, 2, 2, 2, 2, 3, 2),
        upsample_kernel_sizes=(9, 4, 4, 4, 4, 5, 4),
        upsample_initial_channel=2048,
        resblock_kernel_sizes=(3, 5, 7, 11),
        resblock_dilation_sizes=((1, 3, 5),) * 4,
        num_mels=80,
        sampling_rate=24_000,
        hop_size=480,
        n_fft=1024,
        win_size=1024,
    ),
)


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """The networks around the language model, without weights.

    dtype: in which all but the speech tokenizer compute, float32 there as in the release.
    detokenizer: settings of FlowMatchingDetokenizer.
    """

    sizes: Sizes
    dtype: Any
    detokenizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def encoder(self) -> WhisperEncoder:
        """Of the continuous features."""
        return WhisperEncoder(self.sizes.whisper, **self._types)

    @property
    def _types(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.dtype}

    def outline(self) -> Frontend:
        """The front end without arrays: what SpeechPolicy.boxed_frontend tells the shapes of."""
        vocoder = BigVGAN(self.sizes.vocoder, folded=True, **self._types)
        return self._frontend(None, None, None, vocoder, None)

    def load(self, folder: Path, mesh: Mesh | None, rules: Rules | None) -> Frontend:
        """Reads the weights, each straight into its shards.

        Raises:
            ConversionError: a part's files are broken.
        """

        def read(name: str, model):
            return load_variables(folder / name, model, mesh=mesh, rules=rules)["params"]

        vocoder = BigVGAN(self.sizes.vocoder, **self._types)
        return self._frontend(
            {"params": read(WHISPER, WhisperASR(self.sizes.whisper, **self._types))["encoder"]},
            {"params": read(SPEECH_TOKENIZER, WhisperVQEncoder(self.sizes.speech_tokenizer))},
            read(DETOKENIZER, FlowMatchingDiT(self.sizes.dit, **self._types)),
            vocoder,
            read(VOCODER, vocoder),
        )

    def _frontend(self, encoder, tokenizer, dit, vocoder, vocoder_params) -> Frontend:
        return Frontend(
            encoder=encoder,
            speech_tokenizer=WhisperVQTokenizer(
                tokenizer, WhisperVQEncoder(self.sizes.speech_tokenizer)
            ),
            detokenizer=FlowMatchingDetokenizer.from_models(
                FlowMatchingDiT(self.sizes.dit, **self._types),
                dit,
                vocoder,
                vocoder_params,
                **self.detokenizer,
            ),
        )


@dataclasses.dataclass(frozen=True)
class KimiSystem:
    """A Kimi-Audio with all its parts."""

    policy: SpeechPolicy
    variables: dict
    frontend: Frontend
    tokenizer: TiktokenVocabulary

    @property
    def rate_hz(self) -> int:
        """Of the answers."""
        return self.frontend.detokenizer.rate_hz

    def respond_batch(
        self, waves: np.ndarray, lens: np.ndarray, rng: jax.Array
    ) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
        """One answer per query, as `bench.systems.PolicySystem` wants it; compiled once per L.

        waves: float32[B, L] at 16 kHz; lens: int32[B].
        Returns: (waves float32[B, L'] at rate_hz, lens int32[B], B texts, finished bool[B]).
        """
        rollout, waves, lens = answer(self.policy, self.variables, self.frontend, waves, lens, rng)
        texts = [group[0] for group in texts_of(self.policy, rollout, self.tokenizer)]
        return np.asarray(waves), np.asarray(lens), texts, np.asarray(rollout.finished[:, 0])


@functools.partial(jax.jit, static_argnames="policy")
def answer(
    policy: SpeechPolicy, variables, frontend: Frontend, waves, lens, rng
) -> tuple[Rollout, jax.Array, jax.Array]:
    """As policy.respond for a group of one, the waves at the detokenizer's own rate.

    An answer has at most the steps that MAX_TOKENS leaves of the padded prompt.
    """
    draw_rng, wave_rng = jax.random.split(rng)
    prompt = policy.prompt(frontend, waves, lens)
    # The assistant's start, the first input of the answer, counts as part of the prompt.
    limit = MAX_TOKENS - prompt.mask.shape[1] - 1
    policy = dataclasses.replace(policy, max_steps=min(policy.max_steps, limit))
    rollout = policy.rollout(variables, prompt, draw_rng, group_size=1)
    codes, len_codes = decode.codes_of(policy.model.config, rollout)
    return rollout, *frontend.detokenizer.decode(codes[:, 0], len_codes[:, 0], wave_rng)


def assemble(
    folder: Path,
    *,
    text: Sampling,
    audio: Sampling,
    max_steps: int = MAX_TOKENS,
    dtype: str = "bfloat16",
) -> KimiSystem:
    """Loads every part of a Kimi-Audio, for answering: adapters are folded in.

    dtype: in which all but the speech tokenizer compute.

    Raises:
        StageError: a part is missing, is something else, or does not fit the others.
        ConversionError: a part's files are broken.
        VocabularyError: the vocabulary is.
    """
    folder, dtype = Path(folder), jnp.dtype(dtype)
    sizes, tokenizer = parts_of(folder)
    around = Surroundings(sizes, dtype)
    policy = SpeechPolicy(
        model=KimiAudio(sizes.model, dtype=dtype, param_dtype=dtype),
        encoder=around.encoder,
        max_steps=max_steps,
        text=text,
        audio=audio,
        pieces_of_30_s=True,
    )
    variables = load_variables(folder, policy.model)
    return KimiSystem(policy, variables, around.load(folder, None, None), tokenizer)


def parts_of(folder: Path) -> tuple[Sizes, TiktokenVocabulary]:
    """Sizes and vocabulary of a Kimi-Audio, found to fit together.

    Raises:
        StageError: a part is missing, is something else, or does not fit the others.
        ConversionError: a config cannot be read.
        VocabularyError: the vocabulary is broken.
    """
    sizes, tokenizer = Sizes.of(folder), TiktokenVocabulary.load(folder)
    check_fit(folder, sizes, tokenizer)
    return sizes, tokenizer


def _check_parts(folder: Path) -> None:
    if not folder.is_dir():
        raise StageError(f"{folder}: no such folder; give that of a converted Kimi-Audio.")
    for name, source in SOURCES.items():
        part = folder / name
        if not part.is_dir():
            raise StageError(f"{folder} has no {name}/: {source}.")
        if any(path.suffix in SUFFIXES for path in part.iterdir()):
            raise StageError(
                f"{part} holds torch files: convert the whole first "
                f"(paras2s convert --from={folder} --to=DIR)."
            )


def _config_of(folder: Path, kind: type) -> Any:
    """The config of a part, when another family's checkpoint may lie there by mistake."""
    model = families.make_model(families.family_of(folder), folder)
    if not isinstance(model, kind):
        raise StageError(f"{folder} holds a {type(model).__name__}, not a {kind.__name__}.")
    return model.config


def check_fit(folder: Path, sizes: Sizes, tokenizer: TiktokenVocabulary) -> None:
    """Sizes and ids on which the parts must agree."""
    config = sizes.model
    pairs = {
        f"blank tokens of the model and of {folder}'s vocabulary": (
            config.special.kimia_text_blank,
            tokenizer.special_tokens.get("<|im_kimia_text_blank|>"),
        ),
        f"codes of the model and of {SPEECH_TOKENIZER}": (
            config.num_codes,
            sizes.speech_tokenizer.quantize_vocab_size,
        ),
        f"codes of the model and of {DETOKENIZER}": (
            config.num_codes,
            sizes.dit.semantic_vocab_size,
        ),
        f"feature sizes of the model and of {WHISPER}": (
            config.kimia_adaptor_input_dim,
            STACK * sizes.whisper.d_model,
        ),
    }
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise StageError(f"{folder}: {what} differ ({ours} and {theirs}); take one release.")
