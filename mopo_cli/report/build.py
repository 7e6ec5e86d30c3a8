"""`mopo report`: a page that people look at, of a run, of a sweep, or of any runs side by side."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mopo_cli.base.console import stage
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json, write_atomic
from mopo_cli.config import schema
from mopo_cli.report import charts, groups, page
from mopo_cli.report.quality import quality
from mopo_cli.report.theme import save
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.record import ReportedRun, objective_sets, read_run, value_of, varying_settings

BOOTSTRAP, SAMPLES, SEED = 500, 20, 0  # of the reports that runs and sweeps end with


def write_run_report(run: RunDirectory) -> list[Path]:
    """figures/training.png, figures/win_rates.png and report.html of one run; returns the figures' paths."""
    report = build([read_run(run.path)], "run", run.path)
    section = report.sections[0]
    drawn = [figure for figure in section.figures if figure.id in ("training", "win_rates")]
    paths = [save(charts.composed(f, section.data), run.figures / f"{f.id}.png")[0] for f in drawn]
    write(report, run.path)
    return sorted(paths)


def write_sweep_report(directory: Path) -> Path:
    """report.html of a sweep, in its directory; its runs may be in any state."""
    return write(build(read_sweep(directory), "sweep", directory), directory)


def draw_sweep(directory: Path) -> list[Path]:
    """The figures of a sweep's report as PNG and SVG; returns their paths."""
    return draw(build(read_sweep(directory), "sweep", directory, bootstrap=0), directory / "figures")


# --------------------------------------------------------------------------------------------- which runs
def find(settings: schema.ReportConfig) -> tuple[list[ReportedRun], str, Path]:
    """The runs asked for, what they are together, and where their report belongs."""
    if settings.run:
        path = _directory(settings.run, "run")
        return [read_run(path)], "run", path
    if settings.sweep:
        path = _directory(settings.sweep, "sweep")
        return read_sweep(path), "sweep", path
    if settings.runs is not None:
        place = Path("outputs/report") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        return read_many(settings.runs), "comparison", place
    path = newest()
    return (read_sweep(path), "sweep", path) if _is_sweep(path) else ([read_run(path)], "run", path)


def _directory(text: str, key: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise UserError(f"{key}={text}: no such directory")
    if key == "run" and _is_sweep(path):
        raise UserError(f"run={text}: this is a sweep; give it as sweep={text}")
    if key == "sweep" and not _is_sweep(path):
        raise UserError(f"sweep={text}: no sweep there (it has no sweep.json and no runs/)")
    return path


def _is_sweep(path: Path) -> bool:
    return (path / "sweep.json").exists() or (path / "runs").is_dir()


def newest(root: Path = Path("outputs")) -> Path:
    """The run or sweep that ended last under `root`; UserError where there is none."""
    found = [*root.glob("train/*/summary.json"), *root.glob("sweep/*/sweep.json")]
    if not found:
        raise UserError(f"no run or sweep under {root}/; give one by run=DIR, sweep=DIR or runs=[DIR,DIR]")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def read_many(patterns: Sequence[str]) -> list[ReportedRun]:
    """The runs in these directories, or in those that match these patterns; a sweep stands for all of its runs."""
    if not patterns:
        raise UserError("runs=[]: must name a run directory at least")
    paths: list[Path] = []
    for pattern in patterns:
        paths += _matching(pattern)
    unique = list({path.resolve(): path for path in paths}.values())
    names = _names(unique)
    return [read_run(path, name) for path, name in zip(unique, names, strict=True)]


def _matching(pattern: str) -> list[Path]:
    text = str(Path(pattern).expanduser())
    literal = Path(text).is_dir()  # a directory's own name may hold what is special in a pattern
    found = [Path(text)] if literal else [Path(p) for p in sorted(glob.glob(text)) if Path(p).is_dir()]
    found = [run for path in found for run in (sorted((path / "runs").glob("*/")) if _is_sweep(path) else [path])]
    kept = [path for path in found if literal or any((path / f).exists() for f in ("config.yaml", "status.json"))]
    if not kept:
        raise UserError(f"runs: {pattern} matches no run directory")
    return kept


def _names(paths: Sequence[Path]) -> list[str]:
    """The directories' names, with as many parents as tell them apart."""
    for depth in range(1, 1 + max(len(path.resolve().parts) for path in paths)):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_sweep(directory: Path) -> list[ReportedRun]:
    """The runs of a sweep in the order of its sweep.json; those that it does not name yet come after."""
    records = _records(directory)
    runs = []
    for record in records:
        path = directory / "runs" / record["id"]
        overrides = record.get("overrides")
        varying = overrides if isinstance(overrides, dict) else {}
        runs.append(_of_sweep(path, record, varying))
    listed = {run.id for run in runs}
    places = sorted(path for path in (directory / "runs").glob("*/") if path.name not in listed)
    runs += [read_run(path) for path in places if (path / "status.json").exists() or (path / "config.yaml").exists()]
    if not runs:
        raise UserError(f"sweep={directory}: none of its runs has begun")
    return runs


def _records(directory: Path) -> list[dict[str, Any]]:
    """What sweep.json says of its runs; nothing where it is not whole: the runs' own directories tell enough."""
    try:
        values = read_json(directory / "sweep.json")
    except UserError:
        return []
    found = values.get("runs") if isinstance(values, dict) else None
    return [r for r in found if isinstance(r, dict) and isinstance(r.get("id"), str)] if isinstance(found, list) else []


def _of_sweep(path: Path, record: Mapping[str, Any], varying: Mapping[str, Any]) -> ReportedRun:
    error = str(record["error"]) if record.get("error") else None
    try:
        run = read_run(path, record["id"], varying)
    except UserError:  # it never began
        texts = {key: str(value) for key, value in varying.items()}
        state = str(record.get("state") or "not started")
        return ReportedRun(record["id"], path, state, {}, texts, {}, [], [], {}, error)
    return run if run.finished or run.problem else replace(run, problem=error)


# --------------------------------------------------------------------------------------------- the report
def build(
    runs: Sequence[ReportedRun],
    kind: str,
    place: Path,
    samples: int = SAMPLES,
    bootstrap: int = BOOTSTRAP,
    seed: int = SEED,
) -> page.Report:
    """Everything that the page shows, a section for each objective set."""
    settings = varying_settings(runs)
    sections = []
    for members in objective_sets(runs):
        group = groups.group_of(members, settings)
        drawn, data = charts.figures(group), groups.datasets(group)
        sections.append(page.Section(group, drawn, data, quality(group, bootstrap, seed)))
    title = f"{len(runs)} runs" if kind == "comparison" else place.resolve().name
    return page.Report(title, kind, str(place), runs, sections, notices(runs), samples)


def notices(runs: Sequence[ReportedRun]) -> list[str]:
    """What a reader must know before comparing these runs."""
    texts = []
    sets = [group for group in objective_sets(runs) if group[0].names]
    if len(sets) > 1:
        described = [f"{', '.join(group[0].names)} ({_some([run.id for run in group])})" for group in sets]
        texts.append(f"These runs have {len(sets)} objective sets, which are shown apart: {'; '.join(described)}.")
    unfinished = [run for run in runs if not run.finished]
    if unfinished:
        states = ", ".join(f"{count} {state}" for state, count in Counter(r.state for r in unfinished).items())
        texts.append(f"{len(unfinished)} of {len(runs)} runs have no results yet ({states}): "
                     f"{_some([run.id for run in unfinished])}.")  # fmt: skip
    for group in sets:
        differing = [key for key in ("dataset._target_", "dataset.path", "dataset.data_seed", "dataset.rows")
                     if len({value_of(run, key) for run in group if run.settings}) > 1]  # fmt: skip
        if differing:
            texts.append(f"Runs with {', '.join(group[0].names)} were measured on different data, as win rates are "
                         f"against the data's responses: they differ in {', '.join(differing)}.")  # fmt: skip
        for name in group[0].names:
            worst = sorted({run.objectives[name].worst for run in group})
            if len(worst) > 1:
                texts.append(f"objectives.{name}.worst differs between runs ({', '.join(map(str, worst))}): "
                             f"hypervolume is counted from {worst[0]:g}.")  # fmt: skip
    return texts


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write(report: page.Report, directory: Path) -> Path:
    """report.html in `directory`."""
    path = directory / "report.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page.render(report))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def draw(report: page.Report, directory: Path) -> list[Path]:
    """Each figure as PNG and SVG; a second objective set's carry its number."""
    written: list[Path] = []
    with stage("figures", sum(len(section.figures) for section in report.sections)) as progress:
        for number, section in enumerate(report.sections):
            for figure in section.figures:
                name = figure.id if number == 0 else f"{figure.id}_{number + 1}"
                paths = [directory / f"{name}.{kind}" for kind in ("svg", "png")]
                written += save(charts.composed(figure, section.data), *paths)
                progress.advance(len(written) // 2)
    return written
