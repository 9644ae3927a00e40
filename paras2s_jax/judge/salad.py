"""Word salad: clips that speak words in random order, to teach a recogniser words.

The bank has a few hundred sentences. A recogniser that has heard nothing else knows them by heart
and hears one of them in any sound, so that it cannot tell a garbled answer from a clear one.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paras2s_jax.audio import styles
from paras2s_jax.data import speaking, synthesize
from paras2s_jax.data.records import SpeechClip
from paras2s_jax.data.tokenizer import normalize

MIN_WORDS, MAX_WORDS = 3, 7


def speak(
    texts: Sequence[str],
    out_dir: str | Path,
    num_clips: int,
    *,
    seed: int = 0,
    assistant_share: float = 0.6,
    maker: speaking.Maker = speaking.ESPEAK,
    num_workers: int = 1,
    progress: bool = True,
) -> list[SpeechClip]:
    """Speaks random words of the texts, each word about equally often.

    Args:
        texts: where the words come from; punctuation is dropped.
        assistant_share: share of the clips in the assistant's voice, in all of its tones; the rest
            is spoken by the train voices in all styles.
        maker: of `speaking.maker_of`.

    Returns: clips of kind "salad", wavs relative to out_dir; what is there already is kept.
    """
    words = sorted({word for text in texts for word in normalize(text).split()})
    rng = speaking.rng_of(seed, "salad")
    # Every word once in random order, then again in another.
    stream = iter(
        word
        for _ in range(-(-num_clips * MAX_WORDS // len(words)))
        for word in rng.permutation(words).tolist()
    )
    clips = []
    for index in range(num_clips):
        count = int(rng.integers(MIN_WORDS, MAX_WORDS + 1))
        text = " ".join(next(stream) for _ in range(count))
        is_assistant = rng.random() < assistant_share
        clips.append(_clip(f"salad-{index:05d}", text, is_assistant, seed))
    rows, _ = speaking.speak(
        clips, Path(out_dir), maker, num_workers=num_workers, progress=progress
    )
    return rows


def _clip(name: str, text: str, is_assistant: bool, seed: int) -> speaking.Clip:
    rng = speaking.rng_of(seed, "salad", name)
    tone = None
    if is_assistant:
        tone = str(rng.choice(styles.TONES))
        delivery = styles.tone_delivery(tone, rng)
    else:
        delivery = styles.delivery(*_voice_and_style(rng), rng)
    row = SpeechClip(name, text, wav="", split="train", dur_s=0.0, kind="salad", tone=tone)
    return speaking.Clip(row, "salad", name, text, delivery)


def _voice_and_style(rng: np.random.Generator) -> tuple[str, str]:
    style = str(rng.choice(list(styles.QUERY_STYLES)))
    (voice,) = synthesize.voices_for(style, "train", 1, rng)
    return voice, style
