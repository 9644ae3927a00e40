"""The tone captioner: replies, failures, batches of any size."""

import math

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from flax import linen as nn

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.audio_chat import QWEN2_AUDIO_TEMPLATE, AudioChat
from paras2s_jax.data.records import Query, Response
from paras2s_jax.judge.captioner import ToneCaptioner
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.interfaces import Failure, Score, Transcript
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.tone_prompt import parse_tone
from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.models.qwen2_audio import Qwen2Audio, Qwen2AudioConfig
from paras2s_jax.models.whisper_layers import WhisperConfig


@pytest.mark.parametrize(
    ("reply", "tone"),
    [
        ("Warm.", "warm"),
        (' "Calm, reassuring" ', "calm reassuring"),
        ("matter-of-fact", "matter-of-fact"),
        ("<THINK>The pitch is low and even.</THINK>\n<RESPONSE>Flat</RESPONSE>", "flat"),
        ("<THINK>Rising.</THINK><RESPONSE>Playful tone", "playful tone"),
    ],
)
def test_tones_are_read(reply, tone):
    assert parse_tone(reply) == tone


@pytest.mark.parametrize(
    ("reply", "count"),
    [("", 0), ("4!", 0), ("The tone is warm", 4), ("<THINK>warm</THINK><RESPONSE></RESPONSE>", 0)],
)
def test_other_replies_fail_with_their_words(reply, count):
    assert parse_tone(reply) == Failure(f"the reply has {count} words, not one or two", raw=reply)


@pytest.fixture(scope="module")
def processor():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({mark: i for i, mark in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|AUDIO|>"]})
    return AudioChat(fast, QWEN2_AUDIO_TEMPLATE, num_mels=10, max_samples=32_000)


@pytest.fixture(scope="module")
def captioner(processor):
    """A random model: it never ends a reply."""
    tower = WhisperConfig(12, 1, 2, 20, num_mel_bins=10, max_source_positions=100)
    text = Qwen2Config(len(processor.tokenizer), 16, 24, 2, 2, 1)
    slot = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    model = Qwen2Audio(Qwen2AudioConfig(tower, text, slot))
    mel, ids = np.zeros((1, 8, 10), np.float32), np.full((1, 2), slot)
    start = jax.jit(lambda rng: model.init(rng, mel, ids, method="init_all"))
    variables = jax.tree.map(lambda x: 5 * x, nn.meta.unbox(start(jax.random.key(0))))
    return ToneCaptioner(model, variables, processor, max_new_tokens=4, batch_size=2)


def test_every_wave_gets_its_own_reply(captioner):
    rng = np.random.default_rng(0)
    waves = [rng.normal(0, 0.3, size).astype(np.float32) for size in (9000, 800, 12_345)]
    together = dict(captioner.caption(waves))
    assert [together[at].reason for at in range(3)] == ["the reply does not end"] * 3
    assert together == {at: dict(captioner.caption([wave]))[0] for at, wave in enumerate(waves)}
    assert list(captioner.caption([])) == []


def test_identity_names_weights_and_prompt(captioner):
    assert captioner.model_id.startswith("tone-captioner-")
    assert set(captioner.settings) == {"prompt", "max_new_tokens"}


class FreeWords:
    """Calls loud waves eager, and fails on quiet ones."""

    model_id, settings, max_dur_s = "free", {}, 2.0

    def caption(self, waves):
        for index, wave in enumerate(waves):
            yield index, "eager" if wave.max() > 0.2 else Failure("no reply", raw="…")


class Words:
    model_id, settings, max_dur_s = "words", {}, 2.0

    def transcribe(self, waves):
        return [Transcript("yes", -0.1) for _ in waves]


class ToneScorer:
    name, version, settings_hash = "tone", "1", "0"

    def score(self, heard, repeat=0):
        for index, item in enumerate(heard):
            yield index, Score(4.0 if item.tone_out == "eager" else 1.0, None, None, "")


def test_judge_takes_free_words_and_passes_failures_on(tmp_path):
    for name, level in (("loud.wav", 0.5), ("quiet.wav", 0.1)):
        wave_lib.save(tmp_path / name, np.full(8000, level, np.float32), wave_lib.RATE_HZ)
    query = Query(
        id="q",
        sentence_id="s",
        dimension="emotion",
        text="I see.",
        style="sad",
        contrast="surprised",
        topic="people",
        split="test",
        voice="v",
        wav="loud.wav",
        dur_s=0.5,
    )
    pairs = [
        (query, tmp_path / query.wav, Response("q", "s", 0, "yes", name), tmp_path / name)
        for name in ("loud.wav", "quiet.wav")
    ]
    ledger = Ledger(tmp_path / "ledger.sqlite")
    judge = Judge(Words(), {}, FreeWords(), ToneScorer(), ledger, progress=False)
    eager, failed = judge.judge(pairs, use_labels=True)
    assert (eager.score, eager.tone_out, eager.status) == (4.0, "eager", "ok")
    assert math.isnan(failed.score) and failed.status == "tone: no reply"
    assert failed.raw["tone"] == {"reason": "no reply", "raw": "…"}
