"""Speaking styles as data: who speaks (voices) and how (prosody per style and per tone)."""

import dataclasses
import itertools

import numpy as np

from paras2s_jax.audio.synth import Delivery


@dataclasses.dataclass(frozen=True)
class VoiceSpec:
    """A speaker: an espeak voice, what a listener takes it for, and the split it belongs to."""

    espeak: str
    gender: str
    age: str
    split: str


def _adults(gender: str, split: str, variants: str) -> dict[str, VoiceSpec]:
    return {
        variant.lower(): VoiceSpec(f"en-us+{variant}", gender, "adult", split)
        for variant in variants.split()
    }


# No voice is shared between the splits: a style is never recognised by a known speaker. All have
# about espeak's usual tempo and melody, so that rate and pitch range tell the style. Median F0 at
# pitch 50: male 85-117 Hz, female 165-256 Hz. Many, because analyzers trained on a dozen voices
# know those by heart and mishear others.
VOICES = {
    **_adults(
        "male",
        "train",
        "Alex Denis Diogo Gene Gene2 Henrique Hugo Mike adam benjamin iven iven3 m1 m2 m3 m5 "
        "m7 m8 marcelo max michel miguel mike2 norbert pablo victor",
    ),
    **_adults("female", "train", "Alicia Annie aunty belinda f1 f5 grandma linda shelby steph"),
    **_adults("male", "test", "m6 sandro"),
    **_adults("female", "test", "f3 f4"),
}

# The assistant's own voice, which no user has: of all female variants, the one that a recogniser
# trained on people understands best in every tone.
ASSISTANT_VOICE = VoiceSpec("en-us+f2", "female", "adult", "assistant")

# Voices of OpenAI's speech API, for synthesizers that know no espeak voices.
_SERVER_VOICES = {
    ("male", "train"): ("ash", "cedar", "echo", "onyx", "verse"),
    ("female", "train"): ("coral", "nova", "sage"),
    ("male", "test"): ("ballad", "fable"),
    ("female", "test"): ("marin", "shimmer"),
    ("female", "assistant"): ("alloy",),
}


def _server_voices() -> dict[str, str]:
    """`Delivery.voice` -> voice on the server: of the same gender and split, in turn."""
    names = {key: itertools.cycle(voices) for key, voices in _SERVER_VOICES.items()}
    return {
        voice.espeak: next(names[voice.gender, voice.split])
        for voice in (*VOICES.values(), ASSISTANT_VOICE)
    }


OPENAI_VOICES = _server_voices()


@dataclasses.dataclass(frozen=True)
class Prosody:
    """A manner of speaking; the fields are those of `Delivery`."""

    rate_wpm: int
    pitch: int
    pitch_range: int
    volume: int
    tract_scale: float = 1.0
    instructions: str = ""


_NEUTRAL = Prosody(220, 50, 50, 100, instructions="Speak in a plain, even, everyday voice.")

QUERY_STYLES = {
    "neutral": _NEUTRAL,
    "surprised": Prosody(
        265, 82, 95, 165, instructions="Sound astonished: fast, high and loud, with wide swings."
    ),
    "sad": Prosody(
        155, 18, 10, 45, instructions="Sound sad: slow, low and quiet, almost without melody."
    ),
    "sincere": Prosody(
        245, 65, 55, 125, instructions="Sound sincerely pleased: lively, warm and natural."
    ),
    "sarcastic": Prosody(
        150, 22, 99, 75, instructions="Sound sarcastic: drawn out, low, with exaggerated melody."
    ),
    "child": Prosody(
        185, 70, 85, 105, 1.28, instructions="Sound like a child of six: high, slow, sing-song."
    ),
    "adult": dataclasses.replace(_NEUTRAL, instructions="Sound like an adult, in a plain voice."),
    "male": dataclasses.replace(_NEUTRAL, instructions="Sound like a man, in a plain voice."),
    "female": dataclasses.replace(_NEUTRAL, instructions="Sound like a woman, in a plain voice."),
}

# A man's vocal tract and pitch are further from a child's (F0 about 230 Hz) than a woman's.
_MALE_VOICE = {
    "child": dataclasses.replace(QUERY_STYLES["child"], pitch=99, tract_scale=1.46),
}

# What a style fades into as it gets milder: everyday speech; for a gender, a voice that could be
# anyone's, half-way between the pitches and vocal tracts of men and women.
_MIDPOINTS = {
    "male": dataclasses.replace(_NEUTRAL, pitch=80, tract_scale=1.08),
    "female": dataclasses.replace(_NEUTRAL, pitch=20, tract_scale=0.93),
}
MILD = "Only hint at it."

# How strong the styles are that analyzers learn from, per attribute. At full strength some are so
# far apart that even a plain analyzer would trust the voice more than the words; a hint will do.
POLYTONE_STRENGTH = {
    "emotion": (0.3, 0.55),
    "sarcasm": (0.9, 1.0),
    "age": (0.46, 0.71),
    "gender": (0.65, 0.9),
}

ASSISTANT_TONES = {
    "flat": Prosody(220, 45, 3, 80, instructions="Speak in a flat voice without any feeling."),
    "excited": Prosody(260, 82, 95, 160, instructions="Speak with excitement: fast, high, loud."),
    "gentle": Prosody(175, 58, 30, 40, instructions="Speak gently: slow, soft and comforting."),
    "wry": Prosody(165, 20, 96, 75, instructions="Speak in a dry, knowing, ironic voice."),
    "playful": Prosody(225, 95, 60, 100, instructions="Speak playfully, as to a small child."),
    "formal": Prosody(200, 12, 15, 140, instructions="Speak formally: measured, low and firm."),
}
TONES = tuple(ASSISTANT_TONES)


# A voice stands for speakers of its kind: their vocal tracts differ by up to this share.
_TRACT_JITTER = 0.05


def delivery(
    voice_name: str, style: str, rng: np.random.Generator, strength: float = 1.0
) -> Delivery:
    """How the voice speaks a query in the style, with the variation of live speakers.

    strength: 1 for the full style, towards 0 for a mere hint of it.
    """
    if voice_name not in VOICES:
        raise ValueError(f"unknown voice {voice_name!r}; known: {', '.join(VOICES)}")
    if style not in QUERY_STYLES:
        raise ValueError(f"unknown query style {style!r}; known: {', '.join(QUERY_STYLES)}")
    voice = VOICES[voice_name]
    if style in ("male", "female") and style != voice.gender:
        raise ValueError(f"voice {voice_name!r} is {voice.gender} and cannot speak as {style!r}")
    prosody = QUERY_STYLES[style]
    if voice.gender == "male":
        prosody = _MALE_VOICE.get(style, prosody)
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength {strength} of a style must lie in 0..1")
    if strength < 1.0:
        prosody = _milder(prosody, _MIDPOINTS.get(style, _NEUTRAL), strength)
    return _jittered(voice, prosody, rng, _TRACT_JITTER)


def tone_delivery(tone: str, rng: np.random.Generator) -> Delivery:
    """How the assistant speaks an answer in the tone; always the same speaker."""
    if tone not in ASSISTANT_TONES:
        raise ValueError(f"unknown tone {tone!r}; known: {', '.join(TONES)}")
    return _jittered(ASSISTANT_VOICE, ASSISTANT_TONES[tone], rng, 0.0)


def _milder(prosody: Prosody, midpoint: Prosody, strength: float) -> Prosody:
    """On the way from the midpoint to the full style."""

    def between(name):
        start, end = getattr(midpoint, name), getattr(prosody, name)
        return start + strength * (end - start)

    return Prosody(
        rate_wpm=round(between("rate_wpm")),
        pitch=round(between("pitch")),
        pitch_range=round(between("pitch_range")),
        volume=round(between("volume")),
        tract_scale=between("tract_scale"),
        instructions=f"{prosody.instructions} {MILD}",
    )


def _jittered(
    voice: VoiceSpec, prosody: Prosody, rng: np.random.Generator, tract_jitter: float
) -> Delivery:
    """Rate and loudness vary by 5 %, pitch by 4, its range by 3, the tract by `tract_jitter`."""
    rate, pitch, pitch_range, volume, tract = rng.uniform(-1.0, 1.0, 5)
    return Delivery(
        voice=voice.espeak,
        rate_wpm=round(prosody.rate_wpm * (1 + 0.05 * rate)),
        pitch=int(np.clip(round(prosody.pitch + 4 * pitch), 0, 99)),
        pitch_range=int(np.clip(round(prosody.pitch_range + 3 * pitch_range), 0, 99)),
        volume=round(prosody.volume * (1 + 0.05 * volume)),
        tract_scale=round(prosody.tract_scale * (1 + tract_jitter * tract), 3),
        instructions=prosody.instructions,
    )
