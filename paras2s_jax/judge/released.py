"""A released Whisper as the judge's recogniser: any speech, of any length, in many languages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paras2s_jax.convert import from_pretrained
from paras2s_jax.convert.pretrained import local_folder
from paras2s_jax.judge.interfaces import Transcript
from paras2s_jax.judge.ledger import params_digest
from paras2s_jax.models.whisper import WhisperASR
from paras2s_jax.models.whisper_ids import WhisperIds
from paras2s_jax.models.whisper_recognise import Fallback, Recognition, recognise_waves

# Longer answers than this are no answers.
MAX_DUR_S = 300.0
FALLBACK = Fallback()


class ReleasedTranscriber:
    """Waves -> words, batched, with second tries at rising temperatures.

    Args:
        model, params, processor, ids: of one released Whisper; `load` reads them.
        language: of all waves, or None to detect it.
    """

    max_dur_s = MAX_DUR_S

    def __init__(
        self,
        model: WhisperASR,
        params: Mapping[str, Any],
        processor: Any,
        ids: WhisperIds,
        *,
        language: str | None = "en",
        batch_size: int = 16,
        fallback: Fallback = FALLBACK,
    ):
        self._model, self._variables = model, {"params": params}
        self._tokenizer, self._ids = processor.tokenizer, ids
        self._language = language if ids.lang_to_id else None
        self._batch_size, self._fallback = batch_size, fallback
        self.model_id = f"whisper-{params_digest(params)[:12]}"
        self.settings = {"language": self._language, "temperatures": list(fallback.temperatures)}

    @classmethod
    def load(
        cls,
        path_or_hub_id: str | Path,
        *,
        dtype: Any = "float32",
        language: str | None = "en",
        batch_size: int = 16,
    ) -> "ReleasedTranscriber":
        """Of a released or converted Whisper.

        Raises:
            ConversionError: it is broken. ValueError: it is no Whisper, or has no vocabulary.
        """
        folder = local_folder(path_or_hub_id)
        model, params, processor = from_pretrained(folder, dtype=dtype)
        if not isinstance(model, WhisperASR) or getattr(processor, "tokenizer", None) is None:
            raise ValueError(
                f"{path_or_hub_id} is no Whisper with a vocabulary; give for instance "
                "openai/whisper-large-v3"
            )
        ids = WhisperIds.from_json(folder / "generation_config.json")
        return cls(model, params, processor, ids, language=language, batch_size=batch_size)

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[Transcript]:
        """waves: float32[L] each. Returns: their words, "" where no speech is heard."""
        found: list[Transcript | None] = [None] * len(waves)
        # By length, so that a long one does not make short ones wait.
        order = sorted(range(len(waves)), key=lambda index: len(waves[index]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            # Copies fill up the last batch: its shape is compiled.
            rows = [waves[batch[at % len(batch)]] for at in range(self._batch_size)]
            heard = recognise_waves(
                self._model,
                self._variables,
                rows,
                ids=self._ids,
                language=self._language,
                fallback=self._fallback,
            )
            for index, recognition in zip(batch, heard, strict=False):
                found[index] = self._transcript(recognition)
        return found

    def _transcript(self, recognition: Recognition) -> Transcript:
        # Words have the ids below the first control token, the end of the text.
        text = self._tokenizer.decode(
            [token for token in recognition.tokens if token < self._ids.eos_token_id],
            skip_special_tokens=True,
        )
        attempts = [segment.attempt for segment in recognition.segments]
        mean = float(np.mean([attempt.mean_logp for attempt in attempts])) if attempts else 0.0
        return Transcript(text.strip(), round(mean, 4))
