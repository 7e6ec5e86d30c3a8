"""What a sweep leaves: results.csv, sweep.json, the best run, the front, figures and a summary run on W&B.

results.csv holds what is the same whenever the same sweep is run; times are in sweep.json.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json, write_atomic, write_json
from mopo_cli.base.text import one_line
from mopo_cli.config.compose import option_name
from mopo_cli.config.schema import LoggerConfig
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.sweeps.points import written
from mopo_cli.sweeps.record import Record
from mopo_cli.sweeps.worker import ENDED


def with_every_key(records: Sequence[Record], directory: Path) -> list[Record]:
    """The records with the overrides that only others of them name, read from each run's own config.

    Runs of two sweeps in one directory may vary in different keys.
    """
    keys = list(dict.fromkeys(key for record in records for key in record.overrides))
    return [
        record
        if record.overrides.keys() >= set(keys)
        else replace(record, overrides=_overrides(record, keys, directory))
        for record in records
    ]


@lru_cache(4096)
def _settings(path: Path, changed: int) -> dict[str, Any]:
    """A run's config, read once until it is written anew: a sweep asks for all of them whenever a run ends."""
    return RunDirectory(path).settings()


def _overrides(record: Record, keys: Sequence[str], directory: Path) -> dict[str, str]:
    run = RunDirectory(directory / "runs" / record.id)
    settings = _settings(run.path, run.config.stat().st_mtime_ns) if run.config.exists() else {}
    return {key: record.overrides[key] if key in record.overrides else _setting(settings, key) for key in keys}


def _setting(settings: dict[str, Any], key: str) -> str:
    """A key of a config as text: of a group its option, of a mapping what it holds; empty where there is none."""
    node: Any = settings
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return ""
        node = node[part]
    if isinstance(node, dict) and "_target_" in node:
        return option_name(node)
    return str(node["name"]) if isinstance(node, dict) and "name" in node else written(node)


# --------------------------------------------------------------------------------------------- best, and the front
def best(records: Sequence[Record]) -> tuple[Record | None, str | None]:
    """The run that keeps every threshold and has the highest primary win rate; or None, and why."""
    ended = [record for record in records if record.state in ENDED]
    if not ended:
        return None, "no run has ended"
    if len({record.primary for record in ended}) > 1:
        return None, "the runs maximise different objectives"
    if len({record.asked for record in ended}) > 1:
        return None, "some runs were asked for thresholds and others for none, which one number cannot compare"
    kept = [record for record in ended if record.state == "done" and record.satisfied]
    if not kept:
        return None, f"none of the {len(ended)} runs that ended keeps every threshold"
    return max(kept, key=lambda record: record.reached(record.primary or "") or 0.0), None


def front(records: Sequence[Record]) -> list[Record]:
    """The runs that no other equals or exceeds in every objective; empty where runs have different objectives."""
    ended = [record for record in records if record.state in ENDED]
    if len({tuple(record.roles) for record in ended}) != 1:
        return []
    from mopo_cli.maths.pareto import (
        nondominated,  # here, since a sweep of which nothing has ended yet needs no moocore
    )

    points = [[record.reached(name) or 0.0 for name in record.roles] for record in ended]
    return [record for record, best in zip(ended, nondominated(points), strict=True) if best]


# --------------------------------------------------------------------------------------------- files
def write_results(directory: Path, records: Sequence[Record], state: str) -> None:
    """results.csv (a line for each run that ended or failed) and sweep.json (every run), each whole."""
    finished = [record for record in records if record.state in (*ENDED, "failed")]
    rows = [_row(record) for record in finished]
    columns = list(dict.fromkeys(["id", *(k for r in records for k in r.overrides), *(k for row in rows for k in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(directory / "results.csv", text.getvalue())
    write_json(directory / "sweep.json", as_json(directory.name, records, state))


def _row(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        **record.overrides,
        "state": record.state,
        "error": record.error and one_line(record.error),
        **record.numbers,
    }


def as_json(name: str, records: Sequence[Record], state: str) -> dict[str, Any]:
    winner, reason = best(records)
    return {
        "name": name,
        "state": state,
        "runs": [_entry(record) for record in records],
        "best": winner
        and {
            "id": winner.id,
            "overrides": winner.overrides,
            "objective": winner.primary,
            "win_rate": winner.reached(winner.primary or ""),
            "exact": f"exact/{winner.primary}" in winner.numbers,
        },
        "no_best": reason,
        "front": [record.id for record in front(records)],
    }


def _entry(record: Record) -> dict[str, Any]:
    entry = asdict(record)
    return {key: value for key, value in entry.items() if key not in ("numbers", "roles")} | entry["numbers"]


def earlier_runs(directory: Path) -> list[tuple[str, dict[str, str]]]:
    """Id and overrides of every run that sweep.json lists and whose directory is there still, in order."""
    path = directory / "sweep.json"
    if not path.exists():
        return []
    listed = read_json(path)
    if not isinstance(listed, dict) or not isinstance(listed.get("runs"), list):
        raise UserError(f"{path}: is not the list of a sweep's runs; choose another sweep.dir")
    return [(r["id"], r["overrides"]) for r in listed["runs"] if (directory / "runs" / r["id"]).is_dir()]


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
    directory: Path, logger: LoggerConfig, records: Sequence[Record], command: str, figures: Sequence[Path]
) -> str | None:
    """The sweep's own run on W&B, in the group of its points: results, front, figures. Returns the upload command."""
    from mopo_cli.runs.tracking import Tracker

    config = {"sweep": {"name": directory.name, "command": command, "runs": [record.id for record in records]}}
    tracker = Tracker(RunDirectory(directory), logger, config, f"{directory.name}: summary", kind="sweep")
    rows = [_row(record) for record in records]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    tracker.table("results", columns, [[row.get(column) for column in columns] for row in rows])
    ends = front(records)
    names = list(ends[0].roles) if ends else []
    tracker.table("front", ["id", *names], [[r.id, *(r.reached(name) for name in names)] for r in ends])
    tracker.figures(figures)
    told = as_json(directory.name, records, "done")
    tracker.summarise({"best": told["best"] or {"id": None}, "front": told["front"]})
    counted = {state: sum(r.state == state for r in records) for state in ("done", "infeasible", "failed")}
    tracker.summarise({"runs": counted})
    return tracker.finish()
