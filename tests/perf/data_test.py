from paras2s_jax.audio import wave
from paras2s_jax.perf import data


def test_all_audio_is_fed_in_every_epoch(tmp_path, monkeypatch):
    counted = []
    passes = data._feed

    def feed(rows, root, epochs):
        found = passes(rows, root, epochs)
        counted.append(sum(len(wave.load(root / row["wav"])) for row in rows) / wave.RATE_HZ)
        # Speed times time per clip is the mean length of a clip.
        factor, _, clip_s = found
        assert abs(factor * clip_s * len(rows) / counted[-1] - 1) < 0.01
        return found

    monkeypatch.setattr(data, "_feed", feed)
    figures = data.run(clips=5, epochs=1)
    assert len(counted) == 2
    for name in ("realtime_factor", "realtime_factor_cpu", "clip_ms"):
        assert figures[f"data/{name}"] > 0
    assert figures["data/realtime_factor_resampled"] > 0
