"""`mopo <command> [key=value ...]`. Imports nothing heavy: a command's module is loaded when it runs."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NamedTuple

from mopo_cli import __version__
from mopo_cli.base import invocation
from mopo_cli.base.errors import UserError
from mopo_cli.base.processes import is_main
from mopo_cli.base.secrets import masked
from mopo_cli.base.text import one_line


class Command(NamedTuple):
    module: str  # whose function `command` takes the composed config and gives the exit status
    config: (
        str | None
    )  # its record in config/schema.py; None: `command` takes overrides, and composes configs by itself
    summary: str
    example: str
    literal: tuple[str, ...] = ()  # keys that are no config, as any character may stand in them: arguments of `command`


COMMANDS = {
    "train": Command(
        "mopo_cli.commands.train",
        "TrainConfig",
        "align a model: data, reference, preference model, MOPO, evaluation",
        "mopo train model=opt1.3b dataset=hh_rlhf objectives=helpful_harmless",
    ),
    "eval": Command(
        "mopo_cli.commands.eval",
        "EvalConfig",
        "evaluate runs, models or files of responses side by side, also by gold scorers",
        "mopo eval run='outputs/sweep/NAME/runs/*' scorers=[length]",
    ),
    "sweep": Command(
        "mopo_cli.commands.sweep",
        None,  # one for each point
        "train at every point of a grid, here or on a cluster, and collect results.csv",
        "mopo sweep tau=0.1,0.5,1.0 beta=0.95,0.99",
    ),
    "report": Command(
        "mopo_cli.commands.report",
        "ReportConfig",
        "one page of a run, a sweep, or any runs: fronts, trajectories, samples, tables",
        "mopo report runs=[outputs/train/a,'outputs/sweep/x/runs/*']",
    ),
    "data": Command(
        "mopo_cli.commands.data",
        "DataConfig",
        "what is in a data set: labels, ties, lengths, agreement of objectives",
        "mopo data dataset=pairs dataset.path=my.jsonl dataset.chosen_means=human objectives=human_concise",
    ),
    "plan": Command(
        "mopo_cli.commands.plan",
        "PlanConfig",
        "what is attainable, and at what price, before any alignment",
        "mopo plan objectives=assistant_pair objectives.harmless.threshold=0.6",
    ),
    "synthetic": Command(
        "mopo_cli.commands.synthetic",
        "SyntheticConfig",
        "the method on small tables of preferences whose exact answers are known",
        "mopo synthetic tau=0.05 sizes=[2]",
    ),
    "sample": Command(
        "mopo_cli.commands.sample",
        "SampleConfig",
        "responses of a trained model to your own prompts",
        'mopo sample run=outputs/train/NAME prompt="How do I boil an egg?"',
        literal=("prompt",),
    ),
    "export": Command(
        "mopo_cli.commands.export",
        "ExportConfig",
        "a folder to share: weights, tokenizer and a model card with what was measured",
        "mopo export run=outputs/train/NAME to=DIR",
    ),
}
DEBUG = {"debug=true", "debug.traceback=true"}
USAGE = """\
mopo {version}: align a language model with several human objectives, from pairwise preferences.

usage: mopo COMMAND [key=value ...]

{commands}
options of every command:
  --help, -h           the command's config groups and keys; with algorithm=dpo, say, the keys of that choice
  --cfg job            print the composed config and stop
  --config-dir DIR     a folder of your own config groups (DIR/objectives/mine.yaml), searched besides mopo's
  --version            print the version

common keys: tau= beta= epsilon= t0= steps= batch_size= seed= run.dir= run.name=
             objectives.NAME.threshold=0.6   dataset= model= objectives= algorithm= hparams= logger=
"""


def usage() -> str:
    blocks = [f"  {name:<10} {c.summary}\n             $ {c.example}\n" for name, c in COMMANDS.items()]
    return USAGE.format(version=__version__, commands="\n".join(blocks))


def command_usage(name: str, overrides: list[str], config_dir: str | None) -> str:
    """The command's help: its example, its groups with their options, and keys with the defaults of what is chosen."""
    from mopo_cli.config import compose

    command = COMMANDS[name]
    groups = compose.command_groups(name)
    chosen = [o.partition(",")[0] for o in overrides if o.partition("=")[0] in groups]
    composed = compose.compose(name, chosen, config_dir)
    lines = [f"mopo {name}: {command.summary}", "", f"  $ {command.example}", ""]
    if groups:
        lines += ["config groups (group=option):"]
        lines += [f"  {group:<11} {', '.join(compose.group_options(group))}" for group in groups]
        lines += [""]
    lines += ["keys and defaults (key=value):"]
    lines += ["  " + line for line in compose.to_yaml(composed).splitlines()]
    return "\n".join(lines)


class Arguments(NamedTuple):
    overrides: list[str]
    help: bool
    cfg: bool
    config_dir: str | None
    multirun: bool


def parse(arguments: list[str]) -> Arguments:
    overrides: list[str] = []
    help_, cfg, config_dir, multirun = False, False, None, False
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if argument in ("-h", "--help"):
            help_ = True
        elif argument in ("-m", "--multirun"):
            multirun = True
        elif name in ("--cfg", "-c"):
            value = value if equals else next(rest, "")
            if value != "job":
                raise UserError(f"--cfg {value}: allowed is --cfg job")
            cfg = True
        elif name in ("--config-dir", "-cd"):
            config_dir = value if equals else next(rest, None)
            if not config_dir:
                raise UserError("--config-dir needs a directory")
        elif argument.startswith("-"):
            raise UserError(f"{argument}: no such option; see mopo --help")
        else:
            overrides.append(argument)
    return Arguments(overrides, help_, cfg, config_dir, multirun)


def run(name: str, arguments: Arguments) -> int:
    """Run one command; returns its exit status."""
    if name == "train" and arguments.multirun:
        name = "sweep"
    if arguments.help:
        print(command_usage(name, arguments.overrides, arguments.config_dir))
        return 0
    command = COMMANDS[name]
    if command.config is not None and arguments.multirun:
        raise UserError(f"-m: `mopo {name}` runs once; use `mopo sweep`")
    from mopo_cli.config import compose, overrides, schema, trust

    literal = {_key(o): o.partition("=")[2] for o in arguments.overrides if _key(o) in command.literal and "=" in o}
    given = [override for override in arguments.overrides if _key(override) not in literal]
    record = getattr(schema, command.config) if command.config else None
    given = overrides.readable(given, name, record, compose.command_groups(name))
    if record is None:
        return importlib.import_module(command.module).command(given, arguments.config_dir, arguments.cfg)
    compose.check_experiment(name, given, arguments.config_dir)
    composed = compose.compose(name, given, arguments.config_dir)
    if arguments.cfg:
        print(compose.to_yaml(composed), end="")
        return 0
    compose.typed(composed, record)  # a mistake is said before seconds are spent on imports
    trust.find_own_modules(compose.plain(composed))
    return importlib.import_module(command.module).command(composed, **literal)


def _key(override: str) -> str:
    return override.partition("=")[0]


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit status: 0 done, 1 the run failed, 2 bad config or input, 130 interrupted and resumable."""
    argv = sys.argv[1:] if argv is None else argv
    invocation.begin(argv)
    try:
        status = dispatch(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        status = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        if status == 1 or is_main():  # a user's mistake is the same in every process
            report(error, status, debug=not DEBUG.isdisjoint(argument.lower() for argument in argv))
        return status


def dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if "--version" in argv or argv[0] == "version":
        print(f"mopo {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"{argv[0]}: no such command; allowed: {', '.join(COMMANDS)} (see mopo --help)")
    return run(argv[0], parse(argv[1:]))


def report(error: BaseException, status: int, debug: bool) -> None:
    """One line on standard error; with debug=true the traceback."""
    if debug:
        import traceback

        print(masked("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        return
    text = {130: "interrupted", 2: str(error)}.get(status)
    if text is None:
        what = one_line(error)[:1000]
        text = f"failed: {type(error).__name__}: {what} (debug=true shows the traceback)"
    print(f"mopo: {masked(text)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
