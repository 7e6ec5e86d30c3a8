"""Command lines made at random: each composes, or ends in one message of ours, and nothing is run.

What is called stops where a command has checked its config and found what it would work on.
"""

from __future__ import annotations

import io
import random
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from omegaconf import DictConfig, OmegaConf

from mopo_cli import cli
from mopo_cli.base.errors import UserError
from mopo_cli.base.text import flat
from mopo_cli.commands import export, sample, sweep, synthetic
from mopo_cli.config import compose, overrides, schema
from mopo_cli.evaluation.entrants import check_alike, find_entrants, finished_run
from mopo_cli.judging.scorers import check_scorers
from mopo_cli.pipeline.train import check
from mopo_cli.planning.structures import read_structure
from mopo_cli.runs.directory import claim
from mopo_cli.runs.find import find, newest_run

COMMANDS = ("train",) * 2 + ("data", "eval", "report", "sample", "export", "synthetic") * 2 + ("plan", "sweep")
NUMBERS = ("0", "1", "-1", "1.5", "1e3", "1e-5", "0.1", "inf", "-inf", "nan", "1e999", "99999999999999999999", "007")
PLAIN = (*NUMBERS, "true", "false", "True", "yes", "null", "None", "", " ", "''", '""', "???", "-", "auto", "all")
WORDS = (
    "a",
    "a b",
    "a=b",
    "a,b",
    "a.b",
    "é",
    "日本",
    "a'b",
    'a"b',
    "a#b",
    "a(1)",
    "f(x",
    "[",
    "]",
    "{",
    "}",
    "a:b",
    "\\",
)
WORDS += (
    "~",
    "~nobody/x",
    "..",
    "../x",
    "a/../b",
    "a\nb",
    "a\tb",
    "x" * 300,
    "y/" * 2100,
    "\ud800",
    "tau=0.1,beta=0.9",
    "%s",
)
TREES = ("[]", "{}", "[1]", "[a,b]", "[a,[b]]", "{a:1}", "{a:{b:1}}", "[{a:1}]", "[a=b]", "{helpful:0.5}", "[null]")
HYDRA = ("${x}", "${tau}", "${oc.env:HOME}", "${oc.env:NO_SUCH}", "${now:%Y}", "${", "a${b", "$", "${run}", "${.}")
HYDRA += ("range(1,3)", "choice(1,2)", "glob(*)", "1,2", "a,b", "int(2.7)", "str(1)", "shuffle(1,2)", "interval(0,1)")
HYDRA += ("sort(2,1)", "f(1)", "extend_list(1)", "int(x)", "float(a)", "json_str({a:1})")
TARGETS = ("builtins.dict", "mopo_cli.nothing", "nothing", "mopo_cli.algorithms.mopo.Mopo", "")
KEYS = (
    "",
    "a",
    "=",
    ".",
    "a.",
    ".a",
    "a..b",
    "tau.x",
    "hydra.run.dir",
    "hydra.x",
    "hydra/launcher",
    "model@x",
    "sweep.x",
)
KEYS += (
    "experiment.command",
    "run.name.x",
    "objectives.new.role",
    "dataset.new",
    "algorithm.new",
    "run.dri",
    "é",
    "a b",
)


@cache
def keys_of(command: str) -> list[str]:
    """Every key of a command's config, with those of its groups and of what stands inside."""
    composed = compose.compose(command, [])
    keys = list(dict(flat(OmegaConf.to_container(composed), empty=True)))  # type: ignore[arg-type]
    parents = {key.rpartition(".")[0] for key in keys} - {""}
    return sorted({*keys, *parents, *compose.command_groups(command)})


def override_of(rng: random.Random, command: str) -> str:
    """One override: most have a key of the command, and any value."""
    key = rng.choice(keys_of(command) if rng.random() < 0.85 else [*KEYS, *overrides.GROUPS])
    if rng.random() < 0.05:
        key = _mutated(rng, key)
    prefix = rng.choice(("",) * 12 + ("+", "++", "~", "~", "+++"))
    value = rng.choice(TARGETS) if key.endswith("_target_") else value_of(rng, key)
    if rng.random() < 0.03 or (prefix == "~" and rng.random() < 0.7):
        return f"{prefix}{key}"
    return f"{prefix}{key}={value}"


def value_of(rng: random.Random, key: str) -> str:
    if key in overrides.GROUPS and rng.random() < 0.7:
        value = rng.choice(compose.group_options(key))
    elif rng.random() < 0.1:
        value = "".join(rng.choice(string.printable + "é日\ud800") for _ in range(rng.randint(0, 8)))
    else:
        value = rng.choice(rng.choice((PLAIN, WORDS, TREES, HYDRA)))
    value = _mutated(rng, value) if rng.random() < 0.1 else value
    return f"{rng.choice(chr(39) + chr(34))}{value}" if rng.random() < 0.03 else value


def _mutated(rng: random.Random, text: str) -> str:
    """The text with one character changed, added or gone."""
    place = rng.randint(0, len(text))
    return text[:place] + rng.choice(["", *"aA0.=,'\"[{$ é~+@/"]) + text[place + rng.randint(0, 1) :]


def command_lines(seed: int, count: int) -> Iterator[list[str]]:
    """Command lines of one to three overrides each, `count` overrides in all."""
    rng = random.Random(seed)
    while count > 0:
        command = rng.choice(COMMANDS)
        size = min(count, rng.choice((1, 1, 2, 3)))
        count -= size
        yield [command, *(override_of(rng, command) for _ in range(size))]


# --------------------------------------------------------------------------------------------- what is called
def _trains(composed: DictConfig) -> None:
    config = compose.typed(composed, schema.TrainConfig)
    check(config)
    claim(config.run.dir, config.run.resume)


def _plans(composed: DictConfig) -> None:
    check(compose.typed(composed, schema.PlanConfig))


def _evaluates(composed: DictConfig) -> None:
    settings = compose.typed(composed, schema.EvalConfig)
    check_scorers(settings.scorers, settings.functions)
    check_alike(find_entrants(settings)[0])


def _reports(composed: DictConfig) -> None:
    find(compose.typed(composed, schema.ReportConfig))


def _samples(composed: DictConfig, prompt: str | None = None) -> None:
    settings = compose.typed(composed, schema.SampleConfig)
    sample.asked_prompts(settings, prompt if prompt != "-" else "stdin")
    sample.condition_of(sample.entrant_of(settings), settings.direction)


def _exports(composed: DictConfig) -> None:
    settings = compose.typed(composed, schema.ExportConfig)
    entrant = finished_run(settings.run or str(newest_run()))
    export.check_target(Path(settings.to or "x"), entrant.run.path, settings.overwrite)


def _synthesises(composed: DictConfig) -> None:
    config = compose.typed(composed, schema.SyntheticConfig)
    claim(config.run.dir, resume=False)
    for structure in [read_structure(name, node) for name, node in config.structures.items()]:
        synthetic._sizes(structure, config.sizes)
    synthetic.check_recipes(config)


def _sweeps(given: list[str], config_dir: str | None, show_config: bool) -> None:
    sweep.command([*given, "sweep.dry_run=true"], config_dir, show_config)


def _describes(composed: DictConfig) -> None:
    compose.typed(composed, schema.DataConfig)


CALLED: dict[str, Callable[..., None]] = {
    "train": _trains, "plan": _plans, "eval": _evaluates, "report": _reports, "sample": _samples,
    "export": _exports, "synthetic": _synthesises, "sweep": _sweeps, "data": _describes,
}  # fmt: skip


@contextmanager
def stopped() -> Iterator[None]:
    """`mopo ...` in this process up to what a command would work on."""

    def module(name: str) -> Any:
        return mock.Mock(command=CALLED[name.rpartition(".")[2]])

    def here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    with (
        mock.patch.object(cli, "importlib", mock.Mock(import_module=module)),
        mock.patch("mopo_cli.sweeps.engine.apart", here),
        redirect_stdout(io.StringIO()),
    ):
        yield


def wrong(line: list[str]) -> BaseException | None:
    """What a command line raises that is no user's error."""
    try:
        cli.dispatch(line)
    except UserError as error:
        message = str(error)
        one_line = "\n" not in message or any("\n" in word for word in line)
        return None if message and one_line else AssertionError(f"not one line: {message!r}")
    except (Exception, SystemExit) as error:
        return error
    return None


def fuzz(seed: int, count: int) -> list[str]:
    """The command lines that end in anything else than success or a user's error, with what they raised."""
    with stopped():
        found = [(line, wrong(line)) for line in command_lines(seed, count)]
    return [f"mopo {line!r}: {type(error).__name__}: {error}" for line, error in found if error is not None]
