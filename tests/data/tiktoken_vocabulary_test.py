"""Kimi's vocabulary, on small files that the tests write."""

import base64
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from paras2s_jax.data.tiktoken_vocabulary import (
    SPECIAL_OFFSETS,
    TiktokenVocabulary,
    VocabularyError,
    read_ranks,
)

TEXTS = [
    "I just lost my keys. I'm so, so sorry! It's 2025, isn't it?",
    "The cat's friend had 365 days\n\n  and   a half; don't ask.",
    "今天天气怎么样？ 我很高兴。",
]
HARD = [
    "",
    "hello",
    "  spaces  at the ends ",
    "tabs\tand\r\n\r\nlines\n",
    "IT'S we'Ll 1234567890 x86_64",
    "naïve café 東京 😀 ünï",
    "<|im_kimia_text_eos|> is [EOS] no token<|im_media_begin|>",
]


def write(folder, ranks: dict[bytes, int]) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def pairs():
    """A byte-level BPE of another library: (its vocabulary, its merges)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _bytes_of_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's), inverted."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + at): byte for at, byte in enumerate(others)}


@pytest.fixture(scope="module")
def folder(pairs, tmp_path_factory):
    path, letters = tmp_path_factory.mktemp("vocabulary"), _bytes_of_letters()
    write(path, {bytes(letters[c] for c in token): rank for token, rank in pairs[0].items()})
    return path


@pytest.mark.parametrize("text", [*TEXTS, *HARD])
def test_encodes_as_qwen2_and_decodes_to_the_same_text(folder, pairs, text):
    vocabulary = TiktokenVocabulary.load(folder)
    reference = Qwen2Tokenizer(vocab=pairs[0], merges=pairs[1])
    ids = vocabulary.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert vocabulary.decode(ids) == text
    assert all(i < vocabulary.vocab_size for i in ids)


def test_merges_by_rank_by_hand(tmp_path):
    # "abc": bc has the lower rank and merges first, so ab (257) never forms; abc is 258.
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258}
    write(tmp_path, ranks)
    vocabulary = TiktokenVocabulary.load(tmp_path)
    assert vocabulary.encode("abc ab bca") == [258, ord(" "), 257, ord(" "), 256, ord("a")]
    assert vocabulary.vocab_size == 259


def test_special_tokens_follow_the_pairs_unless_the_config_says_where(folder, tmp_path):
    vocabulary = TiktokenVocabulary.load(folder)
    assert vocabulary.vocab_size == 330
    assert vocabulary.special_tokens["[BOS]"] == 330
    assert vocabulary.special_tokens["<|im_kimia_text_eos|>"] == 354
    listed = {
        str(400 + at): {"content": name, "special": True} for name, at in SPECIAL_OFFSETS.items()
    }
    (tmp_path / "tiktoken.model").write_bytes((folder / "tiktoken.model").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": listed}))
    assert TiktokenVocabulary.load(tmp_path).special_tokens["<|im_media_end|>"] == 420
    config.write_text(json.dumps({"model_max_length": 8192}))
    assert TiktokenVocabulary.load(tmp_path).special_tokens["<|im_media_end|>"] == 350
    config.write_text(json.dumps({"added_tokens_decoder": {"345": {"content": "[USED]"}}}))
    found = TiktokenVocabulary.load(tmp_path).special_tokens
    assert found["[USED]"] == 345 and found["<|im_media_end|>"] == 350
    config.write_text(json.dumps({"added_tokens_decoder": {"12": {"content": "[BOS]"}}}))
    with pytest.raises(VocabularyError, match=r"tokenizer_config\.json: .*'\[BOS\]' has id 12"):
        TiktokenVocabulary.load(tmp_path)
    config.write_text(json.dumps({"added_tokens_decoder": ["[BOS]"]}))
    with pytest.raises(VocabularyError, match=r"tokenizer_config\.json: expected"):
        TiktokenVocabulary.load(tmp_path)


def test_control_tokens_have_no_text(folder):
    vocabulary = TiktokenVocabulary.load(folder)
    eos = vocabulary.special_tokens["<|im_kimia_text_eos|>"]
    assert vocabulary.decode([*vocabulary.encode("My"), eos, 9999]) == "My"
    with pytest.raises(ValueError, match="negative"):
        vocabulary.decode([3, -1])


def test_half_a_character_does_not_stop_decoding(folder):
    vocabulary = TiktokenVocabulary.load(folder)
    ids = vocabulary.encode("😀")
    assert len(ids) > 1 and vocabulary.decode(ids[:-1]) == "\ufffd"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("YWI= 256\nYWI= 257", r"tiktoken\.model:258: token b'ab' comes a second time"),
        ("YWI=", r"tiktoken\.model:257: expected .* got 'YWI='"),
        ("YW*= 256", r"tiktoken\.model:257: expected"),
        ("YWI= x", r"tiktoken\.model:257: expected"),
        ("YWI= 300", "ranks are not 0 to 256"),
        ("YWI= 255", "ranks are not 0 to 256"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    write(tmp_path, {bytes([byte]): byte for byte in range(256)})
    path = tmp_path / "tiktoken.model"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(VocabularyError, match=message):
        read_ranks(path)


def test_missing_files_and_bytes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tiktoken\.model: no such vocabulary"):
        TiktokenVocabulary.load(tmp_path)
    write(tmp_path, {bytes([byte]): byte for byte in range(7)})
    with pytest.raises(VocabularyError, match=r"no token for byte 0x07 \(249 bytes"):
        TiktokenVocabulary.load(tmp_path)
