"""`mopo data`: what is in a data set, before any training on it. Tables for a person, and the same numbers as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mopo_cli.base import console
from mopo_cli.base.console import say, table, warn
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import write_json
from mopo_cli.config import compose, schema
from mopo_cli.data import description, prepare
from mopo_cli.data.description import Description, Relation
from mopo_cli.data.statistics import WithError

PLAIN_WIDTH = 100  # columns, where the output is not a terminal
GAUGE = 21  # characters from -1 to 1
WITH_GAUGE = 81  # columns of the relations' table, besides the longest name
STYLES = {description.SAME: "bold yellow", description.CONFLICT: "bold red", description.TOGETHER: "green"}


def command(composed: DictConfig) -> int:
    """Load the data set, describe it, print that, and write it as JSON where asked; returns the exit status."""
    config: schema.DataConfig = compose.typed(composed, schema.DataConfig)
    target = _json_target(config.json)
    with console.stage("data", 1, brief=True) as progress:
        described = description.describe(prepare.load(config.dataset, config.objectives))
        progress.advance(1)
    notes, warnings = description.notes_of(described), description.warnings_of(described)
    with_gauge = console.console.is_terminal and console.console.width >= WITH_GAUGE + max(
        map(len, described.objectives)
    )
    console.show(page(described, with_gauge), PLAIN_WIDTH)
    for text in notes:
        say(f"note: {text}")
    for text in warnings:
        warn(text)
    if target is not None:
        _write(target, {**asdict(described), "notes": notes, "warnings": warnings})
        say(f"numbers: {target}")
    return 0


def _json_target(path: str | None) -> Path | None:
    if path is not None and Path(path).is_dir():
        raise UserError(f"json={path}: is a directory; give a file, such as {path.rstrip('/')}/data.json")
    return Path(path) if path is not None else None


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    except OSError as error:
        raise UserError(f"json={path}: cannot be written ({error.strerror or error})") from error


# Tables
def page(described: Description, gauges: bool) -> Group:
    """All the tables, one below the other; with a gauge for each pair of objectives where there is room."""
    title = Text(str(described.provenance.get("corpus", "data set")), style="bold")
    parts: list[RenderableType] = [title, provenance_table(described.provenance), "", size_table(described), ""]
    parts += [label_table(described), Text(label_legend(described), style="dim")]
    if described.relations:
        legend = Text(relation_legend(described.relations), style="dim")
        parts += ["", relation_table(described.relations, gauges), legend]
    return Group(*parts, "")


def provenance_table(provenance: dict[str, object]) -> Table:
    """How the labels were made, and from what."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in _provenance_lines(provenance):
        grid.add_row(f"  {key}", escape(value))
    return grid


def _provenance_lines(provenance: dict[str, object]) -> Iterator[tuple[str, str]]:
    if provenance.get("labels"):
        yield "labels", str(provenance["labels"])
    computed = provenance.get("computed")
    if isinstance(computed, dict):
        yield "computed", ", ".join(f"{name} by {_scorer(how)}" for name, how in computed.items())
    others = {k: v for k, v in provenance.items() if k not in ("corpus", "labels", "computed") and v not in (None, {})}
    if others:
        yield "made from", " · ".join(f"{key.replace('_', ' ')} {_as_text(value)}" for key, value in others.items())


def _scorer(how: dict[str, Any]) -> str:
    return how["scorer"] + (f" (ties within {how['margin']:g})" if how["margin"] else "")


def _as_text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_as_text(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def size_table(described: Description) -> Columns:
    """The splits; responses and lengths beside them, or below where it is narrow."""
    splits = table([""], ["train", "held out", "test"], 2, "dim")
    for key in ("rows", "prompts", "labelled_pairs"):
        splits.add_row(key.replace("_", " "), *(f"{getattr(part, key):,}" for part in described.parts.values()))
    spreads = table([""], ["min", "median", "95 %", "max"], 2, "dim")
    lengths = {f"words a {what}": spread for what, spread in described.words.items()}
    for label, spread in {"responses a row": described.responses, **lengths}.items():
        spreads.add_row(label, *(f"{value:,.0f}" for value in (spread.min, spread.median, spread.q95, spread.max)))
    return Columns([splits, spreads], padding=(0, 4))


def label_table(described: Description) -> Table:
    """A line per objective."""
    shares = ("judged\n%", "1st wins\n%", "tie\n%", "2nd wins\n%", "cyclic\n%", "longer\nwins %")
    lines = table(["\nobjective", "\nrole"], [*shares, "\ncorr."], 2, "dim")
    lines.columns[1].no_wrap = False  # a threshold may go below
    lines.columns[1].min_width = len("secondary")
    for name, labels in described.objectives.items():
        threshold = f" ≥ {labels.threshold:g}" if labels.threshold is not None else ""
        values = (
            labels.judged,
            labels.first,
            labels.ties,
            labels.second,
            labels.cyclic.value,
            labels.longer_wins.value,
        )
        cells = [*map(_percent, values), _signed(labels.length_correlation)]
        lines.add_row(escape(name), labels.role + threshold, *cells, style="bold" if labels.role == "primary" else None)
    return lines


def label_legend(described: Description) -> str:
    return (
        f"judged: of all labelled pairs ({_percent(described.identical_pairs)} % of them compare identical responses). "
        "cyclic: of all triples; a ranking gives 0 %, coin flips 25 %. corr.: of the preference with the difference in "
        "words."
    )


def relation_table(relations: list[Relation], gauges: bool) -> Table:
    """A line per pair of objectives."""
    ranks = relations[0].method == "ranks"
    numbers = ["ranks", "noise-free"] if ranks else ["2a − 1"]
    titles = ["pairs", "agree %", *numbers, *["−1        0        +1"] * gauges, "verdict"]
    lines = table(["objectives"], titles, 2, "dim")
    lines.columns[0].no_wrap = False
    lines.columns[-1].justify = "left"
    for relation in relations:
        cells = [" – ".join(map(escape, relation.objectives)), f"{relation.agreement.n:,}", _share(relation.agreement)]
        cells += [_signed(relation.observed.value)] * ranks + [_correlation(relation.correlation)]
        style = STYLES.get(relation.verdict, "none")
        lines.add_row(*cells, *(f"[{style}]{text}[/]" for text in [gauge(relation)] * gauges + [relation.verdict]))
    return lines


def relation_legend(relations: list[Relation]) -> str:
    agree = "agree: of the pairs that both decided (a), ± standard error. "
    if relations[0].method == "ranks":
        return (
            f"{agree}ranks: correlation of the responses' win rates, as counted from the labels of a row. noise-free: "
            "the same of their true win rates, estimated."
        )
    return f"{agree}2a − 1: correlation of the preferences; label noise pulls it towards 0."


def gauge(relation: Relation) -> str:
    """The correlation on a line from -1 to 1: a dot in its 95 % interval."""
    marks = ["·"] * GAUGE
    marks[GAUGE // 2] = "┊"
    low, high = relation.ci95
    if not math.isnan(low):
        start, middle, end = (_place(x) for x in (low, relation.correlation.value, high))
        marks[start : end + 1] = "─" * (end + 1 - start)
        marks[middle] = "●"
    return "".join(marks)


def _place(correlation: float) -> int:
    return round((max(-1.0, min(1.0, correlation)) + 1) / 2 * (GAUGE - 1))


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}".replace("-", "−")


def _share(estimate: WithError) -> str:
    return "–" if not estimate.n else f"{100 * estimate.value:.1f} ± {100 * estimate.se:.1f}"


def _correlation(estimate: WithError) -> str:
    clipped = estimate.value if math.isnan(estimate.value) else max(-1.0, min(1.0, estimate.value))
    return "–" if math.isnan(clipped) else f"{_signed(clipped)} ± {estimate.se:.2f}"
