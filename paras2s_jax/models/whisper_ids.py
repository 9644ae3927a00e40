"""What the control tokens of a released Whisper are: its generation_config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WhisperIds:
    """Token ids; names follow generation_config.json, mappings are pairs so that it is hashable.

    lang_to_id: ("<|en|>", id), …; empty for a model of English only. task_to_id: ("transcribe",
    id), ("translate", id). no_timestamps_token_id: the times 0.00, 0.02, … s follow it.
    suppress_tokens are never said, begin_suppress_tokens never first;
    max_initial_timestamp_index: the latest time that may come first, in steps of 0.02 s.
    """

    decoder_start_token_id: int
    eos_token_id: int
    lang_to_id: tuple[tuple[str, int], ...] = ()
    task_to_id: tuple[tuple[str, int], ...] = ()
    no_timestamps_token_id: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    max_initial_timestamp_index: int | None = None

    @classmethod
    def from_json(cls, path: str | Path) -> "WhisperIds":
        """Reads a generation_config.json; raises ValueError, naming it, if keys are missing."""
        values: Mapping = json.loads(Path(path).read_text())
        needed = ("decoder_start_token_id", "eos_token_id")
        missing = [key for key in needed if not isinstance(values.get(key), int)]
        if missing:
            raise ValueError(
                f"{path}: needs one id for {' and '.join(missing)}; is this the "
                "generation_config.json of a Whisper?"
            )
        speaks_many = values.get("is_multilingual", True)
        return cls(
            decoder_start_token_id=values["decoder_start_token_id"],
            eos_token_id=values["eos_token_id"],
            lang_to_id=tuple((values.get("lang_to_id") or {}).items()) if speaks_many else (),
            task_to_id=tuple((values.get("task_to_id") or {}).items()) if speaks_many else (),
            no_timestamps_token_id=values.get("no_timestamps_token_id"),
            suppress_tokens=tuple(values.get("suppress_tokens") or ()),
            begin_suppress_tokens=tuple(values.get("begin_suppress_tokens") or ()),
            max_initial_timestamp_index=values.get("max_initial_timestamp_index"),
        )

    @property
    def no_speech_token_id(self) -> int | None:
        """The token before "no timestamps" (as transformers finds it)."""
        return None if self.no_timestamps_token_id is None else self.no_timestamps_token_id - 1

    def language(self, name: str) -> int:
        """Id of a language given as "en", "<|en|>" or "English"; ValueError if there is none."""
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        code = name.lower().removeprefix("<|").removesuffix("|>")
        languages = dict(self.lang_to_id)
        token = f"<|{TO_LANGUAGE_CODE.get(code, code)}|>"
        if token not in languages:
            known = ", ".join(key.strip("<|>") for key in languages) or "none, it is English only"
            raise ValueError(f"language {name!r} is unknown to this Whisper; it knows: {known}")
        return languages[token]

    def prompt(self, language_id: int | None, task: str, timestamps: bool) -> tuple[int, ...]:
        """What every transcript starts with: start, language, task, "no timestamps".

        language_id: None for a model of English only.
        """
        ids = [self.decoder_start_token_id]
        if language_id is not None:
            ids.append(language_id)
        tasks = dict(self.task_to_id)
        if task in tasks:
            ids.append(tasks[task])
        elif tasks or task != "transcribe":
            raise ValueError(f"task {task!r} is unknown to this Whisper, only {list(tasks)}")
        if timestamps and self.no_timestamps_token_id is None:
            raise ValueError("no_timestamps_token_id is missing: this Whisper knows no times")
        if not timestamps and self.no_timestamps_token_id is not None:
            ids.append(self.no_timestamps_token_id)
        return tuple(ids)
