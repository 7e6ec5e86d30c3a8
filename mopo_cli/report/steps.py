"""Charts of how runs went: series over steps, reward against KL, a heat map of settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mopo_cli.report.groups import PAIRS, Figure, Group, _aimed, plane
from mopo_cli.report.marks import (
    _faintness,
    _front_span,
    _numbers,
    _shade,
    _weight,
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
from mopo_cli.report.theme import BAD, LINES, MANY, NAMED, PAPER, Spec


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
