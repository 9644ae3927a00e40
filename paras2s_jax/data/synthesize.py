"""The text bank -> speech: every jsonl + wav file that the later stages read.

Plans are pure: each `plan_*` function lists clips (a record, its words, a delivery) from the bank
and a seed, and every clip draws from a generator of its own, seeded by (seed, clip id), so that a
clip does not depend on which others are made. `speaking.speak` then makes those that are missing.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from paras2s_jax.audio import styles
from paras2s_jax.data import records
from paras2s_jax.data.bank import Bank, Leading, Sentence, load_bank
from paras2s_jax.data.records import DIMENSIONS, PolytoneClip, Query, Response, SpeechClip
from paras2s_jax.data.speaking import ESPEAK, Clip, Maker, rng_of, speak


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much to speak.

    sentences: see `Bank.first`; 0: all.
    train_voices, test_voices: per sentence and style, also per neutral dialogue.
    polytone_texts, polytone_voices: per attribute, each text in both styles by each voice; half
      of the texts are neutral, half suggest a style.
    plain_takes, contrary_takes: takes of each leading train / test text.
    answer_takes: train takes of each answer in each tone; one more is for testing.
    tone_texts: train texts spoken in all tones; a third as many test texts.
    """

    sentences: int = 0
    train_voices: int = 4
    test_voices: int = 2
    polytone_texts: int = 60
    polytone_voices: int = 4
    plain_takes: int = 10
    contrary_takes: int = 8
    answer_takes: int = 3
    tone_texts: int = 180


def voices_for(
    style: str, split: str, num_voices: int | None, rng: np.random.Generator
) -> list[str]:
    """Distinct voices of the split (None: all), men and women in turn.

    A gender style fixes the gender; other styles get the same voices from the same generator.
    """
    by_gender = {"male": [], "female": []}
    for name, voice in styles.VOICES.items():
        if voice.split == split and (style not in by_gender or style == voice.gender):
            by_gender[voice.gender].append(name)
    men, women = (rng.permutation(names).tolist() for names in by_gender.values())
    first, second = (men, women) if rng.integers(2) else (women, men)
    in_turn = [name for pair in zip(first, second) for name in pair]
    in_turn += first[len(second) :] + second[len(first) :]
    if num_voices is not None and num_voices > len(in_turn):
        raise ValueError(
            f"{num_voices} {split} voices asked for style '{style}', audio/styles.py has "
            f"{len(in_turn)}; ask for fewer."
        )
    return in_turn[:num_voices]


def plan_queries(bank: Bank, seed: int, sizes: Sizes) -> list[Clip]:
    """Every sentence in both styles; the two share their voices unless they are genders."""
    clips = []
    for sentence in bank.sentences:
        num_voices = sizes.train_voices if sentence.split == "train" else sizes.test_voices
        for style in (sentence.style_a, sentence.style_b):
            rng = rng_of(seed, "voices", sentence.id)
            for voice in voices_for(style, sentence.split, num_voices, rng):
                row = query_row(sentence, style, voice, f"{sentence.id}-{style}-{voice}")
                clips.append(_query_clip(row, seed))
    return clips


def query_row(sentence: Sentence, style: str, voice: str, name: str) -> Query:
    """A sentence in one of its styles, before it is spoken: `wav` is empty, `dur_s` 0."""
    return Query(
        id=name,
        sentence_id=sentence.id,
        dimension=sentence.dimension,
        text=sentence.text,
        style=style,
        contrast=sentence.contrast(style),
        topic=sentence.topic,
        split=sentence.split,
        voice=voice,
        wav="",
        dur_s=0.0,
    )


def plan_neutral(bank: Bank, seed: int, sizes: Sizes) -> tuple[list[Clip], list[Clip]]:
    """Neutral dialogues. Returns: (queries, their flat answers by the assistant)."""
    queries, answers = [], []
    for dialogue in bank.dialogues:
        num_voices = sizes.train_voices if dialogue.split == "train" else sizes.test_voices
        rng = rng_of(seed, "voices", dialogue.id)
        for voice in voices_for("neutral", dialogue.split, num_voices, rng):
            row = Query(
                id=f"{dialogue.id}-{voice}",
                sentence_id=dialogue.id,
                dimension="neutral",
                text=dialogue.text,
                style="neutral",
                contrast="neutral",
                topic=dialogue.topic,
                split=dialogue.split,
                voice=voice,
                wav="",
                dur_s=0.0,
            )
            queries.append(_query_clip(row, seed))
            answers.append(
                _answer_clip(row, "bland", "neutral_answers", dialogue.answer, "flat", seed)
            )
    return queries, answers


def plan_answers(
    bank: Bank, queries: Iterable[Query], system: str, folder: str, seed: int
) -> list[Clip]:
    """One answer per query, drawn from the bank: fitting in its tone, or for "bland" tone-deaf."""
    clips = []
    for query in queries:
        key = query.dimension, "neutral" if system == "bland" else query.style
        text = rng_of(seed, folder, query.id, "text").choice(bank.answers[key]).item()
        clips.append(_answer_clip(query, system, folder, text, bank.tones[key], seed))
    return clips


def plan_polytone(bank: Bank, seed: int, sizes: Sizes) -> list[Clip]:
    """Clips for the analyzers: PolyTone train, plain train and contradicting test sets.

    All sets hold both labels equally often. PolyTone speaks each text in both styles (paper
    section 2: the words must tell nothing), be it neutral or one whose words suggest a style.
    """
    clips = []
    for attribute in DIMENSIONS:
        labels = bank.styles(attribute)
        texts = bank.of("train")
        texts += [row for label in labels for row in bank.leading_of(attribute, label, "train")]
        order = rng_of(seed, "polytone", attribute).permutation(len(texts))
        # Neutral and leading texts in turn.
        for row in _in_turn([texts[i] for i in order], type)[: sizes.polytone_texts]:
            for label in labels:
                takes = _takes(label, "train", sizes.polytone_voices, seed, attribute, row.id)
                clips += [_polytone_clip(row, attribute, label, "polytone", t, seed) for t in takes]
        for label in labels:
            (contrary,) = set(labels) - {label}
            for kind, value, split, num_takes in (
                ("plain", label, "train", sizes.plain_takes),
                ("test", contrary, "test", sizes.contrary_takes),
            ):
                for row in bank.leading_of(attribute, value, split):
                    takes = _takes(label, split, num_takes, seed, attribute, row.id)
                    clips += [_polytone_clip(row, attribute, label, kind, t, seed) for t in takes]
    return clips


def plan_speech(bank: Bank, seed: int, sizes: Sizes) -> list[Clip]:
    """The assistant's voice: the answers, and texts of the users, each in every tone."""
    clips = []
    answers = [text for texts in bank.answers.values() for text in texts]
    answers += dict.fromkeys(dialogue.answer for dialogue in bank.dialogues)
    for index, text in enumerate(answers):
        for tone in styles.TONES:
            for take in range(sizes.answer_takes + 1):
                split = "test" if take == sizes.answer_takes else "train"
                name = f"answer-{index:02d}-{tone}-{take}"
                clips.append(_speech_clip(name, text, split, "answer", tone, seed))
    for split, num_texts in (("train", sizes.tone_texts), ("test", sizes.tone_texts // 3)):
        sentences = bank.of(split)
        order = rng_of(seed, "tones", split).permutation(len(sentences))
        for index in order[:num_texts]:
            for tone in styles.TONES:
                name = f"tone-{sentences[index].id}-{tone}"
                clips.append(_speech_clip(name, sentences[index].text, split, "tone", tone, seed))
    return clips


def select_demonstrations(queries: Sequence[Query], n: int, seed: int) -> list[Query]:
    """Picks n queries, even over styles, then over sentences; a larger n keeps all of a smaller.

    The order of `queries` does not matter.
    """
    if not 0 <= n <= len(queries):
        raise ValueError(f"{n} demonstrations asked for, there are {len(queries)} queries.")
    ranked = sorted(queries, key=lambda query: rng_of(seed, "select", query.id).random())
    ranked = _in_turn(ranked, lambda query: (query.sentence_id, query.style))
    return _in_turn(ranked, lambda query: (query.dimension, query.style))[:n]


def run(
    out_dir: str | Path,
    *,
    bank: Bank | None = None,
    seed: int = 0,
    num_workers: int = 2,
    sizes: Sizes = Sizes(),
    maker: Maker = ESPEAK,
    progress: bool = True,
) -> dict[str, float]:
    """Writes all jsonl files and wavs under `out_dir`; what is there already is kept.

    Args:
        bank: the texts; None for the bank of the package.
        maker: of `speaking.maker_of`.

    Returns: figures "<file>/clips" and "<file>/minutes", "total/…", and "made/clips" (new wavs).
    """
    out_dir = Path(out_dir)
    bank = (bank or load_bank()).first(sizes.sentences)
    plans = {"queries": plan_queries(bank, seed, sizes)}
    queries = [clip.row for clip in plans["queries"]]
    train = [query for query in queries if query.split == "train"]
    test = [query for query in queries if query.split == "test"]
    plans["demonstrations"] = plan_answers(bank, train, "demonstration", "demonstrations", seed)
    plans["bland"] = plan_answers(bank, train, "bland", "bland", seed)
    plans["topline"] = plan_answers(bank, test, "topline", "topline", seed)
    plans["neutral"], plans["neutral_answers"] = plan_neutral(bank, seed, sizes)
    plans["polytone"] = plan_polytone(bank, seed, sizes)
    plans["speech"] = plan_speech(bank, seed, sizes)

    everything = [clip for clips in plans.values() for clip in clips]
    rows, num_made = speak(everything, out_dir, maker, num_workers=num_workers, progress=progress)
    figures = {"total/clips": len(rows), "made/clips": num_made}
    figures["total/minutes"] = round(sum(row.dur_s for row in rows) / 60, 2)
    rows = iter(rows)
    files = {name: [next(rows) for _ in clips] for name, clips in plans.items()}
    files["speech"] = _transcribed(files) + files["speech"]
    for name, part in files.items():
        records.write_jsonl(out_dir / f"{name}.jsonl", part)
        figures[f"{name}/clips"] = len(part)
        figures[f"{name}/minutes"] = round(sum(row.dur_s for row in part) / 60, 2)
    return figures


def _query_clip(row: Query, seed: int) -> Clip:
    delivery = styles.delivery(row.voice, row.style, rng_of(seed, "queries", row.id))
    return Clip(row, "queries", row.id, row.text, delivery)


def _answer_clip(query: Query, system: str, folder: str, text: str, tone: str, seed: int) -> Clip:
    row = Response(query_id=query.id, system=system, sample=0, text=text, wav="", tone=tone)
    delivery = styles.tone_delivery(tone, rng_of(seed, folder, query.id))
    return Clip(row, folder, query.id, text, delivery)


def _polytone_clip(
    text: Sentence | Leading, attribute: str, label: str, kind: str, take: tuple, seed: int
) -> Clip:
    voice, number = take
    name = f"{kind}-{attribute}-{text.id}-{label}-{voice}-{number}"
    row = PolytoneClip(name, attribute, label, text.text, text.id, kind, voice, wav="", dur_s=0.0)
    rng = rng_of(seed, "polytone", name)
    lowest, highest = styles.POLYTONE_STRENGTH[attribute]
    # Tested where the voice is as plain as it gets in training.
    strength = highest if kind == "test" else rng.uniform(lowest, highest)
    delivery = styles.delivery(voice, label, rng, strength)
    return Clip(row, "polytone", name, text.text, delivery)


def _takes(style: str, split: str, num_takes: int, seed: int, *names: str) -> list[tuple]:
    """(voice, number of the take): all voices of the split once, then again if that is not enough.

    The generator does not depend on the style, so that a text's two styles share their voices.
    """
    voices = voices_for(style, split, None, rng_of(seed, "voices", *names))
    return [(voices[i % len(voices)], i // len(voices)) for i in range(num_takes)]


def _speech_clip(name: str, text: str, split: str, kind: str, tone: str, seed: int) -> Clip:
    row = SpeechClip(name, text, wav="", split=split, dur_s=0.0, kind=kind, tone=tone)
    delivery = styles.tone_delivery(tone, rng_of(seed, "speech", name))
    return Clip(row, "speech", name, text, delivery)


def _transcribed(files: dict[str, list]) -> list[SpeechClip]:
    """The users' clips of the other files as transcribed speech, which needs no new wavs."""
    rows = []
    for kind, query in [("sentence", q) for q in files["queries"]] + [
        ("dialogue", q) for q in files["neutral"]
    ]:
        rows.append(SpeechClip(query.id, query.text, query.wav, query.split, query.dur_s, kind))
    for clip in files["polytone"]:
        split = "test" if clip.set == "test" else "train"
        kind = "sentence" if clip.set == "polytone" else "leading"
        rows.append(SpeechClip(clip.id, clip.text, clip.wav, split, clip.dur_s, kind))
    return rows


def _in_turn(rows: Sequence, group: Callable) -> list:
    """First the first row of each group, then the second of each, and so on."""
    counts = defaultdict(int)
    turns = []
    for row in rows:
        counts[group(row)] += 1
        turns.append(counts[group(row)])
    return [rows[index] for index in sorted(range(len(rows)), key=turns.__getitem__)]
