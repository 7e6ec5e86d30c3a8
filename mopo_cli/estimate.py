"""How long the runs of a sweep will take, from earlier runs of the same kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopo_cli.errors import UserError
from mopo_cli.runs import RunDirectory, flat
from mopo_cli.worker import progress_of

KIND = ("model.", "dataset.", "batch_size", "gradient_accumulation", "onpolicy.", "evaluation.", "sampling.")
SHARED = ("reference (SFT)", "preference model")  # fitted once, then cached
NEWEST = 200  # run directories that are looked at


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of each run by its id, and of the stages that are fitted once."""

    of: dict[str, float]
    shared: float
    source: str

    @property
    def each(self) -> float:
        return sum(self.of.values()) / max(1, len(self.of))


def estimate(points: Sequence[tuple[dict[str, Any], RunDirectory]], directory: Path) -> Estimate | None:
    """From the newest finished run of the same model and data near `directory`; None where there is none."""
    wanted = [_kind(settings) for settings, _ in points]
    for run in _finished(directory):
        try:
            settings, summary = run.settings(), run.results()
        except UserError:
            continue
        if _kind(settings) in wanted:
            return _scaled(points, settings, summary["train"], run)
    return None


def _scaled(
    points: Sequence[tuple[dict[str, Any], RunDirectory]], settings: dict[str, Any], took: dict[str, Any],
    run: RunDirectory,
) -> Estimate:  # fmt: skip
    """The alignment takes its share of steps, the rest of a run as long as it took."""
    progress = progress_of(run)
    fitted = {name: (progress.stages if progress else {}).get(name, [0, 0.0])[1] for name in SHARED}
    alignment = took["alignment_seconds"] or 0.0
    rest = max(0.0, took["wall_seconds"] - alignment - sum(fitted.values()))
    per_step = alignment / max(1, took["steps"])
    return Estimate(
        {other.path.name: rest + per_step * point["steps"] for point, other in points},
        sum(fitted.values()),
        f"going by {run.path}",
    )


def _kind(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides how long a step takes."""
    return {key: value for key, value in flat(settings) if key.startswith(KIND)}


def _finished(directory: Path) -> Iterator[RunDirectory]:
    """Finished runs of this sweep, of its neighbours and of `mopo train`, the newest first."""
    above = directory.absolute().parent
    found = [*directory.absolute().glob("runs/*/summary.json"), *above.glob("*/runs/*/summary.json")]
    found += above.parent.glob("train/*/summary.json")
    newest = sorted(set(found), key=lambda path: path.stat().st_mtime, reverse=True)
    return (RunDirectory(path.parent) for path in newest[:NEWEST])
