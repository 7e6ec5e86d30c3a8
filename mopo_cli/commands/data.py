"""`mopo data`: what is in a data set, before any training on it. Tables for a person, and the same numbers as JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mopo_cli.base import files
from mopo_cli.base.console import console, say, stage, warn
from mopo_cli.base.errors import UserError
from mopo_cli.config import compose, schema
from mopo_cli.data import prepare
from mopo_cli.data.description import (
    CONFLICT,
    SAME,
    TOGETHER,
    Description,
    Relation,
    Spread,
    describe,
    notes_of,
    warnings_of,
)
from mopo_cli.data.statistics import Estimate

PLAIN_WIDTH = 100  # columns, where the output is not a terminal
GAUGE = 21  # characters from -1 to 1
WITH_GAUGE = 81  # columns of the relations' table, besides the longest name
STYLES = {SAME: "bold yellow", CONFLICT: "bold red", TOGETHER: "green"}


def command(composed: DictConfig) -> int:
    """Load the data set, describe it, print that, and write it as JSON where asked; returns the exit status."""
    cfg: schema.DataConfig = compose.typed(composed, schema.DataConfig)
    target = _json_target(cfg.json)
    with stage("data", 1, brief=True) as progress:
        found = describe(prepare.load(cfg.dataset, cfg.objectives))
        progress.advance(1)
    notes, warnings = notes_of(found), warnings_of(found)
    show(found)
    for text in notes:
        say(f"note: {text}")
    for text in warnings:
        warn(text)
    if target is not None:
        _write(target, {**as_json(found), "notes": notes, "warnings": warnings})
        say(f"numbers: {target}")
    return 0


# JSON
def _json_target(path: str | None) -> Path | None:
    if path is not None and Path(path).is_dir():
        raise UserError(f"json={path}: is a directory; give a file, such as {path.rstrip('/')}/data.json")
    return Path(path) if path is not None else None


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, value)
    except OSError as error:
        raise UserError(f"json={path}: cannot be written ({error.strerror or error})") from error


def as_json(value: Any) -> Any:
    """Records as mappings, and numbers that are not known as null, which every reader of JSON takes."""
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Tables
def show(found: Description) -> None:
    """Print the tables: in a terminal as wide as it is, elsewhere as plain text."""
    if console.is_terminal:
        longest = max(map(len, found.objectives))
        _print(console, found, gauges=console.width >= WITH_GAUGE + longest)
        return
    page = Console(file=sys.stdout, width=PLAIN_WIDTH, color_system=None, highlight=False)
    with page.capture() as captured:
        _print(page, found, gauges=False)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), flush=True)


def _print(page: Console, found: Description, gauges: bool) -> None:
    page.print(f"[bold]{escape(str(found.provenance.get('corpus', 'data set')))}[/]")
    page.print(provenance_table(found.provenance))
    page.print()
    page.print(size_table(found))
    page.print()
    page.print(label_table(found))
    page.print(label_legend(found), style="dim")
    if found.relations:
        page.print()
        page.print(relation_table(found.relations, gauges))
        page.print(relation_legend(found.relations), style="dim")
    page.print()


def provenance_table(provenance: dict[str, object]) -> Table:
    """How the labels were made, and from what."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _provenance_lines(provenance):
        table.add_row(f"  {key}", escape(value))
    return table


def _provenance_lines(provenance: dict[str, object]) -> Iterator[tuple[str, str]]:
    if provenance.get("labels"):
        yield "labels", str(provenance["labels"])
    computed = provenance.get("computed")
    if isinstance(computed, dict):
        yield "computed", ", ".join(f"{name} by {_scorer(how)}" for name, how in computed.items())
    shown = {k: v for k, v in provenance.items() if k not in ("corpus", "labels", "computed") and v not in (None, {})}
    if shown:
        yield "made from", " · ".join(f"{key.replace('_', ' ')} {_flat(value)}" for key, value in shown.items())


def _scorer(how: dict[str, Any]) -> str:
    return how["scorer"] + (f" (ties within {how['margin']:g})" if how["margin"] else "")


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_flat(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def size_table(found: Description) -> Columns:
    """The splits; responses and lengths beside them, or below where it is narrow."""
    splits = _table("", "train", "held out", "test")
    for key in ("rows", "prompts", "labelled_pairs"):
        splits.add_row(key.replace("_", " "), *(f"{getattr(part, key):,}" for part in found.parts.values()))
    spreads = _table("", "min", "median", "95 %", "max")
    lengths: dict[str, Spread] = {f"words a {what}": spread for what, spread in found.words.items()}
    for label, spread in {"responses a row": found.responses, **lengths}.items():
        spreads.add_row(label, *(f"{value:,.0f}" for value in (spread.min, spread.median, spread.q95, spread.max)))
    return Columns([splits, spreads], padding=(0, 4))


def label_table(found: Description) -> Table:
    """A line per objective."""
    shares = ("judged\n%", "1st wins\n%", "tie\n%", "2nd wins\n%", "cyclic\n%", "longer\nwins %")
    table = _table("\nobjective", "\nrole", *shares, "\ncorr.")
    table.columns[1].justify = "left"
    table.columns[1].no_wrap = False  # a threshold may go below
    table.columns[1].min_width = len("secondary")
    for name, o in found.objectives.items():
        asked = f" ≥ {o.threshold:g}" if o.threshold is not None else ""
        values = (o.judged, o.first, o.ties, o.second, o.cyclic.value, o.longer_wins.value)
        style = "bold" if o.role == "primary" else None
        cells = [*map(_percent, values), _signed(o.length_correlation)]
        table.add_row(escape(name), o.role + asked, *cells, style=style)
    return table


def label_legend(found: Description) -> str:
    return (
        f"judged: of all labelled pairs ({_percent(found.identical_pairs)} % of them compare identical responses). "
        "cyclic: of all triples; a ranking gives 0 %, coin flips 25 %. corr.: of the preference with the difference in "
        "words."
    )


def relation_table(relations: list[Relation], gauges: bool) -> Table:
    """A line per pair of objectives."""
    ranks = relations[0].method == "ranks"
    numbers = ["ranks", "noise-free"] if ranks else ["2a − 1"]
    table = _table("objectives", "pairs", "agree %", *numbers, *["−1        0        +1"] * gauges, "verdict")
    table.columns[0].no_wrap = False
    table.columns[-1].justify = "left"
    for r in relations:
        cells = [" – ".join(map(escape, r.objectives)), f"{r.agreement.n:,}", _share(r.agreement)]
        cells += [_signed(r.observed.value)] * ranks + [_correlation(r.correlation)]
        style = STYLES.get(r.verdict, "none")
        table.add_row(*cells, *[f"[{style}]{text}[/]" for text in [gauge(r)] * gauges + [r.verdict]])
    return table


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


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}".replace("-", "−")


def _share(estimate: Estimate) -> str:
    return "–" if not estimate.n else f"{100 * estimate.value:.1f} ± {100 * estimate.se:.1f}"


def _correlation(estimate: Estimate) -> str:
    clipped = estimate.value if math.isnan(estimate.value) else max(-1.0, min(1.0, estimate.value))
    return "–" if math.isnan(clipped) else f"{_signed(clipped)} ± {estimate.se:.2f}"
