"""Which runs are meant: the newest, those of a list, of a pattern or of a sweep; and their names told apart."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json
from mopo_cli.base.secrets import masked
from mopo_cli.config.schema import ReportConfig
from mopo_cli.runs.directory import check_links
from mopo_cli.runs.record import RunFiles, RunRecord, read_run, shown


# --------------------------------------------------------------------------------------------- places
def is_sweep(path: Path) -> bool:
    return (path / "sweep.json").exists() or (path / "runs").is_dir()


def expanded(pattern: str) -> list[Path]:
    """The files or directories that a path or a pattern stands for, in order; a sweep stands for all of its runs."""
    path = Path(pattern).expanduser()
    literal = path.exists()  # its own name may hold what is special in a pattern
    places = [path] if literal else [Path(place) for place in sorted(glob.glob(str(path)))]
    return [run for place in places for run in (sorted((place / "runs").glob("*/")) if is_sweep(place) else [place])]


def names_apart(paths: Sequence[Path]) -> list[str]:
    """The directories' names, with as many parents as tell them apart."""
    for depth in range(1, 1 + max(len(path.resolve().parts) for path in paths)):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _newest(root: Path, *patterns: str) -> Path | None:
    """The directory of the newest file that matches."""
    ended = [path for pattern in patterns for path in root.glob(pattern)]
    return max(ended, key=lambda path: path.stat().st_mtime).parent if ended else None


def newest_run(root: Path = Path("outputs/train")) -> Path:
    """The run that was finished last under `root`; UserError where there is none."""
    newest = _newest(root, "*/summary.json")
    if newest is None:
        raise UserError(f"run: no finished run under {root}/; give one by run=DIR, or train one with `mopo train`")
    return newest


def newest_place(root: Path = Path("outputs")) -> Path:
    """The run or sweep that ended last under `root`; UserError where there is none."""
    newest = _newest(root, "train/*/summary.json", "sweep/*/sweep.json")
    if newest is None:
        raise UserError(f"no run or sweep under {root}/; give one by run=DIR, sweep=DIR or runs=[DIR,DIR]")
    return newest


# --------------------------------------------------------------------------------------------- their records
def find(settings: ReportConfig) -> tuple[list[RunRecord], str, Path]:
    """The runs that a report is asked for, what they are together, and where their report belongs."""
    if settings.runs is not None:
        place = Path("outputs/report") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        return read_many(settings.runs), "comparison", place
    if settings.run:
        path = _directory(settings.run, "run")
    else:
        path = _directory(settings.sweep, "sweep") if settings.sweep else newest_place()
    check_links(path)
    return (read_sweep(path), "sweep", path) if is_sweep(path) else ([read_run(path)], "run", path)


def _directory(text: str, key: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise UserError(f"{key}={text}: no such directory")
    if key == "run" and is_sweep(path):
        raise UserError(f"run={text}: this is a sweep; give it as sweep={text}")
    if key == "sweep" and not is_sweep(path):
        raise UserError(f"sweep={text}: no sweep there (it has no sweep.json and no runs/)")
    return path


def read_many(patterns: Sequence[str]) -> list[RunRecord]:
    """The runs in these directories, or in those that match these patterns."""
    if not patterns:
        raise UserError("runs=[]: must name a run directory at least")
    paths = [path for pattern in patterns for path in _run_directories(pattern)]
    unique = list({path.resolve(): path for path in paths}.values())
    for path in unique:
        check_links(path)
    return [read_run(path, name) for path, name in zip(unique, names_apart(unique), strict=True)]


def _run_directories(pattern: str) -> list[Path]:
    """All of them where the directory itself was named, else those in which a run has begun."""
    literal = Path(pattern).expanduser().is_dir()
    places = [path for path in expanded(pattern) if path.is_dir() and (literal or _has_begun(path))]
    if not places:
        raise UserError(f"runs: {pattern} matches no run directory")
    return places


def _has_begun(path: Path) -> bool:
    return (path / "config.yaml").exists() or (path / "status.json").exists()


# --------------------------------------------------------------------------------------------- runs of a sweep
def sweep_entries(directory: Path) -> list[dict[str, Any]]:
    """What sweep.json says of each run; UserError where it is no whole list of runs."""
    path = directory / "sweep.json"
    listing = read_json(path)
    runs = listing.get("runs") if isinstance(listing, dict) else None
    if not isinstance(runs, list):
        raise UserError(f"{path}: is not the list of a sweep's runs; choose another sweep.dir")
    return [entry for entry in runs if isinstance(entry, dict) and _is_name(entry.get("id"))]


def _is_name(value: Any) -> bool:
    """Whether it names a directory below runs/, and none elsewhere."""
    return isinstance(value, str) and Path(value).name == value and value not in ("", "..")


def read_sweep(directory: Path) -> list[RunRecord]:
    """The runs of a sweep in the order of its sweep.json; those that it does not name yet come after."""
    try:
        entries = sweep_entries(directory)
    except UserError:  # the runs' own directories tell enough
        entries = []
    records = [_listed(directory / "runs" / entry["id"], entry) for entry in entries]
    names = {record.id for record in records}
    places = sorted(path for path in (directory / "runs").glob("*/") if path.name not in names)
    records += [read_run(path) for path in places if _has_begun(path)]
    if not records:
        raise UserError(f"sweep={directory}: none of its runs has begun")
    return records


def _listed(path: Path, entry: dict[str, Any]) -> RunRecord:
    """A run that sweep.json names, whether it began or not."""
    overrides = entry.get("overrides")
    varying = overrides if isinstance(overrides, dict) else {}
    error = str(entry["error"]) if entry.get("error") else None
    try:
        record = read_run(path, entry["id"], varying)
    except UserError:  # it never began
        state = str(entry.get("state") or "not started")
        texts = {key: shown(value) for key, value in masked(varying).items()}
        return RunRecord(entry["id"], RunFiles(path), state, texts, problem=error)
    return record if record.finished or record.problem else replace(record, problem=error)
