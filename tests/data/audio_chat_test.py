"""The processor against Qwen2AudioProcessor, and at the edges of audio."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import tokenizers
import transformers

from paras2s_jax.data.audio_chat import QWEN2_AUDIO_TEMPLATE, AudioChat, num_slots

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
AUDIO = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
RATE_HZ = 16_000
LENS = [800, 1601, 7000]  # 0.05 s, and lengths that are no multiple of a hop.


def save_tokenizer(folder, **settings):
    """A byte-level tokenizer with the release's control tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({mark: i for i, mark in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", **settings
    )
    fast.add_special_tokens({"additional_special_tokens": CONTROL + AUDIO})
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a release has: tokenizer and preprocessor config, no template; audio of at most 1 s."""
    folder = tmp_path_factory.mktemp("release")
    save_tokenizer(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=1)
    extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return AudioChat.load(folder, default_template=QWEN2_AUDIO_TEMPLATE, padding_side="right")


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.Qwen2AudioProcessor(
        transformers.WhisperFeatureExtractor.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


@pytest.fixture(scope="module")
def audios():
    rng = np.random.default_rng(0)
    return [rng.uniform(-0.5, 0.5, size).astype(np.float32) for size in LENS]


def heard(audio):
    return {"type": "audio", "audio": audio}


def said(text):
    return {"type": "text", "text": text}


def conversations(audios):
    return [
        [{"role": "user", "content": "Hi there."}],
        [
            {"role": "system", "content": "Listen\nwell."},
            {"role": "user", "content": [heard(audios[0]), said("What?  "), heard(audios[1])]},
            {"role": "assistant", "content": "Glass."},
            {"role": "user", "content": [said("And this?"), heard(audios[2])]},
        ],
        [{"role": "user", "content": [heard(audios[1]), said("{{ not a template }}")]}],
    ]


def test_text_of_conversations(ours, theirs, audios):
    for prompt in (True, False):
        for conversation in conversations(audios):
            wanted = theirs.apply_chat_template(
                conversation, add_generation_prompt=prompt, tokenize=False
            )
            assert ours.apply_chat_template(conversation, add_generation_prompt=prompt) == wanted
    assert wanted.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


@pytest.mark.parametrize("side", ["left", "right"])
def test_arrays_equal_the_processor(folder, theirs, audios, side):
    ours = AudioChat.load(folder, default_template=QWEN2_AUDIO_TEMPLATE, padding_side=side)
    texts = [
        "<|audio_bos|><|AUDIO|><|audio_eos|>Say.<|AUDIO|>",
        "no audio here",
        "a<|AUDIO|>b",
    ]
    wanted = theirs(
        text=texts,
        audio=audios,
        sampling_rate=RATE_HZ,
        padding=True,
        padding_side=side,
        return_tensors="np",
    )
    found = ours(texts, audios, padding="max_length")
    assert set(found) == set(wanted)
    for key in ("input_ids", "attention_mask", "feature_attention_mask"):
        np.testing.assert_array_equal(found[key], wanted[key])
    np.testing.assert_allclose(found["input_features"], wanted["input_features"], atol=1e-4)
    slots = [num_slots(-(-size // 160)) for size in LENS]
    is_slot = found["input_ids"] == ours.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert is_slot.sum(1).tolist() == [slots[0] + slots[1], 0, slots[2]]


def test_conversation_to_arrays(ours, theirs, audios):
    conversation = conversations(audios)[1]
    wanted = theirs.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    found = ours.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, padding="max_length"
    )
    np.testing.assert_array_equal(found["input_ids"], wanted["input_ids"])
    np.testing.assert_allclose(found["input_features"], wanted["input_features"], atol=1e-4)


def test_shorter_padding_changes_no_frame(tmp_path):
    save_tokenizer(tmp_path, padding_side="left")
    transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=4).save_pretrained(tmp_path)
    ours = AudioChat.load(tmp_path, padding_side="right")
    assert ours.padding_side == "left"  # The tokenizer's own word.
    # Exactly a second has no room for the zeros that follow: two; 3.999 s have none but the limit.
    audios = [np.random.default_rng(i).normal(size=n) for i, n in enumerate([16_000, 63_990])]
    text = "<|AUDIO|>"
    for audio, num_frames in zip(audios, (200, 400), strict=True):
        short = ours(text, [audio])["input_features"]
        full = ours(text, [audio], padding="max_length")["input_features"]
        assert short.shape == (1, 20, num_frames) and full.shape == (1, 20, 400)
        np.testing.assert_array_equal(short, full[:, :, :num_frames])
    both = ours(text * 2, audios)
    assert both["input_features"].shape == (2, 20, 400)
    assert both["feature_attention_mask"].sum(1).tolist() == [100, 400]


@pytest.mark.parametrize("size", [800, 16_000, 50_000])
def test_edges_of_audio(ours, theirs, size):
    """0.05 s, exactly the limit, and beyond it (cut, as transformers does); silence."""
    for audio in (np.zeros(size, np.float32), np.sin(np.arange(size)).astype(np.float32)):
        wanted = theirs(
            text=["<|AUDIO|>"], audio=[audio], sampling_rate=RATE_HZ, return_tensors="np"
        )
        found = ours("<|AUDIO|>", [audio], padding="max_length")
        np.testing.assert_array_equal(found["input_ids"], wanted["input_ids"])
        np.testing.assert_allclose(found["input_features"], wanted["input_features"], atol=1e-4)


def test_omni_hears_minutes(tmp_path):
    """95 s, where the extractor's limit is 300 s as in Qwen2.5-Omni's release."""
    save_tokenizer(tmp_path)
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=300)
    extractor.save_pretrained(tmp_path)
    ours = AudioChat.load(tmp_path, padding_side="left")
    audio = np.random.default_rng(0).normal(size=95 * RATE_HZ).astype(np.float32)
    found = ours("<|AUDIO|>", [audio])
    assert found["input_ids"].shape == (1, 2375)
    assert found["input_features"].shape == (1, 128, 9600)
    wanted = extractor(audio, sampling_rate=RATE_HZ, return_tensors="np")["input_features"]
    np.testing.assert_allclose(found["input_features"], wanted[..., :9600], atol=1e-4)


@pytest.mark.parametrize("rate_hz", [8_000, 48_000])
def test_sound_files_are_resampled_to_mono(ours, tmp_path, rate_hz):
    tone = np.sin(np.arange(rate_hz // 2) * 0.05).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, -0.5 * tone], axis=1), rate_hz)
    part = heard(str(tmp_path / "a.wav"))
    found = ours.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True)
    assert found["feature_attention_mask"].sum() == 50


def test_replies_stop_at_their_length(ours):
    ids = ours.tokenizer("ab<|im_end|>cd", return_tensors="np")["input_ids"]
    assert ours.batch_decode(ids) == ["abcd"]
    assert ours.batch_decode(ids, np.array([2])) == ["ab"]


def test_works_without_torch(folder):
    program = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from paras2s_jax.convert import qwen2_audio
processor = qwen2_audio.load_processor({str(folder)!r})
part = {{"type": "audio", "audio": np.sin(np.arange(800))}}
chat = processor.apply_chat_template([{{"role": "user", "content": [part]}}], tokenize=True)
print(chat["input_features"].shape, processor.batch_decode(chat["input_ids"]))
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shape, _, text = result.stdout.splitlines()[-1].partition(" [")
    assert shape == "(1, 128, 100)" and "Audio 1: \\n\\n" in text


def test_mistakes_are_named(folder, ours, audios, tmp_path):
    with pytest.raises(ValueError, match=r"2 <\|AUDIO\|> for 1 audios"):
        ours("<|AUDIO|><|AUDIO|>", audios[:1])
    with pytest.raises(ValueError, match="max_length"):
        ours("<|AUDIO|>", audios[:1], padding="shortest")
    without = AudioChat.load(folder, padding_side="left")
    with pytest.raises(ValueError, match=r"chat_template\.jinja"):
        without.apply_chat_template([{"role": "user", "content": "Hi"}])
    save_tokenizer(tmp_path)
    transformers.WhisperFeatureExtractor(hop_length=80).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hop_length"):
        AudioChat.load(tmp_path, padding_side="left")


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_template_of_the_folder(tmp_path, name):
    save_tokenizer(tmp_path)
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    template = "{% for m in messages %}[{{ m.role }}]{% endfor %}"
    text = template if name.endswith("jinja") else json.dumps({"chat_template": template})
    (tmp_path / name).write_text(text)
    ours = AudioChat.load(tmp_path, default_template="other", padding_side="left")
    assert ours.apply_chat_template([{"role": "user", "content": "Hi"}]) == "[user]"
