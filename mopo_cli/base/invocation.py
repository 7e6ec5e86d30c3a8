"""The command that this process carries out, as summary.json and the hint to go on say it.

Set once by whoever starts the work (the command line, or the worker of a sweep for its run), read where it is told.
"""

from __future__ import annotations

from collections.abc import Sequence

from mopo_cli.base.secrets import masked_command

_arguments: tuple[str, ...] = ()


def begin(arguments: Sequence[str]) -> None:
    """From here on this process carries out `mopo` with these arguments."""
    global _arguments
    _arguments = tuple(arguments)


def arguments() -> tuple[str, ...]:
    """The command and its overrides; nothing where Python code called us."""
    return _arguments


def line() -> str:
    """The command as a shell takes it, without the secrets in it."""
    return masked_command(["mopo", *_arguments])
