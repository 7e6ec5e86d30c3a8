"""What a sweep leaves: results.csv, sweep.json, the best run, the front, figures and a summary run on W&B.

results.csv holds what is the same whenever the same sweep is run; times are in sweep.json.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mopo_cli.base.files import write_atomic, write_json
from mopo_cli.base.secrets import masked
from mopo_cli.base.text import one_line
from mopo_cli.config.compose import option_name
from mopo_cli.config.schema import LoggerConfig
from mopo_cli.runs.directory import ENDED, RunDirectory
from mopo_cli.runs.find import sweep_entries
from mopo_cli.runs.record import RunRecord, differing_data, read_run
from mopo_cli.sweeps.points import written


def with_every_key(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records with the overrides that only others of them name, read from each run's own config.

    Runs of two sweeps in one directory may vary in different keys.
    """
    keys = list(dict.fromkeys(key for record in records for key in record.varying))
    return [
        record
        if record.varying.keys() >= set(keys)
        else replace(
            record, varying={k: record.varying[k] if k in record.varying else _setting(record, k) for k in keys}
        )
        for record in records
    ]


def _setting(record: RunRecord, key: str) -> str:
    """A key of a run's config as text: of a group its option, of a mapping what it holds; empty where there is none."""
    node: Any = record.files.config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return ""
        node = node[part]
    if isinstance(node, dict) and "_target_" in node:
        return option_name(node)
    return str(node["name"]) if isinstance(node, dict) and "name" in node else written(node)


def stays(record: RunRecord, retry: str) -> bool:
    """Whether a run is left as it is."""
    return retry != "all" and (record.state in ENDED or (record.state == "failed" and retry == "none"))


# --------------------------------------------------------------------------------------------- best, and the front
@dataclass(frozen=True, slots=True)
class Choice:
    """The best run of a sweep, or why there is none, and the numbers by which it was chosen."""

    run: RunRecord | None
    reason: str | None = None
    heldout: bool = True  # by win rates on held-out prompts, so that its test numbers are no maximum of noise

    def chosen_by(self) -> float | None:
        """The primary's win rate that was the highest."""
        return None if self.run is None else deciding(self.run, self.run.primary or "", self.heldout)


def deciding(record: RunRecord, name: str, heldout: bool) -> float | None:
    """The win rate of an objective that a run is chosen by."""
    return record.objectives[name].heldout if heldout else record.reached(name)


def best(records: Sequence[RunRecord]) -> Choice:
    """The run that keeps every threshold and has the highest primary win rate, on held-out prompts.

    By test numbers only where runs of before have no others.
    """
    ended = [record for record in records if record.finished]
    if not ended:
        return Choice(None, "no run has ended")
    if len({record.primary for record in ended}) > 1:
        return Choice(None, "the runs maximise different objectives")
    if differing := differing_data(ended):
        return Choice(None, f"the runs were measured on different data ({', '.join(differing)})")
    if len({record.has_thresholds for record in ended}) > 1:
        return Choice(None, "some runs were asked for thresholds and others for none, which one number cannot compare")
    heldout = all(result.heldout is not None for record in ended for result in record.objectives.values())
    keeping = [record for record in ended if record.state == "done" and _keeps(record, heldout)]
    if not keeping:
        where = " on held-out prompts" if heldout else ""
        return Choice(None, f"none of the {len(ended)} runs that ended keeps every threshold{where}", heldout)
    return Choice(
        max(keeping, key=lambda record: deciding(record, record.primary or "", heldout) or 0.0), None, heldout
    )


def _keeps(record: RunRecord, heldout: bool) -> bool:
    """Whether a run keeps every threshold, by the numbers that it is chosen by."""
    if not heldout:
        return record.satisfied is not False
    bounds = {name: result.threshold for name, result in record.objectives.items()}
    return all((deciding(record, name, True) or 0.0) >= b for name, b in bounds.items() if b is not None)


def front(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs that no other equals or exceeds in every objective; empty where runs have different objectives or
    data."""
    ended = [record for record in records if record.finished]
    if len({record.names for record in ended}) != 1 or differing_data(ended):
        return []
    from mopo_cli.maths.pareto import nondominated  # here, as a sweep of which nothing has ended needs no moocore

    points = [[record.reached(name) or 0.0 for name in record.names] for record in ended]
    return [record for record, best in zip(ended, nondominated(points), strict=True) if best]


# --------------------------------------------------------------------------------------------- files
def write_results(directory: Path, records: Sequence[RunRecord], state: str) -> None:
    """results.csv (a line for each run that ended or failed) and sweep.json (every run), each whole."""
    rows = [masked(_row(record)) for record in records if record.state in (*ENDED, "failed")]
    columns = list(dict.fromkeys(["id", *(k for r in records for k in r.varying), *(k for row in rows for k in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(directory / "results.csv", text.getvalue())
    write_json(directory / "sweep.json", masked(as_json(directory.name, records, state)))


def _row(record: RunRecord) -> dict[str, Any]:
    error = record.problem and one_line(record.problem)
    return {"id": record.id, **record.varying, "state": record.state, "error": error, **numbers(record)}


def numbers(record: RunRecord) -> dict[str, Any]:
    """The columns of results.csv that come from a run's summary; none where it has not ended."""
    if not record.finished:
        return {}
    columns: dict[str, Any] = {}
    for name, result in record.objectives.items():
        columns[f"win_rate/{name}"] = result.win_rate
        columns[f"estimated/{name}"] = result.estimated
        columns[f"heldout/{name}"] = result.heldout
        columns[f"threshold/{name}"] = result.threshold
        columns[f"satisfied/{name}"] = result.satisfied
    columns |= {f"dual/{name}": value for name, value in record.summary["duals"].items()}
    if record.oracle:
        columns |= {f"exact/{name}": result.exact for name, result in record.objectives.items()}
        columns |= {f"optimum/{name}": result.optimum for name, result in record.objectives.items()}
        columns["gap"] = record.oracle.get("gap")
    if record.out_of_reach:
        columns |= {f"attainable/{n}": r.attainable for n, r in record.objectives.items() if r.threshold is not None}
    return columns | {"kl": record.summary["kl"], "warnings": len(record.warnings)}


def as_json(name: str, records: Sequence[RunRecord], state: str) -> dict[str, Any]:
    choice = best(records)
    winner = choice.run
    return {
        "name": name,
        "state": state,
        "runs": [_entry(record) for record in records],
        "best": winner
        and {
            "id": winner.id,
            "overrides": winner.varying,
            "objective": winner.primary,
            "chosen_by": "heldout_win_rate" if choice.heldout else "win_rate",
            "heldout_win_rate": choice.chosen_by() if choice.heldout else None,
            "win_rate": winner.reached(winner.primary or ""),
            "exact": winner.primary is not None and winner.objectives[winner.primary].exact is not None,
        },
        "no_best": choice.reason,
        "front": [record.id for record in front(records)],
    }


def _entry(record: RunRecord) -> dict[str, Any]:
    entry = {"id": record.id, "overrides": record.varying, "state": record.state, "error": record.problem}
    return {**entry, "seconds": record.seconds, **numbers(record)}


def earlier_runs(directory: Path) -> list[tuple[str, dict[str, str]]]:
    """Id and overrides of every run that sweep.json lists and whose directory is there still, in order."""
    entries = sweep_entries(directory) if (directory / "sweep.json").exists() else []
    return [(entry["id"], entry["overrides"]) for entry in entries if (directory / "runs" / entry["id"]).is_dir()]


def ended_runs(directory: Path) -> list[RunRecord]:
    """The runs in a sweep's directory that have ended, whoever asked for them."""
    places = sorted(path.parent for path in (directory / "runs").glob("*/summary.json"))
    records = [read_run(path) for path in places]
    return [record for record in records if record.finished]


# --------------------------------------------------------------------------------------------- figures and W&B
def draw(directory: Path) -> list[Path]:
    """The figures of the sweep's page as PNG and SVG; returns the PNGs."""
    from mopo_cli.report.build import draw_sweep

    return [path for path in draw_sweep(directory) if path.suffix == ".png"]


def write_page(directory: Path) -> str:
    """The sweep's report.html; what to say of it. A sweep has ended well even where its page cannot be made."""
    from mopo_cli.report.build import write_sweep_report

    try:
        return f"report         {write_sweep_report(directory)}"
    except Exception as error:
        again = f"mopo report \"sweep='{directory}'\""
        return f"no report.html ({type(error).__name__}: {error}); once mended: {again}"


def publish(
    directory: Path, logger: LoggerConfig, records: Sequence[RunRecord], command: str, figures: Sequence[Path]
) -> str | None:
    """The sweep's own run on W&B, in the group of its points: results, front, figures. Returns the upload command."""
    from mopo_cli.runs.tracking import Tracker

    config = {"sweep": {"name": directory.name, "command": command, "runs": [record.id for record in records]}}
    tracker = Tracker(RunDirectory(directory), logger, config, f"{directory.name}: summary", kind="sweep")
    rows = [_row(record) for record in records]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    tracker.table("results", columns, [[row.get(column) for column in columns] for row in rows])
    ends = front(records)
    names = list(ends[0].names) if ends else []
    tracker.table("front", ["id", *names], [[r.id, *(r.reached(name) for name in names)] for r in ends])
    tracker.figures(figures)
    summary = as_json(directory.name, records, "done")
    counts = {state: sum(r.state == state for r in records) for state in (*ENDED, "failed")}
    tracker.summarise({"best": summary["best"] or {"id": None}, "front": summary["front"], "runs": counts})
    return tracker.finish()
