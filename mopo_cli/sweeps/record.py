"""One run of a sweep, as its table has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mopo_cli.base.files import read_json
from mopo_cli.runs.directory import RunDirectory, locked
from mopo_cli.runs.record import numbers
from mopo_cli.sweeps.worker import ENDED


@dataclass(frozen=True, slots=True)
class Record:
    """One run of a sweep as sweep.json tells it. State: waiting, or one of status.json's."""

    id: str
    overrides: dict[str, str]
    state: str = "waiting"
    error: str | None = None
    seconds: float | None = None  # of the attempt that ended it
    numbers: dict[str, Any] = field(default_factory=dict)  # see `numbers`
    roles: dict[str, str] = field(default_factory=dict)  # of the objectives

    @property
    def primary(self) -> str | None:
        return next((name for name, role in self.roles.items() if role == "primary"), None)

    def reached(self, name: str) -> float | None:
        """The win rate of an objective: exact where it is known, else as evaluated."""
        exact = self.numbers.get(f"exact/{name}")
        return self.numbers.get(f"win_rate/{name}") if exact is None else exact

    @property
    def asked(self) -> bool:
        """Whether a threshold was asked of the run."""
        return any(v is not None for k, v in self.numbers.items() if k.startswith("threshold/"))

    @property
    def satisfied(self) -> bool:
        """Whether every threshold is kept."""
        return not any(v is False for k, v in self.numbers.items() if k.startswith("satisfied/"))


def record_of(point_id: str, overrides: dict[str, str], run: RunDirectory) -> Record:
    """What a run's directory says now. A run whose process has gone without a word is interrupted."""
    state, error = "waiting", None
    if run.status.exists():
        status = read_json(run.status)
        state, error = str(status.get("state")), status.get("error")
        if state == "running" and not locked(run):
            state = "interrupted"
    if state not in ENDED:
        return Record(point_id, overrides, state, error)
    summary = run.results()
    roles = {name: objective["role"] for name, objective in summary["objectives"].items()}
    return Record(point_id, overrides, state, error, summary["train"]["wall_seconds"], numbers(summary), roles)
