"""Overrides as a person types them, made ready for Hydra's grammar; those that would have no effect are refused.

What holds text (a path, a name) takes it as typed: `run.dir=a (1)`, `run=runs/tau=0.1,beta=0.9` and `run.name=1e3` are
quoted for Hydra, which reads the first two as mistakes and the last as a number. A comma alone still separates the
points of a sweep, unless a file of that name is there.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from mopo_cli.base.errors import UserError
from mopo_cli.config.schema import SweepConfig, TrainConfig

GROUPS = ("dataset", "model", "objectives", "scorers", "algorithm", "hparams", "logger", "structures", "experiment")
GROUPS += ("sweeper", "launcher")
OVERRIDE = re.compile(r"(~|\+{0,2})([^=]*)=(.*)", re.DOTALL)
PATHS = re.compile(  # keys whose values are files or directories
    r"(run|sweep|model|dataset|scorers\.[^.]+)\.(dir|path|test_path)|model\.chat_template|algorithm\.experts\.[^.]+"
    r"|dir|out|to|json|cache|run|runs|sweep|responses|judge|reference|prompts|normalisation"
)
TEXTS = re.compile(r"dataset\.chosen_means|(dataset|algorithm)\.(\w+_)?(path|file|dir)")  # in groups that are no record
SEVERAL = ("run", "runs", "responses", "functions", "logger.tags", "sweep.zip")  # a text, or [a, b]
SPELT = ("direction",)  # texts that may be spelt as a mapping
MAPPINGS = re.compile(r"(objectives|scorers|structures)(\.[^.]+)?|(dataset|algorithm|model\.architecture)\..+\..+"
                      r"|model\.architecture\.[^.]+")  # fmt: skip
HYDRAS = {  # what is asked of Hydra, and who does it here
    "hydra.run": "run.dir=DIR",
    "hydra.sweep": "sweep.dir=DIR",
    "hydra.searchpath": "--config-dir DIR",
    "hydra/launcher": "launcher=",
    "hydra.launcher": "launcher.",
    "hydra/sweeper": "sweeper=",
    "hydra.sweeper": "sweeper.",
    "hydra.verbose": "debug=true",
}
Record = type | None


def readable(overrides: Sequence[str], command: str, record: Record, groups: Sequence[str]) -> list[str]:
    """The overrides of a command as Hydra must read them; UserError where one would be ignored.

    record: the command's, of config/schema.py; None for a sweep, whose overrides may stand for several values.
    groups: those that the command takes.
    """
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key in GROUPS and key not in groups:
            takes = f"it takes {', '.join(groups)}" if groups else "it takes none"
            raise UserError(f"{override}: `mopo {command}` has no group {key}; {takes}")
        _check_effect(override, record)
    return [_readable(override, record, groups) for override in overrides]


def _readable(override: str, record: Record, groups: Sequence[str]) -> str:
    found = OVERRIDE.fullmatch(override)
    if found is None or found.group(1) == "~":
        return override
    prefix, key, value = found.groups()
    if not re.match(r"[A-Za-z_]", key):
        raise UserError(f"cannot read the override {override!r}: expected key=value")
    read = parsed(f"{key}={value}")
    if key in groups and read is not None:
        _check_option(key, value, read)
    hint = hint_of(record, key)
    several = key in SEVERAL and hint is not None and not _is_text(hint)
    if (several or _is_text(hint) or TEXTS.fullmatch(key)) and value not in ("", "null"):
        return f"{prefix}{key}={_as_text(key, value, read, several, sweeps=record is None)}"
    if read is not None and read.is_sweep_override() and record is not None:
        raise UserError(f"{override}: stands for several values; `mopo sweep` tries them, and a list is [a, b]")
    return override


def _as_text(key: str, value: str, read: Override | None, several: bool, sweeps: bool) -> str:
    """A text as Hydra must read it; UserError where it could be several."""
    if read is not None and isinstance(read.value(), str | QuotedString) and not read.is_sweep_override():
        return value
    if is_there(value):
        return in_grammar(value)
    listed = several and value.startswith("[")
    if read is None:
        if listed:
            raise unreadable(f"{key}={value}", "a name with = or spaces in it stands in quotes: ['a=b', c]")
        return in_grammar(value)
    if listed or (sweeps and read.is_sweep_override()):
        return value
    if read.is_sweep_override():
        listing = f"several are {key}=[{value}], " if several else ""
        raise UserError(f"{key}={value}: {listing}one text is {typed_as(key, value)}; only `mopo sweep` tries values")
    if isinstance(read.value(), list) or (isinstance(read.value(), dict) and key not in SPELT):
        raise UserError(f"{key}={value}: must be one text; as that it is {typed_as(key, value)}")
    return in_grammar(value)


def is_there(value: str) -> bool:
    """Whether a path, or something that a pattern of paths matches, is there."""
    path = os.path.expanduser(value)
    try:
        return os.path.lexists(path) or bool(glob.glob(path))
    except (OSError, ValueError, re.error):  # a name that no file can have
        return False


def parsed(override: str) -> Override | None:
    """One override in Hydra's grammar, None where it is none."""
    try:
        return OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, TypeError, RecursionError):
        return None


def in_grammar(text: str) -> str:
    """A string as the value of an override: as it is, or quoted where Hydra would read it otherwise."""
    if re.fullmatch(r"[\w./-]+", text, re.ASCII) and not _is_plain(text):
        return text
    escaped = re.sub(r"(\\*)'", lambda found: found.group(1) * 2 + "\\'", text)  # before a quote a backslash escapes
    return "'" + re.sub(r"\\+\Z", lambda found: found.group() * 2, escaped) + "'"


def _is_plain(text: str) -> bool:
    """Whether a word is a number, a truth value or null."""
    try:
        float(text)
        return True
    except ValueError:
        return text.lower() in ("null", "true", "false")


def typed_as(key: str, value: str) -> str:
    """The override that gives a value as text, as it is typed in a shell."""
    text = f"{key}={in_grammar(value)}"
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'


def unreadable(override: str, reason: str) -> UserError:
    """What is said of an override that Hydra's grammar cannot read."""
    key, equals, value = override.partition("=")
    quoted = (
        f"; as text it is {typed_as(key, value)}"
        if equals and value and re.fullmatch(r"\+{0,2}[\w.@/]*\w", key)
        else ""
    )
    return UserError(f"cannot read the override {override!r}: expected key=value ({reason}){quoted}")


# --------------------------------------------------------------------------------------------- what has an effect
def _check_effect(override: str, record: Record) -> None:
    """UserError for a setting of Hydra's, and where a setting would be taken away instead of set."""
    key = override.lstrip("+~").partition("=")[0]
    if re.split(r"[./@]", key)[0] == "hydra":
        own = next((own for name, own in HYDRAS.items() if key.startswith(name)), None)
        raise UserError(f"{override}: Hydra's own settings have no effect here{f'; use {own}' if own else ''}")
    if override.startswith("+") and key.partition(".")[0] in ("experiment", "sweep") and "." in key and record:
        raise UserError(f"{override}: only `mopo sweep` and presets have {key.partition('.')[0]}.*")
    if not override.startswith("~") or MAPPINGS.fullmatch(key):
        return
    if hint_of(record, key) is not None:
        raise UserError(
            f"{override}: a setting always has a value; give it another one ({key}=...). ~ takes an entry out of a "
            "mapping, as in ~objectives.concise"
        )


def _check_option(group: str, value: str, read: Override) -> None:
    """UserError where no option of a group can be meant."""
    found = read.value()
    names = isinstance(found, list) and group == "scorers" and all(isinstance(name, str) for name in found)
    if (
        (isinstance(found, list) and not names)
        or isinstance(found, bool | int | float | NoneType)
        or ".." in value
        or value.startswith("/")
    ):
        raise UserError(f"{group}={value}: must be the name of one of its options")


# --------------------------------------------------------------------------------------------- what holds text
def hint_of(record: Record, key: str) -> Any:
    """The type of the setting at a dotted key, without its bounds; None where the record has none there."""
    first, _, rest = key.partition(".")
    if record is None:  # a sweep's: those of training, and its own
        record, key = (SweepConfig, rest) if first == "sweep" and rest else (TrainConfig, key)
    hint: Any = record
    for part in key.split("."):
        if is_dataclass(hint):
            hint = _hints(hint).get(part)
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        else:
            return hint if hint is Any else None
    return hint


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    hints = get_type_hints(record, include_extras=True)
    return {name: get_args(hint)[0] if get_origin(hint) is Annotated else hint for name, hint in hints.items()}


def _is_text(hint: Any) -> bool:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return set(kinds) - {NoneType} == {str}
