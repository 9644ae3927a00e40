"""Speech synthesis: espeak-ng inside this process, or any OpenAI-compatible speech server."""

import _ctypes
import ctypes
import dataclasses
import functools
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Protocol

import espeakng_loader
import numpy as np

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.audio.wave import AudioError


@dataclasses.dataclass(frozen=True)
class Delivery:
    """How a text is spoken.

    voice: an espeak voice with its variant ("en-us+m3"), or the voice name of a speech server.
    rate_wpm: words per minute, 80-450.
    pitch, pitch_range: 0-99, around the voice's own pitch (50 = natural).
    volume: loudness in percent of the reference level, 1-200.
    tract_scale: factor on formants and pitch; > 1 = a smaller speaker.
    instructions: a description of the manner, for speech servers that take one.
    """

    voice: str
    rate_wpm: int
    pitch: int
    pitch_range: int
    volume: int
    tract_scale: float = 1.0
    instructions: str = ""


class Synthesizer(Protocol):
    """Speaks texts; the only thing that stages know of a text-to-speech system."""

    name: str
    rate_hz: int

    def speak(self, text: str, delivery: Delivery) -> np.ndarray:
        """Returns: float32[L] at `rate_hz`, |x| < 1."""
        ...


# Root mean square of the voiced part at volume 100: leaves the loudest delivery below clipping.
_REFERENCE_RMS = 0.08
_PEAK = 0.95
_MARGIN_S = 0.04


def trim_silence(wave: np.ndarray, rate_hz: int, margin_s: float = _MARGIN_S) -> np.ndarray:
    """Cuts both ends to `margin_s` before and after the parts above -45 dB of the peak.

    wave: float32[L]. Returns: float32[<= L].
    """
    loud = np.flatnonzero(np.abs(wave) > np.max(np.abs(wave), initial=0.0) * 10 ** (-45 / 20))
    if not loud.size:
        return wave[:0]
    margin = round(margin_s * rate_hz)
    return wave[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def _set_level(wave: np.ndarray, volume: int) -> np.ndarray:
    """Scales a wave to the reference level times volume / 100, peaks kept below 1."""
    rms = float(np.sqrt(np.mean(np.square(wave))))
    gain = _REFERENCE_RMS * volume / 100 / rms
    return (wave * min(gain, _PEAK / float(np.max(np.abs(wave))))).astype(np.float32)


# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
# Low enough that no voice clips inside espeak; the level is set afterwards.
_ESPEAK_VOLUME = 60
_espeak_lock = threading.Lock()


class EspeakSynthesizer:
    """espeak-ng through ctypes, from the library that the wheel `espeakng-loader` ships.

    The same text and delivery give the same samples, in any process and after any other call:
    espeak keeps oscillator and noise state in static variables, which only a fresh load of the
    library resets, so each utterance loads it anew (about 1 ms).
    """

    name = "espeak"
    rate_hz = 22_050

    def speak(self, text: str, delivery: Delivery) -> np.ndarray:
        """Returns: float32[L] at 22.05 kHz."""
        _check(delivery)
        # Control characters are espeak's embedded commands; the text is only ever data.
        text = "".join(c if c.isprintable() else " " for c in text).strip()
        scale = delivery.tract_scale
        pcm = _espeak(text, delivery, round(delivery.rate_wpm / scale), self.rate_hz)
        wave = pcm.astype(np.float32) / 2**15
        # Spoken slower by the scale and played faster by it: the duration stays as asked.
        wave = wave_lib.resample(wave, self.rate_hz * scale, self.rate_hz)
        wave = trim_silence(wave, self.rate_hz)
        if wave.size < 0.05 * self.rate_hz:
            raise AudioError(f"espeak found nothing to say in {text!r}")
        return _set_level(wave, delivery.volume)


def _check(delivery: Delivery) -> None:
    limits = {
        "rate_wpm": (80, 450),
        "pitch": (0, 99),
        "pitch_range": (0, 99),
        "volume": (1, 200),
        "tract_scale": (0.6, 1.7),
    }
    for key, (low, high) in limits.items():
        value = getattr(delivery, key)
        if not low <= value <= high:
            raise AudioError(f"delivery.{key} must lie in [{low}, {high}], got {value}")
    _check_voice(delivery.voice)


@functools.cache
def _check_voice(voice: str) -> None:
    """espeak accepts any variant and falls back to its default without a word."""
    _, _, variant = voice.partition("+")
    folder = pathlib.Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    if variant and variant not in {path.name for path in folder.iterdir()}:
        raise AudioError(f"espeak has no voice variant {variant!r} (asked for {voice!r})")


def _espeak(text: str, delivery: Delivery, rate_wpm: int, rate_hz: int) -> np.ndarray:
    """One utterance by a freshly loaded library. Returns: int16[L]."""
    chunks = []

    def collect(samples, num_samples, _events) -> int:
        if samples and num_samples > 0:
            chunks.append(np.ctypeslib.as_array(samples, shape=(num_samples,)).copy())
        return 0

    callback = _CALLBACK(collect)
    with _espeak_lock:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        try:
            folder = espeakng_loader.get_data_path()
            actual_hz = library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(folder), _DONT_EXIT)
            if actual_hz != rate_hz:
                # Its buffers for paths are short (N_PATH_HOME = 160 in espeak-ng's speech.h).
                raise AudioError(
                    f"espeak cannot start from {folder}: install the environment under a shorter "
                    "path (150 characters at most), or reinstall espeakng-loader"
                )
            # espeak_Initialize seeds the noise of breathy voices from the clock.
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            library.espeak_SetSynthCallback(callback)
            if library.espeak_SetVoiceByName(delivery.voice.encode()):
                raise AudioError(f"espeak has no voice {delivery.voice!r}")
            # After the voice, which resets them.
            library.espeak_SetParameter(_RATE, max(80, rate_wpm), 0)
            library.espeak_SetParameter(_VOLUME, _ESPEAK_VOLUME, 0)
            library.espeak_SetParameter(_PITCH, delivery.pitch, 0)
            library.espeak_SetParameter(_RANGE, delivery.pitch_range, 0)
            data = text.encode() + b"\0"
            size = ctypes.c_size_t(len(data))
            failed = library.espeak_Synth(data, size, 0, 1, 0, _CHARS_UTF8, None, None)
            if failed or library.espeak_Synchronize():
                raise AudioError(f"espeak failed on {text!r}")
            library.espeak_Terminate()
        finally:
            handle = library._handle
            del library
            _ctypes.dlclose(handle)
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int16)


class OpenAISpeechSynthesizer:
    """Any server of OpenAI's speech API (hosted, vLLM-Omni, Kokoro, …).

    Only the voice and the instructions of a delivery are sent: such models follow words, not
    numbers. Failed requests (429, 5xx, connection) are repeated with growing pauses.
    """

    rate_hz = 24_000

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
        voices: Mapping[str, str] | None = None,
        max_retries: int = 6,
        timeout_s: float = 60.0,
    ):
        """Makes the client; sends nothing.

        Args:
          model: name of the speech model on the server.
          base_url: for example http://localhost:8000/v1; None for OpenAI's own.
          api_key_env: environment variable that holds the key; None for a server without keys.
          voices: `Delivery.voice` -> voice on the server; others are passed as they are.
          max_retries: further attempts after the first.
          timeout_s: limit of one attempt.
        """
        import openai  # Takes a second, which workers that only use espeak need not wait.

        self.name = f"openai:{model}"
        self._model = model
        self._server = base_url or "OpenAI"
        self._voices = dict(voices or {})
        self._key = "none" if api_key_env is None else os.environ.get(api_key_env, "")
        if not self._key:
            raise AudioError(f"speech server {self._server}: set its key in ${api_key_env}")
        self._error = openai.OpenAIError
        self._client = openai.OpenAI(
            api_key=self._key, base_url=base_url, max_retries=max_retries, timeout=timeout_s
        )

    def speak(self, text: str, delivery: Delivery) -> np.ndarray:
        """Returns: float32[L] at 24 kHz."""
        if not text.strip():
            raise AudioError("there is nothing to say in an empty text")
        manner = {"instructions": delivery.instructions} if delivery.instructions else {}
        try:
            response = self._client.audio.speech.create(
                model=self._model,
                voice=self._voices.get(delivery.voice, delivery.voice),
                input=text,
                response_format="wav",
                **manner,
            )
        except self._error as error:
            # Servers may echo the key; the original exception would show it in a traceback.
            reason = str(error).replace(self._key, "***")
            raise AudioError(f"speech server {self._server}: {reason}") from None
        wave = wave_lib.decode(
            response.content, f"answer of speech server {self._server}", self.rate_hz
        )
        wave = trim_silence(wave, self.rate_hz)
        if not wave.size:
            raise AudioError(f"speech server {self._server}: returned silence for {text!r}")
        return wave * min(1.0, _PEAK / float(np.max(np.abs(wave))))


def make_synthesizer(name: str, **kwargs) -> Synthesizer:
    """Makes "espeak", or "openai" with the arguments of OpenAISpeechSynthesizer."""
    makers = {"espeak": EspeakSynthesizer, "openai": OpenAISpeechSynthesizer}
    if name not in makers:
        raise AudioError(f"unknown synthesizer {name!r}; known: {', '.join(makers)}")
    return makers[name](**kwargs)
