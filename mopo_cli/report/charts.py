"""The figures of a report as Vega-Lite: one definition is the interactive chart of the page, the PNG and the SVG.

Colours are CSS variables, which the page resolves by its theme; a file gets those of `LIGHT`. Names that people chose
(of objectives, settings, runs) are values and titles, never field names: those are short and made here (`x0`: the win
rate of objective 0, exact where it is known).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mopo_cli.report.fronts import fronts, parallel, win_rates
from mopo_cli.report.groups import Figure, Group, plane
from mopo_cli.report.steps import heat, reward, steps
from mopo_cli.report.theme import CONFIG, FILE_FONT, LIGHT, MANY, Spec, _one_line


def figures(group: Group) -> list[Figure]:
    """The figures that these runs can carry, in the order in which they are read."""
    count = len(group.names)
    drawn: list[Figure] = []
    if group.ended and count > 1:
        drawn.append(fronts(group))
    if group.ended and count > 2 and len(group.ended) > 1:
        drawn.append(parallel(group))
    if group.ended and len(group.ended) <= MANY:
        drawn.append(win_rates(group))
    if any(run.history for run in group.runs) and (over_steps := steps(group)).panels:
        drawn.append(over_steps)
    if group.ended:
        drawn.append(reward(group))
    if plane(group):
        drawn.append(heat(group))
    return [replace(figure, panels=_one_line(figure.panels)) for figure in drawn]


# --------------------------------------------------------------------------------------------- files
def composed(figure: Figure, data: Mapping[str, Any], width: int = 300) -> Spec:
    """The whole figure for a file, in light colours."""
    columns = min(figure.columns, len(figure.panels))
    width = min(width, 960 // columns)
    spec: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "config": CONFIG | {"background": "white", "font": FILE_FONT},
        "params": [{"name": "chosen", "value": []}],
        "datasets": {name: rows for name, rows in data.items() if f'"{name}"' in json.dumps(figure.panels)},
        "padding": 10,
        "spacing": 28,
        "columns": columns,
        "concat": [sized(panel, figure, width) for panel in figure.panels],
        "resolve": {"scale": {name: "shared" if name in figure.shared else "independent" for name in
                              ("color", "shape", "strokeDash", "stroke", "fill")}},
    }  # fmt: skip
    return json.loads(re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found.group(1)], json.dumps(spec)))


def sized(panel: Spec, figure: Figure, width: int) -> Spec:
    """A panel with its size; `wide`, `rows` and `labels` are ours."""
    height = figure.height or max(28 * panel["rows"], 60)
    own = {key: value for key, value in panel.items() if key not in ("wide", "rows", "labels")}
    return own | {"width": int(width * 1.8) if panel.get("wide") else width, "height": height}
