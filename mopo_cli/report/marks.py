"""Pieces that several charts are made of.

Channels are given as objects, never as text or dicts: Altair takes 20 ms to understand each of those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import altair as alt

from mopo_cli.report import theme
from mopo_cli.report.groups import Group, aimed, colour_setting, shape_setting, short
from mopo_cli.runs.record import METHOD

Channel = Any  # a class of Altair's: alt.X, alt.Color, ...
GREY: theme.Spec = {"encoding": {"symbols": {"fill": {"value": theme.SOFT}, "stroke": {"value": theme.SOFT}}}}
FAINT = 0.13  # opacity of a shade


# --------------------------------------------------------------------------------------------- data
def rows_of(name: str, *valid: str) -> alt.Chart:
    """A chart over `runs`, `history` or `reached`: over their rows that have these fields."""
    chart = alt.Chart(alt.NamedData(name))
    return chart.transform_filter(" && ".join(f"isValid(datum.{key})" for key in valid)) if valid else chart


def rows(*values: Mapping[str, Any]) -> alt.Chart:
    """A chart over rows of its own."""
    return alt.Chart(alt.InlineData(values=list(values)))


def layered(*charts: alt.Chart | alt.LayerChart, **more: Any) -> alt.LayerChart:
    """Charts over one another."""
    return alt.LayerChart(layer=list(charts), **more)


# --------------------------------------------------------------------------------------------- channels
def number(
    channel: Channel,
    key: str,
    title: str | list[str],
    span: Sequence[float] | None = None,
    zero: bool = False,
    padding: float = 0,
    **axis: Any,
) -> Any:
    """An axis of numbers, over exactly this range where one is given, else with so many pixels around them."""
    scale = alt.Scale(zero=zero, domain=list(span), nice=False) if span else alt.Scale(zero=zero, padding=padding)
    return channel(f"{key}:Q", axis=alt.Axis(title=title, **{"grid": True, **axis}), scale=scale)


def colour(group: Group, channel: Channel = alt.Color, legend: bool = True) -> Any:
    """Runs by colour: each its own where they are few, else by algorithm or by the first setting that varies."""
    if group.by_run:
        labels, title = [group.labels[run.id] for run in group.runs if run.finished or run.history], None
    else:
        key = colour_setting(group)
        labels, title = (group.settings[key], short(key)) if key else (["runs"], None)
    by_algorithm = not group.by_run and title == METHOD
    colours = [
        theme.COLOURS[i % len(theme.COLOURS)] for i in (theme.places(labels) if by_algorithm else range(len(labels)))
    ]
    key_ = alt.Legend(title=title, symbolType="circle", symbolOpacity=1, columns=_columns(labels))
    return channel(
        "colour:N",
        scale=alt.Scale(domain=labels, range=colours if len(labels) > 1 else [theme.INK]),
        legend=key_ if legend and len(labels) > 1 else None,
    )


def shape(group: Group) -> alt.Shape:
    """Runs by shape: by algorithm, with its colour in one legend, or by the second setting that varies."""
    key = shape_setting(group)
    if not key:
        only = theme.EXACT["shape"] if group.exact else theme.SHAPES[0]
        return alt.Shape("shape:N", scale=alt.Scale(domain=["run"], range=[only]), legend=None)
    labels = group.settings[key]
    shapes = [
        theme.SHAPES[i % len(theme.SHAPES)] for i in (theme.places(labels) if key == METHOD else range(len(labels)))
    ]
    legend = alt.Legend(title=short(key), columns=_columns(labels), symbolOpacity=1, **({} if key == METHOD else GREY))
    return alt.Shape(
        "colour:N" if key == METHOD else "shape:N", scale=alt.Scale(domain=labels, range=shapes), legend=legend
    )


def _columns(labels: Sequence[str]) -> int:
    """How many labels stand beside one another in a legend."""
    longest = max(map(len, labels), default=0)
    return 8 if longest <= 8 else 4 if longest <= 28 else 2


def objective_colour(k: int) -> str:
    return theme.COLOURS[k % len(theme.COLOURS)]


def dash(styles: Mapping[str, list[float]], kind: str) -> alt.StrokeDashDatum:
    """A kind of line by its dashes, with a legend of the kinds that the figure has."""
    legend = alt.Legend(title=None, symbolType="stroke", symbolStrokeColor=theme.SOFT, symbolSize=300)
    scale = alt.Scale(domain=list(styles), range=list(styles.values()))
    return alt.StrokeDashDatum(kind, type="nominal", scale=scale, legend=legend if len(styles) > 1 else None)


def visible(opacity: float = 1.0, channel: Channel = alt.OpacityValue) -> Any:
    """Runs that are not among the chosen ones step back."""
    test = "!length(chosen) || indexof(chosen, datum.run) >= 0"
    return channel(0.08 * opacity, condition={"test": test, "value": opacity})


def tooltip(*fields: tuple[str, str] | tuple[str, str, str]) -> list[alt.Tooltip]:
    """Rows of a tooltip: field, title and, of numbers, a format."""
    return [alt.Tooltip(f"{name}:Q", title=title, format=form[0]) if form else alt.Tooltip(f"{name}:N", title=title)
            for name, title, *form in fields]  # fmt: skip


def run_tooltip(group: Group) -> list[alt.Tooltip]:
    fields: list[Any] = [("run", "run")]
    if group.exact:
        fields += [(f"e{k}", f"{name}, exact", ".4f") for k, name in enumerate(group.names)]
    fields += [(f"w{k}", f"{name}, sampled", ".4f") for k, name in enumerate(group.names)]
    fields += [(f"b{k}", f"{name}, threshold", ".3f") for k, name in enumerate(group.names) if thresholds(group, name)]
    return tooltip(*fields, ("kl", "KL, nats", ".4f"))


# --------------------------------------------------------------------------------------------- marks
def shade(**sides: float) -> alt.Chart:
    """A shaded rectangle: what breaks a threshold."""
    classes = {"x": alt.XDatum, "x2": alt.X2Datum, "y": alt.YDatum, "y2": alt.Y2Datum}
    return rows({}).mark_rect(color=theme.BAD, opacity=FAINT).encode(**{k: classes[k](v) for k, v in sides.items()})


def reached(group: Group, chart: alt.Chart, size: float | None = None) -> alt.Chart:
    """Where runs ended: a point each, which tells its run and chooses it at a click."""
    mark: theme.Spec = {**theme.SAMPLED, "size": size or (75 if len(group.ended) <= theme.MANY else 36)}
    return chart.mark_point(**mark, cursor="pointer").encode(
        shape=shape(group), opacity=visible(), tooltip=run_tooltip(group)
    )


def exact_points(chart: alt.Chart, **mark: Any) -> alt.Chart:
    return chart.mark_point(**theme.EXACT | mark).encode(opacity=visible())


def optimum_points(chart: alt.Chart, **mark: Any) -> alt.Chart:
    return chart.mark_point(**theme.OPTIMUM | mark).encode(opacity=visible())


# --------------------------------------------------------------------------------------------- numbers of a group
def span_of(values: Sequence[float | None], margin: float = 0.07, least: float = 0.02) -> tuple[float, float]:
    """The range of these values with some room around it."""
    finite = [float(v) for v in values if v is not None and isfinite(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    room = max((high - low) * margin, least / 2)
    return round(low - room, 4), round(high + room, 4)


def thresholds(group: Group, name: str) -> list[float]:
    """The thresholds asked of an objective by runs that ended, each once."""
    values = {run.objectives[name].threshold for run in group.ended}
    return sorted(round(t, 6) for t in values if t is not None)


def common_floor(group: Group, name: str) -> float | None:
    """Below this win rate no run keeps its threshold; None where one asks for nothing."""
    values = [run.objectives[name].threshold for run in group.ended]
    return min((t for t in values if t is not None), default=None) if values and None not in values else None


def win_rate_title(group: Group, k: int) -> str:
    return f"win rate, {group.names[k]}" + (" (exact)" if group.exact else "")


def front_span(group: Group, k: int) -> tuple[float, float]:
    """The range of an objective's win rates with their intervals, thresholds, optima and references."""
    values: list[float | None] = []
    for run in group.ended:
        r = run.objectives[group.names[k]]
        values += [r.exact if group.exact else r.win_rate, r.threshold, *(r.ci95 or ())]
        values += [r.optimum if aimed(run) else None, r.reference] if group.exact else []
    return span_of(values)


def bar_opacity(group: Group) -> float:
    """Of error bars: the more there are, the less each is seen."""
    return 0.55 if len(group.ended) <= theme.MANY else 0.2


def line_width(group: Group) -> float:
    return 2.0 if len(group.runs) <= theme.NAMED else 1.3 if len(group.runs) <= theme.MANY else 0.9
