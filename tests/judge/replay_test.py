import dataclasses
import io
import json
import math

import numpy as np
import pytest
import rich.console

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench import run, tables
from paras2s_jax.data.records import Query, Response, write_jsonl
from paras2s_jax.judge import replay
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.interfaces import Failure, Score, Transcript
from paras2s_jax.judge.ledger import Ledger, LedgerError


class Stage:
    model_id, settings, max_dur_s = "stage-1", {"zeta": (0.1, 2), "alpha": 1}, 1.0
    labels = ("sad", "surprised")

    def transcribe(self, waves):
        return [Transcript(f"w{round(100 * wave.max())}", -0.25) for wave in waves]

    def name(self, waves):
        odd = [round(100 * wave.max()) % 2 for wave in waves]
        return [self.labels[i] for i in odd], np.eye(2, dtype=np.float32)[odd]


class Scorer:
    name, version, settings_hash = "some-model", "prompt1", "abc"

    def score(self, heard, repeat=0):
        for index, item in enumerate(heard):
            level = int(item.transcript_out[1:])
            if level % 5 == 0:
                yield index, Failure("server error: status 500", raw={"status": 500})
            else:
                yield index, Score(1.0 + level % 4 + 0.25 * repeat, None, None, "because")


class Tones:
    """Answers with a constant each; one is too long for the judge."""

    name = "tones"

    def respond(self, queries, root, out_dir):
        rows = []
        for index, query in enumerate(queries):
            wav = f"wavs/{index}.wav"
            size = 20_000 if index == 3 else 1600
            wave = np.full(size, (20 + index) / 100, np.float32)
            wave_lib.save(out_dir / wav, wave, wave_lib.RATE_HZ)
            rows.append(Response(query.id, self.name, 0, "", wav))
        rows[2] = dataclasses.replace(rows[2], wav="", error="timeout: no reply")
        return write_jsonl(out_dir / "responses.jsonl", rows) and rows


def queries_in(root):
    queries = []
    for index in range(8):
        style, other = ("sad", "surprised")[:: 1 if index % 2 else -1]
        wav = f"q{index}.wav"
        wave_lib.save(root / wav, np.full(1600, (40 + index) / 100, np.float32), 16_000)
        queries.append(
            Query(
                f"q{index}",
                f"s{index // 2}",
                "emotion",
                "words",
                style,
                other,
                "t",
                "test",
                "v",
                wav,
                0.1,
            )
        )
    return queries


def bench(root, folder, judge):
    results = run.bench(
        [Tones()], queries_in(root), root, folder, judge=judge, answers=(), num_resamples=50,
        console=rich.console.Console(file=io.StringIO()),
    )  # fmt: skip
    return tables.figures(results)


def files(folder):
    names = ("table.md", "table.csv", "results.json", "tones/verdicts.jsonl", "tones/swapped.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("num_repeats", [1, 2])
def test_replay_gives_the_same_files_byte_for_byte(tmp_path, num_repeats):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    judge = Judge(
        Stage(), {"emotion": Stage()}, Stage(), Scorer(), ledger, num_repeats=num_repeats,
        progress=False,
    )  # fmt: skip
    figures = bench(tmp_path, tmp_path / "bench", judge)
    assert figures["bench/tones/failed"] > 1 and not math.isnan(figures["bench/tones/mean"])
    before = files(tmp_path / "bench")
    again = replay.replay_judge(tmp_path / "bench" / "judge.json", ledger)
    assert again.name == judge.name
    assert bench(tmp_path, tmp_path / "bench", again) == figures
    assert files(tmp_path / "bench") == before
    ledger.close()


def test_what_was_never_judged_fails_by_name(tmp_path):
    judge = Judge(
        Stage(), {"emotion": Stage()}, Stage(), Scorer(), Ledger(tmp_path / "a.sqlite"),
        progress=False,
    )  # fmt: skip
    bench(tmp_path, tmp_path / "bench", judge)
    empty = Ledger(tmp_path / "b.sqlite")
    again = replay.replay_judge(tmp_path / "bench" / "judge.json", empty)
    figures = bench(tmp_path, tmp_path / "bench", again)
    assert math.isnan(figures["bench/tones/mean"]) and figures["bench/tones/failed"] == 8
    text = (tmp_path / "bench/tones/verdicts.jsonl").read_text()
    assert "not in the ledger; judge it without --replay" in text


def test_a_failure_that_was_mended_is_replayed_as_mended(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    scorer = Scorer()
    judge = Judge(Stage(), {"emotion": Stage()}, Stage(), scorer, ledger, progress=False)
    bench(tmp_path, tmp_path / "bench", judge)
    failing = scorer.score
    scorer.score = lambda heard, repeat=0: (
        (index, Score(2.0, None, None, "")) for index, _ in enumerate(heard)
    )
    mended = bench(tmp_path, tmp_path / "bench", judge)
    scorer.score = failing
    again = replay.replay_judge(tmp_path / "bench" / "judge.json", ledger)
    assert bench(tmp_path, tmp_path / "bench", again) == mended


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"score": {"model": "x"}})])
def test_no_description_no_replay(tmp_path, text):
    path = tmp_path / "judge.json"
    with pytest.raises(LedgerError, match="no such file"):
        replay.replay_judge(path, Ledger(tmp_path / "a.sqlite"))
    path.write_text(text)
    with pytest.raises(LedgerError, match="describes no judge"):
        replay.replay_judge(path, Ledger(tmp_path / "a.sqlite"))
