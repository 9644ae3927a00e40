"""Published classifiers in the judge: their labels, their padding, and a verdict by one of them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.convert import emotion2vec, wav2vec2
from paras2s_jax.data.records import Query, Response
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.interfaces import Score, Transcript
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.published import AGE_NAMES, GENDER_NAMES, PublishedClassifier
from paras2s_jax.models.emotion2vec import Emotion2vec
from paras2s_jax.models.wav2vec2 import (
    AgeGenderModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)
from tests.judge.conftest import sound
from tests.models.emotion2vec_test import tiny_config

CONFIG = Wav2Vec2Config(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=20,
    conv_dim=(8,) * 7,
    num_conv_pos_embedding_groups=2,
    num_conv_pos_embeddings=8,
    classifier_proj_size=12,
    id2label=("neu", "hap", "exc", "ang"),
)
NAMES = {"hap": "happy", "exc": "happy", "ang": "angry"}


def spread(model, family):
    """Parameters with which sounds are told apart."""
    boxed = jax.eval_shape(functools.partial(family.init, model), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(boxed)["params"]
    )


def published(model, family, names):
    return PublishedClassifier(
        model,
        spread(model, family),
        names,
        is_standardized=True,
        len_buckets_s=(0.5,),
        batch_size=2,
    )


@pytest.fixture(scope="module")
def emotion():
    return published(Wav2Vec2ForSequenceClassification(CONFIG), wav2vec2, NAMES)


@pytest.fixture(scope="module")
def waves():
    return [sound("high"), sound("low high"), sound("low", level=0.01), np.zeros(100, np.float32)]


def test_names_are_the_likeliest(emotion, waves):
    labels, probs = emotion.name(waves)
    assert emotion.labels == ("happy", "angry") and probs.shape == (4, 2)
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, atol=1e-5)
    assert labels == [emotion.labels[i] for i in probs.argmax(axis=1)]


def test_loaded_checkpoint_equals_transformers(waves, tmp_path):
    torch.manual_seed(0)
    values = {**dataclasses.asdict(CONFIG), "id2label": dict(enumerate(CONFIG.id2label))}
    for own in ("head", "prefix", "weight_norm_keys"):
        del values[own]
    hf = transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**values))
    hf.eval().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        PublishedClassifier.load(tmp_path, NAMES, len_buckets_s=(0.5,))
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    extract.save_pretrained(tmp_path)
    namer = PublishedClassifier.load(tmp_path, NAMES, len_buckets_s=(0.5,), batch_size=2)
    inputs = extract(waves[1], sampling_rate=wave_lib.RATE_HZ, return_tensors="pt")
    with torch.no_grad():
        want = torch.softmax(hf(**inputs).logits[0, 1:], -1).numpy()
    np.testing.assert_allclose(
        namer.name([waves[1]])[1][0], [want[0] + want[1], want[2]], atol=1e-5
    )


def test_one_age_and_gender_model_serves_two_attributes(waves):
    model = AgeGenderModel(CONFIG)
    age = published(model, wav2vec2, AGE_NAMES)
    gender = published(model, wav2vec2, GENDER_NAMES)
    assert set(age.labels) == {"child", "adult"} and set(gender.labels) == {"female", "male"}
    assert age.name(waves)[1].shape == gender.name(waves)[1].shape == (4, 2)
    # The same weights, read differently, are kept apart in the ledger.
    assert age.model_id == gender.model_id and age.settings != gender.settings


def test_emotion2vec_names_emotions_whatever_the_company(waves):
    config = tiny_config(token_list=("生气/angry", "开心/happy", "<unk>"))
    names = {"生气/angry": "angry", "开心/happy": "happy"}
    namer = published(Emotion2vec(config), emotion2vec, names)
    together = namer.name(waves)[1]
    # The batch of the last wave is filled up with copies of it.
    np.testing.assert_allclose(together[3:], namer.name(waves[3:])[1], atol=1e-5)
    assert np.ptp(together[:, 0]) > 1e-3


def test_wrong_labels_and_models_are_refused():
    options = {"is_standardized": True, "len_buckets_s": (1.0,)}
    model = Wav2Vec2ForSequenceClassification(CONFIG)
    with pytest.raises(ValueError, match=r"no labels \['sad'\]; it has \['neu', 'hap'"):
        PublishedClassifier(model, {}, {"sad": "sad"}, **options)
    with pytest.raises(ValueError, match="Wav2Vec2Model names no styles"):
        PublishedClassifier(Wav2Vec2Model(CONFIG), {}, {"hap": "happy"}, **options)


class Hearer:
    model_id, settings, max_dur_s = "hearer", {}, 9.0

    def transcribe(self, waves):
        return [Transcript("words", 0.0) for _ in waves]


class StyleScorer:
    """Tells what style it was given."""

    name, version, settings_hash = "style", "1", "x"

    def score(self, heard, repeat=0):
        return [(i, Score(3.0, None, None, item.style_in)) for i, item in enumerate(heard)]


def test_judge_hears_the_style_with_a_published_model(emotion, waves, tmp_path):
    for name, wave in (("in", waves[0]), ("out", waves[1])):
        wave_lib.save(tmp_path / f"{name}.wav", wave, wave_lib.RATE_HZ)
    query = Query(
        "q", "s", "emotion", "words", "happy", "angry", "topic", "test", "v", "in.wav", 0.2
    )
    response = Response("q", "system", 0, "words", "out.wav")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        judge = Judge(
            Hearer(), {"emotion": emotion}, emotion, StyleScorer(), ledger, progress=False
        )
        pair = (query, tmp_path / "in.wav", response, tmp_path / "out.wav")
        (verdict,) = judge.judge([pair])
    assert verdict.status == "ok" and verdict.style_source == "analyzer"
    want, _ = emotion.name([wave_lib.load(tmp_path / "in.wav")])
    assert verdict.style_in == verdict.raw["score"]["reason"] == want[0]
