"""What a config that lies in a run may do. Whoever made the run wrote it, so that reading it runs mopo's own code only.

A config names code by _target_, at any depth. What this command line says is its user's own and runs; what a file of a
run says must be a target of OWN (own_targets), and may neither ask the environment nor run the code of a model's
folder, unless this command line has allow_code=true.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mopo_cli.base.errors import UserError
from mopo_cli.base.text import one_line
from mopo_cli.config.compose import config_dir

OPEN_MODULES = ("mopo_cli.data.computed", "mopo_cli.data.corpora")  # whose public functions a config may name
OTHER_KEY = re.compile(r"\$\{[\w.-]+\}")  # an interpolation that takes the value of another key
ATTENTION = ("attention", "attn_implementation")  # by whose name transformers gets a kernel from the hub: owner/name


class Risk(NamedTuple):
    """A setting that runs code which is not mopo's own."""

    key: str
    value: str
    does: str


@functools.cache
def own_targets() -> frozenset[str]:
    """Every _target_ that the shipped conf/ names, and the public functions of OPEN_MODULES."""
    texts = [path.read_text(encoding="utf-8") for path in config_dir().rglob("*.yaml")]
    named = {target for text in texts for target in re.findall(r"_target_: *([\w.]+)", text)}
    for name in OPEN_MODULES:
        functions = inspect.getmembers(importlib.import_module(name), inspect.isfunction)
        named |= {f"{name}.{f}" for f, function in functions if function.__module__ == name and f[0] != "_"}
    return frozenset(named)


def risks(values: Any, key: str = "") -> Iterator[Risk]:
    """What of a config, at any depth, would run code that is not mopo's own."""
    if isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from risks(value, f"{key}[{number}]")
    if not isinstance(values, dict):
        return
    for name, value in values.items():
        place = f"{key}.{name}" if key else str(name)
        if name == "_target_" and not (isinstance(value, str) and value in own_targets()):
            yield Risk(place, str(value), "names code that is no part of mopo")
        elif name == "trust_remote_code" and value not in (None, False):
            yield Risk(place, str(value), "runs Python code that lies with the model")
        elif name in ATTENTION and isinstance(value, str) and "/" in value:
            yield Risk(place, value, "runs a kernel from the hub")
        else:
            yield from risks(value, place)


def check_trusted(values: Any, path: Path, allow_code: bool) -> None:
    """UserError where a config that was read from `path` would run foreign code, unless this command line allows it."""
    found = list(risks(values))
    if found and not allow_code:
        raise UserError(
            f"{path}: {told(found)}; whoever made this folder chose it, and nothing of it was run. Where you trust it, "
            "give allow_code=true"
        )
    if found:
        find_own_modules(values)


def check_typed(stored: Any, typed: Any, path: Path) -> None:
    """UserError where a run that goes on was started with foreign code that this command line does not name."""
    named = {(risk.key, risk.value) for risk in risks(typed)}
    found = [risk for risk in risks(stored) if (risk.key, risk.value) not in named]
    if found:
        raise UserError(
            f"{path}: {told(found)}; nothing of it was run. A run goes on with what its command line says: where you "
            "trust it, give the overrides that the run was started with"
        )


def told(found: list[Risk]) -> str:
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0].key}={one_line(found[0].value)[:200]} {found[0].does}{more}"


def find_own_modules(values: Any) -> None:
    """Lets Python find modules in the current folder, where a trusted config names something that is not mopo's own."""
    if any(risk.key.endswith("_target_") for risk in risks(values)) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


# --------------------------------------------------------------------------------------------- interpolations
def resolved(values: Any, path: Path) -> Any:
    """A config that was read from `path`, with its own keys' values for ${key}.

    UserError for any other interpolation (of the environment, say), also for one that only resolving puts together.
    """
    if not any("${" in text for _, text in _texts(values)):
        return values
    _check_plain(values, path, OTHER_KEY)
    try:
        values = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    _check_plain(values, path, re.compile("(?!)"))
    return values


def _check_plain(values: Any, path: Path, allowed: re.Pattern[str]) -> None:
    for key, text in _texts(values):
        if "${" in allowed.sub("", text):
            raise UserError(
                f"{path}: {key}={text[:200]!r}: a stored config may refer to its own keys only (${{tau}}, say), not to "
                "the environment or other resolvers"
            )


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a config with its key."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _texts(value, f"{key}[{number}]")
