"""How long the runs of a sweep will take, by those of its own that have ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mopo_cli.config.compose import option_name
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.record import RunRecord
from mopo_cli.sweeps.worker import progress_of

SHARED = ("reference (SFT)", "preference model")  # stages that are fitted once, then cached


@dataclass(frozen=True, slots=True)
class Eta:
    """What runs of an algorithm take: seconds a step of the alignment, and of all else, but for what is fitted once."""

    per_step: float
    rest: float

    def seconds(self, steps: int) -> float:
        return self.rest + self.per_step * steps


def expected(settings: Mapping[str, Mapping[str, Any]], ended: Sequence[RunRecord]) -> dict[str, float]:
    """Seconds that each run (by id, with its settings) will take; empty where none has ended.

    An algorithm of which no run has ended yet goes by all the others.
    """
    algorithms = {name: option_name(config["algorithm"]) for name, config in settings.items()}
    timed = [record for record in ended if record.seconds]
    if not timed:
        return {}
    etas = {name: _eta([r for r in timed if r.method == name] or timed) for name in set(algorithms.values())}
    return {name: etas[algorithms[name]].seconds(config["steps"]) for name, config in settings.items()}


def _eta(records: Sequence[RunRecord]) -> Eta:
    per_step, rest = [], []
    for record in records:
        train, progress = record.summary["train"], progress_of(RunDirectory(record.path))
        fitted = sum((progress.stages if progress else {}).get(stage, (0, 0.0))[1] for stage in SHARED)
        alignment = train.get("alignment_seconds") or 0.0
        per_step.append(alignment / max(1, train.get("steps") or 1))
        rest.append(max(0.0, train["wall_seconds"] - alignment - fitted))
    return Eta(fmean(per_step), fmean(rest))
