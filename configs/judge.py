"""Judge any voice model: a folder of its answers, a server, a pipeline, or a checkpoint.

    paras2s judge --config=configs/judge.py --queries=queries.jsonl --config.system.source=answers

writes tables, a report with players and a page for human ratings below --workdir. The argument
chooses the judge:

    offline   what comes with the package, free: knows the packaged bank and its voices only
    open      released models on this machine: Whisper, Qwen2-Audio, Qwen2.5; free, wants a GPU
    hosted    as open, but scored by a hosted language model: set $OPENAI_API_KEY
    reward    a reward model that was distilled here (`judge.reward.folder`): hears both waveforms
    reward_7b a distilled Qwen2.5-Omni, of configs/kimi_audio_7b.py, and no other stage

Styles are taken from the queries' labels, unless analyzers are given (`judge.analyzers`).
"""

import runpy
from pathlib import Path

import ml_collections
from ml_collections import ConfigDict

_TINY = runpy.run_path(str(Path(__file__).with_name("tiny.py")))
_WITHOUT_ANALYZERS = dict.fromkeys(("emotion", "sarcasm", "age", "gender"), "")
_RELEASED = dict(
    transcriber="openai/whisper-large-v3",
    tone="Qwen/Qwen2-Audio-7B-Instruct",
    dtype="bfloat16",
    batch_size=8,
)
JUDGES = {
    "offline": {},
    "open": _RELEASED | dict(scorer="local"),
    "hosted": _RELEASED | dict(scorer="endpoint", num_repeats=3, temperature=0.7),
    "reward": dict(scorer="reward"),
    "reward_7b": dict(scorer="reward", transcriber="none", tone="none"),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Builds the config.

    Args:
        arg: a key of JUDGES; offline by default.

    Raises:
        ValueError: any other arg.
    """
    arg = arg or "offline"
    if arg not in JUDGES:
        raise ValueError(f"configs/judge.py takes {', '.join(JUDGES)}, not :{arg}.")
    c = ConfigDict()
    c.seed = 0
    c.judge = _TINY["judge"](analyzers=_WITHOUT_ANALYZERS, **JUDGES[arg])
    # Of the scorer "reward": as in the config that distilled it.
    c.distill = ConfigDict(dict(model=_TINY["reward_model"]()))
    if arg == "reward_7b":
        _add_7b(c)
    c.system = system()
    # Small parts of the offline judge, and the voice of the probes.
    c.pretrain = ConfigDict(dict(source="tiny"))
    c.synthesize = ConfigDict(dict(synthesizer="espeak", options={}))
    c.bench = ConfigDict(
        dict(
            use_labels=False,  # although analyzers are given
            num_resamples=2000,
            num_probes=60,  # queries of the judge card
            num_rated_pairs=60,
            sentences_in_report=6,
        )
    )
    return c


def _add_7b(c: ConfigDict) -> None:
    path = Path(__file__).with_name("kimi_audio_7b.py")
    trained = runpy.run_path(str(path))["get_config"]("v5p-4x4x4").distill
    c.distill.model = trained.model
    c.judge.reward.len_buckets_s, c.judge.reward.batch_size = trained.pair_buckets_s, 8


def system() -> ConfigDict:
    """The system that is judged; what a kind does not need is passed over."""
    return ConfigDict(
        dict(
            name="mine",
            # folder (one file per query, named by its id), recorded (responses.jsonl), chat or
            # realtime (servers), pipeline or topline (recogniser, chat server, synthesizer), or
            # checkpoint (a converted Kimi-Audio, or one that was trained here).
            kind="folder",
            source="",  # of folder, recorded and checkpoint
            num_samples=1,
            endpoint=_TINY["audio_endpoint"](),
            instructions="You are a friendly voice assistant. Answer in one or two sentences.",
            voice="alloy",
            synthesizer="espeak",
            synthesizer_options={},
            text_sampling=dict(temperature=0.0, top_k=5),
            audio_sampling=dict(temperature=0.8, top_k=10),
            max_steps=0,
            batch_size=8,
            dtype="bfloat16",
        )
    )
