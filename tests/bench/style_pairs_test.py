import io

import rich.console

from paras2s_jax.bench import run
from paras2s_jax.bench.style_pairs import style_pairs
from paras2s_jax.bench.systems import RecordedSystem


def test_both_styles_and_all_answers_have_players(asked, make, recorded):
    queries, root = asked
    texts = {"listens": lambda query: query.style, "deaf": lambda query: "<b>fine</b>"}
    run.bench(
        [RecordedSystem(name, recorded(name, text_of)) for name, text_of in texts.items()],
        queries, root, root / "bench", judge=make.judge(), answers=(), num_resamples=20,
        console=rich.console.Console(file=io.StringIO()),
    )  # fmt: skip
    page = style_pairs(root / "bench", root)
    # Two dimensions, a sentence of each, two styles: a query and two answers.
    assert page.count("<table>") == 2
    assert page.count("<audio") == page.count('src="data:audio/') == 2 * 2 * 3
    for words in ("spoken as surprised", "spoken as child", "listens", "deaf", "<b>4.0</b>"):
        assert words in page
    assert "&lt;b&gt;fine" in page and "<b>fine" not in page
    assert style_pairs(root / "bench", root, per_column=2).count("<table>") == 4
