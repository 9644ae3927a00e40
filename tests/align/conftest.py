"""A policy of the real classes, small enough for tests, with a random codec."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.align import rewards
from paras2s_jax.align.policy import Frontend, SpeechPolicy
from paras2s_jax.audio import wave
from paras2s_jax.data.records import Query, Response, Verdict
from paras2s_jax.data.tokenizer import TextTokenizer
from paras2s_jax.models.codec import PATCH_DIM, PATCH_SAMPLES, KMeansCodec
from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig
from paras2s_jax.models.lora import NO_LORA
from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.models.qwen2_audio import Qwen2Audio, Qwen2AudioConfig
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.models.whisper import WhisperEncoder
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.train import sharding

NUM_CODES = 40
QUERY_CODES = 5  # Length L of the test queries, in speech codes.


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A policy with random weights, and what surrounds it."""

    policy: SpeechPolicy
    variables: dict
    frontend: Frontend
    tokenizer: TextTokenizer


def make_tiny(max_steps: int = 10, num_codes: int = NUM_CODES, lora=NO_LORA, **sizes) -> Tiny:
    # Ids 0-95 hold the printable ASCII characters of a byte-level tokenizer.
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    } | sizes
    config = KimiAudioConfig(
        vocab_size=132 + num_codes,
        num_hidden_layers=3,
        bos_token_id=96,
        pad_token_id=131,
        kimia_mimo_layers=1,
        kimia_mimo_audiodelaytokens=2,
        kimia_mimo_transformer_from_layer_index=1,
        kimia_token_offset=132,
        kimia_adaptor_input_dim=32,
        **sizes,
    )
    encoder_config = WhisperConfig(
        num_mel_bins=80,
        d_model=8,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        max_source_positions=64,
    )
    policy = SpeechPolicy(
        model=KimiAudio(config, lora),
        encoder=WhisperEncoder(encoder_config),
        max_steps=max_steps,
        text=Sampling(temperature=0.9),
        audio=Sampling(temperature=0.8),
    )
    ids = jnp.zeros((1, 4), jnp.int32)
    rng = np.random.default_rng(0)
    codec = KMeansCodec.from_codebook(rng.normal(-3.0, 1.0, (num_codes, PATCH_DIM)), num_iters=1)
    encoder = jax.jit(policy.encoder.init)(jax.random.key(1), jnp.zeros((1, 16, 80)))
    # Larger than the usual start, so that logits differ clearly from each other.
    variables = jax.tree.map(
        lambda x: x * 4.0 if x.ndim > 1 else x,
        sharding.unbox(jax.jit(policy.model.init)(jax.random.key(0), ids, ids)),
    )
    frontend = Frontend(sharding.unbox(encoder), codec, codec)
    return Tiny(policy, variables, frontend, TextTokenizer.train(["a"], 256))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_of():
    """make_tiny, for tests that want other sizes."""
    return make_tiny


def make_queries(num: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of noises of different lengths: query float32[P, L], query_len int32[P]."""
    rng = np.random.default_rng(seed)
    lens = rng.integers(PATCH_SAMPLES, QUERY_CODES * PATCH_SAMPLES, num).astype(np.int32)
    waves = rng.normal(0, 0.1, (num, QUERY_CODES * PATCH_SAMPLES)).astype(np.float32)
    waves[np.arange(waves.shape[1]) >= lens[:, None]] = 0.0
    return {"query": waves, "query_len": lens}


@pytest.fixture(scope="session")
def queries() -> dict[str, np.ndarray]:
    return make_queries(8)


class Repeat:
    """A `train.loop.Source` of a list of batches, over and over."""

    def __init__(self, batches):
        self.batches, self.at = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return self.batches[(self.at - 1) % len(self.batches)]

    def state(self):
        return {"at": self.at}

    def restore(self, state):
        self.at = state["at"]


@pytest.fixture(scope="session")
def repeat():
    return Repeat


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Six one-tone wavs of different lengths: (their folder, their names)."""
    folder = tmp_path_factory.mktemp("clips")
    names = [f"{i}.wav" for i in range(6)]
    for i, name in enumerate(names):
        length = PATCH_SAMPLES * (2 + i % 3)
        tone = 0.3 * np.sin(2 * np.pi * (200 + 100 * i) * np.arange(length) / wave.RATE_HZ)
        wave.save(folder / name, tone.astype(np.float32), wave.RATE_HZ)
    return folder, names


@pytest.fixture(scope="session")
def reward_model(tiny):
    slot = tiny.tokenizer.vocab_size
    config = Qwen2AudioConfig(
        audio=WhisperConfig(
            d_model=8,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=16,
            max_source_positions=64,
        ),
        text=Qwen2Config(
            vocab_size=slot + 1,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        ),
        audio_token_index=slot,
    )
    return rewards.RewardModel(Qwen2Audio(config), rewards.score_prompt(tiny.tokenizer))


@pytest.fixture(scope="session")
def spoken(clips):
    """Six queries and an answer to each, all in one folder: (queries, responses, folder)."""
    folder, names = clips
    queries = [
        Query(
            id=f"q{i}",
            sentence_id=f"s{i // 2}",
            dimension="emotion",
            text="I just met her.",
            style=("sad", "surprised")[i % 2],
            contrast=("surprised", "sad")[i % 2],
            topic="people",
            split="train",
            voice="v",
            wav=name,
            dur_s=wave.load(folder / name).size / wave.RATE_HZ,
        )
        for i, name in enumerate(names)
    ]
    responses = [
        Response(query.id, "sft", 0, "sad" if i % 2 else "oh", names[-1 - i], dur_s=0.2)
        for i, query in enumerate(queries)
    ]
    return queries, responses, folder


def make_verdict(query, response, score):
    """A judge's verdict with nothing in it but the score, which may be NaN."""
    return Verdict(
        query_id=query.id,
        system=response.system,
        sample=response.sample,
        score=score,
        status="ok" if math.isfinite(score) else "tone: deaf",
        transcript_in="",
        style_in=query.style,
        style_source="label",
        transcript_out="",
        tone_out="",
        content=None,
        tone_fit=None,
        judge="by hand",
        raw={},
    )
