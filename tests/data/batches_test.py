import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from paras2s_jax.audio import wave
from paras2s_jax.data import batches

LENS = [1600, 3200, 4800, 1600, 8000, 3200, 1601]


@pytest.fixture
def corpus(tmp_path):
    """Seven rows whose wave n is constant n / 10 and whose ids are n + 1 times n."""
    rows = []
    for n, size in enumerate(LENS):
        wave.save(tmp_path / "wavs" / f"{n}.wav", np.full(size, n / 10, np.float32), 16_000)
        rows.append({"wav": f"wavs/{n}.wav", "ids": [n] * (n + 1), "label": n, "set": n // 2})
    return tmp_path, rows


def make(corpus, rows=None, **changes):
    root, all_rows = corpus
    settings = {
        "root": root,
        "audio_keys": ("wav",),
        "token_keys": ("ids",),
        "scalar_keys": ("label",),
        "batch_size": 2,
        "len_buckets_s": (0.5, 0.1, 0.2),
        "token_buckets": (3, 8),
        "seed": 5,
    }
    return batches.Batches(all_rows if rows is None else rows, **(settings | changes))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_contents_padding_and_buckets(corpus):
    out = list(make(corpus))
    # Longest rows of the batches: 3200, 4800, 8000, 1601 samples; 2, 4, 6, 7 tokens.
    assert [b["wav"].shape for b in out] == [(2, 3200), (2, 8000), (2, 8000), (2, 3200)]
    assert [b["ids"].shape for b in out] == [(2, 3), (2, 8), (2, 8), (2, 8)]
    second = out[1]
    assert second["wav_len"].tolist() == [4800, 1600]
    np.testing.assert_allclose(second["wav"][1, :1600], 0.3, atol=1e-4)
    assert not second["wav"][1, 1600:].any()
    assert second["ids"].tolist() == [[2, 2, 2, 0, 0, 0, 0, 0], [3, 3, 3, 3, 0, 0, 0, 0]]
    assert second["ids_len"].tolist() == [3, 4]
    assert second["label"].tolist() == second["row"].tolist() == [2, 3]
    kinds = {"wav": "float32", "wav_len": "int32", "ids": "int32", "row": "int32", "valid": "bool"}
    assert {key: second[key].dtype.name for key in kinds} == kinds


def test_the_row_that_completes_the_last_batch_is_marked(corpus):
    *_, last = make(corpus)
    assert last["valid"].tolist() == [True, False]
    assert last["row"].tolist() == [6, -1]
    np.testing.assert_array_equal(last["wav"][0], last["wav"][1])


def test_shuffled_epochs_cover_all_rows_in_orders_of_their_own(corpus):
    source = make(corpus, shuffle=True)
    orders = [np.concatenate([b["row"] for b in source]) for _ in range(3)]
    for order in orders:
        assert sorted(order) == [-1, *range(7)]
    assert len({order.tobytes() for order in orders}) == 3
    again = np.concatenate([b["row"] for b in make(corpus, shuffle=True)])
    np.testing.assert_array_equal(orders[0], again)
    other = np.concatenate([b["row"] for b in make(corpus, shuffle=True, seed=6)])
    assert not np.array_equal(orders[0], other)


@pytest.mark.parametrize("position", [0, 3, 4, 9])
def test_restore_continues_exactly(corpus, position):
    # Four batches an epoch, so 9 lies in the third epoch and 4 on a border.
    source = make(corpus, shuffle=True, repeat=True)
    for _ in range(position):
        next(source)
    state = json.loads(json.dumps(source.state()))
    assert (state["epoch"], state["batch"]) == divmod(position, 4)
    expected = [next(source) for _ in range(6)]
    resumed = make(corpus, shuffle=True, repeat=True)
    next(resumed)
    resumed.restore(state)
    assert all(same(next(resumed), batch) for batch in expected)
    assert resumed.state() == source.state()


def test_restore_at_the_end_of_a_single_pass_ends(corpus):
    source = make(corpus)
    state = [source.state() for _ in source][-1]
    resumed = make(corpus)
    resumed.restore(state)
    assert list(resumed) == []


def test_restore_refuses_other_data(corpus):
    state = make(corpus).state()
    for changed in (make(corpus, rows=corpus[1][:6]), make(corpus, batch_size=4)):
        with pytest.raises(batches.ManifestError, match="changed since the checkpoint"):
            changed.restore(state)


@pytest.mark.parametrize("group_key", [None, "set"])
def test_processes_share_every_batch(corpus, group_key):
    common = {"batch_size": 4, "shuffle": True, "group_key": group_key}
    whole = list(make(corpus, **common))
    halves = ([0, 3], [1, 2])
    parts = [list(make(corpus, **common, local_rows=half)) for half in halves]
    assert len(parts[0]) == len(parts[1]) == len(whole) == len(make(corpus, **common))
    for first, second, both in zip(*parts, whole, strict=True):
        order = np.argsort(np.concatenate(halves))
        joined = {key: np.concatenate([first[key], second[key]])[order] for key in both}
        assert same(joined, both)


def test_groups_stay_together(corpus):
    source = make(corpus, batch_size=3, shuffle=True, repeat=True, group_key="set")
    for _ in range(2 * len(source)):
        batch = next(source)
        sets = batch["label"][batch["valid"]] // 2
        counts = dict(zip(*np.unique(sets, return_counts=True), strict=True))
        assert all(count == (1 if value == 3 else 2) for value, count in counts.items())


def test_resampled_files_fit_their_bucket(corpus):
    root, rows = corpus
    for n, rate_hz in enumerate((8_000, 22_050, 44_100)):
        wave.save(root / f"{n}.wav", np.full(rate_hz // 10, 0.1, np.float32), rate_hz)
    some = [rows[n] | {"wav": f"{n}.wav"} for n in range(3)]
    (batch,) = make(corpus, rows=some, batch_size=3, len_buckets_s=(0.102,))
    assert np.abs(batch["wav_len"] - 1600).max() <= 1


def test_works_without_audio_or_without_any_column(corpus):
    (batch,) = make(corpus, audio_keys=(), len_buckets_s=(), batch_size=7)
    assert "wav" not in batch and batch["ids"].shape == (7, 8)
    bare = make(corpus, audio_keys=(), token_keys=(), batch_size=7)
    assert sorted(next(bare)) == ["label", "row", "valid"]


@pytest.fixture
def bad(corpus):
    """The corpus, and seven rows that are each bad in their own way."""
    root, rows = corpus
    whole = (root / "wavs" / "4.wav").read_bytes()
    (root / "empty.wav").write_bytes(b"")
    (root / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (root / "text.wav").write_bytes(b"this is no audio " * 40)
    wave.save(root.parent / "secret.wav", np.zeros(160, np.float32), 16_000)
    paths = ["missing.wav", "empty.wav", "cut.wav", "text.wav", "../secret.wav", "a\0b.wav", 7]
    return root, rows + [{"wav": path} for path in paths], paths


def test_every_kind_of_bad_file_is_reported(bad):
    root, rows, paths = bad
    good, problems = batches.validate(rows, root, ("wav",), max_bad_share=0.5)
    assert good == rows[:7]
    assert [p.row for p in problems] == list(range(7, 14))
    for path, problem in zip(paths[:5], problems, strict=False):
        assert path in str(problem)
    reasons = ["no such audio", "empty file", "truncated", "not readable", "outside", "no path"]
    assert all(word in p.reason for word, p in zip(reasons, problems, strict=False))


def test_too_many_bad_files_stop_the_run(bad):
    root, rows, paths = bad
    with pytest.raises(batches.ManifestError) as caught:
        batches.validate(rows, root, ("wav",))
    assert "7 of 14 rows" in str(caught.value)
    assert all(path in str(caught.value) for path in paths[:5])
    # One bad row of 101 is below the default 1 %, one of 100 is not above it either.
    good_rows = rows[:1] * 99
    assert len(batches.validate([*good_rows, rows[7]], root, ("wav",))[1]) == 1
    with pytest.raises(batches.ManifestError, match="1 of 99 rows"):
        batches.validate([*good_rows[:98], rows[7]], root, ("wav",))


def test_bad_lines_are_reported_and_counted(corpus):
    root, rows = corpus
    lines = [json.dumps(rows[0]), "{broken", "", "[1]", json.dumps(rows[1])]
    (root / "rows.jsonl").write_text("\n".join(lines))
    read, problems = batches.read_rows(root / "rows.jsonl")
    assert read == rows[:2]
    assert [str(p).split(": ")[0] for p in problems] == [f"{root}/rows.jsonl:{n}" for n in (2, 4)]
    with pytest.raises(batches.ManifestError, match="2 of 4 rows"):
        batches.validate(read, root, ("wav",), problems=problems)
    with pytest.raises(batches.ManifestError, match="no such manifest"):
        batches.read_rows(root / "none.jsonl")


def test_a_file_that_disappears_during_a_run_is_named(corpus):
    source = make(corpus)
    (corpus[0] / "wavs" / "3.wav").unlink()
    next(source)
    with pytest.raises(wave.AudioError, match=r"3\.wav"):
        next(source)


def test_rows_that_fit_no_bucket_are_listed(corpus):
    with pytest.raises(batches.ManifestError, match=r"wavs/4\.wav.*8000 > 6400"):
        make(corpus, len_buckets_s=(0.4,))
    with pytest.raises(batches.ManifestError, match="7 > 6"):
        make(corpus, token_buckets=(6,))


def test_impossible_settings_are_errors(corpus):
    with pytest.raises(ValueError, match="are no rows of a batch of 3"):
        make(corpus, batch_size=3, local_rows=[2, 3])
    with pytest.raises(batches.ManifestError, match="no rows"):
        make(corpus, rows=[])
    with pytest.raises(batches.ManifestError, match="'tone' is missing in 7 rows"):
        make(corpus, scalar_keys=("tone",))
    with pytest.raises(ValueError, match="no buckets"):
        make(corpus, token_buckets=())


def test_a_process_ends_while_pipelines_read_ahead(tmp_path):
    wave.save(tmp_path / "a.wav", np.zeros(8000, np.float32), wave.RATE_HZ)
    program = f"""
        from paras2s_jax.data.batches import Batches
        kept = []
        for _ in range(4):
            rows = [{{"wav": "a.wav"}}] * 64
            kept.append(Batches(rows, root={str(tmp_path)!r}, audio_keys=("wav",), batch_size=16,
                                len_buckets_s=(1.0,), repeat=True))
            next(kept[-1])
        print(sum(batches._source is not None for batches in kept))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "4"


def test_a_closed_pipeline_goes_on_where_it_was(tmp_path):
    rows = []
    for number in range(4):
        wave.save(tmp_path / f"{number}.wav", np.full(8000, 0.1, np.float32), wave.RATE_HZ)
        rows.append({"wav": f"{number}.wav", "number": number})
    once = batches.Batches(
        rows,
        root=tmp_path,
        audio_keys=("wav",),
        scalar_keys=("number",),
        batch_size=1,
        len_buckets_s=(1.0,),
    )
    first = next(once)["number"].item()
    once.close()
    assert [first] + [batch["number"].item() for batch in once] == [0, 1, 2, 3]
