"""The figures of a report as Vega-Lite: one definition is the interactive chart of the page, the PNG and the SVG.

Colours are CSS variables, which the page resolves by its theme; a file gets those of `LIGHT`. Names that people chose
(of objectives, settings, runs) are values and titles, never field names: those are short and made here (`x0`: the win
rate of objective 0, exact where it is known).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import isfinite
from typing import Any

import numpy as np

from mopo_cli import pareto
from mopo_cli.reporting.runs import METHOD, ReportedRun, value_of

Spec = dict[str, Any]

LIGHT = {
    "ink": "#1a1d21",
    "soft": "#5b636d",
    "rule": "#e3e6ea",
    "paper": "#ffffff",
    "bad": "#d55e00",
    "c0": "#0072b2",
    "c1": "#009e73",
    "c2": "#cc79a7",
    "c3": "#b07d00",
    "c4": "#56b4e9",
    "c5": "#7a3e9d",
    "c6": "#6b6b6b",
    "c7": "#8c5a2b",
    "c8": "#1b2a6b",
    "c9": "#7d8c12",
    "c10": "#a01246",
    "c11": "#00707a",
}
DARK = {
    "ink": "#e8eaed",
    "soft": "#a3abb5",
    "rule": "#30353c",
    "paper": "#15181c",
    "bad": "#f08a4b",
    "c0": "#4fa8e0",
    "c1": "#35c79b",
    "c2": "#e59cc5",
    "c3": "#e6b93f",
    "c4": "#a5dbf8",
    "c5": "#bf98e0",
    "c6": "#a8a8a8",
    "c7": "#cf9a66",
    "c8": "#8c9eff",
    "c9": "#c3d04a",
    "c10": "#ff7eb0",
    "c11": "#5fd4de",
}
COLOURS = [f"var(--c{i})" for i in range(12)]
HUES = 8  # of them that can be told apart without a shape
SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left"]
STAR = "M0,-1L0.25,-0.34L0.95,-0.31L0.4,0.13L0.59,0.81L0,0.42L-0.59,0.81L-0.4,0.13L-0.95,-0.31L-0.25,-0.34Z"
SHAPES += [STAR, "M0,-1L0.87,-0.5L0.87,0.5L0,1L-0.87,0.5L-0.87,-0.5Z", "M-0.9,-0.9L0.9,-0.9L-0.9,0.9L0.9,0.9Z",
           "M0,-1L0.95,-0.31L0.59,0.81L-0.59,0.81L-0.95,-0.31Z"]  # fmt: skip
INK, SOFT, BAD, PAPER = "var(--ink)", "var(--soft)", "var(--bad)", "var(--paper)"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Helvetica, 'Liberation Sans', Arial, sans-serif"
FILE_FONT = "Liberation Sans, Helvetica, Arial, sans-serif"

CONFIG: Spec = {
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": SOFT,
        "titleColor": INK,
        "gridColor": "var(--rule)",
        "domainColor": SOFT,
        "tickColor": SOFT,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "tickCount": 5,
        "labelOverlap": True,
    },
    "legend": {
        "labelColor": INK,
        "titleColor": SOFT,
        "labelFontSize": 11.5,
        "titleFontSize": 11.5,
        "titleFontWeight": "normal",
        "orient": "bottom",
        "direction": "horizontal",
        "titleOrient": "left",
        "columns": 4,
        "symbolSize": 70,
        "labelLimit": 260,
        "columnPadding": 18,
        "offset": 14,
        "layout": {"bottom": {"anchor": "start", "direction": "vertical", "margin": 6}},
    },
    "title": {"color": INK, "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 10},
}

UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
MANY = 40  # runs: with more, a figure leaves out what would only be a tangle
NAMED = 8  # runs that still get a colour each
LINES = {"estimate": [1, 0], "lower bound": [1.5, 2.5], "threshold b": [6, 4]}


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels that are read together; `shared` scales have one legend for all."""

    id: str
    title: str
    caption: str
    panels: list[Spec]
    shared: tuple[str, ...] = ("color", "shape", "strokeDash")
    height: int = 240
    columns: int = 3
    label: int = 0  # characters of the longest label beside the panels


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one objective set, and how they are told apart."""

    runs: Sequence[ReportedRun]
    names: tuple[str, ...]
    settings: Mapping[str, list[str]]  # those that vary, with their values in order
    exact: bool  # every finished run knows its exact win rates
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> list[ReportedRun]:
        return [run for run in self.runs if run.finished]

    @property
    def by_method(self) -> bool:
        """Whether runs are told apart by their methods, where these vary."""
        return METHOD in self.settings

    @property
    def by_run(self) -> bool:
        return len(self.runs) <= NAMED and not self.by_method

    def points(self) -> np.ndarray:
        """(n, K) of the runs that ended."""
        return np.array([run.points(self.exact) for run in self.ended]).reshape(-1, len(self.names))


def group_of(runs: Sequence[ReportedRun], settings: Mapping[str, list[str]]) -> Group:
    ended = [run for run in runs if run.finished]
    own = {key: values for key, values in settings.items() if len({value_of(run, key) for run in runs}) > 1}
    labels = {run.id: _label(run, own) for run in runs}
    if len(set(labels.values())) < len(labels):
        labels = {run.id: run.id for run in runs}
    return Group(runs, runs[0].names, own, bool(ended) and all(run.exact for run in ended), labels)


def _label(run: ReportedRun, settings: Mapping[str, list[str]]) -> str:
    if METHOD in settings:  # what other methods are told is not its own
        told = [key for key in settings if key != METHOD and value_of(run, key) not in ("", "null")]
        own = [
            value_of(run, METHOD),
            *(f"{key.rpartition('.')[2]} {value_of(run, key).strip('{}').replace(':', ' ')}" for key in told),
        ]
        return ", ".join(own) if len(own) <= 4 else run.id
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
    if group.by_method and any(not value_of(run, key) for run in group.ended for key in group.settings):
        return None
    for pair in combinations(range(len(group.settings)), 2):
        found = [tuple(value_of(run, list(group.settings)[i]) for i in pair) for run in group.ended]
        if len(set(found)) > max(len({cell[0] for cell in found}), len({cell[1] for cell in found})):
            return pair
    return None


def figures(group: Group) -> list[Figure]:
    """The figures that these runs can carry, in the order in which they are read."""
    count = len(group.names)
    drawn: list[Figure] = []
    if group.ended and count > 1:
        drawn.append(fronts(group))
    if group.ended and count > 2 and len(group.ended) > 1:
        drawn.append(parallel(group))
    if group.ended and len(group.ended) <= MANY:
        drawn.append(win_rates(group))
    if any(run.history for run in group.runs) and (over_steps := steps(group)).panels:
        drawn.append(over_steps)
    if group.ended:
        drawn.append(reward(group))
    if plane(group):
        drawn.append(heat(group))
    return [replace(figure, panels=_one_line(figure.panels)) for figure in drawn]


def _one_line(value: Any) -> Any:
    """Texts without line ends and control characters: Vega's expressions, which they become part of, allow none."""
    if isinstance(value, str):
        return UNSEEN.sub(" ", value)
    if isinstance(value, dict):
        return {key: _one_line(v) for key, v in value.items()}
    return [_one_line(v) for v in value] if isinstance(value, list | tuple) else value


# --------------------------------------------------------------------------------------------- the data


def datasets(group: Group, lines: int = 6000) -> dict[str, list[dict[str, Any]]]:
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
    return _one_line({"runs": rows, "history": history, "reached": reached})


def _front(group: Group) -> dict[str, bool]:
    """By run: whether no other, or no other of its method where methods vary, beats it."""
    front: dict[str, bool] = {}
    methods = {run.id: value_of(run, METHOD) if group.by_method else "" for run in group.ended}
    for method in dict.fromkeys(methods.values()):
        own = [run for run in group.ended if methods[run.id] == method]
        kept = pareto.nondominated(np.array([run.points(group.exact) for run in own]))
        front |= {run.id: bool(flag) for run, flag in zip(own, kept, strict=True)}
    return front


def _row(group: Group, run: ReportedRun, front: bool | None, axes: tuple[int, int] | None) -> dict[str, Any]:
    oracle = run.summary.get("oracle") or {}
    row: dict[str, Any] = {
        "run": run.id,
        "label": group.labels[run.id],
        "colour": colour_of(group, run),
        "shape": shape_of(group, run),
        "state": run.state,
        "front": front,
        "settings": [value_of(run, key) for key in group.settings],
        "kl": (oracle.get("kl") if group.exact else None) or run.summary.get("kl"),
        "okl": oracle.get("optimum_kl") if _aimed(run) else None,
        "step": next((line["step"] for line in reversed(run.history)), None),
    }
    for k, result in enumerate(run.objectives.values()):
        row[f"b{k}"], row[f"d{k}"] = result.threshold, result.dual
        if result.win_rate is None or result.ci95 is None:
            continue
        row[f"w{k}"], (row[f"l{k}"], row[f"h{k}"]) = result.win_rate, result.ci95
        row[f"e{k}"], row[f"o{k}"] = result.exact, result.optimum if _aimed(run) else None
        row[f"x{k}"] = reached = result.exact if group.exact else result.win_rate
        if result.threshold is not None and reached is not None:
            row[f"m{k}"] = reached - result.threshold
    if axes:
        row["across"], row["down"] = (row["settings"][i] for i in axes)
    return {key: _rounded(value) for key, value in row.items() if value is not None}


def _aimed(run: ReportedRun) -> bool:
    """Whether (P) is what a run was to solve: thresholds were asked, or there is nothing to ask them of."""
    return len(run.objectives) == 1 or any(r.threshold is not None for r in run.objectives.values())


def colour_setting(group: Group) -> str | None:
    """The setting that gives runs their colour: the method, or the first where there are too many for a colour each."""
    if group.by_method:
        return METHOD
    return next((key for key, values in group.settings.items() if 2 <= len(values) <= HUES), None)


def shape_setting(group: Group) -> str | None:
    """The setting that gives them their shape: the next, or the method again, as ten colours are hard to tell apart."""
    if group.by_method:
        return METHOD
    fitting = [key for key, values in group.settings.items() if 2 <= len(values) <= HUES]
    return None if group.by_run or len(fitting) < 2 else fitting[1]


def colour_of(group: Group, run: ReportedRun) -> str:
    if group.by_run:
        return group.labels[run.id]
    key = colour_setting(group)
    return value_of(run, key) if key else "runs"


def shape_of(group: Group, run: ReportedRun) -> str:
    key = shape_setting(group)
    return value_of(run, key) if key else "run"


def _steps(run: ReportedRun, names: Sequence[str], most: int) -> list[dict[str, Any]]:
    """At most so many lines of metrics.jsonl at which something was measured anew, in short keys."""
    keys = {"kl": "kl", **{short: key for short, (key, _) in PAIRS.items()}}
    for k, name in enumerate(names):
        keys |= {f"w{k}": f"win_rate/{name}", f"l{k}": f"lower/{name}"}
        keys |= {f"b{k}": f"threshold/{name}", f"d{k}": f"dual/{name}"}
    found, last = [], None
    for line in run.history:
        values = [line.get(key) for key in keys.values()]
        if values != last or line is run.history[-1]:
            found.append((line["step"], values))
        last = values
    return [
        {"step": step}
        | {key: _rounded(v) for key, v in zip(keys, values, strict=True) if isinstance(v, int | float) and isfinite(v)}
        for step, values in _thinned(found, most)
    ]


def _thinned(rows: list[Any], most: int) -> list[Any]:
    """At most so many rows, evenly, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[i] for i in sorted({round(x) for x in np.linspace(0, len(rows) - 1, most)})]


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --------------------------------------------------------------------------------------------- parts of a panel


def colour(group: Group) -> Spec:
    if group.by_run:
        domain, title = [group.labels[run.id] for run in group.runs if run.finished or run.history], None
    else:
        key = colour_setting(group)
        domain, title = (group.settings[key], short(key)) if key else (["runs"], None)
    legend = {"title": title, "symbolType": "circle", "symbolOpacity": 1, "columns": _columns(domain)}
    return {
        "field": "colour",
        "type": "nominal",
        "scale": {"domain": domain, "range": [COLOURS[i % len(COLOURS)] for i in range(len(domain))]},
        "legend": legend if len(domain) > 1 else None,
    }


def _columns(labels: Sequence[str]) -> int:
    """How many labels stand beside one another in a legend."""
    longest = max(map(len, labels), default=0)
    return 8 if longest <= 8 else 4 if longest <= 28 else 2


def stroke(group: Group) -> Spec:
    """The same colours on a second channel, whose legend would be the same."""
    return colour(group) | {"legend": None}


def shape(group: Group) -> Spec:
    key = shape_setting(group)
    domain = group.settings[key] if key else ["run"]
    if key == METHOD:  # one legend for both
        legend = {"title": short(key), "symbolOpacity": 1, "columns": _columns(domain)}
        shapes = [SHAPES[i % len(SHAPES)] for i in range(len(domain))]
        return {"field": "colour", "type": "nominal", "scale": {"domain": domain, "range": shapes}, "legend": legend}
    grey = {"fill": {"value": SOFT}, "stroke": {"value": SOFT}}
    return {
        "field": "shape",
        "type": "nominal",
        "scale": {"domain": domain, "range": SHAPES[: len(domain)]},
        "legend": {"title": short(key), "columns": _columns(domain), "encoding": {"symbols": grey}} if key else None,
    }


def dashes(kinds: Sequence[str], styles: Mapping[str, list[float]], kind: str) -> Spec:
    """A kind of line by its dashes, with a legend of the kinds that the figure has."""
    scale = {"domain": list(kinds), "range": [styles[name] for name in kinds]}
    legend = {"title": None, "symbolType": "stroke", "symbolStrokeColor": SOFT, "symbolSize": 300}
    return {"datum": kind, "type": "nominal", "scale": scale, "legend": legend if len(kinds) > 1 else None}


def visible(opacity: float = 1.0, faint: float = 0.08) -> Spec:
    """Runs that are not among the chosen ones step back."""
    return {
        "condition": {"test": "!length(chosen) || indexof(chosen, datum.run) >= 0", "value": opacity},
        "value": faint * opacity,
    }


def quantity(name: str, title: str | None, domain: Sequence[float] | None = None, **more: Any) -> Spec:
    axis = {"title": title, "grid": True, **more}
    scale: Spec = {"zero": False, "nice": False, **({"domain": list(domain)} if domain else {})}
    return {"field": name, "type": "quantitative", "axis": axis, "scale": scale}


def span(values: Sequence[float | None], margin: float = 0.07, least: float = 0.02) -> tuple[float, float]:
    """The range of these values with some room around it."""
    found = [float(v) for v in values if v is not None and isfinite(v)]
    if not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    room = max((high - low) * margin, least / 2)
    return round(low - room, 4), round(high + room, 4)


def tooltip(*fields: tuple[str, str] | tuple[str, str, str]) -> list[Spec]:
    """Rows of a tooltip: field, title and, of numbers, a format."""
    rows = []
    for name, title, *rest in fields:
        numeric = {"type": "quantitative", "format": rest[0]} if rest else {"type": "nominal"}
        rows.append({"field": name, "title": title, **numeric})
    return rows


def run_tooltip(group: Group) -> list[Spec]:
    rows: list[Any] = [("run", "run")]
    if group.exact:
        rows += [(f"e{k}", f"{name}, exact", ".4f") for k, name in enumerate(group.names)]
    rows += [(f"w{k}", f"{name}, sampled", ".4f") for k, name in enumerate(group.names)]
    rows += [(f"b{k}", f"{name}, threshold", ".3f") for k, name in enumerate(group.names) if _asked(group, name)]
    return tooltip(*rows, ("kl", "KL, nats", ".4f"))


def _asked(group: Group, name: str) -> list[float]:
    """The thresholds asked of an objective by runs that ended, each once."""
    found = {run.objectives[name].threshold for run in group.ended}
    return sorted(round(t, 6) for t in found if t is not None)


def _common_floor(group: Group, name: str) -> float | None:
    """Below this win rate no run keeps its threshold; None where one asks for nothing."""
    asked = [run.objectives[name].threshold for run in group.ended]
    return min((t for t in asked if t is not None), default=None) if asked and None not in asked else None


def _floors(group: Group) -> bool:
    return any(_common_floor(group, name) is not None for name in group.names)


def _shade(**sides: float) -> Spec:
    """A shaded rectangle: what breaks a threshold."""
    encoding = {key: {"datum": value, "type": "quantitative"} for key, value in sides.items()}
    return {"data": {"values": [{}]}, "mark": {"type": "rect", "color": BAD, "opacity": 0.13}, "encoding": encoding}


def win_rate_title(group: Group, name: str) -> str:
    return f"win rate, {name}" + (" (exact)" if group.exact else "")


# --------------------------------------------------------------------------------------------- the figures

FRONT_LINES = {"exact front": [1, 0], "threshold": [6, 4], "to the optimum of (P)": [1.5, 2.5]}


def fronts(group: Group) -> Figure:
    """Each pair of objectives, a point a run."""
    pairs = list(combinations(range(len(group.names)), 2))
    what = (
        "Markers are exact win rates; bars are the 95 % intervals of the sampled ones."
        if group.exact
        else "Markers are win rates on sampled responses; bars are their 95 % intervals."
    )
    links = group.exact and len(group.ended) <= MANY and any(_aimed(run) for run in group.ended)
    more = [what, *(["Shaded: below every threshold that was asked."] if _floors(group) else [])]
    if len(group.ended) > 1:
        which = "no other run of its method" if group.by_method else "no other run"
        more.append(f"Filled: {which} is at least as good in every objective and better in one; hollow: one is.")
    if group.by_method and len(group.names) == 2:
        more.append("Lines join each method's filled runs.")
    if group.exact:
        more += ["Crosses: the exact optimum at a run's thresholds and τ."] if links else []
        more.append("Star: the reference model.")
    front = exact_front(group)
    edges: list[list[Spec]] = [[] for _ in pairs]
    if front is not None:
        edges = [_edge(front[:, [j, i]], _front_span(group, j), _front_span(group, i)) for i, j in pairs]
    if any(edges):
        more.append("The exact front is that of all policies whatever their KL" + (
            ", for these two objectives alone." if len(group.names) > 2 else "."))  # fmt: skip
    shown = (any(edges), any(_asked(group, name) for name in group.names), links)
    kinds = [kind for kind, there in zip(FRONT_LINES, shown, strict=True) if there]
    dashed = {kind: dashes(kinds, FRONT_LINES, kind) for kind in kinds}
    panels = [_pair(group, j, i, edge, dashed) for (i, j), edge in zip(pairs, edges, strict=True)]
    shared = ("fill", "shape", "strokeDash")
    return Figure("fronts", "Pareto fronts", " ".join(more), panels, shared, height=280)


def exact_front(group: Group) -> np.ndarray | None:
    """(m, K) the exact front where all runs have the same one."""
    found: list[Any] = [(run.summary.get("oracle") or {}).get("front") for run in group.ended]
    if not found or not found[0] or any(front != found[0] for front in found):
        return None
    try:
        return np.array([[float(point[name]) for name in group.names] for point in found[0]])
    except (KeyError, TypeError, ValueError):
        return None


def _pair(group: Group, across: int, up: int, edge: list[Spec], dashed: Mapping[str, Spec]) -> Spec:
    names, ended = group.names, group.ended
    x_domain, y_domain = _front_span(group, across), _front_span(group, up)
    x = quantity(f"x{across}", win_rate_title(group, names[across]), x_domain)
    y = quantity(f"x{up}", win_rate_title(group, names[up]), y_domain)
    layers: list[Spec] = []
    for k, axis, domain in ((across, "x", x_domain), (up, "y", y_domain)):
        floor = _common_floor(group, names[k])
        if floor is not None and floor > domain[0]:
            layers.append(_shade(**{axis: domain[0], f"{axis}2": min(floor, domain[1])}))
    for k, axis in ((across, "x"), (up, "y")):
        for b in _asked(group, names[k])[:6]:
            encoding = {axis: {"datum": b, "type": "quantitative"}, "strokeDash": dashed["threshold"]}
            layers.append({"data": {"values": [{}]}, "mark": {"type": "rule", "color": BAD, "opacity": 0.75},
                           "encoding": encoding})  # fmt: skip
    if edge:
        layers.append(_front_line(edge, x, y, dashed["exact front"]))
    tint = stroke(group)
    present = {"filter": f"isValid(datum.x{across}) && isValid(datum.x{up})"}
    if "to the optimum of (P)" in dashed:
        layers += _links(across, up, x, y, tint, dashed["to the optimum of (P)"])
    if group.by_method and len(names) == 2:
        layers.append(_joined(x, y, tint))
    bars = visible(_faintness(group))
    layers += [
        _bar(x | {"field": f"l{across}"}, {"field": f"h{across}"}, y, None, tint, bars, present),
        _bar(x, None, y | {"field": f"l{up}"}, {"field": f"h{up}"}, tint, bars, present),
    ]
    size = 75 if len(ended) <= MANY else 36
    layers.append({
        "data": {"name": "runs"},
        "transform": [present],
        "mark": {"type": "point", "size": size, "filled": True, "strokeWidth": 1.5, "cursor": "pointer"},
        "encoding": {
            "x": x, "y": y, "shape": shape(group), "opacity": visible(),
            "stroke": tint, "fill": {"condition": {"test": "datum.front", **colour(group)}, "value": PAPER},
            "tooltip": run_tooltip(group),
        },
    })  # fmt: skip
    layers += _reference(group, across, up, x, y)[: 2 if (up, across) == (0, 1) else 1]  # named once
    return {"layer": layers}


def _joined(x: Spec, y: Spec, tint: Spec) -> Spec:
    """A line through the front of each method."""
    own = {"x": x, "y": y, "color": tint, "order": {"field": x["field"], "type": "quantitative"}}
    return {"data": {"name": "runs"}, "transform": [{"filter": "datum.front"}],
            "mark": {"type": "line", "strokeWidth": 1.2, "opacity": 0.75}, "encoding": own}  # fmt: skip


def _faintness(group: Group) -> float:
    """Opacity of error bars: the more there are, the less each is seen."""
    return 0.55 if len(group.ended) <= MANY else 0.2


def _front_span(group: Group, k: int) -> tuple[float, float]:
    name, values = group.names[k], []
    for run in group.ended:
        r = run.objectives[name]
        values += [r.exact if group.exact else r.win_rate, r.threshold]
        values += [r.optimum, r.reference] if group.exact else []
        values += r.ci95 or ()
    return span(values)


def _edge(points: np.ndarray, across: Sequence[float], up: Sequence[float]) -> list[Spec]:
    """The upper right edge of what mixtures of (m, 2) points reach, as far as a panel with these ranges shows it."""
    corners = pareto.upper_edge(points)
    fine = np.linspace(across[0], across[1], 80)
    height = np.interp(fine, corners[:, 0], corners[:, 1], left=corners[0, 1], right=np.nan)
    rows = zip(fine.tolist(), height.tolist(), strict=True)
    return [{"x": round(x, 5), "y": round(y, 5)} for x, y in rows if up[0] <= y <= up[1]]


def _front_line(rows: list[Spec], x: Spec, y: Spec, dash: Spec) -> Spec:
    return {
        "data": {"values": rows},
        "mark": {"type": "line", "color": INK, "strokeWidth": 1.4},
        "encoding": {"x": x | {"field": "x"}, "y": y | {"field": "y"}, "strokeDash": dash},
    }


def _links(across: int, up: int, x: Spec, y: Spec, tint: Spec, dash: Spec) -> list[Spec]:
    known = {"filter": f"isValid(datum.o{across}) && isValid(datum.o{up})"}
    target = {"x": x | {"field": f"o{across}"}, "y": y | {"field": f"o{up}"}}
    rule = {"x": x, "y": y, "x2": {"field": f"o{across}"}, "y2": {"field": f"o{up}"}}
    cross = {"type": "point", "shape": "M-1,-1L1,1M-1,1L1,-1", "size": 30, "filled": False, "strokeWidth": 1.6}
    return [
        {"data": {"name": "runs"}, "transform": [known], "mark": {"type": "rule"},
         "encoding": rule | {"color": tint, "strokeDash": dash, "opacity": visible(0.9)}},
        {"data": {"name": "runs"}, "transform": [known], "mark": cross,
         "encoding": target | {"color": tint, "opacity": visible()}},
    ]  # fmt: skip


def _bar(x: Spec, x2: Spec | None, y: Spec, y2: Spec | None, tint: Spec, opacity: Spec, present: Spec) -> Spec:
    ends = ({"x2": x2} if x2 else {}) | ({"y2": y2} if y2 else {})
    return {
        "data": {"name": "runs"},
        "transform": [present],
        "mark": {"type": "rule", "strokeWidth": 1.2},
        "encoding": {"x": x, "y": y, **ends, "color": tint, "strokeOpacity": opacity},
    }


def _reference(group: Group, across: int, up: int, x: Spec, y: Spec) -> list[Spec]:
    """Where the runs started from, once, where all started from the same policy."""
    names = group.names
    found = {(r.objectives[names[across]].reference, r.objectives[names[up]].reference) for r in group.ended}
    if not group.exact or len(found) != 1 or None in next(iter(found)):
        return []
    a, b = next(iter(found))
    place = {"x": x | {"field": "x"}, "y": y | {"field": "y"}}
    return [
        {"data": {"values": [{"x": a, "y": b}]}, "encoding": place, "mark": {"type": "point", "shape": STAR,
         "size": 90, "filled": True, "color": INK, "tooltip": "the reference model"}},
        {"data": {"values": [{"x": a, "y": b}]}, "encoding": place, "mark": {"type": "text",
         "text": "reference", "dy": 15, "fontSize": 11, "color": SOFT}},
    ]  # fmt: skip


def parallel(group: Group) -> Figure:
    """All objectives beside one another, a line a run."""
    asked = [{"objective": name, "b": floor} for name in group.names
             if (floor := _common_floor(group, name)) is not None]  # fmt: skip
    domain = span([v for k in range(len(group.names)) for v in _front_span(group, k)], 0.0)
    x = {
        "field": "objective",
        "type": "nominal",
        "sort": list(group.names),
        "axis": {"title": None, "labelAngle": 0, "labelFontSize": 12, "labelColor": INK, "grid": True},
        "scale": {"padding": 0.2},
    }
    y = quantity("value", "win rate" + (" (exact)" if group.exact else ""), domain)
    rows: list[Any] = [("run", "run"), ("objective", "objective"), ("value", "win rate", ".4f"),
                       ("b", "threshold", ".3f")]  # fmt: skip
    panel: Spec = {
        "layer": [
            {"data": {"values": asked}, "mark": {"type": "bar", "color": BAD, "opacity": 0.14, "width": {"band": 0.5}},
             "encoding": {"x": x, "y": y | {"field": "b"}, "y2": {"datum": domain[0]}}},
            {"data": {"name": "reached"}, "mark": {"type": "line", "strokeWidth": 1.6 if len(group.ended) <= MANY else
             0.8}, "encoding": {"x": x, "y": y, "detail": {"field": "run"}, "color": colour(group),
             "opacity": visible(), "tooltip": tooltip(("run", "run"))}},
            {"data": {"name": "reached"}, "mark": {"type": "point", "filled": True, "size": 45, "cursor": "pointer"},
             "encoding": {"x": x, "y": y, "color": colour(group), "opacity": visible(), "tooltip": tooltip(*rows)}},
        ],
        "wide": True,
    }  # fmt: skip
    caption = "Every run through all objectives. Shaded: below every threshold that was asked of the objective."
    return Figure("parallel", "All objectives together", caption, [panel], height=260, columns=1)


def win_rates(group: Group) -> Figure:
    """Sampled win rates with intervals, thresholds shaded, exact values and optima where they are known."""
    alone = len(group.ended) == 1
    labels = [group.labels[run.id] for run in group.ended]
    order = list(group.names) if alone else labels
    domain = span([v for k in range(len(group.names)) for v in _front_span(group, k)])
    panels = []
    for k, name in enumerate(["all"] if alone else group.names):
        own = domain if alone else _front_span(group, k)
        first = alone or k == 0
        y: Spec = {"field": "objective" if alone else "label", "type": "nominal", "sort": order,
                   "axis": {"title": None, "labels": first, "ticks": False, "domain": False, "labelColor": INK,
                            "labelFontSize": 12, "labelLimit": 240, "grid": False, "labelPadding": 8}}  # fmt: skip
        x = quantity("value", "win rate (0.5: as good as the data's responses)" if alone else f"win rate, {name}", own)
        only = [] if alone else [{"filter": {"field": "objective", "equal": name}}]
        tint = {"value": COLOURS[0]} if alone else colour(group) | {"legend": None}
        panels.append({"layer": _forest(x, y, own, only, tint), "rows": len(order), "wide": alone, "labels": first})
    marks = ["Dots and bars: sampled win rates with 95 % intervals."]
    marks += ["Shaded: below the threshold."] if any(_asked(group, name) for name in group.names) else []
    if group.exact:
        aimed = any(_aimed(run) for run in group.ended)
        marks += ["Diamonds: exact.", *(["Crosses: the exact optimum at these thresholds and τ."] if aimed else [])]
    return Figure("win_rates", "Win rates", " ".join(marks), panels, height=0, label=min(36, max(map(len, order))))


def _forest(x: Spec, y: Spec, domain: tuple[float, float], only: list[Spec], tint: Spec) -> list[Spec]:
    here: Spec = {"data": {"name": "reached"}, "transform": only}
    asked: Spec = {"data": {"name": "reached"}, "transform": [*only, {"filter": "isValid(datum.b)"}]}
    rows = tooltip(("run", "run"), ("objective", "objective"), ("sampled", "sampled", ".4f"), ("low", "low", ".4f"),
                   ("high", "high", ".4f"), ("exact", "exact", ".4f"), ("b", "threshold", ".3f"))  # fmt: skip
    cross = {"type": "point", "shape": "M-1,-1L1,1M-1,1L1,-1", "size": 30, "filled": False, "strokeWidth": 1.6,
             "yOffset": -7, "color": INK}  # fmt: skip
    return [
        {**asked, "mark": {"type": "bar", "color": BAD, "opacity": 0.14, "height": {"band": 0.86}, "clip": True},
         "encoding": {"x": x | {"field": "b"}, "x2": {"datum": domain[0]}, "y": y}},
        {**asked, "mark": {"type": "tick", "color": BAD, "thickness": 1.5, "height": {"band": 0.86}},
         "encoding": {"x": x | {"field": "b"}, "y": y}},
        {**here, "mark": {"type": "rule", "strokeWidth": 2}, "encoding": {"x": x | {"field": "low"},
         "x2": {"field": "high"}, "y": y, "color": tint, "opacity": visible()}},
        {**here, "mark": {"type": "point", "filled": True, "size": 60, "cursor": "pointer"}, "encoding": {
         "x": x | {"field": "sampled"}, "y": y, "color": tint, "opacity": visible(), "tooltip": rows}},
        {**here, "mark": {"type": "point", "shape": "diamond", "size": 60, "filled": True, "strokeWidth": 1.4,
         "fill": PAPER, "yOffset": -7}, "encoding": {"x": x | {"field": "exact"}, "y": y, "stroke": tint,
         "opacity": visible()}},
        {**here, "mark": cross, "encoding": {"x": x | {"field": "optimum"}, "y": y, "opacity": visible()}},
    ]  # fmt: skip


PAIRS = {
    "loss": ("loss", "loss"),
    "better": ("preferred_logp", "log-prob of the preferred response, nats"),
    "worse": ("other_logp", "log-prob of the other, nats"),
    "order": ("accuracy", "pairs in the labels' order, share"),
}  # what a method on labelled pairs logs: the key here, the key there, and the axis


def steps(group: Group) -> Figure:
    """What runs have logged over the steps: estimates against the truth, multipliers and KL; losses and pairs."""
    names = group.names
    logged = {key for run in group.runs for line in run.history for key, value in line.items() if value is not None}
    followed = [k for k, name in enumerate(names) if f"win_rate/{name}" in logged]
    panels = [_estimates(group, k) for k in followed]
    panels += [_over_steps(group, f"d{k}", f"multiplier λ, {names[k]}", "step-after", True)
               for k in range(1, len(names)) if f"dual/{names[k]}" in logged]  # fmt: skip
    if "kl" in logged:
        panels.append(_over_steps(group, "kl", "KL to the reference, nats", "linear", True))
    pairs = {short: told for short, told in PAIRS.items() if told[0] in logged}
    if followed or group.by_method:
        pairs.pop("loss", None)  # methods have each their own scale
    panels += [_over_steps(group, short, title, "linear", False) for short, (_, title) in pairs.items()]
    caption = _followed_caption(group) if followed else ""
    if pairs:
        caption += " What methods on labelled pairs log is of single batches."
    return Figure("steps", "Over the steps", caption.strip(), panels, height=200)


def _followed_caption(group: Group) -> str:
    caption = "The run's own estimate of each win rate"
    if len(group.runs) <= NAMED:
        caption += ", with its pessimistic lower bound and the threshold b."
    else:
        caption += " and the threshold b." if len(group.runs) <= MANY else "."
    found = (["the evaluated win rate with its 95 % interval"] if len(group.ended) <= NAMED else []) + (
        ["the exact one (diamond)"] if group.exact and len(group.ended) <= MANY else []
    )
    return caption + (f" At the end: {' and '.join(found)}." if found and group.ended else "")


def _estimates(group: Group, k: int) -> Spec:
    name = group.names[k]
    lines = [line for run in group.runs for line in run.history]
    secondary = any(f"threshold/{name}" in line for line in lines)
    few = len(group.runs) <= NAMED
    bounds = few and any(f"lower/{name}" in line for line in lines)
    kinds = ["estimate"]
    if len(group.names) > 1 and len(group.runs) <= MANY:
        kinds += ["lower bound", "threshold b"] if few else ["threshold b"]
    values = [line.get(f"{what}/{name}") for line in lines for what in ("win_rate", "threshold")]
    values += [line.get(f"lower/{name}") for line in lines] if bounds else []
    for run in group.ended:
        r = run.objectives[name]
        values += [r.exact, *(r.ci95 or ())]
    domain = span(_numbers(values))
    x, y = _step_axis(group), quantity(f"w{k}", f"win rate, {name}", domain)
    here: Spec = {"data": {"name": "history"}}
    line = {"x": x, "detail": {"field": "run"}, "color": colour(group)}
    layers: list[Spec] = []
    floor = _constant_floor(group, name)
    if floor is not None:
        layers.append(_shade(y=domain[0], y2=min(floor, domain[1])))
    elif len(group.runs) == 1 and secondary:
        layers.append({**here, "mark": {"type": "area", "color": BAD, "opacity": 0.13, "interpolate": "step-after"},
                       "encoding": {"x": x, "y": y | {"field": f"b{k}"}, "y2": {"datum": domain[0]}}})  # fmt: skip
    if secondary and len(group.runs) <= MANY:
        layers.append({**here, "mark": {"type": "line", "strokeWidth": 1.2, "interpolate": "step-after"},
                       "encoding": line | {"y": y | {"field": f"b{k}"}, "opacity": visible(0.8),
                                           "strokeDash": dashes(kinds, LINES, "threshold b")}})  # fmt: skip
    if bounds:
        layers.append({**here, "mark": {"type": "line", "strokeWidth": 1.2},
                       "encoding": line | {"y": y | {"field": f"l{k}"}, "opacity": visible(0.9),
                                           "strokeDash": dashes(kinds, LINES, "lower bound")}})  # fmt: skip
    layers.append({**here, "mark": {"type": "line", "strokeWidth": _weight(group)},
                   "encoding": line | {"y": y, "opacity": visible(), "tooltip": tooltip(("run", "run")),
                                       "strokeDash": dashes(kinds, LINES, "estimate")}})  # fmt: skip
    layers += _hover_points(group, x, y, ((f"w{k}", "estimate"), (f"l{k}", "lower bound"), (f"b{k}", "threshold b")))
    layers += _truth(group, k, x, y)
    return {"layer": layers}


def _truth(group: Group, k: int, x: Spec, y: Spec) -> list[Spec]:
    """What evaluation found at the last step."""
    here: Spec = {"data": {"name": "runs"}, "transform": [{"filter": f"isValid(datum.w{k}) && isValid(datum.step)"}]}
    tint = stroke(group)
    diamond = {"type": "point", "shape": "diamond", "size": 55, "filled": True, "fill": PAPER, "strokeWidth": 1.5}
    found = []
    if len(group.ended) <= NAMED:
        found.append({**here, "mark": {"type": "rule", "strokeWidth": 2}, "encoding": {"x": x, "color": tint,
                      "y": y | {"field": f"l{k}"}, "y2": {"field": f"h{k}"}, "opacity": visible(0.8)}})  # fmt: skip
    if group.exact and len(group.ended) <= MANY:
        rows = tooltip(("run", "run"), (f"e{k}", "exact", ".4f"), (f"w{k}", "sampled", ".4f"))
        found.append({**here, "mark": diamond, "encoding": {"x": x, "y": y | {"field": f"e{k}"}, "stroke": tint,
                      "opacity": visible(), "tooltip": rows}})  # fmt: skip
    return found


def _over_steps(group: Group, name: str, title: str, interpolate: str, from_zero: bool) -> Spec:
    x, y = _step_axis(group), quantity(name, title)
    y["scale"] = {"zero": from_zero, "nice": True}
    line = {"type": "line", "strokeWidth": _weight(group), "interpolate": interpolate}
    encoding = {"x": x, "y": y, "detail": {"field": "run"}, "color": colour(group),
                "opacity": visible(), "tooltip": tooltip(("run", "run"))}  # fmt: skip
    here: Spec = {"data": {"name": "history"}, "transform": [{"filter": f"isValid(datum.{name})"}]}
    return {"layer": [{**here, "mark": line, "encoding": encoding}, *_hover_points(group, x, y, ((name, title),))]}


def _hover_points(group: Group, x: Spec, y: Spec, fields: Sequence[tuple[str, str]]) -> list[Spec]:
    """Points that are seen only by the pointer, where there are few enough."""
    if len(group.runs) > NAMED:
        return []
    rows = tooltip(("run", "run"), ("step", "step"), *((name, title, ".4f") for name, title in fields))
    return [{"data": {"name": "history"}, "mark": {"type": "point", "size": 60, "opacity": 0, "filled": True},
             "encoding": {"x": x, "y": y, "tooltip": rows}}]  # fmt: skip


def _step_axis(group: Group) -> Spec:
    last = max((line["step"] for run in group.runs for line in run.history), default=1)
    return quantity("step", "step", (0, round(last * 1.03, 2) or 1), labelExpr="format(datum.value, '~s')", grid=False)


def _constant_floor(group: Group, name: str) -> float | None:
    """The threshold where it is the same in every run at every step."""
    key = f"threshold/{name}"
    found = {round(float(line[key]), 6) for run in group.runs for line in run.history if line.get(key) is not None}
    return next(iter(found)) if len(found) == 1 else None


def _weight(group: Group) -> float:
    return 2.0 if len(group.runs) <= NAMED else 1.3 if len(group.runs) <= MANY else 0.9


def _numbers(values: Sequence[Any]) -> list[float]:
    return [float(v) for v in values if isinstance(v, int | float)]


def reward(group: Group) -> Figure:
    """The primary's win rate against the KL, along the steps and at the end."""
    name = group.names[0]
    trails = len(group.runs) <= MANY
    x = quantity("kl", "KL to the reference, nats" + (" (exact)" if group.exact else ""))
    x["scale"] = {"zero": True, "nice": True}
    values: list[Any] = list(_front_span(group, 0))
    values += [line.get(f"win_rate/{name}") for run in group.runs for line in run.history] if trails else []
    y, tint = quantity("x0", win_rate_title(group, name), span(_numbers(values), 0.02)), colour(group)
    ends: Spec = {"data": {"name": "runs"}, "transform": [{"filter": "isValid(datum.x0) && isValid(datum.kl)"}]}
    layers: list[Spec] = []
    if trails:
        layers.append({"data": {"name": "history"}, "transform": [{"filter": "isValid(datum.w0)"}],
                       "mark": {"type": "line", "strokeWidth": 1.2},
                       "encoding": {"x": x, "y": y | {"field": "w0"}, "detail": {"field": "run"}, "color": tint,
                                    "order": {"field": "step", "type": "quantitative"}, "opacity": visible(0.5),
                                    "tooltip": tooltip(("run", "run"))}})  # fmt: skip
    layers.append({**ends, "mark": {"type": "rule", "strokeWidth": 1.2},
                   "encoding": {"x": x, "y": y | {"field": "l0"}, "y2": {"field": "h0"}, "color": tint,
                                "strokeOpacity": visible(_faintness(group))}})  # fmt: skip
    if group.exact and len(group.ended) <= MANY:
        cross = {"type": "point", "shape": "M-1,-1L1,1M-1,1L1,-1", "size": 30, "filled": False, "strokeWidth": 1.6}
        layers.append({**ends, "mark": cross, "encoding": {"x": x | {"field": "okl"}, "y": y | {"field": "o0"},
                       "color": tint, "opacity": visible()}})  # fmt: skip
    layers.append({**ends, "mark": {"type": "point", "filled": True, "size": 75 if trails else 36, "cursor": "pointer"},
                   "encoding": {"x": x, "y": y, "color": tint, "shape": shape(group), "opacity": visible(),
                                "tooltip": run_tooltip(group)}})  # fmt: skip
    caption = f"What {name} gained for how far the policy moved. Markers: at the end, with 95 % intervals."
    estimated = any(line.get(f"win_rate/{name}") is not None for run in group.runs for line in run.history)
    caption += " Thin lines: the run's own estimates on its way." if trails and estimated else ""
    crosses = group.exact and len(group.ended) <= MANY and any(_aimed(run) for run in group.ended)
    caption += " Crosses: the exact optima." if crosses else ""
    return Figure("reward_kl", "Reward against KL", caption, [{"layer": layers, "wide": True}], height=300, columns=1)


def heat(group: Group) -> Figure:
    """Win rate, margins over the thresholds, and KL over the plane of two settings; means where runs share a cell."""
    axes = plane(group)
    assert axes is not None
    (across, columns), (down, rows) = (list(group.settings.items())[i] for i in axes)
    names = group.names
    numbers = [("x0", win_rate_title(group, names[0]), list(group.points()[:, 0]), False)]
    for k, name in enumerate(names[1:], 1):
        margins = [
            reached - run.objectives[name].threshold
            for run, reached in zip(group.ended, group.points()[:, k], strict=True)
            if run.objectives[name].threshold is not None
        ]
        if margins:
            numbers.append((f"m{k}", f"{name} less its threshold", margins, True))
        else:
            numbers.append((f"x{k}", win_rate_title(group, name), list(group.points()[:, k]), False))
    numbers.append(("kl", "KL, nats", _numbers([run.summary.get("kl") for run in group.ended]), False))
    scales = {
        "x": {"field": "across", "type": "nominal", "sort": columns, "axis": {"title": across, "labelAngle": 0}},
        "y": {"field": "down", "type": "nominal", "sort": rows, "axis": {"title": down}},
    }
    panels = [_cells(name, title, values, diverging, scales, max(len(columns), len(rows)))
              for name, title, values, diverging in numbers]  # fmt: skip
    caption = "Means over the runs that share a cell. Margins: blue keeps the threshold, red breaks it."
    return Figure(
        "heat",
        "Over two settings",
        caption,
        panels,
        (),
        height=230,
        columns=3 if len(panels) % 4 else 4 if len(columns) <= 4 else 2,
    )


def _cells(name: str, title: str, values: Sequence[float], diverging: bool, axes: Spec, most: int) -> Spec:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    edge = max(abs(low), abs(high)) or 1.0
    scale = {"scheme": "redblue", "domain": [-edge, edge]} if diverging else {"scheme": "viridis"}
    mean = f"datum['mean_{name}']"
    bright = f"abs({mean}) < {0.6 * edge}" if diverging else f"{mean} > {low + 0.62 * (high - low)}"
    ink = {"condition": {"test": bright, "value": "#111111"}, "value": "#ffffff"}
    number = {"aggregate": "mean", "field": name, "type": "quantitative"}
    here: Spec = {"data": {"name": "runs"}, "transform": [{"filter": f"isValid(datum.{name})"}]}
    text = {**number, "format": "+.3f" if diverging else ".3f"}
    rows = [
        {"field": "across", "title": axes["x"]["axis"]["title"]},
        {"field": "down", "title": axes["y"]["axis"]["title"]},
        {**number, "title": title, "format": ".4f"},
        {"aggregate": "count", "title": "runs"},
    ]
    layers: list[Spec] = [{**here, "mark": {"type": "rect", "stroke": PAPER, "strokeWidth": 2}, "encoding": {
                           **axes, "color": {**number, "scale": scale, "legend": None}, "tooltip": rows}}]  # fmt: skip
    if most <= 8:
        layers.append({**here, "mark": {"type": "text", "fontSize": 11},
                       "encoding": {**axes, "text": text, "color": ink}})  # fmt: skip
    return {"title": {"text": title, "fontSize": 12, "fontWeight": "normal"}, "layer": layers}


# --------------------------------------------------------------------------------------------- files


def composed(figure: Figure, data: Mapping[str, Any], width: int = 300) -> Spec:
    """The whole figure for a file, in light colours."""
    columns = min(figure.columns, len(figure.panels))
    width = min(width, 960 // columns)
    spec: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "config": CONFIG | {"background": "white", "font": FILE_FONT},
        "params": [{"name": "chosen", "value": []}],
        "datasets": {name: rows for name, rows in data.items() if f'"{name}"' in json.dumps(figure.panels)},
        "padding": 10,
        "spacing": 28,
        "columns": columns,
        "concat": [sized(panel, figure, width) for panel in figure.panels],
        "resolve": {"scale": {name: "shared" if name in figure.shared else "independent" for name in
                              ("color", "shape", "strokeDash", "stroke", "fill")}},
    }  # fmt: skip
    return json.loads(re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found.group(1)], json.dumps(spec)))


def sized(panel: Spec, figure: Figure, width: int) -> Spec:
    """A panel with its size; `wide`, `rows` and `labels` are ours."""
    height = figure.height or max(28 * panel["rows"], 60)
    own = {key: value for key, value in panel.items() if key not in ("wide", "rows", "labels")}
    return own | {"width": int(width * 1.8) if panel.get("wide") else width, "height": height}
