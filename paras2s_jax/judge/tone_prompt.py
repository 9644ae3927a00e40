"""How an audio language model is asked for the tone of an answer, and how its reply is read.

Questions are text files under tone_prompts/. A file that has been used is never edited: a change is
a new version.
"""

import re
from pathlib import Path

from paras2s_jax.judge.interfaces import Failure

PROMPTS_DIR = Path(__file__).parent / "tone_prompts"
VERSION = "1"
MAX_WORDS = 2
# Audio-Reasoner thinks aloud, then puts its reply between these.
_REPLY = re.compile(r"<RESPONSE>(.*?)(?:</RESPONSE>|$)", re.DOTALL)


def tone_prompt(version: str = VERSION) -> str:
    """The question. Raises FileNotFoundError where there is no such version."""
    path = PROMPTS_DIR / f"{version}.txt"
    if not path.is_file():
        known = sorted(found.stem for found in PROMPTS_DIR.glob("*.txt"))
        raise FileNotFoundError(
            f"there is no tone prompt version {version!r} in {PROMPTS_DIR}; there are "
            f"{', '.join(known)}"
        )
    return path.read_text(encoding="utf-8").strip()


def parse_tone(reply: str) -> str | Failure:
    """The tone that a reply names: one or two words, lower case, without marks around them."""
    match = _REPLY.search(reply)
    words = re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", match[1] if match else reply)
    if not 1 <= len(words) <= MAX_WORDS:
        return Failure(f"the reply has {len(words)} words, not one or two", raw=reply)
    return " ".join(words).lower()
