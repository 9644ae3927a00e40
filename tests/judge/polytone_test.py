import io

import numpy as np
import pytest
from rich.console import Console

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import PolytoneClip
from paras2s_jax.judge import polytone
from paras2s_jax.judge.recipe import Recipe
from paras2s_jax.judge.style import StyleAnalyzers
from tests.judge.conftest import sound

# A voice is loud or soft; the words are "low" or "high".
LEVELS = {"loud": 0.4, "soft": 0.04}
AGREEING = {"loud": "high", "soft": "low"}
RECIPE = Recipe(num_steps=30, batch_size=4, lr=3e-3, warmup_steps=2, len_buckets_s=(0.3,))


def _clip(root, kind, label, word, take):
    name = f"{kind}-{word}-{label}-{take}"
    wave_lib.save(root / f"{name}.wav", sound(word, level=LEVELS[label]), wave_lib.RATE_HZ)
    return PolytoneClip(
        name, "emotion", label, word, f"{kind}-{word}", kind, "v", f"{name}.wav", 0.2
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    rows = []
    for label in LEVELS:
        (contrary,) = set(AGREEING.values()) - {AGREEING[label]}
        rows += [_clip(root, "polytone", label, word, 0) for word in AGREEING.values()]
        # More takes than the PolyTone set has: they must not be used.
        rows += [_clip(root, "plain", label, AGREEING[label], take) for take in range(4)]
        rows += [_clip(root, "test", label, contrary, take) for take in range(2)]
    return rows, root


def test_trains_tests_and_saves_both(clips, tiny_whisper, tmp_path, monkeypatch):
    seen = {}
    train = polytone.classifier.train

    def spy(config, rows, root, labels, recipe, *, groups, progress_label, **kwargs):
        seen[progress_label] = (sorted(wav for wav, _ in rows), groups)
        return train(
            config,
            rows,
            root,
            labels,
            recipe,
            groups=groups,
            progress_label=progress_label,
            **kwargs,
        )

    monkeypatch.setattr(polytone.classifier, "train", spy)
    console = Console(file=io.StringIO(), width=80)
    figures = {}
    for name in polytone.SETS:
        figures |= polytone.fit(
            tiny_whisper, *clips, RECIPE, tmp_path / name, of_set=name, attributes=("emotion",)
        )
    polytone.print_table(figures, ("emotion",), console)
    # By loudness alone, whatever the words are.
    assert figures["polytone/emotion/polytone"] == 1.0
    assert set(figures) == {
        "polytone/emotion/polytone",
        "polytone/emotion/plain",
        "polytone/mean/polytone",
        "polytone/mean/plain",
    }
    poly_wavs, poly_groups = seen["polytone emotion"]
    plain_wavs, plain_groups = seen["plain emotion"]
    assert len(poly_wavs) == len(plain_wavs) == 4
    assert len(set(poly_groups)) == 2 and plain_groups is None
    table = console.file.getvalue()
    assert "emotion" in table and "1.000" in table and "mean" in table
    analyzers = StyleAnalyzers.load(tmp_path / "polytone", ["emotion"])
    labels, probs = analyzers.name_styles([sound("high", level=0.04)], "emotion")
    assert labels == ["soft"] and probs.shape == (1, 2)
    assert (tmp_path / "plain" / "emotion.safetensors").is_file()
    with pytest.raises(KeyError, match="no analyzer for 'age'"):
        analyzers.name_styles([], "age")


def test_balanced_takes_whole_texts_of_each_label():
    clips = [
        PolytoneClip(f"{t}{label}{i}", "age", label, "x", t, "polytone", "v", "w", 1.0)
        for t in "abc"
        for label in ("child", "adult")
        for i in range(2)
    ]
    chosen = polytone.balanced(clips, 8, ("adult", "child"), seed=0)
    assert [clip.label for clip in chosen] == ["adult"] * 4 + ["child"] * 4
    texts = {label: {c.text_id for c in chosen if c.label == label} for label in ("adult", "child")}
    # The same two texts for both labels: words tell nothing.
    assert texts["adult"] == texts["child"] and len(texts["adult"]) == 2
    assert polytone.balanced(clips[::-1], 8, ("adult", "child"), seed=0) == chosen


def test_missing_set_or_label_is_one_clear_error(clips, tiny_whisper, tmp_path):
    rows, root = clips
    without_test = [clip for clip in rows if clip.set != "test"]
    with pytest.raises(ValueError, match="no clips of set 'test' for the attribute 'emotion'"):
        polytone.fit(tiny_whisper, without_test, root, RECIPE, tmp_path, attributes=("emotion",))
    one_label = [clip for clip in rows if clip.set != "plain" or clip.label == "loud"]
    with pytest.raises(ValueError, match="sets of 'emotion'"):
        polytone.fit(tiny_whisper, one_label, root, RECIPE, tmp_path, attributes=("emotion",))
    assert not np.any([path.suffix == ".safetensors" for path in tmp_path.rglob("*")])
