"""Charts of how runs went: series over steps, reward against KL, a heat map of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import altair as alt
import numpy as np

from mopo_cli.report import marks
from mopo_cli.report.groups import PAIRS, Figure, Group, Panel, aimed, plane
from mopo_cli.report.marks import number, rows_of, shade, tooltip, visible
from mopo_cli.report.theme import BAD, COLOURS, DASHED, DOTTED, MANY, NAMED, PAPER, SOLID

ESTIMATE, LOWER, BOUND = "estimate", "lower bound", "threshold b"
LINES = {ESTIMATE: SOLID, LOWER: DOTTED, BOUND: DASHED}


def steps(group: Group) -> Figure:
    """What runs have logged over the steps: estimates against the truth, multipliers and KL; losses and pairs."""
    names = group.names
    logged = {key for run in group.runs for line in run.history for key, value in line.items() if value is not None}
    followed = [k for k, name in enumerate(names) if f"win_rate/{name}" in logged]
    panels = [_estimates(group, k) for k in followed]
    panels += [_series(group, f"d{k}", f"multiplier λ, {names[k]}", marks.objective_colour(k), interpolate="step-after")
               for k in range(1, len(names)) if f"dual/{names[k]}" in logged]  # fmt: skip
    if "kl" in logged:
        panels.append(_series(group, "kl", "KL to the reference, nats"))
    pairs = {short: (key, title) for short, (key, title) in PAIRS.items() if key in logged}
    if followed or group.by_algorithm:
        pairs.pop("loss", None)  # algorithms have each their own scale
    panels += [_batches(group, short, title) for short, (_, title) in pairs.items()]
    caption = _followed_caption(group) if followed else ""
    if pairs:
        faint = " (faint), with" if len(group.runs) <= NAMED else ":"
        caption += f" What methods on labelled pairs log is of single batches{faint} its running mean."
    name = "training" if len(group.runs) == 1 else "trajectories"
    beside = 4 if len(panels) == 4 else 3
    return Figure(name, "Over the steps", caption.strip(), [Panel(p) for p in panels], height=200, columns=beside)


def _followed_caption(group: Group) -> str:
    caption = "The run's own estimate of each win rate"
    if len(group.runs) <= NAMED:
        caption += ", with its pessimistic lower bound and the threshold b."
    else:
        caption += " and the threshold b." if len(group.runs) <= MANY else "."
    ends = ["the evaluated win rate with its 95 % interval"] if len(group.ended) <= NAMED else []
    ends += ["the exact one (diamond)"] if group.exact and len(group.ended) <= MANY else []
    return caption + (f" At the end: {' and '.join(ends)}." if ends and group.ended else "")


def _estimates(group: Group, k: int) -> alt.LayerChart:
    """An objective's estimate, lower bound and threshold over the steps, and what evaluation found in the end."""
    name = group.names[k]
    lines = [line for run in group.runs for line in run.history]
    secondary = any(f"threshold/{name}" in line for line in lines)
    few, many = len(group.runs) <= NAMED, len(group.runs) > MANY
    bounds = few and any(f"lower/{name}" in line for line in lines)
    drawn = (
        {ESTIMATE, *([BOUND] if not many else []), *([LOWER] if few else [])} if len(group.names) > 1 else {ESTIMATE}
    )
    kinds = {kind: style for kind, style in LINES.items() if kind in drawn}
    logged = [line.get(f"{what}/{name}") for line in lines for what in ("win_rate", "threshold", "lower")[: 2 + bounds]]
    ends = [v for run in group.ended for v in (run.objectives[name].exact, *(run.objectives[name].ci95 or ()))]
    span = marks.span_of([v for v in [*logged, *ends] if isinstance(v, int | float)])
    x, y = _step_axis(group), number(alt.Y, f"w{k}", f"win rate, {name}", span)
    tint = _tint(group, marks.objective_colour(k))
    runs = rows_of("history").encode(x, y, alt.Detail("run:N"), tint)
    bound = runs.encode(alt.Y(f"b{k}:Q"))
    layers: list[alt.Chart] = []
    floor = _constant_floor(group, name)
    if floor is not None:
        layers.append(shade(y=span[0], y2=min(floor, span[1])))
    elif len(group.runs) == 1 and secondary:
        area = rows_of("history").mark_area(color=BAD, opacity=marks.FAINT, interpolate="step-after")
        layers.append(area.encode(x, alt.Y(f"b{k}:Q"), alt.Y2Datum(span[0])))
    if secondary and not many:
        line = bound.mark_line(strokeWidth=1.2, interpolate="step-after")
        layers.append(line.encode(visible(0.8), marks.dash(kinds, BOUND)))
    if bounds:
        line = runs.mark_line(strokeWidth=1.2)
        layers.append(line.encode(alt.Y(f"l{k}:Q"), visible(0.9), marks.dash(kinds, LOWER)))
    line = runs.mark_line(strokeWidth=marks.line_width(group))
    layers.append(line.encode(visible(), marks.dash(kinds, ESTIMATE), tooltip=tooltip(("run", "run"))))
    layers += _hover(group, x, y, {f"w{k}": ESTIMATE, f"l{k}": LOWER, f"b{k}": BOUND})
    return marks.layered(*layers, *_truth(group, k, x, y))


def _tint(group: Group, lone: str, channel: Any = alt.Color) -> Any:
    """The colours of runs; of the only one, that of what is shown."""
    value = {alt.Color: alt.ColorValue, alt.Stroke: alt.StrokeValue}[channel]
    return value(lone) if len(group.runs) == 1 else marks.colour(group, channel)


def _truth(group: Group, k: int, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """What evaluation found at the last step."""
    runs = rows_of("runs", f"w{k}", "step").encode(x, y)
    colour = marks.objective_colour(k)
    layers = []
    if len(group.ended) <= NAMED:
        bar = runs.mark_rule(strokeWidth=2).encode(_tint(group, colour), visible(0.8))
        layers.append(bar.encode(alt.Y(f"l{k}:Q"), alt.Y2(f"h{k}")))
    if group.exact and len(group.ended) <= MANY:
        tips = tooltip(("run", "run"), (f"e{k}", "exact", ".4f"), (f"w{k}", "sampled", ".4f"))
        exact = marks.exact_points(runs.encode(alt.Y(f"e{k}:Q"), tooltip=tips))
        tint = alt.StrokeValue(colour) if len(group.runs) == 1 else marks.colour(group, alt.Stroke, legend=False)
        layers.append(exact.encode(tint))
    return layers


def _series(group: Group, key: str, title: str, lone: str = COLOURS[6], **mark: Any) -> alt.LayerChart:
    """A number over the steps, from zero."""
    x, y = _step_axis(group), number(alt.Y, key, title, zero=True)
    line = rows_of("history", key).mark_line(strokeWidth=marks.line_width(group), **mark)
    tips = tooltip(("run", "run"))
    return marks.layered(line.encode(x, y, alt.Detail("run:N"), _tint(group, lone), visible(), tooltip=tips),
                     *_hover(group, x, y, {key: title}))  # fmt: skip


def _batches(group: Group, key: str, title: str) -> alt.LayerChart:
    """A number of single batches over the steps: as it is where runs are few, and its mean over a tenth of them."""
    x, y = _step_axis(group), number(alt.Y, key, title)
    half = max((len(run.history) for run in group.runs), default=0) // 20
    runs = rows_of("history", key).encode(x, y, alt.Detail("run:N"), _tint(group, COLOURS[0]))
    mean = runs.transform_window([{"op": "mean", "field": key, "as": "mean"}], frame=[-half, half], groupby=["run"],
                                 sort=[{"field": "step"}])  # fmt: skip
    smooth = mean.mark_line(strokeWidth=marks.line_width(group)).encode(number(alt.Y, "mean", title), visible())
    raw = [runs.mark_line(strokeWidth=0.8).encode(visible(0.35))] if len(group.runs) <= NAMED else []
    return marks.layered(*raw, smooth.encode(tooltip=tooltip(("run", "run"))), *_hover(group, x, y, {key: title}))


def _hover(group: Group, x: alt.X, y: alt.Y, fields: Mapping[str, str]) -> list[alt.Chart]:
    """Points that are seen only by the pointer, where there are few enough."""
    if len(group.runs) > NAMED:
        return []
    tips = tooltip(("run", "run"), ("step", "step"), *((name, title, ".4f") for name, title in fields.items()))
    return [rows_of("history").mark_point(size=60, opacity=0, filled=True).encode(x, y, tooltip=tips)]


def _step_axis(group: Group) -> alt.X:
    last = max((line["step"] for run in group.runs for line in run.history), default=1)
    span = (0, round(last * 1.03, 2) or 1)
    return number(alt.X, "step", "step", span, labelExpr="format(datum.value, '~s')", grid=False)


def _constant_floor(group: Group, name: str) -> float | None:
    """The threshold where it is the same in every run at every step."""
    key = f"threshold/{name}"
    floors = {round(float(line[key]), 6) for run in group.runs for line in run.history if line.get(key) is not None}
    return next(iter(floors)) if len(floors) == 1 else None


def reward(group: Group) -> Figure:
    """The primary's win rate against the KL, along the steps and at the end."""
    name, few = group.names[0], len(group.runs) <= MANY
    estimates = [line.get(f"win_rate/{name}") for run in group.runs for line in run.history] if few else []
    estimates = [v for v in estimates if isinstance(v, int | float) and isfinite(v)]
    span = marks.span_of([*marks.front_span(group, 0), *estimates], 0.02)
    x = number(alt.X, "kl", "KL to the reference, nats" + (" (exact)" if group.exact else ""), zero=True)
    y = number(alt.Y, "x0", marks.win_rate_title(group, 0), span)
    tint = marks.colour(group)
    ends = rows_of("runs", "x0", "kl").encode(x, y, tint)
    layers: list[alt.Chart] = []
    if estimates:
        trail = rows_of("history", "w0").mark_line(strokeWidth=1.2).encode(x, y, tint, visible(0.5))
        layers.append(trail.encode(alt.Y("w0:Q"), alt.Detail("run:N"), alt.Order("step:Q"),
                                   tooltip=tooltip(("run", "run"))))  # fmt: skip
    bar = ends.mark_rule(strokeWidth=1.2).encode(visible(marks.bar_opacity(group), alt.StrokeOpacityValue))
    layers.append(bar.encode(alt.Y("l0:Q"), alt.Y2("h0")))
    optima = group.exact and len(group.ended) <= MANY and any(map(aimed, group.ended))
    if optima:
        layers.append(marks.optimum_points(ends.encode(alt.X("okl:Q"), alt.Y("o0:Q"))))
    layers.append(marks.reached(group, ends))
    caption = f"What {name} gained for how far the policy moved. Markers: at the end, with 95 % intervals."
    caption += " Thin lines: the run's own estimates on its way." if estimates else ""
    caption += " Crosses: the exact optima." if optima else ""
    panels = [Panel(marks.layered(*layers), wide=True)]
    return Figure("reward_kl", "Reward against KL", caption, panels, height=300, columns=1)


def heat(group: Group) -> Figure:
    """Win rate, margins over the thresholds, and KL over the plane of two settings; means where runs share a cell."""
    axes = plane(group)
    assert axes is not None
    (across, columns), (down, options) = (list(group.settings.items())[i] for i in axes)
    x = alt.X("across:N", sort=columns, axis=alt.Axis(title=across, labelAngle=0))
    y = alt.Y("down:N", sort=options, axis=alt.Axis(title=down))
    kl = [float(run.summary["kl"]) for run in group.ended if run.summary.get("kl") is not None]
    cells = [_cells(*cell, x, y, max(len(columns), len(options)) <= 8)
             for cell in (*_mapped(group), ("kl", "KL, nats", kl, False))]  # fmt: skip
    caption = "Means over the runs that share a cell. Margins: blue keeps the threshold, red breaks it."
    beside = 3 if len(cells) % 4 else 4 if len(columns) <= 4 else 2
    return Figure("stability", "Over two settings", caption, [Panel(c) for c in cells], (), height=230, columns=beside)


def _mapped(group: Group) -> list[tuple[str, str, list[float], bool]]:
    """Of each objective the field, title and values that are mapped, and whether they are margins over a threshold."""
    mapped = []
    for k, name in enumerate(group.names):
        values = group.points()[:, k].tolist()
        floors = [run.objectives[name].threshold for run in group.ended]
        margins = [value - b for value, b in zip(values, floors, strict=True) if b is not None] if k else []
        mapped.append((f"m{k}", f"{name} less its threshold", margins, True) if margins else
                      (f"x{k}", marks.win_rate_title(group, k), values, False))  # fmt: skip
    return mapped


def _cells(
    key: str, title: str, values: Sequence[float], diverging: bool, x: alt.X, y: alt.Y, named: bool
) -> alt.LayerChart:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    edge = float(np.abs([low, high]).max()) or 1.0
    scale = alt.Scale(scheme="redblue", domain=[-edge, edge]) if diverging else alt.Scale(scheme="viridis")
    mean, cell = f"mean({key}):Q", f"datum['mean_{key}']"
    bright = f"abs({cell}) < {0.6 * edge}" if diverging else f"{cell} > {low + 0.62 * (high - low)}"
    tips = [alt.Tooltip("across:N", title=x["axis"]["title"]), alt.Tooltip("down:N", title=y["axis"]["title"]),
            alt.Tooltip(mean, title=title, format=".4f"), alt.Tooltip("count():Q", title="runs")]  # fmt: skip
    runs = rows_of("runs", key).encode(x, y)
    squares = runs.mark_rect(stroke=PAPER, strokeWidth=2)
    layers = [squares.encode(alt.Color(mean, scale=scale, legend=None), tooltip=tips)]
    if named:
        ink = alt.ColorValue("#ffffff", condition={"test": bright, "value": "#111111"})
        layers.append(runs.mark_text(fontSize=11).encode(alt.Text(mean, format="+.3f" if diverging else ".3f"), ink))
    return marks.layered(*layers, title=alt.TitleParams(title, fontSize=12, fontWeight="normal"))
