"""report/index.html: tables, curves and players in one file that opens from disk.

Everything a model wrote or heard is untrusted text: the templates escape it (autoescape), and the
page runs no script but its own.
"""

import base64
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
import soundfile

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench import charts, tables
from paras2s_jax.bench.aggregate import BenchError, column_of
from paras2s_jax.bench.charts import Chart
from paras2s_jax.bench.tables import Results
from paras2s_jax.data.records import Query, Response, Verdict, read_jsonl
from paras2s_jax.data.tokenizer import normalize

# MP3 quality 0 (best) .. 1 (smallest): about 5 kB a second here, and every browser plays it.
_MP3_COMPRESSION = 0.6


def encode_audio(wave: np.ndarray) -> str:
    """A data: URI that browsers play. wave: float32[L] at 16 kHz.

    MP3, or FLAC (four times larger) where libsndfile is older than 1.1.
    """
    out = io.BytesIO()
    if "MP3" in soundfile.available_formats():
        soundfile.write(
            out, wave, wave_lib.RATE_HZ, format="MP3", subtype="MPEG_LAYER_III",
            bitrate_mode="VARIABLE", compression_level=_MP3_COMPRESSION,
        )  # fmt: skip
        kind = "mpeg"
    else:
        soundfile.write(out, wave, wave_lib.RATE_HZ, format="FLAC", subtype="PCM_16")
        kind = "flac"
    return f"data:audio/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def select_sentences(queries: Sequence[Query], per_column: int) -> list[str]:
    """Sentence ids, `per_column` of each column evenly over its sorted ids, columns in turn.

    By place, not by score, so that the page shows neither the best nor the worst.
    """
    found = defaultdict(set)
    for query in queries:
        found[column_of(query)].add(query.sentence_id)
    picked = []
    for column in sorted(found):
        ids = sorted(found[column])
        places = np.linspace(0, len(ids) - 1, min(per_column, len(ids))).round().astype(int)
        picked.append([ids[place] for place in places])
    longest = max(map(len, picked), default=0)
    return [ids[rank] for rank in range(longest) for ids in picked if rank < len(ids)]


class _Cards:
    """Cards of the listening section: a sentence, both its styles, every system's answers."""

    def __init__(self, folder: Path, root: Path, names: Sequence[str], queries: Sequence[Query]):
        self._folder, self._root, self._names = folder, root, names
        self._spoken = defaultdict(dict)
        for query in sorted(queries, key=lambda query: query.id):
            # One voice per style: the first.
            self._spoken[query.sentence_id].setdefault(query.style, query)
        self._responses = {name: self._first_samples(name, Response) for name in names}
        self._verdicts = {name: self._first_samples(name, Verdict) for name in names}

    def _first_samples(self, name: str, cls: type) -> dict:
        file = {Response: "responses.jsonl", Verdict: "verdicts.jsonl"}[cls]
        rows = sorted(read_jsonl(self._folder / name / file, cls), key=lambda row: row.sample)
        found = {}
        for row in rows:
            found.setdefault(row.query_id, row)
        return found

    def card(self, sentence_id: str) -> dict:
        queries = list(self._spoken[sentence_id].values())
        first = queries[0]
        return {
            "text": first.text,
            "column": column_of(first),
            "title": tables.TITLES[column_of(first)],
            "topic": first.topic,
            "takes": [self._take(query) for query in queries],
        }

    def _take(self, query: Query) -> dict:
        answers = [self._answer(query, name) for name in self._names]
        heard = self._verdicts[self._names[0]][query.id]
        return {
            "style": query.style,
            "audio": encode_audio(wave_lib.load(wave_lib.inside(self._root, query.wav))),
            "heard_style": heard.style_in if heard.style_source == "analyzer" else None,
            "heard_text": heard.transcript_in,
            "answers": answers,
        }

    def _answer(self, query: Query, name: str) -> dict:
        response, verdict = self._responses[name][query.id], self._verdicts[name][query.id]
        audio = None
        if not response.error:
            wav = wave_lib.inside(self._folder / name, response.wav)
            audio = encode_audio(wave_lib.load(wav))
        score = verdict.raw.get("score")
        reason = score.get("reason", "") if isinstance(score, Mapping) else ""
        scored = not np.isnan(verdict.score)
        return {
            "name": name,
            "audio": audio,
            "says": response.text,
            "heard": verdict.transcript_out,
            "same": normalize(response.text) == normalize(verdict.transcript_out),
            "tone": verdict.tone_out,
            "score": f"{verdict.score:.1f}" if scored else None,
            "share": round(25 * (verdict.score - 1)) if scored else 0,
            "status": verdict.status,
            "reason": reason,
            "cut": not response.finished,
        }


def _audio_chars(card: dict) -> int:
    return sum(
        len(take["audio"]) + sum(len(answer["audio"] or "") for answer in take["answers"])
        for take in card["takes"]
    )


def _within(cards: _Cards, sentence_ids: Sequence[str], max_mb: float) -> list[dict]:
    """Cards in order until their audio fills the page; grouped by column for reading."""
    shown, chars = [], 0
    for sentence_id in sentence_ids:
        card = cards.card(sentence_id)
        chars += _audio_chars(card)
        if chars > max_mb * 1e6:
            break
        shown.append(card)
    return sorted(shown, key=lambda card: card["column"])


def write_report(
    folder: Path,
    root: Path,
    out: Path,
    *,
    curves: Sequence[Chart] = (),
    title: str = "ParaS2S bench",
    about: Mapping[str, str] | None = None,
    sentences_per_column: int = 4,
    max_mb: float = 12.0,
) -> Path:
    """Writes the page from the files of a bench.

    Args:
        folder: of `run.bench`.
        root: the queries' wavs are relative to it.
        out: the page, for instance report/index.html.
        curves: charts of metrics.jsonl files, for instance `charts.grpo_charts(path)`.
        about: facts for the top of the page (config, commit, hardware).
        sentences_per_column: how many sentences can be listened to.
        max_mb: audio beyond this is left out, and the page says how many sentences it shows.

    Returns:
        out.
    """
    folder, root, out = Path(folder), Path(root), Path(out)
    results = tables.read_results(folder)
    queries = read_jsonl(folder / "queries.jsonl", Query)
    if not queries:
        raise BenchError(f"{folder / 'queries.jsonl'} lists no query; run the bench first.")
    cards = _Cards(folder, root, [system.name for system in results.systems], queries)
    picked = select_sentences(queries, sentences_per_column)
    shown = _within(cards, picked, max_mb)
    page = _render(
        title=title,
        about=dict(about or {}),
        results=results,
        panels=[charts.line_panel(chart) for chart in curves],
        cards=shown,
        num_sentences=len({query.sentence_id for query in queries}),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out)
    return out


def _render(*, results: Results, cards: Sequence[dict], **values: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("paras2s_jax.bench"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = tables.layout(results)
    present = {card["column"]: card["title"] for card in cards}
    return environment.get_template("report.html").render(
        results=results,
        caption=tables.caption(results),
        headings=[heading for heading, _ in columns],
        rows=[[cell(system) for _, cell in columns] for system in results.systems],
        dots=[charts.dot_panel(results, swap=False), charts.dot_panel(results, swap=True)],
        frame=charts,
        cards=cards,
        filters=sorted(present.items()),
        **values,
    )
