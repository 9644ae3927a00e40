import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import SpeechClip
from paras2s_jax.judge import transcribe
from paras2s_jax.judge.recipe import Recipe
from paras2s_jax.train.checkpoint import CheckpointError, save_part
from tests.judge.conftest import sound

TEXTS = ("Low!", "High.", "low high", "High, low", "low low", "high high")
RECIPE = Recipe(num_steps=260, batch_size=8, lr=5e-3, warmup_steps=10, len_buckets_s=(0.5,))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_whisper):
    root = tmp_path_factory.mktemp("clips")
    clips = []
    for index in range(16):
        text = TEXTS[index % len(TEXTS)]
        words = text.lower().translate(str.maketrans("", "", "!.,"))
        wave = sound(words, level=0.1 + 0.02 * index)
        wave_lib.save(root / f"{index}.wav", wave, wave_lib.RATE_HZ)
        clips.append(SpeechClip(str(index), text, f"{index}.wav", "train", 0.4, "sentence"))
    # Two words are too few to be told from their own pieces: no rows without words here.
    return transcribe.train(tiny_whisper, clips, root, RECIPE, vocab_size=256, no_speech_share=0.0)


def test_learns_to_write_what_it_hears(trained):
    texts = ["low", "high", "low high", "high low"]
    heard = trained.transcribe([sound(text) for text in texts])
    assert [transcript.text for transcript in heard] == texts
    assert all(-0.5 < transcript.mean_logp <= 0 for transcript in heard)


def test_transcripts_do_not_depend_on_company(trained):
    waves = [sound("low"), sound("high low"), sound("high high")]
    together = trained.transcribe(waves)
    for wave, transcript in zip(waves, together):
        (alone,) = trained.transcribe([wave])
        assert alone.text == transcript.text
        assert alone.mean_logp == pytest.approx(transcript.mean_logp, abs=2e-4)


def test_quiet_or_unlikely_is_no_speech(trained):
    silence, faint = np.zeros(4000, np.float32), sound("low", level=5e-4)
    assert [t.text for t in trained.transcribe([silence, faint])] == ["", ""]
    (speech,) = trained.transcribe([sound("low")])
    doubtful = dataclasses.replace(trained.decoding, min_mean_logp=speech.mean_logp + 1e-3)
    strict = transcribe.WhisperTranscriber(
        trained.config, trained.variables, trained.tokenizer, doubtful, len_buckets_s=(0.5,)
    )
    (doubted,) = strict.transcribe([sound("low")])
    assert (doubted.text, doubted.mean_logp) == ("", speech.mean_logp)
    # The thresholds are settings: the ledger tells the two apart.
    assert strict.model_id == trained.model_id and strict.settings != trained.settings


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path / "asr")
    loaded = transcribe.WhisperTranscriber.load(tmp_path / "asr")
    assert loaded.model_id == trained.model_id
    assert loaded.settings == trained.settings and loaded.max_dur_s == 0.5
    waves = [sound("low"), sound("high low")]
    assert loaded.transcribe(waves) == trained.transcribe(waves)
    save_part(tmp_path / "asr" / transcribe.MODEL_FILE, {"a": np.zeros(2)}, {})
    with pytest.raises(CheckpointError, match=r"asr\.safetensors"):
        transcribe.WhisperTranscriber.load(tmp_path / "asr")


def test_compiles_once_per_bucket(trained):
    trained.transcribe([sound("low")])
    before = transcribe._transcribe._cache_size()
    trained.transcribe([sound("high")] * 37)
    assert transcribe._transcribe._cache_size() == before


def test_rows_without_words():
    waves = jnp.tile(jnp.repeat(jnp.arange(1.0, 5.0), 1280), (8, 1))
    lens, id_lens = jnp.full(8, waves.shape[1]), jnp.full(8, 3)
    new, new_lens, new_id_lens = transcribe.without_words(
        waves, lens, id_lens, 0.5, jax.random.key(0)
    )
    np.testing.assert_array_equal(new_id_lens, [0] * 4 + [3] * 4)
    np.testing.assert_array_equal(new_lens, lens)
    np.testing.assert_array_equal(new[4:], waves[4:])
    is_shuffled = []
    for row in np.asarray(new[:4]):
        kept = sorted(row) == sorted(np.asarray(waves[0]))
        is_shuffled.append(kept)
        # A piece of 80 ms stays whole.
        assert not kept or len(np.unique(row[:1280])) == 1
    assert set(is_shuffled) == {True, False}, "one draw of four should show both kinds"


def test_loss_by_hand(tiny_whisper):
    """With all-zero weights, every one of the V = 10 tokens has probability 1 / 10."""
    config = dataclasses.replace(tiny_whisper, vocab_size=10)
    model = transcribe.WhisperASR(config)
    variables = transcribe.init_variables(
        model, config, 0, decoder_input_ids=jnp.zeros((1, 4), jnp.int32)
    )
    variables["ctc"] = {"kernel": jnp.zeros((config.d_model, 9))}
    variables["voiceprint"] = transcribe.init_voiceprint(config)
    variables = jax.tree.map(jnp.zeros_like, variables)
    batch = {
        "waves": jnp.zeros((2, 3200)),
        "lens": jnp.array([3200, 3200]),
        # One id, and no speech; what stands past the length is padding.
        "ids": jnp.array([[4, 3], [7, 7]]),
        "id_lens": jnp.array([1, 0]),
    }
    sums = jax.jit(lambda v, b: transcribe._loss(model, v, b, 8, 9, (2.0, 3.0)))(variables, batch)
    # An id and an end, and an end.
    token_loss = 3 * np.log(10)
    # 3200 samples are 10 steps of the encoder. Of the 9^10 equally likely paths, those of one
    # symbol hold a run of k >= 1 of it: 10 + 9 + … + 1 = 55; only one has no symbol.
    ctc_loss = (10 * np.log(9) - np.log(55)) + 10 * np.log(9)
    assert float(sums.weight) == 3
    assert float(sums.metrics["token_loss"][0]) == pytest.approx(token_loss, rel=1e-5)
    assert float(sums.metrics["ctc_loss"][0]) == pytest.approx(ctc_loss, rel=1e-4)
    # Whisper's log-mel of silence is -1.5 in every band, and does not vary: the spread is 0.001.
    voiceprint_error = 2 * config.num_mel_bins * (1.5**2 + 0.001**2)
    assert float(sums.metrics["voiceprint_error"][0]) == pytest.approx(voiceprint_error, rel=1e-4)
    want = token_loss + 2 * ctc_loss + 3 * voiceprint_error
    assert float(sums.loss_sum) == pytest.approx(want, rel=1e-4)
