"""Conversations with audio in them -> padded arrays for Qwen2-Audio and Qwen2.5-Omni.

What Qwen2AudioProcessor and Qwen2_5OmniProcessor of transformers do to text and audio, without
torch and without the latter's vision parts: the folder's tokenizer and chat template, our log-mel.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paras2s_jax.audio import wave
from paras2s_jax.audio.mel import HOP, N_FFT, RATE_HZ, whisper_log_mel

AUDIO_TOKEN = "<|AUDIO|>"
# Zeros that must follow an audio for its last frames, and what convolutions see next to them, to be
# those of an audio padded to the full length.
_TAIL = 2 * N_FFT
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_EXTRACTORS = ("preprocessor_config.json", "processor_config.json")

# The form that Qwen2-Audio was trained on (technical report, section 2; its release has no template
# file): ChatML, a default system turn, audios numbered through the conversation.
QWEN2_AUDIO_TEMPLATE = """\
{%- set heard = namespace(count=0) -%}
{%- if messages[0].role != "system" -%}
{{ "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" }}
{%- endif -%}
{%- for turn in messages -%}
{{ "<|im_start|>" + turn.role + "\\n" }}
{%- if turn.content is string -%}
{{ turn.content }}
{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == "audio" -%}
{%- set heard.count = heard.count + 1 -%}
{{ "Audio " ~ heard.count ~ ": <|audio_bos|><|AUDIO|><|audio_eos|>\\n" }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\\n" }}
{%- endif -%}
"""


@dataclasses.dataclass(frozen=True)
class AudioChat:
    """A tokenizer of transformers, a jinja template, and the sizes of the log-mel.

    max_samples: longer audio is cut, as transformers does. padding_side: of the text.
    """

    tokenizer: Any
    chat_template: str | None
    num_mels: int
    max_samples: int
    padding_side: str = "left"
    audio_token: str = AUDIO_TOKEN

    @classmethod
    def load(
        cls, folder: str | Path, *, default_template: str | None = None, padding_side: str
    ) -> "AudioChat | None":
        """Reads tokenizer, feature extractor and template of a released folder.

        default_template: if the folder has none. padding_side: if the tokenizer does not say.

        Returns: None if it has no vocabulary or no feature extractor.

        Raises:
            ValueError: the features are not Whisper's, or there is no audio token.
        """
        from transformers import AutoTokenizer, WhisperFeatureExtractor

        folder = Path(folder)
        if not (_has_any(folder, _VOCABULARIES) and _has_any(folder, _EXTRACTORS)):
            return None
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sizes = WhisperFeatureExtractor.from_pretrained(folder)
        found = (sizes.sampling_rate, sizes.n_fft, sizes.hop_length)
        if found != (RATE_HZ, N_FFT, HOP):
            raise ValueError(
                f"{folder}: sampling_rate, n_fft, hop_length are {found}, not Whisper's "
                f"{(RATE_HZ, N_FFT, HOP)}; correct the preprocessor config"
            )
        if AUDIO_TOKEN not in tokenizer.get_vocab():
            raise ValueError(f"{folder}: the tokenizer has no token {AUDIO_TOKEN}")
        return cls(
            tokenizer,
            _read_template(folder) or default_template,
            num_mels=sizes.feature_size,
            max_samples=sizes.n_samples,
            padding_side=tokenizer.init_kwargs.get("padding_side", padding_side),
        )

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **layout: Any,
    ) -> str | dict[str, np.ndarray]:
        """The text of a conversation, or with `tokenize` the arrays of text and audios.

        conversation: turns {"role", "content"}; content is a string, or parts {"type": "text",
        "text"} and {"type": "audio", "audio": float[L] at 16 kHz, or the path of a sound file}.
        layout: padding and text_multiple, as in __call__.
        """
        if self.chat_template is None:
            raise ValueError("the folder has no chat template; add its chat_template.jinja")
        audios, turns = [], []
        for turn in conversation:
            parts = turn["content"]
            if not isinstance(parts, str):
                audios += [part["audio"] for part in parts if part["type"] == "audio"]
                # The template only asks whether a part is audio.
                parts = [
                    {"type": "audio", "audio": ""} if part["type"] == "audio" else part
                    for part in parts
                ]
            turns.append({**turn, "content": parts})
        text = self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        if not tokenize:
            return text
        return self([text], [_samples(audio) for audio in audios], **layout)

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Sequence[np.ndarray] | None = None,
        *,
        padding: str = "longest",
        text_multiple: int = 1,
    ) -> dict[str, np.ndarray]:
        """Texts with one audio token per audio, and the audios of all texts in order.

        padding: "longest", to whole seconds that hold the longest audio, or "max_length", to
        max_samples as transformers does; the models hear no difference.
        text_multiple: T is a multiple of it, so that few shapes are compiled.

        Returns: input_ids and attention_mask int32[B, T], the audio token repeated for each
        embedding; with audio, input_features float32[n, M, A] and feature_attention_mask
        int32[n, A].

        Raises:
            ValueError: the numbers of audios and of audio tokens differ, or padding is unknown.
        """
        texts = [text] if isinstance(text, str) else list(text)
        audio = [] if audio is None else list(audio)
        places = sum(text.count(self.audio_token) for text in texts)
        if places != len(audio):
            raise ValueError(f"the texts have {places} {self.audio_token} for {len(audio)} audios")
        if padding not in ("longest", "max_length"):
            raise ValueError(f'padding "{padding}" is neither "longest" nor "max_length"')
        features = self._features(audio, padding) if audio else {}
        counts = iter(features["feature_attention_mask"].sum(1) if audio else ())
        expanded = []
        for row in texts:
            first, *rest = row.split(self.audio_token)
            slots = (self.audio_token * num_slots(int(next(counts))) for _ in rest)
            expanded.append(first + "".join(s + part for s, part in zip(slots, rest, strict=True)))
        ids = self.tokenizer(
            expanded,
            padding=True,
            pad_to_multiple_of=text_multiple,
            padding_side=self.padding_side,
            return_tensors="np",
        )
        text_arrays = {key: ids[key].astype(np.int32) for key in ("input_ids", "attention_mask")}
        return text_arrays | features

    def batch_decode(self, tokens: np.ndarray, lens: np.ndarray | None = None) -> list[str]:
        """The text of ids int32[B, R], the first lens[b] of each, without control tokens."""
        rows = [row if lens is None else row[: lens[i]] for i, row in enumerate(np.asarray(tokens))]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _features(self, audio: Sequence[np.ndarray], padding: str) -> dict[str, np.ndarray]:
        audio = [np.asarray(samples, np.float32)[: self.max_samples] for samples in audio]
        sizes = [min(self.max_samples, _whole_seconds(len(samples) + _TAIL)) for samples in audio]
        num_frames = (self.max_samples if padding == "max_length" else max(sizes)) // HOP
        mels = []
        for samples, size in zip(audio, sizes, strict=True):
            padded = np.zeros((1, size), np.float32)
            padded[0, : len(samples)] = samples
            mel = np.asarray(_log_mel(padded, n_mels=self.num_mels))[0]
            # The last frame hears zeros only, if there is padding: so do those that follow.
            mels.append(np.pad(mel, ((0, num_frames - len(mel)), (0, 0)), mode="edge").T)
        lens = np.array([[-(-len(samples) // HOP)] for samples in audio])
        mask = (np.arange(num_frames) < lens).astype(np.int32)
        return {"input_features": np.stack(mels), "feature_attention_mask": mask}


def num_slots(num_frames: int) -> int:
    """Embeddings of an audio of so many mel frames: halved by a convolution, then by pooling."""
    return -(-num_frames // 2) // 2


@functools.partial(jax.jit, static_argnames="n_mels")
def _log_mel(waves, n_mels):
    return whisper_log_mel(waves, n_mels=n_mels)[0]


def _whole_seconds(num_samples: int) -> int:
    return -(-num_samples // RATE_HZ) * RATE_HZ


def _samples(audio: np.ndarray | str | Path) -> np.ndarray:
    return wave.load(audio) if isinstance(audio, str | Path) else np.asarray(audio)


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _read_template(folder: Path) -> str | None:
    """The template of the folder's processor, from any of the files it has been kept in."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text()
    for name in ("chat_template.json", "processor_config.json"):
        if (file := folder / name).is_file():
            template = json.loads(file.read_text()).get("chat_template")
            if template is not None:
                return template
    return None
