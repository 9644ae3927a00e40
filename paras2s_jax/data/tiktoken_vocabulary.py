"""Kimi-Audio's text vocabulary: a tiktoken file of byte pairs, then one block of special tokens.

Facts: the released tokenizer (moonshotai/Kimi-Audio-7B-Instruct, tokenization_kimia.py).
"""

import base64
import json
import os
import pathlib
from collections.abc import Sequence

FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"

# How text is cut before pairs are merged: the pattern of Qwen2, without its normalisation.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Where the special tokens with a meaning lie in their block, which follows the byte pairs.
SPECIAL_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_msg_end|>": 2,
    "<|im_user_msg_start|>": 3,
    "<|im_assistant_msg_start|>": 4,
    "[EOT]": 9,
    "<|im_media_begin|>": 18,
    "<|im_media_end|>": 20,
    "<|im_kimia_text_blank|>": 23,
    "<|im_kimia_text_eos|>": 24,
    "<|im_kimia_user_msg_start|>": 27,
    "<|im_kimia_assistant_msg_start|>": 28,
    "<|im_kimia_speech_ct_id|>": 32,
    "<|im_kimia_speech_ctd_id|>": 33,
}


class VocabularyError(ValueError):
    """A vocabulary file that cannot be used; the message names file and line."""


class TiktokenVocabulary:
    """Text <-> ids in 0..vocab_size-1 (data.tokenizer.Tokenizer); special tokens lie above.

    Text is never read as a special token, whatever it contains.

    special_tokens: ids by name.
    """

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int], name: str = "kimi"):
        # Imported here: models read SPECIAL_OFFSETS and need no tokenizer.
        import tiktoken

        self.special_tokens = special_tokens
        self._num_ranks = len(ranks)
        self._encoding = tiktoken.Encoding(
            name=name,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={},
        )

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "TiktokenVocabulary":
        """Reads tiktoken.model and the ids in tokenizer_config.json, where that lies beside it.

        Special tokens that it does not list have the released places in the block.

        Raises:
            FileNotFoundError: the folder has no tiktoken.model.
            VocabularyError: one of the two does not hold what it should.
        """
        folder = pathlib.Path(folder)
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such vocabulary; it comes with the checkpoint")
        ranks = read_ranks(path)
        special_tokens = {name: len(ranks) + at for name, at in SPECIAL_OFFSETS.items()}
        special_tokens |= _named_tokens(folder / CONFIG_FILE)
        taken = [name for name, token_id in special_tokens.items() if token_id < len(ranks)]
        if taken:
            raise VocabularyError(
                f"{folder / CONFIG_FILE}: special token {taken[0]!r} has id "
                f"{special_tokens[taken[0]]}, which {path} uses for text."
            )
        return cls(ranks, special_tokens, name=str(path))

    @property
    def vocab_size(self) -> int:
        return self._num_ranks

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Joins the text of `ids`; those at or above `vocab_size` are control tokens, no text.

        Bytes that are not UTF-8 (a character cut in two) become U+FFFD.
        """
        ids = [int(i) for i in ids]
        if any(i < 0 for i in ids):
            raise ValueError(f"negative token id in {ids}; mask padding out before decoding")
        return self._encoding.decode([i for i in ids if i < self._num_ranks])


def read_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Byte pairs of a tiktoken file: lines of a base64 token and its rank, 0, 1, 2, … in all.

    Raises:
        VocabularyError: a line is something else, a rank or a token comes twice or is missing.
    """
    path = pathlib.Path(path)
    ranks: dict[bytes, int] = {}
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError as error:
            shown = line[:40].decode("utf-8", errors="replace")
            raise VocabularyError(
                f"{path}:{number}: expected a base64 token and its rank, got {shown!r}."
            ) from error
        if token in ranks:
            raise VocabularyError(f"{path}:{number}: token {token!r} comes a second time.")
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise VocabularyError(
            f"{path}: its {len(ranks)} ranks are not 0 to {len(ranks) - 1}; is the file whole?"
        )
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise VocabularyError(
            f"{path}: no token for byte {lacking[0]:#04x} ({len(lacking)} bytes lack one); "
            "is the file whole?"
        )
    return ranks


def _named_tokens(path: pathlib.Path) -> dict[str, int]:
    """Special tokens that tokenizer_config.json lists; none where there is no such file or list."""
    if not path.is_file():
        return {}
    try:
        listed = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        return {entry["content"]: int(token_id) for token_id, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VocabularyError(
            f"{path}: expected added_tokens_decoder to map ids to {{'content': name}} ({error!r})."
        ) from error
