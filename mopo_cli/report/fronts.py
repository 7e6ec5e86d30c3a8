"""Charts of where runs end: fronts, parallel coordinates, win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import altair as alt
import numpy as np

from mopo_cli.maths import pareto
from mopo_cli.report import marks
from mopo_cli.report.groups import Figure, Group, Panel, aimed, exact_front
from mopo_cli.report.marks import number, rows, rows_of, shade, tooltip, visible
from mopo_cli.report.theme import BAD, DASHED, DOTTED, INK, MANY, PAPER, REFERENCE, SAMPLED, SOFT, SOLID

EDGE, ASKED, AIM = "exact front", "threshold", "to the optimum of (P)"
LINES = {EDGE: SOLID, ASKED: DASHED, AIM: DOTTED}
Edge = list[dict[str, float]]
Spans = tuple[tuple[float, float], tuple[float, float]]  # of x and y
ROOM = 0.01  # of win rate, beyond the front


def fronts(group: Group) -> Figure:
    """Each pair of objectives, a point a run."""
    pairs = list(combinations(range(len(group.names)), 2))
    front = exact_front(group)
    spans = [(marks.front_span(group, j), marks.front_span(group, i)) for i, j in pairs]
    edges: list[Edge] = [[] for _ in pairs]
    if front is not None:
        edges = [_edge(front[:, [j, i]], *span) for (i, j), span in zip(pairs, spans, strict=True)]
        spans = [_with_edge(span, edge) for span, edge in zip(spans, edges, strict=True)]
    links = group.exact and len(group.ended) <= MANY and any(map(aimed, group.ended))
    shown = {EDGE: any(edges), ASKED: any(marks.thresholds(group, name) for name in group.names), AIM: links}
    lines = {kind: style for kind, style in LINES.items() if shown[kind]}
    drawn = zip(pairs, spans, edges, strict=True)
    panels = [Panel(_pair(group, j, i, span, edge, lines)) for (i, j), span, edge in drawn]
    caption = " ".join(_sentences(group, links, any(edges)))
    return Figure("pareto", "Pareto fronts", caption, panels, ("fill", "shape", "strokeDash"), height=280)


def _joined(group: Group) -> bool:
    """Whether lines join each method's filled runs."""
    return group.by_algorithm and len(group.names) == 2 and not group.differing


def _sentences(group: Group, links: bool, edged: bool) -> list[str]:
    """The caption of the fronts, sentence by sentence."""
    sentences = [
        "Markers are exact win rates; bars are the 95 % intervals of the sampled ones."
        if group.exact
        else "Markers are win rates on sampled responses; bars are their 95 % intervals."
    ]
    if any(marks.common_floor(group, name) is not None for name in group.names):
        sentences.append("Shaded: below every threshold that was asked.")
    if len(group.ended) > 1 and not group.differing:
        which = "no other run of its method" if group.by_algorithm else "no other run"
        sentences.append(f"Filled: {which} is at least as good in every objective and better in one; hollow: one is.")
    if _joined(group):
        sentences.append("Lines join each method's filled runs.")
    if links:
        sentences.append("Crosses: the exact optimum at a run's thresholds and τ.")
    if group.exact:
        sentences.append("Star: the reference model.")
    if edged:
        alone = ", for these two objectives alone." if len(group.names) > 2 else "."
        sentences.append(f"The exact front is that of all policies whatever their KL{alone}")
    return sentences


def _pair(
    group: Group, across: int, up: int, ranges: Spans, edge: Edge, lines: Mapping[str, list[float]]
) -> alt.LayerChart:
    x = number(alt.X, f"x{across}", marks.win_rate_title(group, across), ranges[0])
    y = number(alt.Y, f"x{up}", marks.win_rate_title(group, up), ranges[1])
    layers: list[alt.Chart] = []
    for k, side, (low, high) in ((across, "x", ranges[0]), (up, "y", ranges[1])):
        floor = marks.common_floor(group, group.names[k])
        if floor is not None and floor > low:
            layers.append(shade(**{side: low, f"{side}2": min(floor, high)}))
    for k, place in ((across, alt.XDatum), (up, alt.YDatum)):
        for b in marks.thresholds(group, group.names[k])[:6]:
            rule = rows({}).mark_rule(color=BAD, opacity=0.75)
            layers.append(rule.encode(place(b), strokeDash=marks.dash(lines, ASKED)))
    if edge:
        line = rows(*edge).mark_line(color=INK, strokeWidth=1.4)
        layers.append(line.encode(alt.X("x:Q"), alt.Y("y:Q"), strokeDash=marks.dash(lines, EDGE)))
    tint, bars = marks.colour(group, legend=False), visible(marks.bar_opacity(group), alt.StrokeOpacityValue)
    runs = rows_of("runs", f"x{across}", f"x{up}").encode(x, y)
    tinted = runs.encode(tint)
    if AIM in lines:
        optima = rows_of("runs", f"o{across}", f"o{up}").encode(x, y, tint)
        target = alt.X2(f"o{across}"), alt.Y2(f"o{up}")
        layers.append(optima.mark_rule().encode(*target, visible(0.9), marks.dash(lines, AIM)))
        layers.append(marks.optimum_points(optima.encode(alt.X(f"o{across}:Q"), alt.Y(f"o{up}:Q"))))
    if _joined(group):
        best = rows_of("runs").transform_filter("datum.front").encode(x, y, tint)
        layers.append(best.mark_line(strokeWidth=1.2, opacity=0.75).encode(alt.Order(f"x{across}:Q")))
    layers += [
        tinted.mark_rule(strokeWidth=1.2).encode(alt.X(f"l{across}:Q"), alt.X2(f"h{across}"), bars),
        tinted.mark_rule(strokeWidth=1.2).encode(alt.Y(f"l{up}:Q"), alt.Y2(f"h{up}"), bars),
        marks.reached(group, runs.encode(
            marks.colour(group, alt.Stroke, legend=False),
            alt.FillValue(PAPER, condition=marks.colour(group, alt.Fill).to_dict() | {"test": "datum.front"}),
        )),
    ]  # fmt: skip
    return marks.layered(*layers, *_reference(group, across, up))


def _edge(points: np.ndarray, across: Sequence[float], up: Sequence[float]) -> Edge:
    """The upper right edge of what mixtures of (m, 2) points reach, where it lies above and right of the least of these
    ranges."""
    corners = pareto.upper_edge(points)
    fine = np.linspace(across[0], max(across[0], corners[-1, 0]), 120)
    height = np.interp(fine, corners[:, 0], corners[:, 1], left=corners[0, 1], right=np.nan)
    places = zip(fine.tolist(), height.tolist(), strict=True)
    return [{"x": round(x, 5), "y": round(y, 5)} for x, y in places if y >= up[0]]


def _with_edge(spans: Spans, edge: Edge) -> Spans:
    """The ranges of a panel that shows its runs and the front."""
    across, up = (
        (low, max([high, *(place[axis] for place in edge)])) for axis, (low, high) in zip("xy", spans, strict=True)
    )
    return (across[0], round(across[1] + ROOM, 4)), (up[0], round(up[1] + ROOM, 4))


def _reference(group: Group, across: int, up: int) -> list[alt.Chart]:
    """Where the runs started from, once, where all started from the same policy; named in the first panel alone."""
    starts = {tuple(run.objectives[group.names[k]].reference for k in (across, up)) for run in group.ended}
    if not group.exact or len(starts) != 1 or None in next(iter(starts)):
        return []
    x, y = next(iter(starts))
    start = rows({"x": x, "y": y}).encode(alt.X("x:Q"), alt.Y("y:Q"))
    text = start.mark_text(text="reference", dy=15, fontSize=11, color=SOFT)
    return [start.mark_point(**REFERENCE, tooltip="the reference model"), *([text] if (up, across) == (0, 1) else [])]


def parallel(group: Group) -> Figure:
    """All objectives beside one another, a line a run."""
    floors = [(name, marks.common_floor(group, name)) for name in group.names]
    span = marks.span_of([v for k in range(len(group.names)) for v in marks.front_span(group, k)], 0.0)
    axis = alt.Axis(title=None, labelAngle=0, labelFontSize=12, labelColor=INK, grid=True)
    x = alt.X("objective:N", sort=list(group.names), axis=axis, scale=alt.Scale(padding=0.2))
    y = number(alt.Y, "value", "win rate" + (" (exact)" if group.exact else ""), span)
    runs = rows_of("reached").encode(x, y, marks.colour(group), visible())
    width = 1.6 if len(group.ended) <= MANY else 0.8
    layers = marks.layered(
        rows(*({"objective": name, "b": b} for name, b in floors if b is not None))
        .mark_bar(color=BAD, opacity=marks.FAINT, width={"band": 0.5})
        .encode(x, alt.Y("b:Q"), alt.Y2Datum(span[0])),
        runs.mark_line(strokeWidth=width).encode(alt.Detail("run:N"), tooltip=tooltip(("run", "run"))),
        runs.mark_point(**SAMPLED | {"size": 45}, cursor="pointer").encode(
            tooltip=tooltip(
                ("run", "run"), ("objective", "objective"), ("value", "win rate", ".4f"), ("b", "threshold", ".3f")
            )
        ),
    )
    caption = "Every run through all objectives. Shaded: below every threshold that was asked of the objective."
    return Figure("parallel", "All objectives together", caption, [Panel(layers, wide=True)], height=260, columns=1)


def win_rates(group: Group) -> Figure:
    """Sampled win rates with intervals, thresholds shaded, exact values and optima where they are known.

    Of one run a row an objective; of several a row a run, and a panel an objective.
    """
    alone = len(group.ended) == 1
    labels = list(group.names) if alone else [group.labels[run.id] for run in group.ended]
    spans = [marks.front_span(group, k) for k in range(len(group.names))]
    if alone:
        whole = marks.span_of([v for span in spans for v in span], 0.0)
        panels = [Panel(_forest(group, None, labels, whole), wide=True, rows=1.25 * len(labels))]
    else:
        panels = [Panel(_forest(group, k, labels, span), rows=len(labels)) for k, span in enumerate(spans)]
    sentences = ["Dots and bars: sampled win rates with 95 % intervals."]
    sentences += ["Shaded: below the threshold."] if any(marks.thresholds(group, name) for name in group.names) else []
    if group.exact:
        optima = any(map(aimed, group.ended))
        sentences += [
            "Diamonds: exact.",
            *(["Crosses: the exact optimum at these thresholds and τ."] if optima else []),
        ]
    longest = min(36, max(map(len, labels)))
    return Figure("win_rates", "Win rates", " ".join(sentences), panels, height=0, label=longest)


def _forest(group: Group, k: int | None, labels: list[str], span: tuple[float, float]) -> alt.LayerChart:
    """The rows of one objective, or of all objectives of the only run where `k` is None."""
    axis = alt.Axis(title=None, labels=not k or k % 3 == 0, ticks=False, domain=False, labelColor=INK, labelFontSize=12,
                    labelLimit=240, grid=False, labelPadding=8)  # fmt: skip
    if k is None:
        if group.runs[0].primary:
            axis.labelExpr, axis.labelOffset = "[datum.label, datum.index ? 'secondary' : 'primary']", -7
        chart, title = rows_of("reached"), "win rate (0.5: as good as the data's responses)"
        colours = [marks.objective_colour(i) for i in range(len(labels))]
        scale = alt.Scale(domain=labels, range=colours)
        tint = {channel: channel("objective:N", scale=scale, legend=None) for channel in (alt.Color, alt.Stroke)}
    else:
        chart = rows_of("reached").transform_filter(alt.FieldEqualPredicate(field="objective", equal=group.names[k]))
        title = f"win rate, {group.names[k]}"
        tint = {channel: marks.colour(group, channel, legend=False) for channel in (alt.Color, alt.Stroke)}
    y = alt.Y("objective:N" if k is None else "label:N", sort=labels, axis=axis)
    every = chart.encode(number(alt.X, "value", title, span), y, visible())
    floors = chart.transform_filter("isValid(datum.b)").encode(alt.X("b:Q"), y)
    tips = tooltip(("run", "run"), ("objective", "objective"), ("sampled", "sampled", ".4f"), ("low", "low", ".4f"),
                   ("high", "high", ".4f"), ("exact", "exact", ".4f"), ("b", "threshold", ".3f"))  # fmt: skip
    parity = [rows({}).mark_rule(color=SOFT, opacity=0.6).encode(alt.XDatum(0.5))] if span[0] < 0.5 < span[1] else []
    return marks.layered(
        *parity,
        floors.mark_bar(color=BAD, opacity=marks.FAINT, height={"band": 0.86}, clip=True).encode(alt.X2Datum(span[0])),
        floors.mark_tick(color=BAD, thickness=1.5, height={"band": 0.86}),
        every.mark_rule(strokeWidth=2).encode(alt.X("low:Q"), alt.X2("high"), tint[alt.Color]),
        every.mark_point(**SAMPLED, cursor="pointer").encode(
            number(alt.X, "sampled", title, span), tint[alt.Color], tooltip=tips
        ),
        marks.exact_points(every.encode(alt.X("exact:Q"), tint[alt.Stroke]), yOffset=-7),
        marks.optimum_points(every.encode(alt.X("optimum:Q")), yOffset=-7, color=INK),
    )
