"""Speech synthesis: deliveries are heard, the same input gives the same samples, servers fail."""

import concurrent.futures
import dataclasses
import hashlib
import http.server
import json
import multiprocessing
import threading
import time

import librosa
import numpy as np
import pytest

from paras2s_jax.audio import synth, wave
from paras2s_jax.audio.synth import Delivery
from paras2s_jax.audio.wave import AudioError

TEXT = "My sister has moved away."
PLAIN = Delivery("en-us+m3", rate_wpm=220, pitch=50, pitch_range=30, volume=100)
ESPEAK = synth.EspeakSynthesizer()


def pitch_hz(samples: np.ndarray) -> np.ndarray:
    """F0 of the louder frames."""
    setup = {"frame_length": 1024, "hop_length": 256}
    f0 = librosa.yin(samples, fmin=60, fmax=500, sr=ESPEAK.rate_hz, **setup)
    rms = librosa.feature.rms(y=samples, **setup)[0][: len(f0)]
    return f0[rms > 0.4 * rms.max()]


def say(text=TEXT, **changes) -> np.ndarray:
    return ESPEAK.speak(text, dataclasses.replace(PLAIN, **changes))


def digest(text_and_delivery) -> str:
    return hashlib.sha256(ESPEAK.speak(*text_and_delivery).tobytes()).hexdigest()


def test_speech_is_a_plausible_wave():
    samples = say()
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    # Five short words at 220 words per minute: 1.4 s, less the trimmed ends.
    assert 0.7 < len(samples) / ESPEAK.rate_hz < 1.5
    assert 0.1 < np.abs(samples).max() < 1.0
    assert 80 < np.median(pitch_hz(samples)) < 130


def test_pitch_rate_and_volume_are_heard():
    plain, high, slow, loud = say(), say(pitch=85), say(rate_wpm=150), say(volume=140)
    assert np.median(pitch_hz(high)) > 1.25 * np.median(pitch_hz(plain))
    # 220 / 150 = 1.47; pauses do not scale.
    assert 1.2 < len(slow) / len(plain) < 1.6
    level = np.sqrt([np.mean(plain**2), np.mean(loud**2)])
    assert level[1] / level[0] == pytest.approx(1.4, rel=1e-3)


def test_pitch_range_is_heard():
    spreads = [np.std(np.log2(pitch_hz(say(voice="en-us+f2", pitch_range=r)))) for r in (0, 99)]
    assert spreads[1] > 2 * spreads[0]


def test_tract_scale_raises_pitch_and_formants_but_keeps_the_duration():
    plain, small = say(), say(tract_scale=1.3)
    assert np.median(pitch_hz(small)) / np.median(pitch_hz(plain)) == pytest.approx(1.3, rel=0.05)
    centroids = [librosa.feature.spectral_centroid(y=x, sr=22_050).mean() for x in (plain, small)]
    assert centroids[1] > 1.1 * centroids[0]
    assert len(small) / len(plain) == pytest.approx(1.0, abs=0.06)


def test_loudness_never_reaches_full_scale():
    assert np.abs(say(voice="en-us+m5", volume=200)).max() < 1.0


def test_same_input_same_samples_whatever_was_said_before():
    first = say()
    say("Something else entirely!", voice="en-us+f2", rate_wpm=300, pitch=90)
    say("A whisper.", voice="en-us+whisper")
    np.testing.assert_array_equal(say(), first)


def test_breathy_voices_are_the_same_at_another_time():
    # espeak seeds its noise from the clock, in seconds.
    voices = [f"en-us+{variant}" for variant in ("f3", "f5", "sandro", "victor", "whisper")]
    before = [say(voice=voice) for voice in voices]
    time.sleep(1.1)
    for voice, samples in zip(voices, before, strict=True):
        np.testing.assert_array_equal(say(voice=voice), samples)


def test_same_samples_from_threads():
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(digest, [(TEXT, PLAIN)] * 8))) == 1


def test_same_samples_in_a_spawned_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(digest, [(TEXT, PLAIN)]) == [digest((TEXT, PLAIN))]


@pytest.mark.parametrize("text", ["", "  \n ", "...", "\x01", "🙂"])
def test_a_text_without_words_is_an_error_or_spoken(text):
    if text == "🙂":  # espeak knows the names of emoji.
        assert say(text).size
        return
    with pytest.raises(AudioError, match="nothing to say"):
        say(text)


def test_text_is_never_markup_or_command():
    # As SSML the tag would be silent; as data its letters are read out.
    assert len(say('<break time="9s"/> hello')) > 2 * len(say("hello"))
    # As phonemes this would be the word hello.
    assert len(say("[[h@l'oU]]")) != len(say("hello"))
    # espeak's embedded command "\x01 99P" would set the pitch.
    np.testing.assert_array_equal(say("\x01 hello"), say("hello"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rate_wpm", 40),
        ("rate_wpm", 500),
        ("pitch", 100),
        ("pitch_range", -1),
        ("volume", 0),
        ("tract_scale", 3.0),
    ],
)
def test_values_beyond_espeaks_limits_are_named(key, value):
    with pytest.raises(AudioError, match=rf"delivery\.{key} must lie in"):
        say(**{key: value})


@pytest.mark.parametrize("voice", ["en-us+nobody", "xx-nowhere", "en-us+../../x"])
def test_unknown_voices_are_errors_not_the_default_voice(voice):
    with pytest.raises(AudioError, match="espeak has no voice"):
        say(voice=voice)


def test_missing_voice_data_is_named(monkeypatch, tmp_path):
    say()  # The check of the voice name is cached and needs the real folder.
    monkeypatch.setattr(synth.espeakng_loader, "get_data_path", lambda: str(tmp_path / "gone"))
    with pytest.raises(AudioError, match=r"espeak cannot start from .*gone"):
        say()


def test_trim_silence_keeps_a_margin():
    # 100 silent samples, 50 loud, 100 silent; margin 10 ms at 1 kHz = 10 samples each side.
    samples = np.concatenate([np.zeros(100), np.full(50, 0.5), np.zeros(100)]).astype(np.float32)
    assert len(synth.trim_silence(samples, 1000, margin_s=0.01)) == 70
    assert synth.trim_silence(np.zeros(9, np.float32), 1000).size == 0


def test_make_synthesizer_by_name():
    assert synth.make_synthesizer("espeak").name == "espeak"
    with pytest.raises(AudioError, match="unknown synthesizer 'festival'; known: espeak, openai"):
        synth.make_synthesizer("festival")


class SpeechServer:
    """A local server of OpenAI's speech API that plays back a list of (status, body)."""

    def __init__(self, replies):
        self.requests, self.keys = [], []
        outer, replies = self, list(replies)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, json.loads(body)))
                outer.keys.append(self.headers["Authorization"])
                status, reply = replies.pop(0)
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.send_header("retry-after-ms", "5")
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


SECRET = "sk-secret-123"


@pytest.fixture
def wav(tmp_path) -> bytes:
    """One second at 16 kHz: silence, a tone of 0.4 s, silence."""
    t = np.arange(6_400) / 16_000
    samples = np.pad(0.5 * np.sin(2 * np.pi * 440 * t), 4_800)
    wave.save(tmp_path / "tone.wav", samples, 16_000)
    return (tmp_path / "tone.wav").read_bytes()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("SPEECH_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ask(replies, text="Hello.", **kwargs):
    with SpeechServer(replies) as server:
        synthesizer = synth.make_synthesizer(
            "openai", model="tts", base_url=server.url, api_key_env="SPEECH_KEY", **kwargs
        )
        delivery = dataclasses.replace(PLAIN, instructions="Sound sad.")
        return synthesizer, synthesizer.speak(text, delivery), server


def test_server_is_asked_for_voice_and_manner(wav):
    synthesizer, samples, server = ask([(200, wav)], voices={"en-us+m3": "echo"})
    assert server.requests == [
        (
            "/v1/audio/speech",
            {
                "model": "tts",
                "voice": "echo",
                "input": "Hello.",
                "instructions": "Sound sad.",
                "response_format": "wav",
            },
        )
    ]
    assert server.keys == [f"Bearer {SECRET}"]
    assert synthesizer.name == "openai:tts"
    assert samples.dtype == np.float32
    # The tone of 0.4 s and a margin of 0.04 s on both sides, at 24 kHz.
    assert len(samples) / synthesizer.rate_hz == pytest.approx(0.48, abs=0.01)


def test_busy_server_is_asked_again(wav):
    _, samples, server = ask([(429, b"{}"), (503, b"oops"), (200, wav)])
    assert len(server.requests) == 3
    assert samples.size


def test_retries_end():
    with pytest.raises(AudioError, match=r"speech server http://127\.0\.0\.1.*429"):
        ask([(429, b"{}")] * 2, max_retries=1)


def test_garbage_is_a_clear_error():
    with pytest.raises(AudioError, match=r"answer of speech server .* not readable as audio"):
        ask([(200, b"<html>It works!</html>")])


def test_silence_is_a_clear_error(tmp_path):
    wave.save(tmp_path / "silence.wav", np.zeros(1_600))
    with pytest.raises(AudioError, match=r"returned silence for 'Hello\.'"):
        ask([(200, (tmp_path / "silence.wav").read_bytes())])


def test_key_is_not_shown_when_the_server_echoes_it():
    reply = json.dumps({"error": {"message": f"Incorrect API key: {SECRET}"}}).encode()
    with pytest.raises(AudioError, match=r"401.*\*\*\*") as caught:
        ask([(401, reply)])
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


def test_unreachable_server_is_named():
    with SpeechServer([]) as server:
        url = server.url
    synthesizer = synth.OpenAISpeechSynthesizer(
        "tts", base_url=url, api_key_env=None, max_retries=0, timeout_s=2.0
    )
    with pytest.raises(AudioError, match=f"speech server {url}: Connection error"):
        synthesizer.speak("Hello.", PLAIN)


def test_missing_key_names_the_variable(monkeypatch):
    monkeypatch.delenv("SPEECH_KEY")
    with pytest.raises(AudioError, match=r"set its key in \$SPEECH_KEY"):
        synth.OpenAISpeechSynthesizer("tts", api_key_env="SPEECH_KEY")


def test_empty_text_is_not_sent():
    with pytest.raises(AudioError, match="nothing to say"):
        ask([], text=" ")
