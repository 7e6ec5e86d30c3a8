"""Pieces that several charts are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from mopo_cli.report.groups import Group, colour_setting, shape_setting, short
from mopo_cli.report.theme import BAD, COLOURS, MANY, NAMED, SHAPES, SOFT, Spec
from mopo_cli.runs.record import METHOD


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


def _weight(group: Group) -> float:
    return 2.0 if len(group.runs) <= NAMED else 1.3 if len(group.runs) <= MANY else 0.9


def _numbers(values: Sequence[Any]) -> list[float]:
    return [float(v) for v in values if isinstance(v, int | float)]
