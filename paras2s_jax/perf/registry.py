"""What `paras2s perf NAME` measures, each closing with a summary.json as stages do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from paras2s_jax.stages.commands import Command, Flag
from paras2s_jax.stages.registry import Figures, Lazy, finish, source_commit

WORKDIR = Flag("workdir", "where summaries go, in a folder of the measure's name", "runs/perf")
THREADS = Flag("threads", "cores and threads of either side", 1, int)

MEASURES: dict[str, Command] = {
    measure.name: measure
    for measure in (
        Command(
            "convert",
            "peak memory and speed of converting a synthetic sharded checkpoint to disk",
            (
                Flag("gb", "size of the checkpoint", 4.0, float),
                Flag("scratch", "folder for the checkpoint and its conversion", None),
                WORKDIR,
            ),
            Lazy("paras2s_jax.perf.convert", "run"),
        ),
        Command(
            "data",
            "seconds of audio that one core reads, decodes and batches per second",
            (
                Flag("clips", "synthetic wav files, of 2 to 12.4 s", 256, int),
                Flag("epochs", "timed passes over them", 5, int),
                WORKDIR,
            ),
            Lazy("paras2s_jax.perf.data", "run"),
        ),
        Command(
            "decode",
            "generation against transformers', prompts shared by a group, answers of all lengths",
            (THREADS, WORKDIR),
            Lazy("paras2s_jax.perf.decode", "run"),
        ),
        Command(
            "detokenize",
            "speed of a batch of answers against one by one; what approximations change",
            (
                Flag("answers", "in the batch", 6, int),
                Flag("width", "of the flow-matching network", 128, int),
                Flag("depth", "of the flow-matching network, in layers", 4, int),
                Flag("channels", "of the vocoder, at first", 32, int),
                THREADS,
                WORKDIR,
            ),
            Lazy("paras2s_jax.perf.detokenize", "run"),
        ),
        Command(
            "grpo",
            "speed of whole GRPO steps of a text-only Qwen2 against TRL's GRPOTrainer",
            (
                Flag("prompts", "in a step", 1, int),
                Flag("group", "answers to a prompt", 8, int),
                Flag("prompt_len", "tokens of a prompt", 160, int),
                Flag("answer_len", "tokens of an answer", 190, int),
                THREADS,
                WORKDIR,
            ),
            Lazy("paras2s_jax.perf.grpo", "run"),
        ),
        Command(
            "reward",
            "scores per second of the reward model: whole groups against pair by pair",
            (
                Flag("prompts", "queries at a time", 1, int),
                Flag("group", "answers to a query", 8, int),
                THREADS,
                WORKDIR,
            ),
            Lazy("paras2s_jax.perf.reward", "run"),
        ),
        Command(
            "forward",
            "speed of forward passes against torch: Whisper encoder, Qwen2 decoding, log-mel",
            (
                Flag(
                    "races", "which of them, with commas between", "whisper_encoder,decode,log_mel"
                ),
                THREADS,
                WORKDIR,
            ),
            Lazy("paras2s_jax.perf.forward", "run"),
        ),
        Command(
            "plan",
            "decode loop and update as compiled for a slice, of few layers: copies, collectives",
            (
                Flag("layers", "of each of three stacks; 0: as many as the config says", 2, int),
                Flag("plan", "reads what compile left in WORKDIR/plan/grpo instead", ""),
            ),
            Lazy("paras2s_jax.perf.plan", "run"),
            takes_config=True,
        ),
        Command(
            "faults",
            "what a server that fails and a program that is killed lose or pay twice",
            (
                Flag("queries", "asked and judged", 200, int),
                Flag("kills", "times that the program is killed", 6, int),
                Flag("seed", "of the moments", 0, int),
                WORKDIR,
            ),
            Lazy("paras2s_jax.perf.faults", "run"),
        ),
        Command(
            "judge",
            "pairs a second through the local judge, in batches and one by one",
            (
                Flag("pairs", "judged in batches", 1000, int),
                Flag("single", "judged one by one", 60, int),
                Flag("batch_size", "waves per call of a stage", 8, int),
                WORKDIR,
            ),
            Lazy("paras2s_jax.perf.judge", "run"),
        ),
    )
}


def run(measure: Command, values: Mapping[str, object]) -> Figures:
    """Runs one measure with the values of its flags; writes and prints its figures."""
    values = dict(values)
    folder = Path(str(values.pop(WORKDIR.name))) / measure.name
    commit, started = source_commit(), time.monotonic()
    print(f"▶ perf {measure.name}: {measure.help}", flush=True)
    figures = measure.run(**values)
    config = values.get("config")
    shown = values if config is None else values | {"config": config.to_dict()}
    finish(folder, f"perf {measure.name}", shown, commit, started, figures)
    return figures
