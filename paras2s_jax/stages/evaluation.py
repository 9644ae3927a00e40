"""Stages that judge: bench (respond, judge, tables, probes) and report (a page to listen to)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from paras2s_jax.align.phases import make_respond_batch
from paras2s_jax.bench import charts, tables
from paras2s_jax.bench import run as bench_run
from paras2s_jax.bench.report import write_report
from paras2s_jax.bench.systems import PolicySystem, RecordedSystem
from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.records import Query
from paras2s_jax.judge import probes
from paras2s_jax.judge.chain import Judge
from paras2s_jax.models.codec import KMeansCodec
from paras2s_jax.stages.assembly import (
    Assembly,
    assemble,
    folder_digest,
    own_layouts,
    policy_folder,
)
from paras2s_jax.stages.judging import make_judge
from paras2s_jax.stages.speech import CODEC_FILE, data_dir, maker_of, parts_dir, queries_of

# (a, b): who is compared with whom, where both are benched.
COMPARISONS = (("grpo", "sft"), ("sft", "base"), ("grpo", "sft_5x"), ("topline", "grpo"))


def policy_system(
    config: ConfigDict, made: Assembly, workdir: Path, stage: str, name: str | None = None
) -> PolicySystem:
    """A trained policy as a system of the bench; every token is sampled."""
    folder = policy_folder(config, workdir, stage)
    return PolicySystem(
        name or stage,
        make_respond_batch(
            made.policy,
            made.load(folder),
            made.frontend,
            made.tokenizer,
            made.layouts,
            dtype=made.policy.model.dtype,
        ),
        version=f"{folder_digest(folder)}-{made.policy.text}-{made.policy.audio}",
        batch_size=config.bench.batch_size,
        len_buckets_s=tuple(config.bench.len_buckets_s),
        num_samples=config.bench.num_samples,
        seed=config.seed,
    )


def run_bench(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Base, SFT, SFT on 5x, GRPO and topline on held-out sentences and voices.

    What knows only the bank's words, the ear and the probes, is left out on a user's own data.
    """
    made = assemble(config, workdir, own_layouts(config))
    root, c = data_dir(config, workdir), config.bench
    queries, bank = queries_of(root, "test"), load_bank()
    judge = make_judge(config, workdir)
    systems = [policy_system(config, made, workdir, stage) for stage in c.systems]
    if (topline := root / "topline.jsonl").is_file():
        systems.append(RecordedSystem("topline", topline))
    names = {system.name for system in systems}
    known = () if config.data.folder else bank.answers.values()
    results = bench_run.bench(
        systems,
        queries,
        root,
        workdir / "bench",
        judge=judge,
        answers=sorted({text for texts in known for text in texts}),
        comparisons=[pair for pair in COMPARISONS if names.issuperset(pair)],
        use_labels=c.use_labels,
        seed=config.seed,
        num_workers=c.num_workers,
    )
    if config.data.folder:
        return tables.figures(results)
    return tables.figures(results) | _probe_figures(config, workdir, judge, queries)


def _probe_figures(
    config: ConfigDict, workdir: Path, judge: Judge, queries: list[Query]
) -> dict[str, float]:
    """Whether the judge puts answers of known worth in their order."""
    codec = KMeansCodec.load(parts_dir(config, workdir) / CODEC_FILE)

    @jax.jit
    def through(codec, waves, lens):
        return codec.decode(*codec.encode(waves, lens))

    def resynthesize(waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        out = []
        for wave in waves:
            padded = np.zeros((1, -(-len(wave) // 16_000) * 16_000), np.float32)
            padded[0, : len(wave)] = wave
            made, lens = jax.device_get(through(codec, padded, np.array([len(wave)], np.int32)))
            out.append(made[0, : lens[0]])
        return out

    chosen = probes.build(
        queries[:: max(1, len(queries) // config.bench.num_probes)],
        load_bank(),
        workdir / "bench" / "probes",
        seed=config.seed,
        maker=maker_of(config),
        resynthesize=resynthesize,
    )
    root = data_dir(config, workdir)
    return probes.run(judge, chosen, root, use_labels=config.bench.use_labels)[0]


def run_report(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """One page with tables, curves and players, to be opened from disk."""
    page = write_report(
        workdir / "bench",
        data_dir(config, workdir),
        workdir / "report" / "index.html",
        curves=charts.grpo_charts(workdir / "grpo" / "metrics.jsonl"),
        title="ParaS2S: does the model listen?",
        about={"seed": str(config.seed)},
        sentences_per_column=config.bench.sentences_in_report,
    )
    print(f"open {page}")
    return {"report/mb": page.stat().st_size / 1e6}
