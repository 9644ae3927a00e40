"""The commands that make queries: written by a server, taken from corpora."""

import dataclasses

import numpy as np
import pytest

from paras2s_jax import cli
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.records import Query, read_jsonl, write_jsonl
from paras2s_jax.perf.chat_server import ChatServer
from paras2s_jax.stages import query_sources
from tests.data.datasets.queries_test import fake_iemocap, fake_meld
from tests.data.query_writer_test import Writer
from tests.data.styletalk_test import write as fake_styletalk


class Analyzer:
    """Takes every second wave that it hears for well spoken, and none of the first sentence's sad
    ones."""

    labels = ("surprised", "sad")

    def __init__(self):
        self.calls = 0

    def name(self, waves):
        self.calls += 1
        # Queries come as surprised, sad, surprised, sad, …, one voice each.
        style = (self.calls - 1) % 2
        good = 0.1 if self.calls == 2 else 0.9
        own = np.where(np.arange(len(waves)) % 2 == 1, good, 0.05)
        probs = np.stack([own, 1 - own] if style == 0 else [1 - own, own], axis=1)
        return ["sad"] * len(waves), probs


def write(server, workdir, *flags):
    settings = ("dimensions=('emotion',)", "num_sentences=3", "num_voices=1", "num_takes=2")
    argv = ["paras2s", "write_queries", "--config=configs/queries.py", f"--workdir={workdir}"]
    argv += [f"--config.queries.{setting}" for setting in (*settings, "num_workers=1")]
    url = server.url if server else "http://127.0.0.1:1/v1"
    return cli.main([*argv, f"--config.queries.endpoint.base_url={url}", *flags])


@pytest.fixture
def analyzer(monkeypatch):
    found = Analyzer()
    monkeypatch.setattr(query_sources, "_analyzers", lambda config, folder: {"emotion": found})
    return found


def test_sentences_are_written_spoken_chosen_and_kept_in_pairs(tmp_path, analyzer, capsys):
    workdir = tmp_path / "new"
    with ChatServer(Writer()) as server:
        assert write(server, workdir) == 0
        queries = read_jsonl(workdir / "queries.jsonl", Query)
        # Three sentences in two styles; one was heard in one style only.
        assert len(queries) == 4 and len({query.sentence_id for query in queries}) == 2
        for query in queries:
            assert query.wav.endswith(".wav") and ".1-" in query.wav  # The second take.
            assert len(wave_lib.load(workdir / query.wav)) / 16_000 == pytest.approx(
                query.dur_s, abs=1e-3
            )
        assert {query.style for query in queries} == {"surprised", "sad"}
        asked = len(server.requests)
        assert write(server, workdir) == 0
        assert len(server.requests) == asked and analyzer.calls == 6
    assert read_jsonl(workdir / "queries.jsonl", Query) == queries
    assert "queries/sentences_left_out" in capsys.readouterr().out


def test_an_estimate_asks_nobody(tmp_path, capsys):
    prices = [f"--config.queries.endpoint.usd_per_million_{way}=2" for way in ("in", "out")]
    assert write(None, tmp_path / "new", "--dry_run", *prices) == 0
    out = capsys.readouterr().out
    assert "queries/clips_to_speak" in out and "nothing was asked" in out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.queries.num_takes=2", "judge.analyzers.emotion is empty, but queries.num_takes"),
        ("--config.queries.styles.emotion=('sad','cross')", "give two of"),
        ("--config.judge.analyzers.emotion=trained", "has no analyzer of emotion"),
    ],
)
def test_what_cannot_be_made_is_said_first(tmp_path, capsys, flag, message):
    with ChatServer(Writer()) as server:
        assert write(server, tmp_path / "new", flag) == 2
        assert not server.requests
    assert message in capsys.readouterr().err


def corpus(name, source, output, *flags):
    argv = [f"--from={name}", f"--source={source}", f"--output={output}", *flags]
    return cli.main(["paras2s", "import_queries", *argv])


@pytest.mark.parametrize(("name", "fake"), [("iemocap", fake_iemocap), ("meld", fake_meld)])
def test_corpora_become_queries(tmp_path, name, fake, capsys):
    fake(tmp_path / "manual")
    assert corpus(name, tmp_path / "manual", tmp_path / "out") == 0
    queries = read_jsonl(tmp_path / "out" / "queries.jsonl", Query)
    assert len(queries) == 2 and {query.topic for query in queries} == {name}
    assert all((tmp_path / "out" / query.wav).is_file() for query in queries)
    # The list of names that passed the filters is obeyed at once.
    kept = queries[0].id.removeprefix(f"{name}-")
    (tmp_path / "manual" / "kept_ids.txt").write_text(f"{kept}\n")
    assert corpus(name, tmp_path / "manual", tmp_path / "out") == 0
    assert len(read_jsonl(tmp_path / "out" / "queries.jsonl", Query)) == 1
    (tmp_path / "manual" / "kept_ids.txt").write_text("nobody\n")
    assert corpus(name, tmp_path / "manual", tmp_path / "none") == 2
    assert "is it the whole corpus" in capsys.readouterr().err


def test_words_of_a_corpus_are_filtered(tmp_path, capsys):
    query = Query(
        "m0", "m0", "emotion", "It came back.", "sad", "happy", "meld", "test", "v", "", 1.0
    )
    texts = ("It came back.", "A leaky pipe.", "An odd thing.", "So vague.", "It came back.")
    rows = [dataclasses.replace(query, id=f"m{n}", text=text) for n, text in enumerate(texts)]
    path = write_jsonl(tmp_path / "meld" / "queries.jsonl", rows)
    argv = ["paras2s", "filter_queries", "--config=configs/queries.py", f"--queries={path}"]
    with ChatServer(Writer()) as server:
        argv += [f"--config.queries.endpoint.base_url={server.url}", f"--workdir={tmp_path / 'w'}"]
        assert cli.main(argv) == 0
        # 4 distinct sentences: 4 + 3 + 2 questions.
        assert len(server.requests) == 9
        assert cli.main(argv) == 0 and len(server.requests) == 9
    kept = read_jsonl(tmp_path / "meld" / "kept.jsonl", Query)
    assert [row.id for row in kept] == ["m0", "m4"]
    write_jsonl(path, [dataclasses.replace(query, dimension="neutral")])
    assert cli.main(argv) == 2
    assert "the filters know emotion" in capsys.readouterr().err


def test_styletalk_becomes_queries(tmp_path, capsys):
    path = fake_styletalk(tmp_path)
    assert corpus("styletalk", path, tmp_path / "out") == 2
    assert "--from=styletalk needs --waves" in capsys.readouterr().err
    assert corpus("styletalk", path, tmp_path / "out", f"--waves={tmp_path / 'waves'}") == 0
    assert len(read_jsonl(tmp_path / "out" / "queries.jsonl", Query)) == 2


def test_a_corpus_that_is_not_there_says_where_it_belongs(tmp_path, capsys):
    assert corpus("meld", tmp_path, tmp_path / "out") == 2
    assert "put MELD there" in capsys.readouterr().err


def test_the_config_asks_for_styles_of_the_bank():
    config, bank = cli.load_config("configs/queries.py"), load_bank()
    assert {name: tuple(pair) for name, pair in config.queries.styles.items()} == {
        name: bank.styles(name) for name in config.queries.dimensions
    }
