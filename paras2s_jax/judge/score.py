"""Words and names → a score of 1..5: the offline rubric, which stands in for a language model."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from paras2s_jax.data.bank import Rubric
from paras2s_jax.judge import rubric as rubric_lib
from paras2s_jax.judge.interfaces import Failure, Heard, Score
from paras2s_jax.judge.ledger import digest

SCORE_MIN = 1.0
SCORE_MAX = 5.0

# Shares of the four points above SCORE_MIN. Words weigh most; the tone earns its full share only
# with fitting words, because a warm voice that says nothing useful is no answer; any speech at all
# is worth something, so that a wrong answer stays above noise.
CONTENT_SHARE = 0.55
TONE_SHARE = 0.35
SPEECH_SHARE = 0.10
TONE_WITHOUT_CONTENT = 0.3

# Content of a polite answer that suits any style: more than wrong words, less than one act of two.
BLAND_CONTENT = 0.35


class RubricScorer:
    """Scores by cue phrases and a table of tones; pure and deterministic.

    The transcript is data: it is searched for the rubric's cues and never read as an instruction,
    so an answer that asks for a good score gets what its other words deserve. A tone that the
    rubric does not name does not fit.
    """

    name = "rubric"
    # Goes up whenever the formula or the matching changes a score.
    version = "1"

    def __init__(self, rubric: Mapping[tuple[str, str], Rubric]):
        for key, entry in rubric.items():
            _check_entry(key, entry)
        self._rubric = dict(rubric)
        # The other styles of a dimension: what an answer to the wrong style would do.
        self._contrasts = {
            (dimension, style): [
                other.acts
                for (other_dimension, other_style), other in self._rubric.items()
                if other_dimension == dimension and other_style != style
            ]
            for dimension, style in self._rubric
        }

    @property
    def settings_hash(self) -> str:
        """Hash of the rubric's contents and the formula's shares."""
        formula = [CONTENT_SHARE, TONE_SHARE, SPEECH_SHARE, TONE_WITHOUT_CONTENT, BLAND_CONTENT]
        matching = [rubric_lib.MIN_SIMILARITY, rubric_lib.MIN_CREDIT]
        entries = sorted([*key, dataclasses.asdict(entry)] for key, entry in self._rubric.items())
        return digest([formula, matching, entries])

    def score(
        self, heard: Sequence[Heard], repeat: int = 0
    ) -> Iterator[tuple[int, Score | Failure]]:
        """(index, Score) of every item; a Failure where a style has no rubric."""
        del repeat
        return ((index, self._score_one(item)) for index, item in enumerate(heard))

    def _score_one(self, heard: Heard) -> Score | Failure:
        key = (heard.dimension, heard.style_in)
        entry = self._rubric.get(key)
        if entry is None:
            return Failure(f"the rubric has no entry for {heard.dimension}/{heard.style_in}")
        if not rubric_lib.normalize(heard.transcript_out):
            return Score(SCORE_MIN, 0.0, 0.0, "no speech")
        found = rubric_lib.find(heard.transcript_out, entry.acts, self._contrasts[key], entry.bland)
        # Words that suit another style are no harmless politeness.
        floor = 0.0 if found.against else BLAND_CONTENT * found.bland
        content = max(floor, found.own - found.against)
        tone_fit = float(entry.tones.get(heard.tone_out, 0.0))
        return Score(
            score=total(content, tone_fit),
            content=content,
            tone_fit=tone_fit,
            reason=_reason(heard, entry, found, tone_fit),
        )


def total(content: float, tone_fit: float) -> float:
    """The score in 1..5 of an answer with audible words, from its two parts in 0..1."""
    tone_weight = TONE_WITHOUT_CONTENT + (1.0 - TONE_WITHOUT_CONTENT) * content
    share = CONTENT_SHARE * content + TONE_SHARE * tone_fit * tone_weight + SPEECH_SHARE
    return SCORE_MIN + (SCORE_MAX - SCORE_MIN) * share


def _reason(heard: Heard, entry: Rubric, found: rubric_lib.Found, tone_fit: float) -> str:
    words = (
        f"the words do {found.own:.0%} of what a {heard.style_in} speaker needs "
        f"({entry.requirement.rstrip('.')})"
    )
    if found.against:
        words += f" and {found.against:.0%} of what suits another style"
    elif found.bland and not found.own:
        words += " but are polite"
    return f"{words}; a {heard.tone_out} tone fits {tone_fit:.0%}"


def _check_entry(key: tuple[str, str], entry: Rubric) -> None:
    where = "/".join(key)
    if not entry.acts or not all(entry.acts):
        raise ValueError(f"rubric {where}: every entry needs acts, and every act a cue phrase.")
    wrong = [tone for tone, fit in entry.tones.items() if not 0.0 <= fit <= 1.0]
    if wrong:
        raise ValueError(f"rubric {where}: the fit of tone '{wrong[0]}' must lie in 0..1.")
