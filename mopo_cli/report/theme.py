"""Colours, symbols and type of every chart, on the page and in files; and how a chart becomes a file.

Colours are CSS variables, which the page resolves by its theme; a file gets those of `LIGHT`. One colour an objective,
by its place in the set; one colour and shape an algorithm, whichever stand beside it; the symbols of the exact value,
of the optimum and of the reference are nobody else's.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import altair as alt

Spec = dict[str, Any]
PALETTE = {
    "ink": ("#1a1d21", "#e8eaed"),
    "soft": ("#5b636d", "#a3abb5"),
    "rule": ("#e3e6ea", "#30353c"),
    "paper": ("#ffffff", "#15181c"),
    "bad": ("#d55e00", "#f08a4b"),
    "c0": ("#0072b2", "#4fa8e0"),
    "c1": ("#009e73", "#35c79b"),
    "c2": ("#cc79a7", "#e59cc5"),
    "c3": ("#b07d00", "#e6b93f"),
    "c4": ("#56b4e9", "#a5dbf8"),
    "c5": ("#7a3e9d", "#bf98e0"),
    "c6": ("#6b6b6b", "#a8a8a8"),
    "c7": ("#8c5a2b", "#cf9a66"),
    "c8": ("#1b2a6b", "#8c9eff"),
    "c9": ("#7d8c12", "#c3d04a"),
    "c10": ("#a01246", "#ff7eb0"),
    "c11": ("#00707a", "#5fd4de"),
}
LIGHT, DARK = ({name: both[i] for name, both in PALETTE.items()} for i in (0, 1))
INK, SOFT, BAD, PAPER = (f"var(--{name})" for name in ("ink", "soft", "bad", "paper"))
COLOURS = [f"var(--c{i})" for i in range(12)]
HUES = 8  # of them that can be told apart without a shape
SHAPES = [
    "circle",
    "square",
    "triangle-up",
    "triangle-down",
    "cross",
    "triangle-right",
    "triangle-left",
    "M0,-1L0.87,-0.5L0.87,0.5L0,1L-0.87,0.5L-0.87,-0.5Z",  # hexagon
    "M0,-1L0.95,-0.31L0.59,0.81L-0.59,0.81L-0.95,-0.31Z",  # pentagon
    "M-0.9,-0.9L0.9,-0.9L-0.9,0.9L0.9,0.9Z",  # hourglass
    "M-0.9,-0.9L0,-0.15L0.9,-0.9L0.9,0.9L0,0.15L-0.9,0.9Z",  # bow tie
    "M-0.5,-0.8L0.5,-0.8L1,0.8L-1,0.8Z",  # trapezium
]
ALGORITHMS = ("mopo", "dpo", "modpo", "soups", "ric", "dpa", "sft", "mapl", "mopo_conditioned", "ipo", "mopo_barrier",
              "mopo_paper")  # fmt: skip
STAR = "M0,-1L0.25,-0.34L0.95,-0.31L0.4,0.13L0.59,0.81L0,0.42L-0.59,0.81L-0.4,0.13L-0.95,-0.31L-0.25,-0.34Z"
SAMPLED: Spec = {"filled": True, "size": 60, "opacity": 1}
EXACT: Spec = {"shape": "diamond", "filled": True, "fill": PAPER, "size": 60, "strokeWidth": 1.5, "opacity": 1}
OPTIMUM: Spec = {"shape": "M-1,-1L1,1M-1,1L1,-1", "filled": False, "size": 30, "strokeWidth": 1.6, "opacity": 1}
REFERENCE: Spec = {"shape": STAR, "filled": True, "size": 90, "color": INK, "opacity": 1}
SOLID, DASHED, DOTTED = [1, 0], [6, 4], [1.5, 2.5]
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


def places(names: Sequence[str]) -> list[int]:
    """The place of each algorithm in colours and shapes: always the same of those we ship, free ones for others."""
    free = iter([i for i, name in enumerate(ALGORITHMS) if name not in names] * len(names))
    return [ALGORITHMS.index(name) if name in ALGORITHMS else next(free, 0) for name in names]


def one_line(value: Any) -> Any:
    """Texts without line ends and control characters: Vega's expressions, which they become part of, allow none."""
    if isinstance(value, str):
        return UNSEEN.sub(" ", value)
    if isinstance(value, dict):
        return {key: one_line(v) for key, v in value.items()}
    return [one_line(v) for v in value] if isinstance(value, list | tuple) else value


# --------------------------------------------------------------------------------------------- from chart to file
@contextmanager
def drawing() -> Iterator[None]:
    """Charts made herein are not checked piece by piece, which takes longer than to draw them; tests check them whole.

    Their rows stay where they are used, so that a chart can become a panel of another.
    """
    from altair.utils.schemapi import debug_mode

    with debug_mode(False), alt.data_transformers.enable(consolidate_datasets=False):
        yield


def spec_of(chart: alt.TopLevelMixin) -> Spec:
    """Vega-Lite of a chart that is to be a panel."""
    spec = chart.to_dict(validate=False)
    return one_line({key: value for key, value in spec.items() if key not in ("$schema", "config")})


def in_light(spec: Mapping[str, Any]) -> Spec:
    """A whole figure as a file has it: light colours on white."""
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "config": CONFIG | {"background": "white", "font": FILE_FONT},
        "padding": 10,
        **spec,
    }
    return json.loads(re.sub(r"var\(--(\w+)\)", lambda variable: LIGHT[variable.group(1)], json.dumps(whole)))


def below(caption: str, width: float) -> Spec:
    """A caption as the last lines of a file's picture."""
    lines = textwrap.wrap(one_line(caption), max(40, round(width / 5.6)))
    return {"text": lines, "orient": "bottom", "offset": 14, "fontSize": 11, "fontWeight": "normal", "color": SOFT}


def save(spec: Mapping[str, Any], *paths: Path) -> list[Path]:
    """Write a figure to .png and .svg files; returns their paths."""
    import vl_convert

    svg = vl_convert.vegalite_to_svg(in_light(spec))
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(svg.encode() if path.suffix == ".svg" else vl_convert.svg_to_png(svg, scale=2))
    return list(paths)
