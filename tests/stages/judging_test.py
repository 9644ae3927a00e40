"""The judge's stages by config, from checkpoints in their released layouts; a user's verdicts."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from paras2s_jax import cli
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.endpoint import EndpointError
from paras2s_jax.data.records import Query, Response, Verdict, write_jsonl
from paras2s_jax.judge.captioner import ToneCaptioner
from paras2s_jax.judge.classifier import WaveClassifier
from paras2s_jax.judge.duel import LocalComparer
from paras2s_jax.judge.endpoint_tone import EndpointToneCaptioner
from paras2s_jax.judge.local_score import LocalScorer
from paras2s_jax.judge.published import PublishedClassifier
from paras2s_jax.judge.recipe import init_variables
from paras2s_jax.judge.released import ReleasedTranscriber
from paras2s_jax.judge.style import StyleAnalyzers
from paras2s_jax.models.whisper import WhisperForAudioClassification
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.stages import judging
from paras2s_jax.stages.judging import given_verdicts
from paras2s_jax.stages.registry import StageError
from tests.judge.conftest import TEMPLATE
from tests.stages.conftest import write_chat

RESPONSES = [Response(f"q{i}", "sft", sample, "", "") for i in range(2) for sample in range(2)]


def verdict(query_id, sample, score):
    names = {field.name: "" for field in dataclasses.fields(Verdict)}
    return Verdict(
        **names
        | {"query_id": query_id, "sample": sample, "score": score, "raw": {}, "status": "ok"}
        | {"style_source": "label", "content": None, "tone_fit": None}
    )


ALL = [
    verdict("q1", 1, 4.0),
    verdict("q0", 0, 1.0),
    verdict("q1", 0, math.nan),
    verdict("q0", 1, 2.0),
]


def test_they_come_in_the_order_of_the_answers(tmp_path):
    path = write_jsonl(tmp_path / "verdicts.jsonl", [*ALL, verdict("another run's", 0, 5.0)])
    found = given_verdicts(path, RESPONSES, tmp_path / "responses.jsonl")
    assert [(v.query_id, v.sample) for v in found] == [(r.query_id, r.sample) for r in RESPONSES]
    assert [v.score for v in found][:2] == [1.0, 2.0] and math.isnan(found[2].score)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (None, r"is not there: judge the answers in .*responses\.jsonl"),
        (ALL[1:], r"no verdict on 1 of the 4 answers in .*, first on sample 1 of query 'q1'"),
        ([*ALL, ALL[0]], r"two verdicts on sample 1 of query 'q1'"),
    ],
)
def test_wrong_ones_are_refused(tmp_path, rows, sentence):
    path = tmp_path / "verdicts.jsonl"
    if rows is not None:
        write_jsonl(path, rows)
    with pytest.raises(StageError, match=sentence) as error:
        given_verdicts(path, RESPONSES, tmp_path / "responses.jsonl")
    assert str(path) in str(error.value)


WORDS = "abcdefghijklmnopqrstuvwxyz"
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def saved(model, folder, scale=4.0):
    """Random weights, larger than the usual start, so that outputs differ."""
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.mul_(scale)
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A Qwen2 with a byte-level vocabulary and a chat template."""
    folder = tmp_path_factory.mktemp("lm") / "Qwen2-Tiny"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=len(fast), max_position_embeddings=4096, **TEXT)
    return saved(transformers.Qwen2ForCausalLM(config), folder)


@pytest.fixture(scope="module")
def audio_model(tmp_path_factory):
    """A Qwen2-Audio, which the config's tone may be."""
    folder = tmp_path_factory.mktemp("audio") / "Qwen2-Audio-Tiny"
    slot = write_chat(folder)
    (folder / "chat_template.jinja").unlink()  # The release's own is the default.
    tower = {
        "d_model": 12,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 20,
        "num_mel_bins": 16,
        "max_source_positions": 1500,
    }
    torch.manual_seed(0)
    config = transformers.Qwen2AudioConfig(
        audio_config=tower, text_config=TEXT | {"vocab_size": slot + 4}, audio_token_index=slot
    )
    return saved(transformers.Qwen2AudioForConditionalGeneration(config), folder)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A Whisper of English only that knows single letters."""
    folder = tmp_path_factory.mktemp("whisper") / "whisper-tiny"
    letters = {letter: number for number, letter in enumerate(WORDS)}
    vocab = letters | {"<|endoftext|>": 26}
    transformers.WhisperTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=16).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=28,
        num_mel_bins=16,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=50,
        max_target_positions=12,
        pad_token_id=26,
        bos_token_id=26,
        eos_token_id=26,
        decoder_start_token_id=27,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    saved(transformers.WhisperForConditionalGeneration(config), folder)
    control = {
        "decoder_start_token_id": 27,
        "eos_token_id": 26,
        "is_multilingual": False,
        "suppress_tokens": [27],
    }
    (folder / "generation_config.json").write_text(json.dumps(control))
    return folder


@pytest.fixture(scope="module")
def emotions(tmp_path_factory):
    """A wav2vec 2.0 with labels of its own."""
    folder = tmp_path_factory.mktemp("wav2vec2") / "wav2vec2-emotion"
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        conv_dim=(8,) * 7,
        num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=8,
        classifier_proj_size=12,
        id2label={0: "neu", 1: "sur", 2: "sad"},
    )
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return saved(transformers.Wav2Vec2ForSequenceClassification(config), folder, 1.0)


@pytest.fixture
def config():
    """The judge's config on a small machine."""
    c = cli.load_config("configs/judge.py").unlock()
    c.judge.batch_size, c.judge.len_buckets_s = 2, (1.0,)
    c.judge.local.batch_size = 2
    return c


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A query in two styles, and answers of different sounds."""
    root = tmp_path_factory.mktemp("pairs")
    rng, found = np.random.default_rng(0), []
    for number, (style, other) in enumerate((("sad", "surprised"), ("surprised", "sad"))):
        for kind, dur_s in (("q", 0.5), ("a", 0.4)):
            wave = 0.1 * rng.normal(size=round(dur_s * 16_000)).astype(np.float32)
            wave_lib.save(root / f"{kind}{number}.wav", wave, 16_000)
        query = Query(
            f"q{number}", "s", "emotion", "hi", style, other, "t", "test", "v", "x.wav", 0.5
        )
        response = Response(query.id, "sys", 0, "", "a.wav")
        found.append((query, root / f"q{number}.wav", response, root / f"a{number}.wav"))
    return found


def test_an_open_judge_of_released_checkpoints(
    config, text_model, audio_model, whisper, emotions, pairs, tmp_path
):
    c = config.judge
    c.transcriber, c.tone, c.scorer = str(whisper), str(audio_model), "local"
    c.local.checkpoint, c.tone_max_new_tokens = str(text_model), 3
    c.analyzers.emotion = str(emotions)
    c.analyzer_names.emotion = (("sur", "surprised"), ("sad", "sad"))
    assert not judging.use_labels(config, [pair[0] for pair in pairs])
    judge = judging.make_judge(config, tmp_path, progress=False)
    about = judge.describe()
    assert set(about) == {"transcribe", "tone", "style emotion", "score"}
    assert about["score"]["model"].startswith("Qwen2-Tiny-prompt1-")
    # A random captioner ends no reply: that is a failure with its words, not a guess.
    for verdict in judge.judge(pairs):
        assert verdict.status == "tone: the reply does not end"
        assert verdict.style_in in ("sad", "surprised") and verdict.style_source == "analyzer"
        assert set(verdict.transcript_in) <= set(WORDS)
        assert math.isnan(verdict.score) and "raw" in verdict.raw["tone"]
    # With the packaged tone namer the language model has something to read.
    c.tone = "packaged"
    scores = [v.score for v in judging.make_judge(config, tmp_path, progress=False).judge(pairs)]
    assert all(1.0 <= score <= 5.0 for score in scores)


def test_every_stage_is_what_its_key_says(
    config, text_model, audio_model, whisper, emotions, tmp_path
):
    c = config.judge
    c.transcriber = str(whisper)
    assert isinstance(judging.make_transcriber(config, tmp_path), ReleasedTranscriber)
    c.tone, c.tone_endpoint.base_url = "endpoint", "http://localhost:1/v1"
    assert isinstance(judging.make_tone(config, tmp_path), EndpointToneCaptioner)
    c.tone = str(audio_model)
    assert isinstance(judging.make_tone(config, tmp_path), ToneCaptioner)
    c.scorer, c.local.checkpoint = "local", str(text_model)
    assert isinstance(judging.make_scorer(config, tmp_path), LocalScorer)
    assert isinstance(judging.make_comparer(config), LocalComparer)
    c.analyzers.emotion = str(emotions)
    c.analyzer_names.emotion = (("sur", "surprised"), ("sad", "sad"))
    sizes = WhisperConfig(8, 1, 2, 8, num_mel_bins=8, max_source_positions=60)
    variables = init_variables(WhisperForAudioClassification(sizes, 2), sizes, 0)
    own = WaveClassifier(sizes, variables, ("child", "adult"), len_buckets_s=(1.0,))
    StyleAnalyzers({"age": own}).save(tmp_path / "other" / "analyzers")
    c.analyzers.age = str(tmp_path / "other" / "analyzers")
    found = judging.make_analyzers(config, tmp_path)
    assert isinstance(found["emotion"], PublishedClassifier) and set(found) == {"emotion", "age"}
    assert found["age"].model_id == own.model_id


def wrong(config, key, value, monkeypatch, tmp_path):
    """The sentence with which a setting is refused."""
    *path, last = key.split(".")
    section = config.judge
    for name in path:
        section = section[name]
    section[last] = value
    with pytest.raises(StageError) as error:
        judging.make_judge(config, tmp_path)
    return str(error.value)


def test_wrong_checkpoints_name_their_key(
    config, text_model, audio_model, emotions, monkeypatch, tmp_path
):
    def says(key, value, **others):
        c = config.copy_and_resolve_references()
        c.judge.update(others)
        return wrong(c, key, str(value), monkeypatch, tmp_path)

    assert "judge.transcriber = " in says("transcriber", text_model)
    assert "is no Qwen2-Audio with its processor" in says("tone", text_model)
    assert "is no text model" in says("local.checkpoint", audio_model, scorer="local")
    plain = tmp_path / "plain"
    transformers.AutoTokenizer.from_pretrained(text_model).save_pretrained(plain)
    (plain / "chat_template.jinja").unlink()
    for name in ("config.json", "model.safetensors"):
        (plain / name).symlink_to(text_model / name)
    assert "plain has no chat template" in says("local.checkpoint", plain, scorer="local")
    assert "the model has no labels []" in says("analyzers.emotion", emotions)
    assert "has no analyzer of age" in says("analyzers.age", "trained")
    assert "choose one of rubric" in says("scorer", "oracle")
    assert "no reward model there; run `paras2s distill`" in says("scorer", "reward")
    assert "the scorer 'rubric' reads what it hears" in says("tone", "none")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY"):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        says("tone", "endpoint")


def test_styles_that_are_heard_in_part_are_refused(config, pairs):
    queries = [pairs[0][0], dataclasses.replace(pairs[0][0], dimension="age")]
    assert judging.use_labels(config, queries)
    config.judge.analyzers.age = "x"
    with pytest.raises(StageError, match=r"judge\.analyzers\.emotion is empty"):
        judging.use_labels(config, queries)
    config.bench.use_labels = True
    assert judging.use_labels(config, queries)
