import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.judge import classifier, recipe
from paras2s_jax.judge.classifier import WaveClassifier
from paras2s_jax.models.whisper import WhisperForAudioClassification
from paras2s_jax.train.checkpoint import CheckpointError, save_part
from tests.judge.conftest import sound

LABELS = ("low", "high")
RECIPE = recipe.Recipe(num_steps=40, batch_size=4, lr=3e-3, warmup_steps=2, len_buckets_s=(0.5,))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Rows (wav, label) of 8 waves, and their folder."""
    root = tmp_path_factory.mktemp("clips")
    rows = []
    for index in range(8):
        label = LABELS[index % 2]
        wave = sound(f"{label} {label}"[: 4 + 5 * (index > 3)].strip(), level=0.1 + 0.05 * index)
        wave_lib.save(root / f"{index}.wav", wave, wave_lib.RATE_HZ)
        rows.append((f"{index}.wav", label))
    return rows, root


@pytest.fixture(scope="module")
def trained(clips, tiny_whisper):
    return classifier.train(tiny_whisper, *clips, LABELS, RECIPE)


@pytest.fixture(scope="module")
def fresh(tiny_whisper):
    """An untrained classifier."""
    model = WhisperForAudioClassification(tiny_whisper, len(LABELS))
    variables = recipe.init_variables(model, tiny_whisper, 0)
    return WaveClassifier(tiny_whisper, variables, LABELS, len_buckets_s=(0.25, 0.5), batch_size=4)


def test_learns_to_tell_sounds_apart(trained):
    waves = [sound("high", level=0.2), sound("low", 0.2), sound("low low"), sound("high high")]
    labels, probs = trained.name(waves)
    assert labels == ["high", "low", "low", "high"]
    assert probs.shape == (4, 2)
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, rtol=1e-5)


def test_probabilities_do_not_depend_on_company_or_padding(fresh):
    # Lengths of 0.2 and 0.4 s: two buckets.
    waves = [sound("low"), sound("high low"), sound("high")]
    _, together = fresh.name(waves)
    alone = np.concatenate([fresh.name([wave])[1] for wave in waves])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    # The short ones, padded into the longer bucket.
    padded = np.zeros((4, 8000), np.float32)
    lens = np.array([len(waves[0]), len(waves[2]), 1, 1], np.int32)
    for row, wave in enumerate((waves[0], waves[2])):
        padded[row, : len(wave)] = wave
    longer = fresh._probs(fresh.variables, padded, lens)
    np.testing.assert_allclose(longer[:2], together[[0, 2]], atol=1e-5)


def test_save_and_load(fresh, trained, tmp_path):
    fresh.save(tmp_path / "a.safetensors")
    loaded = WaveClassifier.load(tmp_path / "a.safetensors", batch_size=4)
    assert (loaded.labels, loaded.model_id) == (LABELS, fresh.model_id)
    assert loaded.max_dur_s == 0.5
    waves = [sound("low"), sound("high")]
    np.testing.assert_array_equal(loaded.name(waves)[1], fresh.name(waves)[1])
    # Other weights are another model to the ledger.
    assert trained.model_id != fresh.model_id


def test_foreign_part_and_broken_weights_are_refused(fresh, tmp_path):
    save_part(tmp_path / "x.safetensors", {"a": np.zeros(2)}, {"kind": "codec"})
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        WaveClassifier.load(tmp_path / "x.safetensors")
    broken = copy.copy(fresh)
    broken.variables = jax.tree.map(lambda x: x * np.nan, fresh.variables)
    with pytest.raises(CheckpointError, match="low/high"):
        broken.name([sound("low")])


def test_starts_from_a_given_encoder_and_trains_on(clips, fresh, tiny_whisper, monkeypatch):
    encoder = fresh.variables["params"]["encoder"]
    started = []

    def stop_before_training(state, update, batches, **kwargs):
        started.append(state.variables["params"]["encoder"])
        return state

    monkeypatch.setattr(classifier, "fit", stop_before_training)
    classifier.train(tiny_whisper, *clips, LABELS, RECIPE, init_encoder=encoder)
    classifier.train(
        tiny_whisper, *clips, LABELS, dataclasses.replace(RECIPE, seed=1), init_encoder=encoder
    )
    for start in started:
        jax.tree.map(np.testing.assert_array_equal, start, encoder)


def test_unknown_label_is_named(clips, tiny_whisper):
    rows, root = clips
    with pytest.raises(ValueError, match="'high'"):
        classifier.train(tiny_whisper, rows, root, ("low", "middle"), RECIPE)


def test_augment_touches_its_share_and_keeps_the_shape():
    waves, lens = jnp.ones((4, 2000)), jnp.full(4, 1900)

    def codec(waves, lens, rng):
        # Whole patches of 1280 samples: longer than the batch.
        return jnp.full((waves.shape[0], 2560), 2.0), jnp.full(waves.shape[0], 2560)

    new, new_lens = recipe.augment_rows(waves, lens, codec, RECIPE, jax.random.key(0))
    # Half of four rows; lengths are cut to the batch's.
    np.testing.assert_array_equal(new[:, 0], [2, 2, 1, 1])
    np.testing.assert_array_equal(new_lens, [2000, 2000, 1900, 1900])
    assert new.shape == waves.shape
    same, _ = recipe.augment_rows(waves, lens, None, RECIPE, jax.random.key(0))
    np.testing.assert_array_equal(same, waves)


def test_another_microphone_keeps_loudness_length_and_padding():
    waves = np.random.default_rng(0).normal(0, [[0.05], [0.2]], (2, 4000)).astype(np.float32)
    lens = jnp.asarray([4000, 3000])
    waves[1, 3000:] = 0.0
    new, new_lens = recipe.another_microphone(jnp.asarray(waves), lens, jax.random.key(1))
    np.testing.assert_array_equal(new_lens, lens)
    np.testing.assert_array_equal(new[1, 3000:], 0.0)
    for row, length in enumerate(lens):
        before, after = (np.sqrt(np.mean(x[row, :length] ** 2)) for x in (waves, np.asarray(new)))
        np.testing.assert_allclose(after, before, rtol=1e-3)
    assert np.abs(new - waves).max() > 0.01
    silent, _ = recipe.another_microphone(jnp.zeros((1, 100)), jnp.zeros(1, int), jax.random.key(1))
    np.testing.assert_array_equal(silent, 0.0)
