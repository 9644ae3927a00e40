"""The judge command on fake ears: what they hear is the level of constant waves."""

import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from paras2s_jax import cli
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import Query, Verdict, read_jsonl, write_jsonl
from paras2s_jax.judge.card import Card, write_card
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.interfaces import Score, Transcript
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.perf.chat_server import ChatServer, audio_message
from paras2s_jax.stages.registry import StageError

judge_stage = importlib.import_module("paras2s_jax.stages.judge")

STYLES = ("sad", "surprised")
BOTH = (("one", 2), ("two", 4))


class Ear:
    model_id, settings, max_dur_s, labels = "ear", {}, 5.0, STYLES

    def transcribe(self, waves):
        return [Transcript(f"level {round(100 * wave.max())}", 0.0) for wave in waves]

    def name(self, waves):
        odd = [round(100 * wave.max()) % 2 for wave in waves]
        return [STYLES[i] for i in odd], np.eye(2, dtype=np.float32)[odd]


class Scorer:
    name, version, settings_hash = "levels", "1", "x"

    def score(self, heard, repeat=0):
        for index, item in enumerate(heard):
            yield index, Score(1.0 + int(item.transcript_out[6:]) % 5, None, None, "by level")


@pytest.fixture
def asked(tmp_path):
    """queries.jsonl of 100 sentences in two styles, and a folder with 200 answers."""
    rows = []
    for index in range(200):
        style, other = STYLES[:: 1 if index % 2 else -1]
        wav = f"queries/{index}.wav"
        wave_lib.save(tmp_path / wav, np.full(400, (20 + index % 60) / 100, np.float32), 16_000)
        answer = np.full(400, (10 + index % 7) / 100, np.float32)
        wave_lib.save(tmp_path / f"answers/q{index}.wav", answer, 16_000)
        rows.append(
            Query(
                f"q{index}",
                f"s{index // 2}",
                "emotion",
                "words",
                style,
                other,
                "topic",
                "test",
                "v",
                wav,
                0.025,
            )
        )
    return write_jsonl(tmp_path / "queries.jsonl", rows)


@pytest.fixture
def fake_judge(monkeypatch):
    def make(config, workdir):
        return Judge(
            Ear(), {}, Ear(), Scorer(), Ledger(workdir / judge_stage.LEDGER), progress=False
        )

    monkeypatch.setattr(judge_stage, "make_judge", make)


def run(asked, workdir, *flags):
    argv = ["paras2s", "judge", "--config=configs/judge.py", f"--queries={asked}"]
    return cli.main([*argv, f"--workdir={workdir}", "--config.bench.num_resamples=50", *flags])


def test_a_folder_of_200_answers(asked, tmp_path, fake_judge, capsys):
    workdir = tmp_path / "run"
    folder = f"--config.system.source={tmp_path / 'answers'}"
    assert run(asked, workdir, folder) == 0
    out = capsys.readouterr().out
    assert "ParaS2SBench" in out and "0/200" in out
    for name in ("bench/table.md", "report/index.html", "rating/index.html"):
        assert (workdir / name).is_file()
    before = (workdir / "bench" / "results.json").read_bytes()
    assert run(asked, workdir, "--replay") == 0
    assert (workdir / "bench" / "results.json").read_bytes() == before


def test_an_endpoint_by_the_same_path(asked, tmp_path, fake_judge, capsys):
    wav = io.BytesIO()
    soundfile.write(wav, np.full(400, 0.14), 16_000, format="WAV")
    with ChatServer(lambda body: audio_message(wav.getvalue(), "well")) as server:
        endpoint = f"--config.system.endpoint.base_url={server.url}"
        assert run(asked, tmp_path / "run", "--config.system.kind=chat", endpoint) == 0
        assert len(server.requests) == 200
    assert "0/200" in capsys.readouterr().out


def test_a_judge_that_failed_its_card_is_refused_unless_forced(asked, tmp_path, fake_judge, capsys):
    workdir = tmp_path / "run"
    name = judge_stage.make_judge(None, workdir).name
    write_card(Card(name, {}, {"judge/probe_order": 0.5}), workdir / "card")
    folder = f"--config.system.source={tmp_path / 'answers'}"
    assert run(asked, workdir, folder) == 2
    assert "failed its card (probes in their order" in capsys.readouterr().err
    assert run(asked, workdir, folder, "--force") == 0
    assert "THE JUDGE FAILED ITS CARD" in (workdir / "bench" / "table.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--humans=x.csv"], "--humans is for the judge card"),
        (["--batch=write"], "set --config.judge.scorer=endpoint"),
        ([], "a system of kind 'folder' needs system.source"),
        (["--config.system.kind=fax"], "choose one of folder, recorded, chat"),
        (["--replay"], "only what has been judged can be replayed"),
    ],
)
def test_what_cannot_be_done_says_so(asked, tmp_path, fake_judge, capsys, flags, message):
    assert run(asked, tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err


def test_the_card_takes_what_people_said(asked, tmp_path, fake_judge, capsys):
    workdir = tmp_path / "run"
    assert run(asked, workdir, f"--config.system.source={tmp_path / 'answers'}") == 0
    verdicts = read_jsonl(workdir / "bench" / "mine" / "verdicts.jsonl", Verdict)
    # Two people who say what the judge says, and one who says the opposite.
    rows = ["rater,query_id,system,sample,score"]
    for verdict in verdicts[:30]:
        score = round(verdict.score)
        for rater, given in (("ann", score), ("bob", score), ("cy", 6 - score)):
            rows.append(f"{rater},{verdict.query_id},mine,0,{given}")
    ratings = tmp_path / "ratings.csv"
    ratings.write_text("\n".join(rows))
    flags = (f"--humans={ratings}", "--config.bench.num_probes=2")
    assert run(asked, workdir, "--card", *flags) == 0
    card = (workdir / "card" / "card.md").read_text()
    # The mean of s, s and 6 - s rises with s; emotion is all there is.
    for name in ("emotion", "all"):
        (row,) = (line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert row.split("|")[2].strip().startswith("1 [1, 1]") and row.endswith("| 30 | 3 |")
    assert "attack/rubric/changed | 0 |" in card
    assert "judge/echo_order" in card
    assert "NOT PASSED" in capsys.readouterr().out  # It goes by loudness.
    assert run(asked, workdir, "--card", f"--humans={tmp_path / 'none.csv'}") == 2
    assert "export it from the rating page" in capsys.readouterr().err


def test_attacks_on_the_configured_scorer(tmp_path, capsys):
    argv = ["paras2s", "attack", "--config=configs/judge.py", f"--workdir={tmp_path}"]
    assert cli.main(argv) == 0
    found = capsys.readouterr().out
    assert "attack/rubric/changed" in found and "attack/rubric/attacks" in found
    rows = [json.loads(row) for row in (tmp_path / "attack" / "rubric.jsonl").open()]
    assert len(rows) >= 40 and all(row["plain"] == row["attacked"] for row in rows)

    def obedient(body):
        data = json.loads(body["messages"][1]["content"].splitlines()[2])
        return json.dumps({"reason": "", "score": 5 if "5" in data["answer_words"] else 2})

    with ChatServer(obedient) as server:
        endpoint = f"--config.judge.endpoint.base_url={server.url}"
        flags = ["--config.judge.scorer=endpoint", endpoint]
        assert cli.main([*argv, *flags]) == 0
        asked = len(server.requests)
        assert cli.main([*argv, *flags]) == 0  # Paid for once.
        assert len(server.requests) == asked
    rows = [json.loads(row) for row in (tmp_path / "attack" / "gpt-4.1.jsonl").open()]
    led = [row for row in rows if "5" in row["attack"]]
    assert len(led) > 20 and all(row["attacked"] == 5.0 for row in led)


def test_leaderboard_of_two_runs(asked, tmp_path, fake_judge, capsys):
    for name in ("one", "two"):
        source = f"--config.system.source={tmp_path / 'answers'}"
        assert run(asked, tmp_path / name, source, f"--config.system.name={name}") == 0
    out = tmp_path / "board"
    runs = [str(tmp_path / name) for name in ("one", "two")]
    assert cli.main(["paras2s", "report", *runs, f"--output={out}"]) == 0
    text = (out / "leaderboard.md").read_text()
    assert "one" in text and "two" in text
    assert cli.main(["paras2s", "report", str(tmp_path), f"--output={out}"]) == 2
    arena = [*runs, f"--output={tmp_path / 'arena'}", "--num_resamples=20"]
    assert cli.main(["paras2s", "arena", *arena]) == 0
    # The same answers: every game is drawn.
    table = (tmp_path / "arena" / "arena.md").read_text()
    assert "| 1 | one | 1000 [1000, 1000] | 200 | – | 50% |" in table
    assert len((tmp_path / "arena" / "votes.jsonl").read_text().splitlines()) == 400
    rate = [f"--queries={asked}", "--pairs=10", f"--output={tmp_path / 'rate'}"]
    assert cli.main(["paras2s", "rate", *runs, *rate]) == 0
    csv = tmp_path / "ratings.csv"
    rows = [f"ann,q{q},{system},0,{score}" for q in range(3) for system, score in BOTH]
    csv.write_text("\n".join(["rater,query_id,system,sample,score", *rows]))
    assert cli.main(["paras2s", "arena", *arena, "--by=people", f"--ratings={csv}"]) == 0
    assert "| 1 | two |" in (tmp_path / "arena" / "arena.md").read_text()
    capsys.readouterr()
    assert cli.main(["paras2s", "arena", *arena, "--by=people"]) == 2
    assert "--ratings=CSV and --by=people go together" in capsys.readouterr().err
    assert cli.main(["paras2s", "arena", runs[0], runs[0]]) == 2
    assert "both have a system 'one'" in capsys.readouterr().err
    assert cli.main(["paras2s", "arena"]) == 2
    assert "no RUN RUN … given" in capsys.readouterr().err


def test_duels_of_two_runs(asked, tmp_path, fake_judge, capsys):
    for name, level in (("one", 10), ("two", 12)):
        folder = tmp_path / f"answers {name}"
        for index in range(200):
            wave_lib.save(folder / f"q{index}.wav", np.full(400, level / 100, np.float32), 16_000)
        source = f"--config.system.source={folder}"
        assert run(asked, tmp_path / name, source, f"--config.system.name={name}") == 0

    def louder(body):
        """Says tie where the louder answer comes second: it likes what comes first."""
        data = json.loads(body["messages"][1]["content"].splitlines()[2])
        levels = [int(data[place]["answer_words"].split()[1]) for place in ("first", "second")]
        winner = "first" if levels[0] > levels[1] else "tie"
        return json.dumps({"reason": "", "winner": winner})

    argv = ["paras2s", "duel", "--config=configs/judge.py", f"--workdir={tmp_path / 'duel'}"]
    argv += [f"--runs={tmp_path / 'one'},{tmp_path / 'two'}", "--num_queries=10"]
    assert cli.main(argv) == 2
    assert "set --config.judge.scorer=endpoint" in capsys.readouterr().err
    with ChatServer(louder) as server:
        url = f"--config.judge.endpoint.base_url={server.url}"
        argv += ["--config.judge.scorer=endpoint", url]
        assert cli.main(argv) == 0
        # Both orders of each; queries that sound alike are asked about once.
        count = len(server.requests)
        assert 10 <= count <= 2 * 10
        assert cli.main(argv) == 0 and len(server.requests) == count
    table = (tmp_path / "duel" / "arena" / "arena.md").read_text()
    assert "| 1 | two |" in table and "| – | 75% |" in table
    assert "decided for the answer heard first: 100%" in table
    assert "whose winner changes with the order: 100%" in table


def test_duels_need_somebody_who_heard_the_answers(asked, tmp_path, monkeypatch, capsys):
    class Waves:
        name, version, settings_hash = "waves", "1", "x"

        def score_waves(self, pairs, repeat=0):
            for index, _ in enumerate(pairs):
                yield index, Score(3.0, None, None, "")

    monkeypatch.setattr(
        judge_stage,
        "make_judge",
        lambda config, workdir: Judge(
            None, {}, None, Waves(), Ledger(workdir / judge_stage.LEDGER), progress=False
        ),
    )
    source = f"--config.system.source={tmp_path / 'answers'}"
    assert run(asked, tmp_path / "one", source) == 0
    assert "heard by the scorer itself" in capsys.readouterr().out
    argv = ["paras2s", "duel", "--config=configs/judge.py", f"--workdir={tmp_path / 'duel'}"]
    argv += ["--config.judge.scorer=endpoint", f"--runs={tmp_path / 'one'}"]
    assert cli.main([*argv, "--config.judge.endpoint.base_url=http://localhost:1/v1"]) == 2
    assert "was judged without the stage 'tone'" in capsys.readouterr().err


def test_runs_of_different_judges_do_not_meet(asked, tmp_path, fake_judge, monkeypatch, capsys):
    source = f"--config.system.source={tmp_path / 'answers'}"
    assert run(asked, tmp_path / "one", source, "--config.system.name=one") == 0
    monkeypatch.setattr(Scorer, "version", "2")
    assert run(asked, tmp_path / "two", source, "--config.system.name=two") == 0
    assert cli.main(["paras2s", "arena", str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert "cannot meet: another scorer (levels-2 instead of levels-1)" in capsys.readouterr().err


def test_scorers_by_config(monkeypatch):
    from paras2s_jax.stages.judging import make_scorer

    config = cli.load_config("configs/judge.py:hosted")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    from paras2s_jax.data.endpoint import EndpointError

    with pytest.raises(EndpointError, match="OPENAI_API_KEY"):
        make_scorer(config, Path())
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert make_scorer(config, Path()).name == "gpt-4.1"
    config.judge.scorer = "oracle"
    with pytest.raises(StageError, match="choose one of rubric, endpoint, local, reward"):
        make_scorer(config, Path())
