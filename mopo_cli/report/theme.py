"""Colours, symbols and type of every chart."""

from __future__ import annotations

import re
from typing import Any

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


def _one_line(value: Any) -> Any:
    """Texts without line ends and control characters: Vega's expressions, which they become part of, allow none."""
    if isinstance(value, str):
        return UNSEEN.sub(" ", value)
    if isinstance(value, dict):
        return {key: _one_line(v) for key, v in value.items()}
    return [_one_line(v) for v in value] if isinstance(value, list | tuple) else value
