"""Speaking styles as data: who speaks (voices) and how (prosody per style and per tone)."""

import dataclasses

import numpy as np

from paras2s_jax.audio.synth import Delivery


@dataclasses.dataclass(frozen=True)
class VoiceSpec:
    """A speaker: an espeak voice, what a listener takes it for, and the split it belongs to."""

    espeak: str
    gender: str
    age: str
    split: str


def _adult(variant: str, gender: str, split: str) -> VoiceSpec:
    return VoiceSpec(f"en-us+{variant}", gender, "adult", split)


# No voice is shared between the splits: a style is never recognised by a known speaker. All have
# espeak's usual tempo, so that the rate tells the style. Median F0 at pitch 50: male 90-115 Hz,
# female 170-245 Hz.
VOICES = {
    "adam": _adult("adam", "male", "train"),
    "miguel": _adult("m3", "male", "train"),
    "oscar": _adult("m7", "male", "train"),
    "pablo": _adult("pablo", "male", "train"),
    "victor": _adult("victor", "male", "train"),
    "walter": _adult("m2", "male", "train"),
    "anna": _adult("f1", "female", "train"),
    "bella": _adult("f2", "female", "train"),
    "clara": _adult("f3", "female", "train"),
    "annie": _adult("Annie", "female", "train"),
    "linda": _adult("linda", "female", "train"),
    "steph": _adult("steph", "female", "train"),
    "marcus": _adult("m5", "male", "test"),
    "sandro": _adult("sandro", "male", "test"),
    "belinda": _adult("belinda", "female", "test"),
    "shelby": _adult("shelby", "female", "test"),
}

# The assistant's own voice: no user has it.
ASSISTANT_VOICE = VoiceSpec("en-us+f4", "female", "adult", "assistant")

# For synthesizers that know no espeak voices: `Delivery.voice` -> voice of OpenAI's speech API.
OPENAI_VOICES = {
    "en-us+adam": "ash",
    "en-us+m3": "echo",
    "en-us+m7": "onyx",
    "en-us+pablo": "verse",
    "en-us+victor": "ash",
    "en-us+m2": "echo",
    "en-us+f1": "coral",
    "en-us+f2": "nova",
    "en-us+f3": "sage",
    "en-us+Annie": "coral",
    "en-us+linda": "nova",
    "en-us+steph": "sage",
    "en-us+m5": "ballad",
    "en-us+sandro": "fable",
    "en-us+belinda": "shimmer",
    "en-us+shelby": "marin",
    "en-us+f4": "alloy",
}


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
        275, 82, 95, 165, instructions="Sound astonished: fast, high and loud, with wide swings."
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
        220, 66, 65, 105, 1.28, instructions="Sound like a small child of about six years."
    ),
    "adult": dataclasses.replace(_NEUTRAL, instructions="Sound like an adult, in a plain voice."),
    "male": dataclasses.replace(_NEUTRAL, instructions="Sound like a man, in a plain voice."),
    "female": dataclasses.replace(_NEUTRAL, instructions="Sound like a woman, in a plain voice."),
}

# A man's vocal tract and pitch are further from a child's (F0 about 230 Hz) than a woman's.
_MALE_VOICE = {
    "child": dataclasses.replace(QUERY_STYLES["child"], pitch=95, tract_scale=1.36),
}

ASSISTANT_TONES = {
    "flat": Prosody(220, 45, 3, 80, instructions="Speak in a flat voice without any feeling."),
    "excited": Prosody(270, 82, 95, 160, instructions="Speak with excitement: fast, high, loud."),
    "gentle": Prosody(175, 58, 30, 40, instructions="Speak gently: slow, soft and comforting."),
    "wry": Prosody(165, 20, 96, 75, instructions="Speak in a dry, knowing, ironic voice."),
    "playful": Prosody(225, 95, 60, 100, instructions="Speak playfully, as to a small child."),
    "formal": Prosody(200, 12, 15, 140, instructions="Speak formally: measured, low and firm."),
}
TONES = tuple(ASSISTANT_TONES)


def delivery(voice_name: str, style: str, rng: np.random.Generator) -> Delivery:
    """How the voice speaks a query in the style, with the small variation of a live speaker."""
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
    return _jittered(voice, prosody, rng)


def tone_delivery(tone: str, rng: np.random.Generator) -> Delivery:
    """How the assistant speaks an answer in the tone."""
    if tone not in ASSISTANT_TONES:
        raise ValueError(f"unknown tone {tone!r}; known: {', '.join(TONES)}")
    return _jittered(ASSISTANT_VOICE, ASSISTANT_TONES[tone], rng)


def _jittered(voice: VoiceSpec, prosody: Prosody, rng: np.random.Generator) -> Delivery:
    """Rate and loudness within 5 %, pitch within 4, range within 3, tract within 3 %."""
    rate, pitch, pitch_range, volume, tract = rng.uniform(-1.0, 1.0, 5)
    scale = prosody.tract_scale
    return Delivery(
        voice=voice.espeak,
        rate_wpm=round(prosody.rate_wpm * (1 + 0.05 * rate)),
        pitch=int(np.clip(round(prosody.pitch + 4 * pitch), 0, 99)),
        pitch_range=int(np.clip(round(prosody.pitch_range + 3 * pitch_range), 0, 99)),
        volume=round(prosody.volume * (1 + 0.05 * volume)),
        tract_scale=scale if scale == 1.0 else scale * (1 + 0.03 * tract),
        instructions=prosody.instructions,
    )
