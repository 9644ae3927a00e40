"""The same words in two styles and what each system answered: players to put into a notebook."""

from pathlib import Path

from paras2s_jax.bench import page, tables
from paras2s_jax.bench.cards import Cards, select_sentences
from paras2s_jax.bench.rows import read_queries, read_rows
from paras2s_jax.bench.sounds import Sounds

# A notebook keeps what it shows.
MAX_MB = 6.0


def style_pairs(folder: Path, root: Path, per_column: int = 1) -> str:
    """HTML with the sound inside, without a page around it.

    Args:
        folder: of `run.bench`.
        root: the queries' wavs are relative to it.
        per_column: how many sentences of each dimension, picked by their place, not their score.

    Raises:
        BenchError: there is no finished bench in the folder.
    """
    folder, root = Path(folder), Path(root)
    queries = read_queries(folder)
    names = [system.name for system in tables.read_results(folder).systems]
    rows = {name: read_rows(folder, queries, name) for name in names}
    picked = select_sentences(queries, per_column)
    sounds = Sounds(folder / "none.html", MAX_MB)
    cards = Cards(folder, root, queries, rows).within(picked, sounds)
    return page.fragment("style_pairs.html", cards=cards, names=names)
