"""Recognition of speech of any length against transformers' generate."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.models import whisper_recognise as recognise_lib
from paras2s_jax.models.whisper_recognise import GREEDY, Attempt, Fallback
from tests.models.whisper_pairs import CONFIGS, speaking

LONG = dataclasses.replace(CONFIGS[0], max_target_positions=80)


def features_of(config, rows, frames, seed=0):
    """Noise in colours that differ from row to row, and every 20 frames."""
    rng = np.random.default_rng(seed)
    colours = 2 * rng.normal(size=(rows, config.num_mel_bins, -(-frames // 20)))
    noise = rng.normal(size=(rows, config.num_mel_bins, frames))
    return (noise + np.repeat(colours, 20, axis=2)[..., :frames]).astype(np.float32)


def times(config, num_words=30):
    """Ids of all times, which a random model says even where they are not asked for."""
    return range(num_words + 11, num_words + 12 + config.max_source_positions)


def words(generated, ids):
    """Rows of transformers' padded output, without the padding."""
    rows = np.asarray(generated)
    return [tuple(row[row != ids.eos_token_id].tolist()) for row in rows]


@pytest.mark.parametrize(("config", "task"), zip(CONFIGS, ("transcribe", "translate") * 2))
def test_64_greedy_tokens_equal_transformers(config, task):
    config = dataclasses.replace(config, max_target_positions=75)
    # The end token is suppressed, so that all 64 are said; and times, or both would seek to them.
    suppressed = {
        "suppress_tokens": (3, 8, 30, *times(config)),
        "begin_suppress_tokens": (5, 11, 12, 13),
    }
    hf, model, variables, ids = speaking(config, num_words=30, seed=2, **suppressed)
    features = features_of(config, 3, 2 * config.max_source_positions)
    expected = hf.generate(
        torch.tensor(features), language="en", task=task, max_new_tokens=64
    ).numpy()
    heard = recognise_lib.recognise(
        model,
        variables,
        features,
        ids=ids,
        language="English",
        task=task,
        max_new_tokens=64,
        fallback=GREEDY,
    )
    assert expected.shape == (3, 64)
    assert len(np.unique(expected)) > 8 and len({tuple(row) for row in expected}) == 3
    assert [list(row.tokens) for row in heard] == expected.tolist()
    assert not any(row.segments[0].attempt.finished for row in heard)


def test_languages_are_detected_as_in_transformers():
    hf, model, variables, ids = speaking(
        LONG, num_words=30, seed=9, suppress_tokens=tuple(times(LONG))
    )
    features = features_of(LONG, 6, 40, seed=1)
    expected = hf.detect_language(torch.tensor(features)).tolist()
    assert len(set(expected)) > 1
    options = {"ids": ids, "max_new_tokens": 12, "fallback": GREEDY}
    heard = recognise_lib.recognise(model, variables, features, **options)
    assert [row.language_id for row in heard] == expected
    # The prompts of the rows differ, and so must be what follows.
    generated = hf.generate(torch.tensor(features), task="transcribe", max_new_tokens=12)
    assert [row.tokens for row in heard] == words(generated, ids)
    named = ["de", "<|zh|>", "english", "en", "zh", "de"]
    heard = recognise_lib.recognise(model, variables, features, language=named, **options)
    generated = hf.generate(
        torch.tensor(features),
        language=["de", "zh", "en", "en", "zh", "de"],
        task="transcribe",
        max_new_tokens=12,
    )
    assert [row.tokens for row in heard] == words(generated, ids)
    with pytest.raises(ValueError, match="2 languages for 6 rows"):
        recognise_lib.recognise(model, variables, features, language=["de", "en"], **options)


def compare_segments(heard, expected):
    """heard: Recognition; expected: transformers' segments of a row."""
    assert [list(segment.tokens) for segment in heard.segments] == [
        segment["tokens"].tolist() for segment in expected
    ]
    for ours, theirs in zip(heard.segments, expected):
        assert ours.start_s == pytest.approx(float(theirs["start"]), abs=1e-6)
        # The reference truncates 0.01 * n / 0.02, which may fall below the whole number.
        assert ours.end_s == pytest.approx(float(theirs["end"]), abs=0.0201)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_long_audio_is_cut_as_in_transformers(seed):
    config = dataclasses.replace(CONFIGS[seed], max_target_positions=80)
    suppressed = {"suppress_tokens": (4, 9), "begin_suppress_tokens": (20,)}
    hf, model, variables, ids = speaking(config, num_words=30, seed=seed, **suppressed)
    features = features_of(config, 3, 140, seed=seed)
    mask = np.arange(140) < np.array([[140], [97], [110]])
    options = {"language": "de", "task": "transcribe", "max_new_tokens": 24}
    expected = hf.generate(
        torch.tensor(features),
        attention_mask=torch.tensor(mask.astype(int)),
        return_timestamps=True,
        return_segments=True,
        **options,
    )["segments"]
    heard = recognise_lib.recognise(
        model, variables, features, mask, ids=ids, fallback=GREEDY, **options
    )
    assert sum(map(len, expected)) > 6
    for row, wanted in zip(heard, expected):
        compare_segments(row, wanted)
    if seed:
        return
    # A row alone, cut to its length, is heard as in company.
    (alone,) = recognise_lib.recognise(
        model, variables, features[1:2, :, :97], ids=ids, fallback=GREEDY, **options
    )
    assert alone.tokens == heard[1].tokens


def test_short_audio_with_times_equals_transformers():
    hf, model, variables, ids = speaking(LONG, num_words=30, seed=5)
    features = features_of(LONG, 2, 40, seed=3)
    options = {"language": "en", "task": "transcribe", "return_timestamps": True}
    options["max_new_tokens"] = 24
    expected = hf.generate(torch.tensor(features), return_segments=True, **options)["segments"]
    heard = recognise_lib.recognise(model, variables, features, ids=ids, fallback=GREEDY, **options)
    for row, wanted in zip(heard, expected):
        compare_segments(row, wanted)


def test_no_speech_is_left_out_as_in_transformers():
    hf, model, variables, ids = speaking(LONG, num_words=30, seed=6)
    features = features_of(LONG, 1, 200, seed=4)
    options = {"language": "en", "task": "transcribe", "max_new_tokens": 16}
    (all_heard,) = recognise_lib.recognise(
        model, variables, features, ids=ids, fallback=GREEDY, **options
    )
    attempts = [segment.attempt for segment in all_heard.segments]
    # Thresholds in the middle of what there is, so that some windows go and some stay.
    logprob = float(np.median([attempt.mean_logp for attempt in attempts])) + 0.003
    no_speech = float(np.quantile([attempt.no_speech_prob for attempt in attempts], 0.3))
    expected = hf.generate(
        torch.tensor(features),
        return_segments=True,
        return_timestamps=True,
        temperature=(0.0,),
        logprob_threshold=logprob,
        no_speech_threshold=no_speech,
        compression_ratio_threshold=9.9,
        **options,
    )["segments"][0]
    fallback = Fallback((0.0,), 9.9, logprob, no_speech)
    (heard,) = recognise_lib.recognise(
        model, variables, features, ids=ids, fallback=fallback, **options
    )
    compare_segments(heard, expected)
    assert 0 < len(heard.tokens) != len(all_heard.tokens)


def test_likelihood_and_compression_equal_transformers():
    hf, model, variables, ids = speaking(LONG, num_words=30, seed=7)
    features = features_of(LONG, 2, 40, seed=5)
    options = {"language": "en", "task": "transcribe", "return_timestamps": True}
    options["max_new_tokens"] = 24
    result = hf.generate(
        torch.tensor(features), return_dict_in_generate=True, output_scores=True, **options
    )
    heard = recognise_lib.recognise(model, variables, features, ids=ids, fallback=GREEDY, **options)
    for row, segments in zip(heard, result["segments"]):
        sequence, scores = segments[0]["result"]["sequences"], segments[0]["result"]["scores"]
        said = row.segments[0].attempt
        tokens = [*said.tokens, *[ids.eos_token_id] * said.finished]
        # Behind the prompt of start, language and task.
        assert sequence[3:].tolist()[: len(tokens)] == tokens
        spoken = torch.tensor(tokens)
        logp = hf._retrieve_avg_logprobs(scores, spoken, 0.0)
        assert said.mean_logp == pytest.approx(float(logp), abs=1e-4)
        vocab_size = model.config.vocab_size
        assert recognise_lib.compression_ratio(tokens, vocab_size) == pytest.approx(
            hf._retrieve_compression_ratio(spoken, vocab_size)
        )


def test_a_window_is_cut_by_hand():
    ids = speaking(LONG, num_words=30)[-1]
    begin = ids.no_timestamps_token_id + 1

    def cut(*tokens):
        segments, step = recognise_lib.cut(Attempt(tokens, True, 0.0, 0.0, 0.0), ids, 40, 2.0)
        spans = [(round(s.start_s, 6), round(s.end_s, 6), s.tokens) for s in segments]
        return spans, step

    t = range(begin, begin + 21)
    # Nothing; words without times; words with a start only, and with an end.
    assert cut() == ([], 40)
    assert cut(5, 6) == ([(2.0, 2.4, (5, 6))], 40)
    assert cut(t[0], 5) == ([(2.0, 2.4, (t[0], 5))], 40)
    assert cut(t[0], 5, t[7]) == ([(2.0, 2.14, (t[0], 5, t[7]))], 40)
    # Two segments and a quiet end; a pair and words that are cut off: on from the pair.
    first = (2.04, 2.1, (t[2], 5, t[5]))
    assert cut(t[2], 5, t[5], t[6], 7, t[9]) == ([first, (2.12, 2.18, (t[6], 7, t[9]))], 40)
    assert cut(t[2], 5, t[5], t[6], 7) == ([(2.04, 2.1, (t[2], 5, t[5], t[6]))], 10)
    # Times that a careless model says unasked never make it stay where it is.
    assert cut(t[0], t[0], 7)[1] == 40


@pytest.mark.parametrize(
    ("tokens", "mean_logp", "no_speech_prob", "verdict"),
    [
        # Sound; a guess; a guess that is no speech; sure of itself, whatever it says of speech.
        (range(20), -0.4, 0.1, (False, False)),
        (range(20), -1.2, 0.1, (True, False)),
        (range(20), -1.2, 0.7, (False, True)),
        (range(20), -0.4, 0.9, (False, False)),
        # One token forty times compresses far better than 2.4; as no speech, it is left out.
        ([7] * 40, -0.1, 0.1, (True, False)),
        ([7] * 40, -1.1, 0.9, (False, True)),
    ],
)
def test_what_is_tried_again(tokens, mean_logp, no_speech_prob, verdict):
    _, model, _, ids = speaking(LONG, num_words=30)
    said = Attempt(tuple(tokens), True, mean_logp, no_speech_prob, 0.0)
    assert recognise_lib.judge(said, Fallback(), ids, model.config.vocab_size) == verdict
    loose = recognise_lib.judge(said, GREEDY, ids, model.config.vocab_size)
    assert loose == (False, False)


def test_temperature_rises_only_where_needed():
    _, model, variables, ids = speaking(
        LONG, num_words=30, seed=8, suppress_tokens=tuple(times(LONG))
    )
    features = features_of(LONG, 4, 40, seed=6)
    options = {"ids": ids, "language": "en", "max_new_tokens": 16}
    cold = recognise_lib.recognise(model, variables, features, fallback=GREEDY, **options)
    middle = float(np.median([row.segments[0].attempt.mean_logp for row in cold]))
    fallback = Fallback((0.0, 1.5), None, middle, None)
    mixed = recognise_lib.recognise(model, variables, features, fallback=fallback, **options)
    temperatures = [row.segments[0].attempt.temperature for row in mixed]
    assert sorted(temperatures) == [0.0, 0.0, 1.5, 1.5]
    for row, was, temperature in zip(mixed, cold, temperatures):
        # Drawn at 1.5 from 60 words, 16 tokens do not come out as the likeliest ones.
        assert (row.tokens == was.tokens) == (temperature == 0.0)
    again = recognise_lib.recognise(model, variables, features, fallback=fallback, **options)
    other = recognise_lib.recognise(
        model, variables, features, fallback=fallback, rng=jax.random.key(1), **options
    )
    assert [row.tokens for row in again] == [row.tokens for row in mixed]
    assert [row.tokens for row in other] != [row.tokens for row in mixed]


def test_waves_at_the_edges_equal_transformers(tmp_path):
    """Nothing, silence, 0.05 s, exactly 30 s, 8 kHz, 48 kHz stereo and 95 s in one call."""
    # A real front end (80 mels, 30 s), all else small. Times between 1 s and 28 s are not said,
    # so that few windows are needed.
    config = dataclasses.replace(
        CONFIGS[1], num_mel_bins=80, max_source_positions=1500, max_target_positions=32
    )
    suppressed = {"suppress_tokens": tuple(times(config)[50:1400])}
    hf, model, variables, ids = speaking(config, num_words=30, seed=9, **suppressed)
    rng = np.random.default_rng(0)
    waves = [np.zeros(0), np.zeros(16_000)]
    waves += [0.1 * rng.normal(size=size) for size in (800, 480_000)]
    for rate_hz, channels in ((8_000, 1), (48_000, 2)):
        path = tmp_path / f"{rate_hz}.wav"
        sound = 0.1 * rng.normal(size=(rate_hz, channels))
        wave_lib.soundfile.write(path, sound, rate_hz)
        waves.append(wave_lib.load(path))
        assert len(waves[-1]) == 16_000
    waves = [wave.astype(np.float32) for wave in (*waves, 0.1 * rng.normal(size=1_520_000))]
    options = {"language": "en", "task": "transcribe", "max_new_tokens": 8}
    heard = recognise_lib.recognise_waves(
        model, variables, waves, ids=ids, fallback=GREEDY, **options
    )
    extract = transformers.WhisperFeatureExtractor(feature_size=80)
    short = extract(waves[1:6], sampling_rate=16_000, return_tensors="pt").input_features
    expected = hf.generate(short, return_segments=True, return_timestamps=False, **options)[
        "segments"
    ]
    assert len({row.tokens for row in heard}) > 3
    for row, wanted in zip(heard[1:6], expected):
        compare_segments(row, wanted)
    # No samples are a silence.
    assert heard[0].tokens == heard[1].tokens
    whole = extract(
        waves[6], sampling_rate=16_000, return_tensors="pt", truncation=False, padding="longest"
    ).input_features
    assert whole.shape[-1] == 9500
    expected = hf.generate(whole, return_segments=True, return_timestamps=True, **options)
    compare_segments(heard[6], expected["segments"][0])
    assert heard[6].segments[-1].end_s > 60
