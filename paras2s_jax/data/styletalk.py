"""StyleTalk's CSV files (Lin et al. 2024) as queries and reference answers.

Its rows are turns of a dialogue: the words of the user's last turn with a style, and the words of
an answer with one. Its waves are named by audio ids in a folder of the user's.
"""

import csv
from pathlib import Path

from tqdm import tqdm

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import Query, RecordError, Response, write_jsonl

# What a row must hold; the files have more.
COLUMNS = ("context_id", "curr_text", "curr_emotion", "res_text", "res_emotion")
SYSTEM = "styletalk"


def import_csv(
    path: str | Path, waves: str | Path, folder: str | Path, *, split: str = "test"
) -> tuple[int, int]:
    """Writes queries.jsonl, answers.jsonl and 16 kHz wavs below `folder`.

    A sentence's contrast is the next other emotion in which its words are spoken; sentences that
    are there in one style only are left out, for nothing could tell a deaf system by them.

    Args:
        path: with COLUMNS and audio_id, the name of the turn's file in `waves` without .wav.
        waves: folder of them.

    Returns: (queries written, rows left out).

    Raises:
        RecordError: a column is missing.
        AudioError: a wave is missing or broken.
    """
    path, waves, folder = Path(path), Path(waves), Path(folder)
    rows = _rows(path)
    styles: dict[str, list[str]] = {}
    for row in rows:
        known = styles.setdefault(_key(row), [])
        if row["curr_emotion"] not in known:
            known.append(row["curr_emotion"])
    numbers = {key: number for number, key in enumerate(sorted(styles))}
    queries, answers = [], []
    for number, row in enumerate(tqdm(rows, desc="import", unit="turn")):
        others = [name for name in styles[_key(row)] if name != row["curr_emotion"]]
        if not others:
            continue
        name = f"styletalk-{number:05d}"
        source = wave_lib.inside(waves, f"{row['audio_id']}.wav")
        wave = wave_lib.load(source)
        wav = f"wavs/{name}.wav"
        wave_lib.save(folder / wav, wave, wave_lib.RATE_HZ)
        queries.append(
            Query(
                id=name,
                sentence_id=f"styletalk-{numbers[_key(row)]:05d}",
                dimension="emotion",
                text=row["curr_text"].strip(),
                style=row["curr_emotion"],
                contrast=others[0],
                topic=row["context_id"],
                split=split,
                voice=row.get("speaker") or "unknown",
                wav=wav,
                dur_s=len(wave) / wave_lib.RATE_HZ,
            )
        )
        answers.append(
            Response(name, SYSTEM, 0, row["res_text"].strip(), "", tone=row["res_emotion"])
        )
    write_jsonl(folder / "queries.jsonl", queries)
    write_jsonl(folder / "answers.jsonl", answers)
    return len(queries), len(rows) - len(queries)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise RecordError(f"{path}: no such file; give one of StyleTalk's CSV files.")
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (*COLUMNS, "audio_id") if name not in (reader.fieldnames or ())]
        if missing:
            raise RecordError(f"{path}: no column {', '.join(missing)} in its first line.")
        return list(reader)


def _key(row: dict[str, str]) -> str:
    """Turns with the same words in the same dialogue are one sentence."""
    return f"{row['context_id']}\n{' '.join(row['curr_text'].lower().split())}"
