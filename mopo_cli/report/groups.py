"""Runs as the charts have them: a group of runs of one kind, its labels and its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import isfinite
from typing import Any

import numpy as np

from mopo_cli.maths import pareto
from mopo_cli.report.theme import HUES, NAMED, one_line
from mopo_cli.runs.record import METHOD, RunRecord, differing_data, value_of


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart, and in the end its Vega-Lite; `rows` where their number is its height, `wide` where it stands alone."""

    chart: Any
    wide: bool = False
    rows: float = 0


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels that are read together; `shared` scales have one legend for all. `id` is the name of its file."""

    id: str
    title: str
    caption: str
    panels: list[Panel]
    shared: tuple[str, ...] = ("color", "shape", "strokeDash")
    height: int = 240
    columns: int = 3
    label: int = 0  # characters of the longest label beside the panels


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one objective set, and how they are told apart."""

    runs: Sequence[RunRecord]
    names: tuple[str, ...]
    settings: Mapping[str, list[str]]  # those that vary, with their values in order
    exact: bool  # every finished run knows its exact win rates
    labels: Mapping[str, str] = field(default_factory=dict)
    differing: Sequence[str] = ()  # settings by which they were measured on different data: no run is above another

    @property
    def ended(self) -> list[RunRecord]:
        return [run for run in self.runs if run.finished]

    @property
    def by_algorithm(self) -> bool:
        """Whether runs are told apart by their methods, where these vary."""
        return METHOD in self.settings

    @property
    def by_run(self) -> bool:
        return len(self.runs) <= NAMED and not self.by_algorithm

    def points(self) -> np.ndarray:
        """(n, K) of the runs that ended."""
        return np.array([run.points(self.exact) for run in self.ended]).reshape(-1, len(self.names))


def group_of(runs: Sequence[RunRecord], settings: Mapping[str, list[str]]) -> Group:
    ended = [run for run in runs if run.finished]
    varying = {key: values for key, values in settings.items() if len({value_of(run, key) for run in runs}) > 1}
    labels = {run.id: _label(run, varying) for run in runs}
    if len(set(labels.values())) < len(labels):
        labels = {run.id: run.id for run in runs}
    exact = bool(ended) and all(run.exact for run in ended)
    return Group(runs, runs[0].names, varying, exact, labels, differing_data(ended))


def _label(run: RunRecord, settings: Mapping[str, list[str]]) -> str:
    if METHOD in settings:  # what other methods are told is not its own
        keys = [key for key in settings if key != METHOD and value_of(run, key) not in ("", "null")]
        parts = [
            value_of(run, METHOD),
            *(f"{key.rpartition('.')[2]} {value_of(run, key).strip('{}').replace(':', ' ')}" for key in keys),
        ]
        return ", ".join(parts) if len(parts) <= 4 else run.id
    if not 0 < len(settings) <= 3:
        return run.id
    return ", ".join(f"{short(key)} {value_of(run, key) or '–'}" for key in settings)


def short(key: str) -> str:
    """`objectives.harmless.threshold` as `harmless.threshold`: the last two parts of a key."""
    return ".".join(key.split(".")[-2:])


def plane(group: Group) -> tuple[int, int] | None:
    """The first two settings whose values the runs combine, so that a map of them has rows and columns to compare.

    None where methods have each their own settings: a cell would mix trade-offs that are not the same.
    """
    if group.by_algorithm and any(not value_of(run, key) for run in group.ended for key in group.settings):
        return None
    for pair in combinations(range(len(group.settings)), 2):
        cells = [tuple(value_of(run, list(group.settings)[i]) for i in pair) for run in group.ended]
        if len(set(cells)) > max(len({cell[0] for cell in cells}), len({cell[1] for cell in cells})):
            return pair
    return None


# --------------------------------------------------------------------------------------------- the data
def datasets(group: Group, lines: int = 4000) -> dict[str, list[dict[str, Any]]]:
    """`runs`: a row for each; `history`: rows over the steps; `reached`: a row for each run and objective."""
    front = _front(group)
    axes = plane(group)
    rows = [_row(group, run, front.get(run.id), axes) for run in group.runs]
    keys = {row["run"]: {"run": row["run"], "label": row["label"], "colour": row["colour"]} for row in rows}
    most = max(12, lines // max(len(group.runs), 1))
    history = [keys[run.id] | line for run in group.runs for line in _steps(run, group.names, most)]
    parts = {"value": "x", "sampled": "w", "low": "l", "high": "h", "b": "b", "exact": "e", "optimum": "o"}
    reached = [
        keys[row["run"]]
        | {"objective": name}
        | {part: row[f"{key}{k}"] for part, key in parts.items() if f"{key}{k}" in row}
        for row in rows
        for k, name in enumerate(group.names)
        if f"w{k}" in row
    ]
    return one_line({"runs": rows, "history": history, "reached": reached})


def _front(group: Group) -> dict[str, bool]:
    """By run: whether no other, or no other of its method where methods vary, beats it; all where none can."""
    if group.differing:
        return {run.id: True for run in group.ended}
    front: dict[str, bool] = {}
    methods = {run.id: value_of(run, METHOD) if group.by_algorithm else "" for run in group.ended}
    for method in dict.fromkeys(methods.values()):
        members = [run for run in group.ended if methods[run.id] == method]
        best = pareto.nondominated(np.array([run.points(group.exact) for run in members]))
        front |= {run.id: bool(flag) for run, flag in zip(members, best, strict=True)}
    return front


def _row(group: Group, run: RunRecord, front: bool | None, axes: tuple[int, int] | None) -> dict[str, Any]:
    oracle = run.oracle
    row: dict[str, Any] = {
        "run": run.id,
        "label": group.labels[run.id],
        "colour": colour_of(group, run),
        "shape": shape_of(group, run),
        "state": run.state,
        "front": front,
        "settings": [value_of(run, key) for key in group.settings],
        "kl": (oracle.get("kl") if group.exact else None) or run.summary.get("kl"),
        "okl": oracle.get("optimum_kl") if aimed(run) else None,
        "step": next((line["step"] for line in reversed(run.history)), None),
    }
    for k, result in enumerate(run.objectives.values()):
        row[f"b{k}"], row[f"d{k}"] = result.threshold, result.dual
        if result.win_rate is None:
            continue
        row[f"w{k}"], (row[f"l{k}"], row[f"h{k}"]) = result.win_rate, result.ci95 or (None, None)
        row[f"e{k}"], row[f"o{k}"] = result.exact, result.optimum if aimed(run) else None
        row[f"x{k}"] = reached = result.exact if group.exact else result.win_rate
        if result.threshold is not None and reached is not None:
            row[f"m{k}"] = reached - result.threshold
    if axes:
        row["across"], row["down"] = (row["settings"][i] for i in axes)
    return {key: _rounded(value) for key, value in row.items() if value is not None}


def aimed(run: RunRecord) -> bool:
    """Whether there is an optimum of (P) that a run was to find: at the thresholds that were asked, unless they are out
    of reach, or where there is nothing to ask them of."""
    bounded = len(run.objectives) == 1 or any(r.threshold is not None for r in run.objectives.values())
    return bounded and not run.out_of_reach


def colour_setting(group: Group) -> str | None:
    """The setting that gives runs their colour: the method, or the first where there are too many for a colour each."""
    if group.by_algorithm:
        return METHOD
    return next((key for key, values in group.settings.items() if 2 <= len(values) <= HUES), None)


def shape_setting(group: Group) -> str | None:
    """The setting that gives them their shape: the next, or the method again, as ten colours are hard to tell apart."""
    if group.by_algorithm:
        return METHOD
    fitting = [key for key, values in group.settings.items() if 2 <= len(values) <= HUES]
    return None if group.by_run or len(fitting) < 2 else fitting[1]


def colour_of(group: Group, run: RunRecord) -> str:
    if group.by_run:
        return group.labels[run.id]
    key = colour_setting(group)
    return value_of(run, key) if key else "runs"


def shape_of(group: Group, run: RunRecord) -> str:
    key = shape_setting(group)
    return value_of(run, key) if key else "run"


def _steps(run: RunRecord, names: Sequence[str], most: int) -> list[dict[str, Any]]:
    """At most so many lines of metrics.jsonl at which something was measured anew, in short keys."""
    keys = {"kl": "kl", **{short: key for short, (key, _) in PAIRS.items()}}
    for k, name in enumerate(names):
        keys |= {f"w{k}": f"win_rate/{name}", f"l{k}": f"lower/{name}"}
        keys |= {f"b{k}": f"threshold/{name}", f"d{k}": f"dual/{name}"}
    lines, last = [], None
    for line in run.history:
        values = [line.get(key) for key in keys.values()]
        if values != last or line is run.history[-1]:
            lines.append((line["step"], values))
        last = values
    return [
        {"step": step}
        | {key: _rounded(v) for key, v in zip(keys, values, strict=True) if isinstance(v, int | float) and isfinite(v)}
        for step, values in _thinned(lines, most)
    ]


def _thinned(rows: list[Any], most: int) -> list[Any]:
    """At most so many rows, evenly, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[i] for i in sorted({round(x) for x in np.linspace(0, len(rows) - 1, most)})]


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def exact_front(group: Group) -> np.ndarray | None:
    """(m, K) the exact front where all runs have the same one."""
    fronts: list[Any] = [run.oracle.get("front") for run in group.ended]
    if not fronts or not fronts[0] or any(front != fronts[0] for front in fronts):
        return None
    try:
        return np.array([[float(point[name]) for name in group.names] for point in fronts[0]])
    except (KeyError, TypeError, ValueError):
        return None


PAIRS = {
    "loss": ("loss", "loss"),
    "better": ("preferred_logp", "log-prob of the preferred, nats"),
    "worse": ("other_logp", "log-prob of the other, nats"),
    "order": ("accuracy", "pairs in the labels' order, share"),
}  # what a method on labelled pairs logs: the key here, the key there, and the axis
