"""The commands `write_queries` and `import_queries`: spoken queries from elsewhere than the bank.

Both leave a folder with queries.jsonl and wavs, which `paras2s judge` reads.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from paras2s_jax.audio import styles
from paras2s_jax.data import query_writer, speaking, styletalk, synthesize
from paras2s_jax.data.bank import Sentence, load_bank
from paras2s_jax.data.endpoint import ChatClient, Endpoint
from paras2s_jax.data.records import Query, read_jsonl, write_jsonl
from paras2s_jax.judge.interfaces import WaveNamer
from paras2s_jax.judge.takes import choose_takes
from paras2s_jax.stages.judging import make_analyzers
from paras2s_jax.stages.registry import Figures, StageError, print_figures
from paras2s_jax.stages.speech import QUERIES, maker_of

# Sentences and why others were left out; which take of a query was chosen.
SENTENCES, CHOICES = "sentences", "choices.jsonl"


def write(config: ConfigDict, workdir: str, *, dry_run: bool) -> Figures:
    """Sentences by a language model -> filters -> takes -> the best of each -> queries.jsonl.

    Continues where it was stopped: sentences, wavs and choices that are there are kept.

    Raises:
        StageError: the config asks for styles that cannot be spoken, or takes that nobody can
            choose from.
        EndpointError: the server gives nothing, or the spend cap is reached.
    """
    c, folder = config.queries, Path(workdir)
    _check_styles(c)
    if dry_run:
        return _estimate(config)
    analyzers = _analyzers(config, folder)
    client = ChatClient(Endpoint(**c.endpoint))
    sentences: list[Sentence] = []
    known = [sentence.text for sentence in load_bank().sentences]
    for dimension, pair in _pairs(c).items():
        sentences += query_writer.write_sentences(
            client,
            dimension,
            pair,
            c.num_sentences,
            folder / SENTENCES,
            known=[*known, *(sentence.text for sentence in sentences)],
            split=c.split,
            seed=config.seed,
        )
    queries = _spoken(config, folder, sentences, analyzers)
    kept = _in_both_styles(queries)
    write_jsonl(folder / QUERIES, kept)
    figures = {
        "queries/sentences": len({query.sentence_id for query in kept}),
        "queries/clips": len(kept),
        "queries/sentences_left_out": len(sentences) - len({q.sentence_id for q in kept}),
        "queries/calls": client.calls,
        "queries/usd": round(client.usd, 4),
    }
    print_figures(f"queries in {folder / QUERIES}", figures)
    return figures


def _pairs(c: ConfigDict) -> dict[str, tuple[str, str]]:
    return {dimension: tuple(c.styles[dimension]) for dimension in c.dimensions}


def _check_styles(c: ConfigDict) -> None:
    for dimension in c.dimensions:
        pair = tuple(c.styles[dimension]) if dimension in c.styles else ()
        unknown = [style for style in pair if style not in styles.QUERY_STYLES]
        if len(pair) != 2 or unknown:
            raise StageError(
                f"queries.styles.{dimension} is {pair}: give two of "
                f"{', '.join(styles.QUERY_STYLES)}."
            )


def _analyzers(config: ConfigDict, folder: Path) -> dict[str, WaveNamer]:
    """Those that choose takes; none where there is nothing to choose."""
    c = config.queries
    if c.num_takes == 1:
        return {}
    lacking = [name for name in c.dimensions if not config.judge.analyzers[name]]
    if lacking:
        raise StageError(
            f"judge.analyzers.{lacking[0]} is empty, but queries.num_takes is {c.num_takes}: name "
            "analyzers that choose the best take (the folder `analyzers` of a run, or a released "
            "classifier), or take the first with --config.queries.num_takes=1."
        )
    return make_analyzers(config, folder)


def _estimate(config: ConfigDict) -> Figures:
    """What is to be expected, printed; asks nobody."""
    c = config.queries
    per_dimension = query_writer.expected(c.num_sentences, c.keep_share)
    count = len(c.dimensions)
    tokens_in, tokens_out = count * per_dimension.tokens_in, count * per_dimension.tokens_out
    usd = 1e-6 * (
        tokens_in * c.endpoint.usd_per_million_in + tokens_out * c.endpoint.usd_per_million_out
    )
    queries = 2 * count * c.num_sentences * c.num_voices
    figures = {
        "queries/sentences": count * c.num_sentences,
        "queries/calls": count * per_dimension.calls,
        "queries/tokens_in": tokens_in,
        "queries/tokens_out": tokens_out,
        "queries/usd": round(usd, 2),
        "queries/clips_to_speak": queries * c.num_takes,
        "queries/clips": queries,
    }
    print_figures("what write_queries would do", figures)
    if not usd:
        print("prices unknown: set --config.queries.endpoint.usd_per_million_in and …_out")
    print(
        f"assumed that {c.keep_share:.0%} of the sentences pass the filters and every take is good "
        f"enough; nothing was asked. A cap: --config.queries.endpoint.usd_cap"
    )
    return figures


def _spoken(
    config: ConfigDict,
    folder: Path,
    sentences: Sequence[Sentence],
    analyzers: Mapping[str, WaveNamer],
) -> list[Query]:
    """Every sentence in both styles, each query in its best take."""
    c = config.queries
    clips = [
        clip
        for sentence in sentences
        for style in (sentence.style_a, sentence.style_b)
        for clip in _takes(sentence, style, c.num_voices, c.num_takes, config.seed)
    ]
    rows, _ = speaking.speak(
        clips, folder, maker_of(config), num_workers=c.num_workers, progress=True
    )
    takes: dict[str, list[Query]] = defaultdict(list)
    for row in rows:
        takes[row.id.rpartition(".")[0]].append(row)
    if c.num_takes == 1:
        return [Query(**vars(take) | {"id": name}) for name, (take,) in takes.items()]
    return choose_takes(takes, folder, analyzers, min_prob=c.min_prob, log=folder / CHOICES)


def _takes(
    sentence: Sentence, style: str, num_voices: int, num_takes: int, seed: int
) -> list[speaking.Clip]:
    """A style's takes, named <query id>.<number>; its voices are those of the other style too."""
    rng = speaking.rng_of(seed, "voices", sentence.id)
    try:
        voices = synthesize.voices_for(style, sentence.split, num_voices, rng)
    except ValueError as error:
        raise StageError(f"queries.num_voices: {error}") from error
    clips = []
    for voice in voices:
        for take in range(num_takes):
            name = f"{sentence.id}-{style}-{voice}.{take}"
            delivery = styles.delivery(voice, style, speaking.rng_of(seed, "takes", name))
            row = synthesize.query_row(sentence, style, voice, name)
            clips.append(speaking.Clip(row, "takes", name, sentence.text, delivery))
    return clips


def _in_both_styles(queries: Sequence[Query]) -> list[Query]:
    """Without sentences that are left in one style only, by which no deaf system can be told."""
    found: dict[str, set[str]] = defaultdict(set)
    for query in queries:
        found[query.sentence_id].add(query.style)
    return [query for query in queries if len(found[query.sentence_id]) == 2]


def filter_queries(config: ConfigDict, workdir: str, *, queries: str, output: str) -> Figures:
    """Leaves of a corpus's queries those whose words pass the three filters, beside the others.

    What was asked is kept in the workdir's filters.jsonl and not asked again.

    Raises:
        StageError: a query is of no dimension that the filters know.
        EndpointError: the server gives nothing, or the spend cap is reached.
    """
    path = Path(queries)
    rows = read_jsonl(path, Query)
    strange = [query for query in rows if query.dimension not in query_writer.ABOUT]
    if strange:
        raise StageError(
            f"{path}: query {strange[0].id!r} is of the dimension {strange[0].dimension!r}; the "
            f"filters know {', '.join(query_writer.ABOUT)}."
        )
    candidates = [
        query_writer.Candidate(
            query.dimension, query.style, query.contrast, query.text, query.topic, "", "", ""
        )
        for query in rows
    ]
    client = ChatClient(Endpoint(**config.queries.endpoint))
    unique = list(dict.fromkeys(candidates))
    judged = query_writer.filter_sentences(client, unique, Path(workdir) / "filters.jsonl")
    status = {(c.dimension, c.style_a, c.style_b, c.text): c.status for c in judged}
    found = [status.get((q.dimension, q.style, q.contrast, q.text)) for q in rows]
    kept = [query for query, given in zip(rows, found) if given == query_writer.KEPT]
    write_jsonl(path.with_name(output), kept)
    figures = {
        "queries/clips": len(rows),
        "queries/kept": len(kept),
        "queries/undecided": found.count(None),
        "queries/calls": client.calls,
        "queries/usd": round(client.usd, 4),
    }
    print_figures(f"queries in {path.with_name(output)}", figures)
    if found.count(None):
        print("undecided: the server gave no answer about them; run the same command again")
    return figures


def import_corpus(corpus: str, source: str, waves: str | None, output: str) -> Figures:
    """Writes queries of a corpus that the user has, as `paras2s judge` reads them.

    corpus: "iemocap", "meld" (source: what their builders call manual_dir) or "styletalk" (source:
    a CSV; waves: the folder of its audio).

    Raises:
        StageError: nothing of the corpus can be a query, or a flag is missing.
        FileNotFoundError, RecordError, AudioError: the corpus is not as released.
    """
    folder = Path(output)
    if corpus == "styletalk":
        if not waves:
            raise StageError("--from=styletalk needs --waves: the folder of its audio files.")
        num_queries, num_left_out = styletalk.import_csv(source, waves, folder)
        figures = {"queries/clips": num_queries, "queries/left_out": num_left_out}
    else:
        figures = {"queries/clips": _export(corpus, Path(source), folder)}
    if not figures["queries/clips"]:
        raise StageError(
            f"{source}: none of its rows is there in two styles; is it the whole file?"
        )
    print_figures(f"queries in {folder / QUERIES}", figures)
    return figures


def _export(corpus: str, source: Path, folder: Path) -> int:
    """By the corpus's builder. Returns: how many queries."""
    # TensorFlow takes seconds to import, which nothing else here needs.
    import tensorflow_datasets as tfds

    from paras2s_jax.data.datasets import queries
    from paras2s_jax.data.datasets.iemocap_queries import IemocapQueries
    from paras2s_jax.data.datasets.meld_queries import MeldQueries

    builder_class = {"iemocap": IemocapQueries, "meld": MeldQueries}[corpus]
    folder.mkdir(parents=True, exist_ok=True)
    # Built anew each time: kept_ids.txt may have changed.
    with tempfile.TemporaryDirectory(prefix=".tfds-", dir=folder) as scratch:
        builder = builder_class(data_dir=scratch)
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                manual_dir=source.resolve(), try_download_gcs=False
            )
        )
        queries.export(builder, "test", folder)
        return builder.info.splits["test"].num_examples
