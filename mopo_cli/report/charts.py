"""The figures of a report as Vega-Lite: one definition is the interactive chart of the page, the PNG and the SVG.

Names that people chose (of objectives, settings, runs) are values and titles, never field names: those are short and
made in groups.py (`x0`: the win rate of objective 0, exact where it is known).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mopo_cli.report.fronts import fronts, parallel, win_rates
from mopo_cli.report.groups import Figure, Group, Panel, plane
from mopo_cli.report.steps import heat, reward, steps
from mopo_cli.report.theme import MANY, Spec, below, drawing, spec_of


def figures(group: Group) -> list[Figure]:
    """The figures that these runs can carry, in the order in which they are read."""
    count = len(group.names)
    drawn: list[Figure] = []
    with drawing():
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
        return [replace(figure, panels=[replace(p, chart=spec_of(p.chart)) for p in figure.panels]) for figure in drawn]


def composed(figure: Figure, data: Mapping[str, Any], width: int = 300) -> Spec:
    """The whole figure for a file, with its caption below."""
    columns = min(figure.columns, len(figure.panels))
    width = min(width, 960 // columns)
    panels = [panel.chart | {"width": int(width * 1.8) if panel.wide else width, "height": _height(figure, panel)}
              for panel in figure.panels]  # fmt: skip
    written = json.dumps(panels)
    around = sum(panel["width"] + 66 for panel in panels[:columns])
    resolved = {name: "shared" if name in figure.shared else "independent"
                for name in ("color", "shape", "strokeDash", "stroke", "fill")}  # fmt: skip
    return {
        "params": [{"name": "chosen", "value": []}],
        "datasets": {name: rows for name, rows in data.items() if f'"{name}"' in written},
        "title": below(figure.caption, around),
        "spacing": 28,
        "columns": columns,
        "concat": panels,
        "resolve": {"scale": resolved},
    }


def _height(figure: Figure, panel: Panel) -> float:
    return figure.height or max(28 * panel.rows, 60)
