"""`mopo synthetic`: every recipe on every structure of preferences, in a table beside exact answers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table

from mopo_cli.base.console import say, show, stage
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import write_json
from mopo_cli.config import compose
from mopo_cli.config.schema import SyntheticConfig
from mopo_cli.planning.structures import Structure, read_structure
from mopo_cli.planning.tabular import Problem, StructureResult, points_of, pose, recipes, run_problem
from mopo_cli.runs.directory import claim


# --------------------------------------------------------------------------------------------- the command
def command(composed: DictConfig) -> int:
    """Run every recipe on every structure; table, synthetic.json and figures."""
    from mopo_cli.planning.figures import draw_structure

    config: SyntheticConfig = compose.typed(composed, SyntheticConfig)
    run = claim(config.run.dir, resume=False)
    structures = [read_structure(name, node) for name, node in config.structures.items()]
    check_recipes(config)
    problems = [
        pose(structure.first(k), config.tau, config.thresholds)
        for structure in structures
        for k in _sizes(structure, config.sizes)
    ]
    started = time.perf_counter()
    records = run_all(config, problems)
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "config.yaml").write_text(compose.to_yaml(composed), encoding="utf-8")
    figures = [
        draw_structure(structure.name, *_of(structure.name, problems, records), run.figures / f"{structure.name}.png")
        for structure in structures
    ]
    write_json(run.path / "synthetic.json", [asdict(record) for record in records])
    show(results_table(records))
    say(f"\nworst over thresholds, in win rate; hypervolume as a share of the exact front's (tau {config.tau:g})")
    say(f"{len(records)} records in {time.perf_counter() - started:.0f} s\n")
    say(f"records        {run.path / 'synthetic.json'}")
    for path in figures:
        say(f"figure         {path}")
    return 0


def _sizes(structure: Structure, sizes: Sequence[int]) -> list[int]:
    most = len(structure.preferences)
    for k in sizes:
        if k > most:
            raise UserError(f"sizes={list(sizes)}: structures.{structure.name} has {most} matrices")
    return list(sizes)


def check_recipes(config: SyntheticConfig) -> None:
    """A misspelt part of a recipe is said before anything runs."""
    for recipe in recipes(config, config.preferences[0]):
        try:
            points_of(config, recipe, [((None,), 1.0, math.inf)])
        except UserError as error:
            raise UserError(str(error).replace("algorithm.", "recipes: ")) from None


def run_all(config: SyntheticConfig, problems: Sequence[Problem]) -> list[StructureResult]:
    """Every problem from every kind of preferences; one process a core."""
    jobs = list(product(problems, config.preferences))
    workers = max(1, min(config.processes or os.cpu_count() or 1, len(jobs)))
    with stage("synthetic", len(jobs)) as progress, ExitStack() as held:
        if workers == 1:
            done: Any = (_run_job(config, job) for job in jobs)
        else:
            pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
            done = held.enter_context(pool).map(partial(_run_job, config), jobs)
        records: list[StructureResult] = []
        for number, results in enumerate(done, start=1):
            records += results
            progress.advance(number)
    return records


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run_job(config: SyntheticConfig, job: tuple[Problem, str]) -> list[StructureResult]:
    return run_problem(config, *job)


def _of(
    name: str, problems: Sequence[Problem], records: Sequence[StructureResult]
) -> tuple[list[Problem], list[StructureResult]]:
    return [p for p in problems if p.structure.name == name], [r for r in records if r.structure == name]


def results_table(records: Sequence[StructureResult]) -> Table:
    """The issue's columns, a line a structure, K and recipe; runs on the schedule have no optimum of their own."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("structure", "K", "preferences", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("to front", "to optimum", "violation", "hypervolume"):
        table.add_column(column, justify="right", no_wrap=True)
    last = ("", 0)
    for r in records:
        if r.beta is not None:
            continue
        if last != (r.structure, r.K) and last[1]:
            table.add_section()
        new, last = last != (r.structure, r.K), (r.structure, r.K)
        table.add_row(
            r.structure if new else "", str(r.K) if new else "", r.preferences, r.method,
            f"{r.distance_to_front:.3f}", f"{r.distance_to_optimum:.3f}", f"{r.violation:.3f}",
            f"{r.hypervolume_ratio:.1%}",
        )  # fmt: skip
    return table
