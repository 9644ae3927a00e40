"""Text <-> ids: what every text tokenizer offers, and a byte-level BPE that can be trained here."""

import os
import pathlib
import unicodedata
import uuid
from collections.abc import Iterable, Sequence
from typing import Protocol

import tokenizers

# A byte-level alphabet covers every string, so a vocabulary cannot be smaller than it.
MIN_VOCAB_SIZE = 256


class Tokenizer(Protocol):
    """Text <-> ids of a text stream; ids at or above `vocab_size` are control tokens, no text."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class TextTokenizer:
    """Byte-level BPE, ids in 0..vocab_size-1: any text in, any text back, no unknown token."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "TextTokenizer":
        """Learns at most `vocab_size` tokens; the same texts in any order give the same tokenizer.

        Texts too few for `vocab_size` tokens give a smaller vocabulary: see `vocab_size`.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size {vocab_size} is below {MIN_VOCAB_SIZE}, the number of single bytes"
            )
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator(sorted(texts), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TextTokenizer":
        """Reads a tokenizer.json."""
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such tokenizer; train one or correct the path")
        return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))

    def save(self, path: str | os.PathLike) -> None:
        """Writes one tokenizer.json, whole or not at all."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        partial.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        os.replace(partial, path)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Joins the text of `ids`; those at or above `vocab_size` are control tokens, no text."""
        ids = [int(i) for i in ids]
        if any(i < 0 for i in ids):
            raise ValueError(f"negative token id in {ids}; mask padding out before decoding")
        return self._tokenizer.decode([i for i in ids if i < self.vocab_size])


def normalize(text: str) -> str:
    """Lower case, no punctuation, single spaces: the form in which transcripts are compared.

    An apostrophe inside a word is kept ("don't"); every other mark separates words.
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower()
    kept = []
    for at, mark in enumerate(text):
        inside_word = (
            mark == "'" and text[at - 1 : at].isalnum() and text[at + 1 : at + 2].isalnum()
        )
        # Combining marks (category M) belong to the letter before them.
        is_letter = mark.isalnum() or unicodedata.category(mark).startswith("M")
        kept.append(mark if is_letter or inside_word else " ")
    return " ".join("".join(kept).split())
