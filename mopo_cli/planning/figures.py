"""Figures of `mopo plan` and `mopo synthetic`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np

from mopo_cli.report import theme
from mopo_cli.report.marks import layered, number, rows

if TYPE_CHECKING:
    from mopo_cli.planning.attainable import PairFront, Plan
    from mopo_cli.planning.tabular import Problem, StructureResult

PREDICTED, EXACT, ASKED = "predicted front, with its 95 % band", "exact front", "threshold asked"
LAMBDA = "optima of (P) as λ moves"
LINES = {
    PREDICTED: (theme.COLOURS[0], theme.SOLID),
    EXACT: (theme.INK, theme.SOLID),
    ASKED: (theme.BAD, theme.DASHED),
    LAMBDA: (theme.SOFT, theme.DASHED),
}
BEST, SCHEDULED = "optimum at b", "reached on the schedule, by β"
REACHED = {
    BEST: (theme.SOFT, theme.OPTIMUM["shape"]),
    "reached, exact preferences": (theme.COLOURS[0], theme.SHAPES[0]),
    "reached, sampled preferences": (theme.COLOURS[1], theme.SHAPES[2]),
    SCHEDULED: (theme.COLOURS[2], theme.SHAPES[1]),
}


def _kind(kinds: Sequence[str], kind: str) -> alt.StrokeDatum:
    """A line's colour by what it is, with a legend of what the figure has."""
    scale = alt.Scale(domain=list(kinds), range=[LINES[kind][0] for kind in kinds])
    legend = alt.Legend(title=None, symbolType="stroke", symbolSize=300, symbolStrokeWidth=2)
    return alt.StrokeDatum(kind, type="nominal", scale=scale, legend=legend)


def _places(points: Any) -> list[dict[str, float]]:
    """(n, 2) points as rows that keep their order."""
    return [{"x": x, "y": y, "i": i} for i, (x, y) in enumerate(np.asarray(points).tolist())]


def _line(points: Any, kinds: Sequence[str], kind: str, **mark: Any) -> alt.Chart:
    line = rows(*_places(points)).mark_line(strokeWidth=1.6, strokeDash=LINES[kind][1], **mark)
    return line.encode(alt.X("x:Q"), alt.Y("y:Q"), alt.Order("i:Q"), _kind(kinds, kind))


# --------------------------------------------------------------------------------------------- mopo synthetic
def draw_structure(name: str, problems: Sequence[Problem], records: Sequence[StructureResult], path: Path) -> Path:
    """One figure a structure: exact front, regularised front, and what the first recipe reached; a panel for each K."""
    with theme.drawing():
        panels = []
        for problem in problems:
            size = problem.optima.shape[1]
            draw = _plane if size == 2 else _projection
            panel = draw(problem, _first_recipes([r for r in records if size == r.K]))
            panels.append(panel.properties(width=360, height=300, title=f"{name.replace('_', ' ')}, K = {size}"))
        spec = theme.spec_of(alt.concat(*panels, columns=3, spacing=40))
    return theme.save(spec, path)[0]


def _first_recipes(records: Sequence[StructureResult]) -> list[StructureResult]:
    """The first recipe's records: one for each kind of preferences, and those on the schedule."""
    first: dict[tuple[str, bool], StructureResult] = {}
    for record in records:
        first.setdefault((record.preferences, record.beta is not None), record)
    return list(first.values())


def _plane(problem: Problem, records: Sequence[StructureResult]) -> alt.LayerChart:
    """Two objectives: the secondary's win rate against the primary's."""
    kinds = (EXACT, LAMBDA)
    front = problem.front[np.argsort(problem.front[:, 1])]
    lines = layered(
        _line(front[:, [1, 0]], kinds, EXACT, point={"color": theme.INK, "size": 25}),
        _line(problem.regularised[:, [1, 0]], kinds, LAMBDA),
    )
    points = _reached(problem, records, 1, 0, "win rate, secondary", "win rate, primary")
    return layered(lines, points)


def _projection(problem: Problem, records: Sequence[StructureResult]) -> alt.LayerChart:
    """Three objectives or more: the first two secondaries, over what is left for the primary at those thresholds."""
    title = "primary's win rate at the optimum of (P)"
    legend = alt.Legend(title=title, titleOrient="top", titleLimit=400, gradientLength=240)
    shade = alt.Fill("primary:Q", scale=alt.Scale(range=["#f1f1f1", "#8c8c8c"]), legend=legend)
    ground = rows(*_surface(problem.regularised)).mark_rect().encode(
        alt.X("x:Q"), alt.X2("x2"), alt.Y("y:Q"), alt.Y2("y2"), shade
    )  # fmt: skip
    points = _reached(problem, records, 1, 2, "win rate, first secondary", "win rate, second secondary")
    return layered(ground, points)


def _surface(optima: np.ndarray, cells: int = 96) -> list[dict[str, float]]:
    """The primary's win rate between the optima (C, K), on a grid over the first two secondaries."""
    from scipy.interpolate import LinearNDInterpolator

    low, high = optima[:, 1:3].min(0), optima[:, 1:3].max(0)
    edges = np.linspace(low, high, cells + 1)  # (cells + 1, 2)
    step = edges[1] - edges[0]
    value = LinearNDInterpolator(optima[:, 1:3], optima[:, 0], rescale=True)
    xs, ys = np.meshgrid(edges[:-1, 0], edges[:-1, 1])
    primary = value(xs + step[0] / 2, ys + step[1] / 2)
    inside = ~np.isnan(primary)
    right, top = xs + 1.1 * step[0], ys + 1.1 * step[1]  # a little over their neighbours, so that no seam shows
    columns = (grid[inside] for grid in (xs, right, ys, top, primary))
    return [dict(zip(("x", "x2", "y", "y2", "primary"), row, strict=True))
            for row in zip(*(column.round(5).tolist() for column in columns), strict=True)]  # fmt: skip


def _reached(
    problem: Problem, records: Sequence[StructureResult], x: int, y: int, across: str, up: str
) -> alt.LayerChart:
    """The optimum at each threshold and what records reached; those on the schedule with their β."""
    points = [row | {"series": BEST} for row in _places(problem.optima[:, [x, y]])]
    betas: list[dict[str, Any]] = []
    for record in records:
        places = np.array(record.reached)[:, [x, y]]
        series = SCHEDULED if record.beta is not None else f"reached, {record.preferences} preferences"
        points += [row | {"series": series} for row in _places(places)]
        for at, together in _together(record.beta or [], places):
            betas.append({"x": at[0], "y": at[1], "text": ", ".join(f"{beta:g}" for beta in together)})
    shown = [series for series in REACHED if any(row["series"] == series for row in points)]
    colours, shapes = (alt.Scale(domain=list(REACHED), range=[look[i] for look in REACHED.values()]) for i in (0, 1))
    legend = alt.Legend(title=None, values=shown, symbolOpacity=1, columns=2, symbolStrokeWidth=1.6)
    chart = rows(*points).mark_point(size=50, opacity=1, strokeWidth=1.6).encode(
        number(alt.X, "x", across, padding=20), number(alt.Y, "y", up, padding=10),
        alt.Color("series:N", scale=colours, legend=legend), alt.Shape("series:N", scale=shapes, legend=legend),
    )  # fmt: skip
    labels = rows(*betas).mark_text(color=REACHED[SCHEDULED][0], fontSize=10, fontWeight=600, align="left", dx=6, dy=-8)
    return layered(chart, labels.encode(alt.X("x:Q"), alt.Y("y:Q"), alt.Text("text:N")))


def _together(betas: Sequence[float], points: np.ndarray) -> list[tuple[tuple[float, float], list[float]]]:
    """Betas by the point they reached; those that a reader could not tell apart share one."""
    groups: list[tuple[tuple[float, float], list[float]]] = []
    for beta, (x, y) in zip(betas, points.tolist(), strict=False):
        near = next((group for at, group in groups if abs(at[0] - x) < 0.01 and abs(at[1] - y) < 0.01), None)
        if near is None:
            groups.append(((x, y), [beta]))
        else:
            near.append(beta)
    return groups


# --------------------------------------------------------------------------------------------- mopo plan
def draw_plan(plan: Plan, path: Path) -> Path:
    """The predicted front of each pair of objectives, with its band, and the exact one where it is known."""
    exact = any(front.exact_front is not None for front in plan.pairs)
    bounded = any(plan.objectives[front.secondary].threshold is not None for front in plan.pairs)
    kinds = [PREDICTED, *([EXACT] if exact else []), *([ASKED] if bounded else [])]
    with theme.drawing():
        panels = [_pair(front, plan, kinds) for front in plan.pairs]
        spec: theme.Spec = theme.spec_of(alt.concat(*panels, columns=3, spacing=30))
    return theme.save(spec | {"title": theme.below("Star: the reference.", 300)}, path)[0]


def _pair(front: PairFront, plan: Plan, kinds: Sequence[str]) -> alt.LayerChart:
    points = [{"x": p.threshold, "y": p.win_rate, "low": p.win_rate - p.ci95, "high": p.win_rate + p.ci95}
              for p in front.points]  # fmt: skip
    predicted = rows(*points).encode(
        number(alt.X, "x", f"win rate, {front.secondary}", padding=10),
        number(alt.Y, "y", f"win rate, {front.primary}", padding=10),
    )
    colour = _kind(kinds, PREDICTED)
    layers = [
        predicted.mark_area(color=theme.COLOURS[0], opacity=0.2).encode(alt.Y("low:Q"), alt.Y2("high")),
        predicted.mark_line(point={"color": theme.COLOURS[0], "size": 30}, strokeWidth=1.6).encode(colour),
    ]
    if front.exact_front is not None:
        exact = np.array(front.exact_front)
        across = [row["x"] for row in points]
        inside = (exact[:, 0] >= min(across) - 0.02) & (exact[:, 0] <= max(across) + 0.02)
        layers.append(_line(exact[inside], kinds, EXACT))
    first, second = plan.objectives[front.primary], plan.objectives[front.secondary]
    if second.threshold is not None:
        rule = rows({}).mark_rule(strokeWidth=1.4, strokeDash=theme.DASHED)
        layers.append(rule.encode(alt.XDatum(second.threshold), _kind(kinds, ASKED)))
    start = rows({"x": second.reference, "y": first.reference}).mark_point(**theme.REFERENCE)
    layers.append(start.encode(alt.X("x:Q"), alt.Y("y:Q")))
    return layered(*layers).properties(width=290, height=250)
