"""Failures with a message of their own: a mistake of the user (exit status 2); memory that ran out, numbers that are
not finite, a run directory that is gone (1)."""

from __future__ import annotations

import importlib
from typing import Any


class UserError(Exception):
    """A mistake in the config or the input: what was found, where (key, file and line), what is allowed."""


class Shown(str):
    """A value of the user's, as a message shows it."""


class RowError(UserError):
    """A row that cannot be used: where it is, and why. `kind` is the why without the row's own values."""

    def __init__(self, where: str, *parts: str):
        super().__init__(f"{where}: {''.join(parts)}")
        self.kind = "".join("…" if isinstance(part, Shown) else part for part in parts)


class AcceleratorMemoryError(RuntimeError):
    """The accelerator's memory did not suffice: where, and which setting would do."""


class NotFiniteError(RuntimeError):
    """Losses, gradients, weights or log-probs are NaN or infinite: where, and which setting to lower."""


class RunLostError(RuntimeError):
    """The run's directory is not there any more: nothing can be written."""


def needed(module: str, extra: str) -> Any:
    """The module of an optional extra; UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f'{package} is not installed, which this needs: pip install "mopo[{extra}]"') from None
