"""Command line: `paras2s STAGE --config=configs/X.py [--config.key=value …]`, and commands."""

from __future__ import annotations

import difflib
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

# TensorFlow only feeds data here: its start-up notices help nobody.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import flags
from ml_collections import ConfigDict, config_flags

from paras2s_jax import allocator
from paras2s_jax.perf import registry as perf
from paras2s_jax.stages.commands import COMMANDS, Command, UsageError

USAGE = """paras2s STAGE --config=configs/X.py [--workdir=DIR] [--config.key=value …]
paras2s COMMAND [--flag=value …]
paras2s perf MEASURE [--flag=value …]
paras2s report RUN RUN … [--output=DIR]      a leaderboard of finished benches

Teaches a speech-to-speech model to answer how something was said, not only what.

stages (each runs the ones it needs first, and is skipped where it has finished):
{stages}

flags of stages:
  --config=FILE[:ARG]     the experiment; any key can be overridden: --config.grpo.beta=0
  --workdir=DIR           where files go (default: runs/<name of the config>)

several processes as one run (a pod, nodes, or one machine):
  --distributed=MODE      auto (default): where the machine says so (Cloud TPU VM, GKE, Slurm, Open
                          MPI), or the next three do; on: or fail; off
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                          of process 0, and which of how many this one is; or in the environment:
                          PARAS2S_COORDINATOR, PARAS2S_NUM_PROCESSES, PARAS2S_PROCESS_ID
  --start_timeout=300 --heartbeat_timeout=60 --barrier_timeout=600
                          seconds for all to appear; of silence until one counts as dead, which
                          ends all; by which one may lag behind the others

commands (`paras2s COMMAND --help` tells their flags):
{commands}

measures of `paras2s perf`:
{measures}
"""

STOPPED = "paras2s: stopped by SIGTERM; what was done is saved, and the same command goes on."


def _usage(stages: Mapping) -> str:
    width = max(map(len, [*stages, *COMMANDS, *perf.MEASURES]))

    def rows(table: Mapping) -> str:
        return "\n".join(f"  {name:<{width}}  {entry.help}" for name, entry in table.items())

    return USAGE.format(stages=rows(stages), commands=rows(COMMANDS), measures=rows(perf.MEASURES))


def _sentence(error: object) -> str:
    return f"paras2s: {' '.join(str(error).split())}"


def _fail(error: object) -> int:
    print(_sentence(error), file=sys.stderr)
    return 2


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message tells the user what to do; others are defects and show their trace."""
    from paras2s_jax.audio.wave import AudioError
    from paras2s_jax.bench.aggregate import BenchError
    from paras2s_jax.convert.rules import ConversionError
    from paras2s_jax.data.batches import ManifestError
    from paras2s_jax.data.endpoint import EndpointError
    from paras2s_jax.data.records import RecordError
    from paras2s_jax.data.tiktoken_vocabulary import VocabularyError
    from paras2s_jax.judge.agreement import RatingError
    from paras2s_jax.judge.ledger import LedgerError
    from paras2s_jax.plan.hardware import PlanError
    from paras2s_jax.stages.registry import StageError
    from paras2s_jax.train.checkpoint import CheckpointError
    from paras2s_jax.train.distributed import DistributedError
    from paras2s_jax.train.loop import TrainingError

    return (
        AudioError,
        BenchError,
        CheckpointError,
        ConversionError,
        DistributedError,
        EndpointError,
        LedgerError,
        ManifestError,
        PlanError,
        RatingError,
        RecordError,
        StageError,
        TrainingError,
        VocabularyError,
        FileNotFoundError,
    )


def _did_you_mean(near: Iterable[str]) -> str:
    near = list(near)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def load_config(spec: str) -> ConfigDict:
    """The config that a file's `get_config` returns, locked against new keys.

    Args:
        spec: FILE or FILE:ARG.

    Raises:
        UsageError: there is no such file, or it refuses the argument.
    """
    name, colon, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        beside = [str(file) for file in sorted(path.parent.glob("*.py"))]
        near = _did_you_mean(difflib.get_close_matches(str(path), beside, n=1))
        raise UsageError(f"there is no config file {name!r}{near or '.'}")
    try:
        module = runpy.run_path(name)
    except SyntaxError as error:
        raise UsageError(f"{name} is not a config file: {error}.") from error
    if "get_config" not in module:
        raise UsageError(f"{name} is not a config file: it has no get_config().")
    try:
        config = module["get_config"](*([arg] if colon else []))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return config.lock()


def _leaves(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Every key that can be overridden, dotted, with its value; an empty section is one key."""
    leaves = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _check_key(key: str, leaves: Mapping[str, object]) -> None:
    if key in leaves:
        return
    inside = [leaf for leaf in leaves if leaf.startswith(f"{key}.")]
    if inside:
        raise UsageError(
            f"config.{key} is a section: set its keys one by one, "
            f"for example --config.{inside[0]}={leaves[inside[0]]}"
        )
    near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.75)
    last = key.rpartition(".")[2]
    near = near or [leaf for leaf in leaves if leaf.rpartition(".")[2] == last][:3]
    near = _did_you_mean(f"config.{leaf}" for leaf in near)
    raise UsageError(f"there is no config key config.{key}{near or '.'}")


def _check_tuple(key: str, old: tuple, new: tuple) -> None:
    """Tuples may change their length, not the kind of what they hold."""
    kinds = {type(value) for value in old} | ({int} if float in map(type, old) else set())
    wrong = [value for value in new if old and type(value) not in kinds]
    if wrong:
        raise UsageError(
            f"flag --config.{key}: {wrong[0]!r} is not of the type of {old[0]!r}, "
            f"as in --config.{key}='{old}'."
        )


def _define_distributed(values: flags.FlagValues) -> None:
    """Flags of `train.distributed.Settings`; the addresses may stand in the environment too."""

    def given(name: str) -> str | None:
        return os.environ.get(f"PARAS2S_{name.upper()}") or None

    flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"], "", flag_values=values)
    flags.DEFINE_string("coordinator", given("coordinator"), "", flag_values=values)
    for name in ("num_processes", "process_id"):
        flags.DEFINE_integer(name, given(name), "", lower_bound=0, flag_values=values)
    for name, default in (("start", 300), ("heartbeat", 60), ("barrier", 600)):
        flags.DEFINE_integer(f"{name}_timeout", default, "", lower_bound=1, flag_values=values)


def _distributed_settings(values: flags.FlagValues) -> dict[str, object]:
    """The fields of `train.distributed.Settings` as given."""
    names = ("coordinator", "num_processes", "process_id")
    return {
        "mode": values.distributed,
        **{name: values[name].value for name in names},
        **{
            f"{name}_s": values[f"{name}_timeout"].value
            for name in ("start", "heartbeat", "barrier")
        },
    }


def parse(argv: list[str]) -> tuple[ConfigDict, str, dict[str, object]]:
    """Flags of one run -> (config with its overrides, workdir, fields of distributed.Settings).

    Args:
        argv: the program's name, then flags.

    Raises:
        flags.Error: a flag, key, type or file is wrong; one sentence says which.
    """
    values, workdir = _parse(argv, _define_distributed)
    return values.config, workdir, _distributed_settings(values)


def _parse(
    argv: list[str], define: Callable[[flags.FlagValues], None]
) -> tuple[flags.FlagValues, str]:
    """Config with its overrides, workdir and the flags that `define` adds; the workdir apart."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "Experiment file.", flag_values=values)
    values.set_gnu_getopt()
    rest = values(argv, known_only=True)
    if not values.config:
        raise UsageError("no --config given, for example --config=configs/tiny.py")
    config = load_config(values.config)
    leaves = _leaves(config)
    found = [re.match(r"--?(?:no)?config\.([^=]*)", arg) for arg in rest[1:]]
    keys = [match.group(1) for match in found if match]
    for key in keys:
        _check_key(key, leaves)

    overrides = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=overrides, sys_argv=rest)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=overrides)
    define(overrides)
    overrides.set_gnu_getopt()
    try:
        stray = overrides(rest)[1:]
    except ValueError as error:
        # absl's answer to a value for --noconfig.key.
        raise UsageError(f"{error}.") from error
    if stray:
        raise UsageError(f"unexpected argument {stray[0]!r}: overrides are --config.key=value.")
    made = _leaves(overrides.config)
    for key in keys:
        if isinstance(leaves[key], tuple):
            _check_tuple(key, leaves[key], made[key])
    stem = re.sub(r"\.py(:|$)", r"\1", os.path.basename(values.config)).strip(":")
    workdir = overrides.workdir or os.path.join("runs", stem.replace(":", "_"))
    return overrides, workdir


def _arguments(command: Command, argv: list[str]) -> dict[str, object]:
    """Keyword arguments of a command or measure, from what follows its name."""
    if not command.takes_config:
        return command.parse(argv)
    values, workdir = _parse([command.name, *argv], command.define)
    return {"config": values.config, "workdir": workdir} | command.given(values)


def _stage_name(argument: str, stages: Mapping) -> str:
    if argument.startswith("-"):
        raise UsageError(f"the stage comes first, as in `paras2s align {argument}`.")
    if argument not in stages:
        near = difflib.get_close_matches(argument, [*stages, *COMMANDS, "perf"], n=1)
        raise UsageError(
            f"there is no stage or command {argument!r}{_did_you_mean(near) or ';'} "
            "`paras2s --help` lists them."
        )
    return argument


def _keep_compiled(workdir: Path) -> None:
    """Programs are compiled once per workdir: for all stages that run them, and when resumed."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))


def _run_stage(argv: list[str]) -> None:
    from paras2s_jax.stages.recipe import STAGES, stages_of
    from paras2s_jax.stages.registry import Runner

    name = _stage_name(argv[1], STAGES)
    config, workdir, settings = parse([argv[0], *argv[2:]])
    # Behind the checks of flags, which need not wait for JAX.
    from paras2s_jax.train import distributed, preemption

    def describe(error: BaseException) -> tuple[str, int]:
        if isinstance(error, preemption.Preempted):
            return STOPPED, 0
        if isinstance(error, _user_errors()):
            return _sentence(error), 2
        return traceback.format_exc(), 1

    try:
        with distributed.joined(distributed.Settings(**settings), describe), preemption.watch():
            _keep_compiled(Path(workdir))
            Runner(stages_of(config), config, workdir).run(name)
    except preemption.Preempted:
        # What was done is saved: status 0, and the scheduler runs the same command again.
        print(STOPPED, file=sys.stderr)


def _run_measure(argv: list[str]) -> None:
    if len(argv) < 3 or argv[2] not in perf.MEASURES:
        given = f"there is no measure {argv[2]!r}" if len(argv) > 2 else "no measure given"
        near = difflib.get_close_matches(argv[2], perf.MEASURES, n=1) if len(argv) > 2 else []
        known = _did_you_mean(near) or f"; there are {', '.join(perf.MEASURES)}."
        raise UsageError(f"{given}{known}")
    measure = perf.MEASURES[argv[2]]
    perf.run(measure, _arguments(measure, argv[3:]))


def _compare(argv: list[str]) -> None:
    """`report A B C [--output=DIR]`: a leaderboard of finished benches."""
    from paras2s_jax.stages.judge import compare

    values = flags.FlagValues()
    flags.DEFINE_string("output", "runs/leaderboard", "Folder of the pages.", flag_values=values)
    values.set_gnu_getopt()
    compare(values(["report", *argv])[1:], values.output)


def _run(argv: list[str]) -> None:
    if argv[1] == "perf":
        _run_measure(argv)
    elif argv[1] == "report" and len(argv) > 2 and not argv[2].startswith("-"):
        _compare(argv[2:])
    elif argv[1] in COMMANDS:
        command = COMMANDS[argv[1]]
        command.run(**_arguments(command, argv[2:]))
    else:
        _run_stage(argv)


def _help(argv: list[str]) -> str:
    """What is asked for with --help: one command's flags, or everything."""
    from paras2s_jax.stages.recipe import STAGES

    measure = perf.MEASURES.get(argv[2]) if argv[1] == "perf" and len(argv) > 2 else None
    if measure is not None:
        return measure.usage("paras2s perf")
    if argv[1] in COMMANDS:
        return COMMANDS[argv[1]].usage()
    title = f"paras2s {argv[1]}: {STAGES[argv[1]].help}\n\n" if argv[1] in STAGES else ""
    return title + _usage(STAGES)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    if argv is None:
        allocator.restart_tuned()
    argv = list(sys.argv if argv is None else argv)
    if len(argv) < 2:
        print(_help([*argv, "help"]), file=sys.stderr)
        return 2
    if argv[1] == "help" or not {"-h", "--help"}.isdisjoint(argv):
        print(_help(argv))
        return 0
    try:
        _run(argv)
    except KeyboardInterrupt:
        print("paras2s: interrupted; run the same command again.", file=sys.stderr)
        return 130
    except flags.Error as error:
        return _fail(error)
    except _user_errors() as error:
        return _fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
