"""How long the runs of a sweep will take, from earlier runs of the same kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopo_cli.base.errors import UserError
from mopo_cli.base.text import flat
from mopo_cli.config.compose import option_name
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.sweeps.worker import progress_of

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


@dataclass(frozen=True, slots=True)
class Took:
    """What a finished run took: seconds a step of its alignment, and of all else, but for what is fitted once."""

    run: RunDirectory
    per_step: float
    rest: float
    shared: float


def estimate(points: Sequence[tuple[dict[str, Any], RunDirectory]], directory: Path) -> Estimate | None:
    """From the newest finished run near `directory` of each point's method, model and data; None where there is none.

    A method that has not run yet goes by another one of these, on the same model and data where there is such.
    """
    wanted = {run.path.name: (option_name(settings["algorithm"]), _kind(settings)) for settings, run in points}
    found = _newest_of(set(wanted.values()), directory)
    if not found:
        return None
    each: dict[str, Took] = {}
    for name, (method, kind) in wanted.items():
        others = [took for (_, other), took in found.items() if other == kind] or list(found.values())
        each[name] = found.get((method, kind), others[0])
    of = {run.path.name: each[run.path.name].rest + each[run.path.name].per_step * settings["steps"]
          for settings, run in points}  # fmt: skip
    sources = list(dict.fromkeys(str(took.run.path) for took in each.values()))
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return Estimate(of, max(took.shared for took in each.values()), f"going by {sources[0]}{more}")


def _newest_of(wanted: set[tuple[str, str]], directory: Path) -> dict[tuple[str, str], Took]:
    """What the newest run of each (method, kind) took; where none is of any kind asked, nothing."""
    found: dict[tuple[str, str], Took] = {}
    for run in _finished(directory):
        missing = wanted - found.keys()
        if not missing:
            break
        try:
            summary = run.results()
            if summary.get("algorithm") not in (None, *(method for method, _ in missing)):
                continue  # reading its config would take longer
            settings = run.settings()
            key = option_name(settings["algorithm"]), _kind(settings)
            if key in missing:
                found[key] = _took(run, summary["train"])
        except (UserError, KeyError):
            continue
    return found


def _took(run: RunDirectory, train: dict[str, Any]) -> Took:
    """Its alignment by steps, the rest of the run as long as it took."""
    progress = progress_of(run)
    fitted = sum((progress.stages if progress else {}).get(name, [0, 0.0])[1] for name in SHARED)
    alignment = train["alignment_seconds"] or 0.0
    rest = max(0.0, train["wall_seconds"] - alignment - fitted)
    return Took(run, alignment / max(1, train["steps"]), rest, fitted)


def _kind(settings: dict[str, Any]) -> str:
    """What decides how long a step of a method takes."""
    return repr(sorted((key, str(value)) for key, value in flat(settings) if key.startswith(KIND)))


def _finished(directory: Path) -> Iterator[RunDirectory]:
    """Finished runs of this sweep, of its neighbours and of `mopo train`, the newest first."""
    above = directory.absolute().parent
    found = [*directory.absolute().glob("runs/*/summary.json"), *above.glob("*/runs/*/summary.json")]
    found += above.parent.glob("train/*/summary.json")
    newest = sorted(set(found), key=lambda path: path.stat().st_mtime, reverse=True)
    return (RunDirectory(path.parent) for path in newest[:NEWEST])
