"""`mopo report`: a page that people look at, of a run, of a sweep, or of any runs side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mopo_cli.base.console import stage
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import write_atomic
from mopo_cli.report import charts, groups, page
from mopo_cli.report.quality import quality
from mopo_cli.report.theme import save
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.find import read_sweep
from mopo_cli.runs.record import RunRecord, differing_data, objective_sets, read_run, varying_settings

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


# --------------------------------------------------------------------------------------------- the report
def build(
    runs: Sequence[RunRecord],
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


def notices(runs: Sequence[RunRecord]) -> list[str]:
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
        if differing := differing_data(group):
            texts.append(f"Runs with {', '.join(group[0].names)} were measured on different data, as win rates are "
                         f"against the data's responses: they differ in {', '.join(differing)}. No front, "
                         "hypervolume or distance is given, which would compare them.")  # fmt: skip
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
