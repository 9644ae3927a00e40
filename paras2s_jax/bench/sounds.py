"""Sound of a page: inside the page while there is room, beyond it a link to the wav."""

import base64
import io
import os
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from paras2s_jax.audio import wave as wave_lib

# MP3 quality 0 (best) .. 1 (smallest): about 5 kB a second here, and every browser plays it.
_MP3_COMPRESSION = 0.6
Container = Literal["mp3", "flac"]


def encode(wave: np.ndarray, container: Container = "mp3") -> str:
    """A data: URI that browsers play. wave: float32[L] at 16 kHz.

    MP3, or FLAC (lossless, four times larger) on demand or where libsndfile is older than 1.1.
    """
    out = io.BytesIO()
    if container == "mp3" and "MP3" in soundfile.available_formats():
        soundfile.write(
            out, wave, wave_lib.RATE_HZ, format="MP3", subtype="MPEG_LAYER_III",
            bitrate_mode="VARIABLE", compression_level=_MP3_COMPRESSION,
        )  # fmt: skip
        kind = "mpeg"
    else:
        soundfile.write(out, wave, wave_lib.RATE_HZ, format="FLAC", subtype="PCM_16")
        kind = "flac"
    return f"data:audio/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def quoted(relative: str) -> str:
    """A relative path as a link; the quotes of a file's own name are quoted once more."""
    return urllib.parse.quote(relative)


class Sounds:
    """Sources of a page's players.

    Args:
        page: where the page will lie; links are relative to it.
        max_mb: of sound inside the page.
        container: of sound inside the page.
    """

    def __init__(self, page: Path, max_mb: float, container: Container = "mp3"):
        self._folder, self._container = Path(page).resolve().parent, container
        self._room_chars = max_mb * 1e6
        self.num_linked = 0

    def embed_all(self, wavs: Iterable[Path]) -> dict[Path, str] | None:
        """data: URIs of all wavs, or None (and no room taken) where not all of them fit."""
        found, room_chars = {}, self._room_chars
        for wav in dict.fromkeys(wavs):
            found[wav] = encode(wave_lib.load(wav), self._container)
            room_chars -= len(found[wav])
            if room_chars < 0:
                return None
        self._room_chars = room_chars
        return found

    def source(self, wav: Path) -> str:
        """A data: URI, or a link once the first sound did not fit."""
        found = self.embed_all([wav]) if self._room_chars > 0 else None
        if found is not None:
            return found[wav]
        self._room_chars = 0.0
        self.num_linked += 1
        return quoted(Path(os.path.relpath(Path(wav).resolve(), self._folder)).as_posix())
