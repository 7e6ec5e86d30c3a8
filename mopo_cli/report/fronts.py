"""Charts of where runs end: fronts, parallel coordinates, win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mopo_cli.maths import pareto
from mopo_cli.report.groups import Figure, Group, _aimed, exact_front
from mopo_cli.report.marks import (
    _asked,
    _common_floor,
    _faintness,
    _floors,
    _front_span,
    _shade,
    colour,
    dashes,
    quantity,
    run_tooltip,
    shape,
    span,
    stroke,
    tooltip,
    visible,
    win_rate_title,
)
from mopo_cli.report.theme import BAD, COLOURS, INK, MANY, PAPER, SOFT, STAR, Spec

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
