"""`mopo report`: one HTML page of a run, a sweep or any runs."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig

from mopo_cli.base.console import say, warn
from mopo_cli.config import compose, schema
from mopo_cli.report import page
from mopo_cli.report.build import build, draw, write
from mopo_cli.runs.find import find


def command(composed: DictConfig) -> int:
    """`mopo report`: read the runs, write the page and its figures, say where they are."""
    settings: schema.ReportConfig = compose.typed(composed, schema.ReportConfig)
    started = time.perf_counter()
    runs, kind, place = find(settings)
    out = Path(settings.out).expanduser() if settings.out else place
    report = build(
        runs, kind, out if kind == "comparison" else place, settings.samples, settings.bootstrap, settings.seed
    )
    path = write(report, out)
    drawn = draw(report, out / "figures") if settings.figures else []
    for notice in report.notices:
        warn(notice)
    for section in report.sections:
        for head, number, meaning in page.numbers(section.quality) if section.quality else []:
            say(f"{head:<14} {number:<24} {meaning}")
    ended = sum(run.finished for run in runs)
    size = path.stat().st_size / 1e6
    say(f"runs           {len(runs)}" + (f", {len(runs) - ended} unfinished" if ended < len(runs) else ""))
    for figure in drawn:
        say(f"figure         {figure}")
    say(f"report         {path} ({size:.1f} MB, {time.perf_counter() - started:.1f} s)")
    return 0
