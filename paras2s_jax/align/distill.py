"""Distillation of the judge into the reward model (paper.md, section 3, step 2).

sample: N answers per query from the SFT policy -> wavs + responses.jsonl
judge_samples: -> verdicts.jsonl
train: verdicts -> reward model; evaluate: against verdicts on queries it never saw.
Each part continues where it was stopped.
"""

import hashlib
import json
import math
import os
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from paras2s_jax.align import rewards
from paras2s_jax.align.pairs import pair_rows, query_rows
from paras2s_jax.align.phases import Call, Responder
from paras2s_jax.align.policy import Frontend, SpeechPolicy, texts_of
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.batches import Batches
from paras2s_jax.data.records import Query, Response, Verdict, read_jsonl, write_jsonl
from paras2s_jax.data.tokenizer import Tokenizer
from paras2s_jax.train import distributed
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.loop import Source, fit
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.sharding import ONE_DEVICE, ONE_DEVICE_LAYOUTS, Layout, Layouts, Program
from paras2s_jax.train.state import TrainState
from paras2s_jax.train.step import Update, make_update

AUDIO_KEYS = ("query", "answer")
SCALAR_KEYS = ("score", "style", "tone")
# A file for an answer without any sound, which no player or judge chokes on.
NO_ANSWER_S = 0.1

Pair = tuple[Query, Path, Response, Path]
JudgeFn = Callable[[Sequence[Pair]], Sequence[Verdict]]


def sample(
    policy: SpeechPolicy,
    variables: Mapping[str, Any],
    frontend: Frontend,
    tokenizer: Tokenizer,
    queries: Sequence[Query],
    queries_dir: Path,
    out_dir: Path,
    *,
    num_samples: int,
    batch_size: int,
    len_buckets_s: Sequence[float],
    seed: int,
    version: str,
    system: str = "sft",
    layouts: Layouts = ONE_DEVICE_LAYOUTS,
    dtype: Any = None,
) -> list[Response]:
    """Samples answers; sampling at a higher temperature is a matter of `policy.text`, `.audio`.

    Args:
        queries: their wavs are relative to `queries_dir`.
        out_dir: gets wavs/, responses.jsonl and, meanwhile, parts/.
        num_samples: N answers per query.
        batch_size: queries per batch; the batch holds batch_size * N answers.
        version: names the policy's weights; answers of other weights are discarded.
        layouts, dtype: see phases.Responder.

    Returns:
        all responses.
    """
    parts = out_dir / "parts"
    identity = {
        "version": version,
        "system": system,
        "seed": seed,
        "num_samples": num_samples,
        "batch_size": batch_size,
        "len_buckets_s": list(len_buckets_s),
        "sampling": [repr(policy.text), repr(policy.audio), policy.max_steps],
        "queries": [[query.id, query.wav, query.dur_s] for query in queries],
    }

    def find_done() -> int | None:
        """How many parts there are; None if all is done."""
        _continue_or_clear(out_dir, identity)
        finished = (out_dir / "responses.jsonl").is_file()
        return None if finished else len(list(parts.glob("*.jsonl")))

    done = distributed.on_main(f"{system}: look at samples", find_done)
    if done is None:
        return read_jsonl(out_dir / "responses.jsonl", Response)
    batches = Batches(
        query_rows(queries),
        root=queries_dir,
        audio_keys=("query",),
        batch_size=batch_size,
        len_buckets_s=len_buckets_s,
        seed=seed,
        local_rows=layouts.train.local_rows(batch_size),
    )
    # Parts are written in order, each after its wavs.
    batches.restore({"epoch": 0, "batch": done})
    respond = Responder(policy, layouts, group_size=num_samples, dtype=dtype)
    variables = layouts.train.place(variables, policy.boxed())
    frontend = layouts.train.place(frontend, policy.boxed_frontend(frontend))
    bar = tqdm(
        total=len(batches),
        initial=done,
        desc=f"{system}: sample",
        unit="batch",
        disable=not distributed.is_main(),
    )
    with bar:
        for index in range(done, len(batches)):
            batch = next(batches)
            rng = jax.random.fold_in(jax.random.key(seed), index)
            heard = {key: batch[key] for key in ("query", "query_len", "row")}
            heard = layouts.train.place_batch(heard, num_samples)
            row = heard.pop("row")
            rollout, answers = respond(variables, frontend, heard, rng)
            lens, rollout, row = distributed.gather((answers.lens, rollout, row))
            texts = texts_of(policy, rollout, tokenizer)
            made = [
                Response(
                    query_id=queries[row[at]].id,
                    system=system,
                    sample=g,
                    text=texts[at][g],
                    finished=bool(rollout.finished[at, g]),
                    dur_s=int(lens[at, g]) / wave_lib.RATE_HZ,
                    wav=_wav_name(queries[row[at]].id, g),
                )
                for at in np.flatnonzero(row >= 0)
                for g in range(num_samples)
            ]
            _save_waves(out_dir, queries, row, answers.waves, lens)
            distributed.barrier(f"{system}: waves of part {index}")
            if distributed.is_main():
                write_jsonl(parts / f"{index:06d}.jsonl", made)
            bar.update()

    def join() -> None:
        responses = [
            row for path in sorted(parts.glob("*.jsonl")) for row in read_jsonl(path, Response)
        ]
        write_jsonl(out_dir / "responses.jsonl", responses)
        shutil.rmtree(parts)

    distributed.on_main(f"{system}: join samples", join)
    return read_jsonl(out_dir / "responses.jsonl", Response)


def _continue_or_clear(out_dir: Path, identity: Mapping[str, Any]) -> None:
    """Removes what another policy, or other settings, left in the folder."""
    mark = out_dir / "identity.json"
    wanted = json.dumps(identity)
    if mark.is_file() and mark.read_text(encoding="utf-8") == wanted:
        return
    for name in ("parts", "wavs"):
        shutil.rmtree(out_dir / name, ignore_errors=True)
    (out_dir / "responses.jsonl").unlink(missing_ok=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    partial = mark.with_suffix(".partial")
    partial.write_text(wanted, encoding="utf-8")
    os.replace(partial, mark)


def _wav_name(query_id: str, sample: int) -> str:
    return f"wavs/{urllib.parse.quote(query_id, safe='')}.{sample}.wav"


def _save_waves(
    out_dir: Path, queries: Sequence[Query], row: np.ndarray, waves: jax.Array, lens: np.ndarray
) -> None:
    """Writes the answers that lie on this process's devices.

    row: int32[P], of queries, or -1. waves: float32[P, G, L]. lens: int32[P, G].
    """
    silence = np.zeros(round(NO_ANSWER_S * wave_lib.RATE_HZ), np.float32)
    for (prompts, samples, _), block in distributed.own_blocks(waves):
        for at, group in zip(np.arange(len(row))[prompts], block, strict=True):
            for g, wave in zip(np.arange(waves.shape[1])[samples], group, strict=True):
                if row[at] >= 0:
                    wave = wave[: lens[at, g]] if lens[at, g] else silence
                    wave_lib.save(out_dir / _wav_name(queries[row[at]].id, g), wave)


def judge_samples(
    judge: JudgeFn,
    queries: Iterable[Query],
    queries_dir: Path,
    responses: Sequence[Response],
    responses_dir: Path,
) -> list[Verdict]:
    """Verdicts of all responses, also written to responses_dir/verdicts.jsonl.

    Nothing is kept back from an earlier run: the judge's ledger makes repeats cheap, and cannot
    confuse an answer with another one of the same name.
    """
    by_id = {query.id: query for query in queries}
    verdicts = list(
        judge(
            [
                (
                    by_id[response.query_id],
                    wave_lib.inside(queries_dir, by_id[response.query_id].wav),
                    response,
                    wave_lib.inside(responses_dir, response.wav),
                )
                for response in responses
            ]
        )
    )
    if len(verdicts) != len(responses):
        raise ValueError(f"the judge gave {len(verdicts)} verdicts for {len(responses)} answers.")
    write_jsonl(responses_dir / "verdicts.jsonl", verdicts)
    return verdicts


def scored_rows(
    queries: Sequence[Query],
    queries_dir: Path,
    responses: Sequence[Response],
    responses_dir: Path,
    verdicts: Sequence[Verdict],
) -> tuple[list[dict], Path, int]:
    """Rows with a score for training: unscored verdicts and soundless answers are left out.

    responses and verdicts: in the same order.
    Returns: (rows as `pairs.pair_rows`, with `score` and the indices of the `style` and the `tone`
      that the judge heard; their root; how many were left out).
    """
    rows, root = pair_rows(queries, queries_dir, responses, responses_dir)
    kept = [
        row
        | {
            "score": verdict.score,
            "style": _index(verdict.style_in, rewards.STYLE_LABELS),
            "tone": _index(verdict.tone_out, rewards.TONE_LABELS),
        }
        for row, response, verdict in zip(rows, responses, verdicts, strict=True)
        if math.isfinite(verdict.score) and response.dur_s > 0
    ]
    return kept, root, len(rows) - len(kept)


def _index(label: str, labels: Sequence[str]) -> int:
    return labels.index(label) if label in labels else rewards.UNKNOWN


def hold_out(rows: Sequence[dict], share: float) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows): all answers to a sentence, in all its styles, go together.

    The choice is a hash of the sentence's id, so that it survives more queries or samples.
    """

    def is_held_out(row):
        digest = hashlib.sha256(row["sentence_id"].encode()).digest()
        return int.from_bytes(digest[:4], "big") < share * 2**32

    held_out = [row for row in rows if is_held_out(row)]
    return [row for row in rows if not is_held_out(row)], held_out


def make_reward_update(
    reward_model: rewards.RewardModel,
    optimizer: optax.GradientTransformation,
    *,
    findings_weight: float = 0.0,
    accum_steps: int = 1,
    layout: Layout = ONE_DEVICE,
) -> Update:
    """The step of `train`, on batches of AUDIO_KEYS and SCALAR_KEYS."""
    loss_fn = rewards.make_loss(reward_model, findings_weight)
    return make_update(loss_fn, optimizer, accum_steps=accum_steps, layout=layout)


def calls(reward_model, optimizer, state: TrainState, batch, **settings: Any) -> list[Call]:
    """The program of a step, on abstract arguments; settings: of make_reward_update."""
    return [Call(make_reward_update(reward_model, optimizer, **settings), (state, batch))]


def train(
    reward_model: rewards.RewardModel,
    variables: Mapping[str, Any],
    batches: Source,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    rng: jax.Array,
    trainable: str = "lora|projector",
    findings_weight: float = 0.0,
    accum_steps: int = 1,
    layout: Layout = ONE_DEVICE,
    checkpointer: Checkpointer | None = None,
    save_every: int = 100,
    writer: MetricWriter | None = None,
    log_every: int = 10,
    label: str = "reward",
    max_skipped: int = 5,
) -> dict[str, Any]:
    """Trains the variables that match `trainable` on scores; resumes where it stopped.

    batches: repeating, with AUDIO_KEYS and SCALAR_KEYS.
    Returns: all variables after `num_steps`.
    """
    variables = layout.place(variables, reward_model.boxed())
    state = TrainState.create(variables, optimizer, rng, trainable=trainable)
    # The state has its own copy of what is trained; the other would only take room.
    del variables
    update = make_reward_update(
        reward_model,
        optimizer,
        findings_weight=findings_weight,
        accum_steps=accum_steps,
        layout=layout,
    )

    def place(batch):
        keys = [name for key in AUDIO_KEYS for name in (key, f"{key}_len")]
        return layout.place_batch({key: batch[key] for key in (*keys, *SCALAR_KEYS)})

    state = fit(
        state,
        update,
        batches,
        num_steps=num_steps,
        checkpointer=checkpointer,
        save_every=save_every,
        writer=writer,
        log_every=log_every,
        progress_label=label,
        make_batch=place,
        max_skipped=max_skipped,
    )
    return state.variables


def predict(
    reward_model: rewards.RewardModel,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    num_rows: int,
    layout: Layout = ONE_DEVICE,
) -> np.ndarray:
    """The reward model's score of every row. batches: one pass with AUDIO_KEYS.

    Returns: float32[num_rows], in the order of the rows.
    """
    score = Program("score", reward_model.score, layout)
    variables = layout.place(variables, reward_model.boxed())
    found = np.full(num_rows, np.nan, np.float32)
    for batch in batches:
        heard = {name: batch[name] for key in AUDIO_KEYS for name in (key, f"{key}_len")}
        heard = layout.place_batch(heard | {"row": batch["row"]})
        answers, lens = heard["answer"][:, None], heard["answer_len"][:, None]
        scores = score(variables, heard["query"], heard["query_len"], answers, lens)
        scores, row = distributed.gather((scores, heard["row"]))
        found[row[row >= 0]] = scores[row >= 0, 0]
    return found


def agreement(
    predicted: np.ndarray, judged: np.ndarray, query_ids: Sequence[str]
) -> dict[str, float]:
    """How far the reward model follows the judge.

    Returns: `pearson` over all answers; `pearson_within`, of what is left when each query's mean
    is taken out, which is all that group-normalised advantages see; `abs_error`.
    """
    _, group = np.unique(np.asarray(query_ids), return_inverse=True)
    sizes = np.bincount(group)

    def within(x):
        return x - (np.bincount(group, x) / sizes)[group]

    return {
        "pearson": _pearson(predicted, judged),
        "pearson_within": _pearson(within(predicted), within(judged)),
        "abs_error": float(np.abs(predicted - judged).mean()),
    }


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    """NaN where one of them does not vary."""
    a, b = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (a, b))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan
