"""The figure of `mopo eval`: win rates and scores of every entrant, with intervals and thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt

from mopo_cli.maths.significance import UNKNOWN
from mopo_cli.report.marks import layered, number, rows
from mopo_cli.report.theme import BAD, COLOURS, INK, SHAPES, SOFT, STAR, below, drawing, one_line, save, spec_of

if TYPE_CHECKING:
    from mopo_cli.evaluation.records import Evaluation, Measured

DATA, REFERENCE, EXACT = "against the data", "against the reference", "exact, against the data"
SERIES = {DATA: (COLOURS[0], SHAPES[0]), REFERENCE: (COLOURS[2], STAR), EXACT: (INK, "diamond")}


def draw_evaluation(evaluated: Sequence[Evaluation], normalisation: Mapping[str, Any], directory: Path) -> Path:
    """Write evaluation.png: a column an objective (or scorer), win rates above and normalised scores below."""
    names = [*evaluated[0].objectives, *evaluated[0].scorers]
    caption = "Bars: 95 % intervals. Upright lines: thresholds."
    if any(name in normalisation for name in names):
        fitted = dict.fromkeys(scale["fitted_on"] for scale in normalisation.values())
        caption += f" Scores are normalised on {'; '.join(fitted)}."
    with drawing():
        panels = [_rates(name, k == 0, evaluated) for k, name in enumerate(names)]
        if any(name in normalisation for name in names):
            panels += [_scores(name, k == 0, evaluated, normalisation.get(name)) for k, name in enumerate(names)]
        spec = spec_of(alt.concat(*panels, columns=len(names), spacing=24))
    return save(spec | {"title": below(caption, 280 * len(names))}, directory / "evaluation.png")[0]


def _measured(entrant: Evaluation, name: str) -> Measured:
    return entrant.objectives.get(name) or entrant.scorers[name]


def _entrants(evaluated: Sequence[Evaluation], labelled: bool) -> alt.Y:
    axis = alt.Axis(
        title=None,
        labels=labelled,
        ticks=False,
        domain=False,
        labelColor=INK,
        labelLimit=240,
        labelPadding=8,
        grid=False,
    )
    return alt.Y("entrant:N", scale=alt.Scale(domain=[one_line(e.name) for e in evaluated], padding=0.2), axis=axis)


def _rates(name: str, first: bool, evaluated: Sequence[Evaluation]) -> alt.LayerChart:
    results = {entrant.name: _measured(entrant, name) for entrant in evaluated}
    points = [
        {"entrant": entrant, "series": series, "value": value, **_bar(value, interval)}
        for entrant, r in results.items()
        for series, value, interval in (
            (DATA, r.win_rate, r.win_rate_ci95),
            (REFERENCE, r.reference_win_rate, r.reference_win_rate_ci95),
            (EXACT, r.exact_win_rate, UNKNOWN),
        )
        if value is not None and not math.isnan(value)
    ]
    floors = [{"entrant": entrant, "b": r.threshold} for entrant, r in results.items() if r.threshold is not None]
    y, domain = _entrants(evaluated, first), list(SERIES)
    legend = alt.Legend(title=None, symbolOpacity=1) if first else None
    colour = alt.Color("series:N", scale=alt.Scale(domain=domain, range=[c for c, _ in SERIES.values()]), legend=legend)
    shape = alt.Shape("series:N", scale=alt.Scale(domain=domain, range=[s for _, s in SERIES.values()]), legend=legend)
    chart = rows(*points).encode(y, colour, alt.YOffset("series:N", scale=alt.Scale(domain=domain)))
    return layered(
        rows({}).mark_rule(color=SOFT, opacity=0.6).encode(alt.XDatum(0.5)),
        rows(*floors).mark_tick(color=BAD, thickness=1.5, height={"band": 0.9}).encode(alt.X("b:Q"), y),
        chart.mark_rule(strokeWidth=1.6).encode(
            number(alt.X, "low", "win rate (0.5 is parity)", padding=12), alt.X2("high")
        ),
        chart.mark_point(filled=True, size=55, opacity=1).encode(alt.X("value:Q"), shape),
    ).properties(width=210, height=_height(evaluated, 3), title=name)


def _scores(
    name: str, first: bool, evaluated: Sequence[Evaluation], scale: Mapping[str, Any] | None
) -> alt.Chart | alt.LayerChart:
    size = {"width": 210, "height": _height(evaluated, 2)}
    if scale is None:
        return rows({}).mark_text(text="its judge only compares", color=SOFT).properties(**size)
    results = {entrant.name: _measured(entrant, name) for entrant in evaluated}
    points = [
        {"entrant": entrant, "value": r.normalised_score, **_bar(r.normalised_score, r.normalised_score_ci95)}
        for entrant, r in results.items()
        if not math.isnan(r.normalised_score)
    ]
    judge = next(iter(results.values())).judge
    title: Any = [f"normalised score, {judge}", f"mean {scale['mean']:.3g}, deviation {scale['std']:.3g}"]
    chart = rows(*points).encode(_entrants(evaluated, first))
    return layered(
        rows({}).mark_rule(color=SOFT, opacity=0.6).encode(alt.XDatum(0.0)),
        chart.mark_rule(strokeWidth=1.6, color=COLOURS[4]).encode(
            number(alt.X, "low", title, padding=12), alt.X2("high")
        ),
        chart.mark_point(filled=True, size=55, opacity=1, color=COLOURS[4]).encode(alt.X("value:Q")),
    ).properties(**size)


def _bar(value: float, interval: tuple[float, float]) -> dict[str, float]:
    """The ends of an interval; where there is none, a bar of no length."""
    return {key: value if math.isnan(end) else end for key, end in zip(("low", "high"), interval, strict=True)}


def _height(evaluated: Sequence[Evaluation], each: int) -> int:
    return max(50, 14 * each * len(evaluated))
