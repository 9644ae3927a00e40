"""Command line: `paras2s STAGE --config=configs/X.py --workdir=DIR [--config.key=value …]`."""

from __future__ import annotations

import difflib
import os
import sys

# TensorFlow only feeds data here: its start-up notices help nobody.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import flags
from ml_collections import config_flags

USAGE = """paras2s STAGE --config=configs/X.py [--workdir=DIR] [--config.key=value …]

Teaches a speech-to-speech model to answer how something was said, not only what.

stages (each runs the ones it needs first, and is skipped where it has finished):
{stages}

flags:
  --config=FILE[:ARG]     the experiment; any key can be overridden: --config.grpo.beta=0
  --workdir=DIR           where files go (default: runs/<name of the config>)
"""


def _usage(stages) -> str:
    width = max(map(len, stages))
    return USAGE.format(
        stages="\n".join(f"  {name:<{width}}  {stage.help}" for name, stage in stages.items())
    )


def _fail(message: str) -> int:
    print(f"paras2s: {message}", file=sys.stderr)
    return 2


def _parse(argv: list[str]):
    """Flags of one run.

    Returns:
        (config, workdir).

    Raises:
        flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError: as
            ml_collections and absl report a wrong flag, key, type or file.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Experiment file.", flag_values=values, lock_config=True
    )
    flags.DEFINE_string("workdir", None, "Folder for every file of the run.", flag_values=values)
    rest = values(argv)
    if len(rest) > 1:
        raise flags.Error(f"unexpected argument {rest[1]!r}")
    if values.config is None:
        raise flags.Error("no --config given, for example --config=configs/tiny.py")
    name = values["config"].config_filename
    stem = os.path.splitext(os.path.basename(name))[0]
    return values.config, values.workdir or os.path.join("runs", stem)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    argv = list(sys.argv if argv is None else argv)
    from paras2s_jax.stages.recipe import STAGES, USER_ERRORS
    from paras2s_jax.stages.registry import Runner

    if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
        print(_usage(STAGES))
        return 0 if len(argv) > 1 else 2
    name = argv[1]
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return _fail(f"there is no stage {name!r}{hint} `paras2s --help` lists them.")
    if any(a in ("-h", "--help") for a in argv[2:]):
        print(f"paras2s {name}: {STAGES[name].help}\n\n{_usage(STAGES)}")
        return 0
    try:
        config, workdir = _parse([argv[0], *argv[2:]])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        return _fail(str(error).strip().strip("'\"").replace("\n", " "))
    try:
        Runner(STAGES, config, workdir).run(name)
    except USER_ERRORS as error:
        return _fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
