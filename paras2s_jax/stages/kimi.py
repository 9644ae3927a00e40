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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.align.policy import Frontend, SpeechPolicy, texts_of
from paras2s_jax.convert import from_pretrained
from paras2s_jax.convert.kimi_audio import DETOKENIZER, SPEECH_TOKENIZER, VOCODER, WHISPER
from paras2s_jax.convert.torch_files import SUFFIXES
from paras2s_jax.data.tiktoken_vocabulary import TiktokenVocabulary
from paras2s_jax.models import decode
from paras2s_jax.models.decode import Rollout
from paras2s_jax.models.detokenizer import FlowMatchingDetokenizer
from paras2s_jax.models.kimi_audio import KimiAudio
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.models.speech_tokenizer import WhisperVQEncoder, WhisperVQTokenizer
from paras2s_jax.models.whisper import STACK, WhisperASR, WhisperEncoder
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
    """Loads every part of a Kimi-Audio.

    dtype: in which all but the speech tokenizer compute, float32 there as in the release.

    Raises:
        StageError: a part is missing, is something else, or does not fit the others.
        ConversionError: a part's files are broken.
        VocabularyError: the vocabulary is.
    """
    folder = Path(folder)
    _check_parts(folder)
    tokenizer, dtype = TiktokenVocabulary.load(folder), jnp.dtype(dtype)
    model, params, _ = _load(folder, KimiAudio, dtype)
    whisper, whisper_params, _ = _load(folder / WHISPER, WhisperASR, dtype)
    vq, vq_params, _ = _load(folder / SPEECH_TOKENIZER, WhisperVQEncoder, jnp.float32)
    dit, dit_params, _ = from_pretrained(folder / DETOKENIZER, dtype=dtype)
    vocoder, vocoder_params, _ = from_pretrained(folder / VOCODER, dtype=dtype)
    encoder = WhisperEncoder(whisper.config, dtype=dtype, param_dtype=dtype)
    frontend = Frontend(
        encoder={"params": whisper_params["encoder"]},
        speech_tokenizer=WhisperVQTokenizer({"params": vq_params}, vq),
        detokenizer=FlowMatchingDetokenizer.from_models(dit, dit_params, vocoder, vocoder_params),
    )
    policy = SpeechPolicy(
        model=model,
        encoder=encoder,
        max_steps=max_steps,
        text=text,
        audio=audio,
        pieces_of_30_s=True,
    )
    made = KimiSystem(policy, {"params": params}, frontend, tokenizer)
    _check_fit(folder, made)
    return made


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


def _load(folder: Path, kind: type, dtype):
    """from_pretrained, when another family's checkpoint may lie there by mistake."""
    model, params, processor = from_pretrained(folder, dtype=dtype)
    if not isinstance(model, kind):
        raise StageError(f"{folder} holds a {type(model).__name__}, not a {kind.__name__}.")
    return model, params, processor


def _check_fit(folder: Path, made: KimiSystem) -> None:
    """Sizes and ids on which the parts must agree."""
    config, encoder = made.policy.model.config, made.policy.encoder.config
    blank = made.tokenizer.special_tokens.get("<|im_kimia_text_blank|>")
    pairs = {
        f"blank tokens of the model and of {folder}'s vocabulary": (
            config.special.kimia_text_blank,
            blank,
        ),
        f"codes of the model and of {SPEECH_TOKENIZER}": (
            config.num_codes,
            made.frontend.speech_tokenizer.codebook_size,
        ),
        f"codes of the model and of {DETOKENIZER}": (
            config.num_codes,
            made.frontend.detokenizer.codebook_size,
        ),
        f"feature sizes of the model and of {WHISPER}": (
            config.kimia_adaptor_input_dim,
            STACK * encoder.d_model,
        ),
    }
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise StageError(f"{folder}: {what} differ ({ours} and {theirs}); take one release.")
