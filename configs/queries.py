"""New spoken queries, written by a language model and spoken by a synthesizer.

    paras2s write_queries --config=configs/queries.py --workdir=data/new --dry_run
    paras2s write_queries --config=configs/queries.py --workdir=data/new

leaves data/new/queries.jsonl, which `paras2s judge` reads. Needs a language model behind a server
($OPENAI_API_KEY, or --config.queries.endpoint.base_url of one of your own). Of several takes the
one is kept whose style is heard best, if analyzers are named:
--config.judge.analyzers.emotion=runs/tiny/analyzers and so on.
"""

import runpy
from pathlib import Path

import ml_collections
from ml_collections import ConfigDict

_TINY = runpy.run_path(str(Path(__file__).with_name("tiny.py")))
DIMENSIONS = ("age", "emotion", "gender", "sarcasm")


def get_config() -> ml_collections.ConfigDict:
    """Builds the config."""
    c = ConfigDict()
    c.seed = 0
    c.judge = _TINY["judge"](analyzers=dict.fromkeys(DIMENSIONS, ""))  # only analyzers are used
    c.synthesize = ConfigDict(dict(synthesizer="espeak", options={}))
    c.queries = ConfigDict(
        dict(
            endpoint=_TINY["endpoint"](),
            dimensions=DIMENSIONS,
            styles=dict(
                age=("child", "adult"),
                emotion=("surprised", "sad"),
                gender=("male", "female"),
                sarcasm=("sincere", "sarcastic"),
            ),
            num_sentences=30,  # of each dimension
            split="test",  # whose voices: analyzers and policies here have heard those of train
            num_voices=2,  # of each sentence and style
            num_takes=4,  # of each query
            min_prob=0.5,  # of the style, by its analyzer, in the best take
            keep_share=0.5,  # of proposed sentences, for --dry_run
            num_workers=2,
        )
    )
    return c
