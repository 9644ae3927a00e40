"""How far a transcript does what a rubric asks: cue phrases, matched with a tolerance for slips.

A cue counts only as whole words, so "art" is not heard in "party"; a word that the recogniser got
almost right gets part of the credit, so that a garbled answer lies between a clear one and none.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

from paras2s_jax.data.tokenizer import normalize

# One wrong letter in five is still the same word; below that, another word is likelier. So words
# of up to four letters must be heard exactly.
MIN_SIMILARITY = 0.8
# Credit at MIN_SIMILARITY; it rises to 1 for an exact match.
MIN_CREDIT = 0.5

# A "slip" that only adds one of these says the opposite ("fortunately", "unfortunately").
_NEGATING_PREFIXES = ("un", "in", "im", "dis", "non")

Acts = Sequence[Sequence[str]]


class Found(NamedTuple):
    """Credits in 0..1: for the acts of the right style, against it, and for mere politeness."""

    own: float
    against: float
    bland: float


def cue_credit(cue: str, words: Sequence[str]) -> float:
    """Credit in 0..1 for the best occurrence of a cue phrase among normalised words."""
    cue = normalize(cue)
    if not cue:
        return 0.0
    num_words = len(cue.split())
    best = 0.0
    # A recogniser also splits and joins words ("thank you", "thankyou").
    for width in range(max(1, num_words - 1), num_words + 2):
        for start in range(len(words) - width + 1):
            window = " ".join(words[start : start + width])
            best = max(best, _window_credit(cue, window))
            if best == 1.0:
                return best
    return best


def acts_credit(acts: Acts, words: Sequence[str]) -> float:
    """Mean over acts of the best of each act's alternative cues, in 0..1."""
    if not acts:
        return 0.0
    return sum(max((cue_credit(cue, words) for cue in act), default=0.0) for act in acts) / len(
        acts
    )


def without_shared_cues(acts: Acts, own: Acts) -> list[list[str]]:
    """The acts less those cues that `own` has too, which cannot tell the two styles apart."""
    shared = {normalize(cue) for act in own for cue in act}
    kept = [[cue for cue in act if normalize(cue) not in shared] for act in acts]
    return [act for act in kept if act]


def find(text: str, acts: Acts, contrasts: Iterable[Acts], bland: Sequence[str] = ()) -> Found:
    """Looks for cues in a transcript, which is otherwise never interpreted.

    Args:
        text: the transcript.
        acts: what a fitting answer does: per act, alternative cue phrases.
        contrasts: the acts of each other style.
        bland: cues of an answer that suits any style.
    """
    words = normalize(text).split()
    against = (acts_credit(without_shared_cues(other, acts), words) for other in contrasts)
    return Found(
        own=acts_credit(acts, words),
        against=max(against, default=0.0),
        bland=max((cue_credit(cue, words) for cue in bland), default=0.0),
    )


def _window_credit(cue: str, window: str) -> float:
    if window == cue:
        return 1.0
    if any(window == prefix + cue or cue == prefix + window for prefix in _NEGATING_PREFIXES):
        return 0.0
    similarity = Levenshtein.normalized_similarity(cue, window, score_cutoff=MIN_SIMILARITY)
    if similarity < MIN_SIMILARITY:
        return 0.0
    slope = (1.0 - MIN_CREDIT) / (1.0 - MIN_SIMILARITY)
    return MIN_CREDIT + slope * (similarity - MIN_SIMILARITY)
