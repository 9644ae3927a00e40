"""Commands beside the stages: each has a few flags of its own and needs no config.

To add one: write a function with one keyword argument per flag, and give it a row in COMMANDS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from absl import flags

from paras2s_jax.stages.registry import Lazy

REQUIRED = object()


class UsageError(flags.Error):
    """The command line asks for something that does not exist; one sentence says what."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Attributes:
        name: as it is typed.
        help: a few words; ends up in `--help`.
        default: value when it is not given; REQUIRED means that it must be.
        kind: str, int, float or bool.
        argument: the keyword under which the command gets it, by default `name`.
        choices: all that it may be, if that is a short list.
    """

    name: str
    help: str
    default: object = REQUIRED
    kind: type = str
    argument: str | None = None
    choices: tuple[str, ...] = ()

    def define(self, values: flags.FlagValues) -> None:
        """Adds the flag to a set of absl flags."""
        default = None if self.default is REQUIRED else self.default
        if self.choices:
            flags.DEFINE_enum(self.name, default, self.choices, self.help, flag_values=values)
            return
        define = {
            str: flags.DEFINE_string,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            bool: flags.DEFINE_boolean,
        }[self.kind]
        define(self.name, default, self.help, flag_values=values)

    @property
    def usage(self) -> str:
        """As in a usage line: --name=… or [--name=default]."""
        if self.kind is bool:
            return f"[--{'no' if self.default else ''}{self.name}]"
        plain = "…" if self.default in (REQUIRED, None) else self.default
        shown = "|".join(self.choices) or plain
        return f"--{self.name}={shown}" if self.default is REQUIRED else f"[--{self.name}={shown}]"


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand with flags of its own.

    Attributes:
        name: subcommand.
        help: one line for `paras2s --help`.
        flags: its flags, in the order of the help.
        run: called with one keyword argument per flag.
        takes_config: whether it is given a config and a workdir as a stage is, besides; `run` then
            gets them as `config` and `workdir`.
        operands: what it is given beside flags, in words; `run` gets them as `folders`.
    """

    name: str
    help: str
    flags: tuple[Flag, ...]
    run: Callable[..., object]
    takes_config: bool = False
    operands: str = ""

    def usage(self, prefix: str = "paras2s") -> str:
        """The text of `--help`."""
        width = max((len(flag.name) for flag in self.flags), default=0)
        rows = [f"  --{flag.name:<{width}}  {flag.help}" for flag in self.flags]
        config = ["--config=FILE[:ARG] [--workdir=DIR] [--config.key=value …]"]
        given = config if self.takes_config else [self.operands] if self.operands else []
        line = " ".join([prefix, self.name, *given, *(flag.usage for flag in self.flags)])
        return "\n".join([line, "", self.help, *(["", "flags:", *rows] if rows else [])])

    def parse(self, argv: Sequence[str]) -> dict[str, object]:
        """Flags as keyword arguments of `run`.

        argv: what follows the command's name.

        Raises:
            flags.Error: a flag is unknown, missing or ill-formed; one sentence says which.
        """
        values = flags.FlagValues()
        self.define(values)
        values.set_gnu_getopt()
        stray = values([self.name, *argv])[1:]
        if bool(stray) != bool(self.operands):
            problem = f"unexpected argument {stray[0]!r}" if stray else f"no {self.operands} given"
            raise UsageError(f"{problem}: {self.usage().splitlines()[0]}")
        return self.given(values) | ({"folders": stray} if self.operands else {})

    def define(self, values: flags.FlagValues) -> None:
        """Adds its flags to a set of absl flags."""
        for flag in self.flags:
            flag.define(values)

    def given(self, values: flags.FlagValues) -> dict[str, object]:
        """Its flags as keyword arguments of `run`, from a set that has parsed them.

        Raises:
            UsageError: one is missing.
        """
        given = {flag: values[flag.name].value for flag in self.flags}
        for flag, value in given.items():
            if flag.default is REQUIRED and value in (None, ""):
                raise UsageError(f"no --{flag.name} given: {self.usage().splitlines()[0]}")
        return {flag.argument or flag.name: value for flag, value in given.items()}


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(
            "convert",
            "a released checkpoint (safetensors or .pt) -> Orbax, streamed to disk",
            (
                Flag("from", "folder of checkpoint and config, or hub id", argument="source"),
                Flag("to", "folder to make", argument="target"),
                Flag("dtype", "type of the parameters; by default as stored", default=None),
            ),
            Lazy("paras2s_jax.convert.folders", "convert"),
        ),
        Command(
            "export",
            "Orbax -> safetensors with the original names, index and config",
            (
                Flag("from", "folder of a converted checkpoint, trained or not", argument="source"),
                Flag("to", "folder to make", argument="target"),
                Flag(
                    "lora",
                    "adapters folded into the weights, or alone as a PEFT adapter",
                    default="merged",
                    choices=("merged", "adapter"),
                ),
            ),
            Lazy("paras2s_jax.convert.folders", "export"),
        ),
        Command(
            "respond",
            "a converted Kimi-Audio answers wavs with wavs",
            (
                Flag("checkpoint", "folder of a converted Kimi-Audio"),
                Flag("input", "a wav, a folder of wavs, or queries.jsonl", argument="source"),
                Flag("output", "gets responses.jsonl and the wavs it names", argument="target"),
                Flag("audio_temperature", "0 takes the likeliest", 0.8, float),
                Flag("audio_top_k", "0 draws from all", 10, int),
                Flag("text_temperature", "0 takes the likeliest", 0.0, float),
                Flag("text_top_k", "0 draws from all", 5, int),
                Flag("max_steps", "longest answer, 12.5 a second; 0: as released", 0, int),
                Flag("num_samples", "answers per query", 1, int),
                Flag("batch_size", "queries answered at one time", 8, int),
                Flag("seed", "of the sampling", 0, int),
                Flag(
                    "dtype",
                    "in which the networks compute",
                    "bfloat16",
                    choices=("bfloat16", "float32"),
                ),
            ),
            Lazy("paras2s_jax.stages.respond", "run"),
        ),
        Command(
            "queries",
            "the built-in queries as wavs, to ask a voice model that `judge` is to judge",
            (
                Flag("output", "gets queries.jsonl and the wavs it names", argument="target"),
                Flag("split", "of the bank", "test", choices=("train", "test")),
                Flag("voices", "per sentence and style", 2, int),
                Flag("sentences", "of each dimension; 0: all", 0, int),
                Flag("seed", "of voices and deliveries", 0, int),
                Flag("examples", "also answers of two made-up systems", False, bool),
            ),
            Lazy("paras2s_jax.stages.queries", "run"),
        ),
        Command(
            "judge",
            "any voice model: what it answers, judged, tabled, and shown on a page",
            (
                Flag("queries", "queries.jsonl of the spoken queries"),
                Flag("replay", "makes the tables again from the ledger alone", False, bool),
                Flag("card", "judges the judge: probes, attacks, agreement", False, bool),
                Flag("humans", "CSV of the rating page, for the card", None),
                Flag("force", "scores although the judge failed its card", False, bool),
                Flag(
                    "batch",
                    "a step of scoring by batch files, at half the price",
                    "no",
                    choices=("no", "write", "submit", "collect"),
                ),
            ),
            Lazy("paras2s_jax.stages.judge", "run"),
            takes_config=True,
        ),
        Command(
            "arena",
            "systems of several runs against each other: Bradley-Terry ratings with intervals",
            (
                Flag(
                    "by",
                    "whose scores decide: of the runs' judge, or of people",
                    "judge",
                    choices=("judge", "people"),
                ),
                Flag("ratings", "CSV of the rating page, for --by=people", None),
                Flag("margin", "scores that differ by no more are a tie", 0.0, float),
                Flag("num_resamples", "of the bootstrap over sentences", 500, int),
                Flag("seed", "of the bootstrap", 0, int),
                Flag("output", "folder of tables and votes", "runs/arena"),
            ),
            Lazy("paras2s_jax.stages.arena", "run"),
            operands="RUN RUN …",
        ),
        Command(
            "duel",
            "as arena, but the judge's language model compares two answers each, in both orders",
            (
                Flag("runs", "folders of finished runs, with commas between"),
                Flag("num_queries", "queries to compare answers to; 0: all", 0, int),
            ),
            Lazy("paras2s_jax.stages.arena", "duel"),
            takes_config=True,
        ),
        Command(
            "rate",
            "a page on which people rate answers of one run or several, by ear, from 1 to 5",
            (
                Flag("queries", "queries.jsonl that the runs answered"),
                Flag("pairs", "exchanges to rate", 60, int, argument="num_pairs"),
                Flag(
                    "together",
                    "whether all answers to a drawn query are rated, as the arena needs",
                    True,
                    bool,
                ),
                Flag("seed", "of the draw and of the raters' orders", 0, int),
                Flag("output", "folder of the page", "runs/rating"),
            ),
            Lazy("paras2s_jax.stages.arena", "rate"),
            operands="RUN …",
        ),
        Command(
            "write_queries",
            "new spoken queries: a language model writes, three filters and the analyzers choose",
            (
                Flag(
                    "dry_run",
                    "says what it would ask, speak and cost, and does nothing",
                    False,
                    bool,
                ),
            ),
            Lazy("paras2s_jax.stages.query_sources", "write"),
            takes_config=True,
        ),
        Command(
            "filter_queries",
            "of queries from a corpus those whose words pass the three filters",
            (
                Flag("queries", "queries.jsonl of the corpus"),
                Flag("output", "name of the jsonl beside it for those that pass", "kept.jsonl"),
            ),
            Lazy("paras2s_jax.stages.query_sources", "filter_queries"),
            takes_config=True,
        ),
        Command(
            "import_queries",
            "queries from your licensed copy of IEMOCAP or MELD, or from StyleTalk's CSV files",
            (
                Flag("from", "whose", argument="corpus", choices=("iemocap", "meld", "styletalk")),
                Flag("source", "folder that holds the corpus as released, or a CSV of StyleTalk"),
                Flag("waves", "folder of StyleTalk's wavs", None),
                Flag("output", "gets queries.jsonl and the wavs it names"),
            ),
            Lazy("paras2s_jax.stages.query_sources", "import_corpus"),
        ),
        Command(
            "attack",
            "whether answers that talk to the configured scorer lead it: attack/<scorer>/changed",
            (),
            Lazy("paras2s_jax.stages.attack", "run"),
            takes_config=True,
        ),
        Command(
            "compile",
            "what a stage needs on a slice of chips that need not be there: memory, time, price",
            (
                Flag(
                    "stage",
                    "whose step is planned",
                    "grpo",
                    choices=("grpo", "sft", "distill", "respond"),
                ),
                Flag("phases", "which of them to compile, with commas between; by default all", ""),
                Flag("efficiency", "floor / time that is expected of a step", 0.4, float),
                Flag("chip_hour_price", "price of a chip for an hour; 0: not given", 0.0, float),
                Flag("judge_price", "price of 1000 calls of the judge; 0: not given", 0.0, float),
                Flag("jobs", "phases compiled at one time; each takes up to 4.3 GB", 1, int),
                Flag(
                    "reuse", "takes phases compiled there before from the same config", False, bool
                ),
            ),
            Lazy("paras2s_jax.plan.compile", "run"),
            takes_config=True,
        ),
    )
}
