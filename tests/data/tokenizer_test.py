import pytest

from paras2s_jax.data import tokenizer

TEXTS = ["I just lost my keys.", "My cat has a new friend!", "How does a rainbow work?"] * 3


def test_learns_the_most_frequent_pairs():
    # Words: "ab" x1, " ab" x3. Pair (a, b) occurs 4 times -> id 256, then (" ", "ab") -> id 257.
    tok = tokenizer.TextTokenizer.train(["ab ab ab ab"], 258)
    assert tok.vocab_size == 258
    assert tok.encode("ab ab") == [256, 257]


@pytest.mark.parametrize("text", ["", "I just", " two  spaces\n", "naïve 😀 ünï", "東京"])
def test_any_text_comes_back(text):
    tok = tokenizer.TextTokenizer.train(TEXTS, 300)
    ids = tok.encode(text)
    assert all(0 <= i < tok.vocab_size for i in ids)
    assert tok.decode(ids) == text


def test_training_does_not_depend_on_order(tmp_path):
    for name, texts in (("a", TEXTS), ("b", TEXTS[::-1])):
        tokenizer.TextTokenizer.train(texts, 300).save(tmp_path / name / "tokenizer.json")
    files = [tmp_path / name / "tokenizer.json" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in files[0].parent.iterdir()] == ["tokenizer.json"]


def test_save_and_load(tmp_path):
    tok = tokenizer.TextTokenizer.train(TEXTS, 300)
    tok.save(tmp_path / "tokenizer.json")
    loaded = tokenizer.TextTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == tok.vocab_size
    assert loaded.encode("My cat") == tok.encode("My cat")


def test_few_texts_give_a_smaller_vocabulary():
    assert tokenizer.TextTokenizer.train(["ab"], 512).vocab_size == 257


def test_control_tokens_have_no_text():
    tok = tokenizer.TextTokenizer.train(TEXTS, 300)
    assert tok.decode([*tok.encode("My"), tok.vocab_size, 999]) == "My"


def test_errors_name_the_cause(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 100 is below 256"):
        tokenizer.TextTokenizer.train(TEXTS, 100)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        tokenizer.TextTokenizer.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="negative"):
        tokenizer.TextTokenizer.train(TEXTS, 300).decode([3, -1])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Don't STOP, now!", "don't stop now"),
        ("'Quoted' words’ don’t", "quoted words don't"),
        ("well-known  — dash…", "well known dash"),
        ("Éclair 2 हिन्दी", "éclair 2 हिन्दी"),
        ("?!", ""),
        ("'", ""),
        ("ends with '", "ends with"),
    ],
)
def test_normalize(text, expected):
    assert tokenizer.normalize(text) == expected
