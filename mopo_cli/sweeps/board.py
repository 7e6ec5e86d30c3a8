"""What a person sees of a sweep: a live table in a terminal, a line for each start and end elsewhere, the results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mopo_cli.base.console import clock, console, say, show
from mopo_cli.base.files import read_json
from mopo_cli.base.text import one_line
from mopo_cli.runs.directory import RunDirectory, locked
from mopo_cli.sweeps.eta import Estimate
from mopo_cli.sweeps.record import Record
from mopo_cli.sweeps.results import best
from mopo_cli.sweeps.worker import ENDED, Progress, progress_of

COLOURS = {"running": "cyan", "done": "green", "infeasible": "yellow", "failed": "red", "interrupted": "yellow"}
ORDER = ("running", "failed", "interrupted", "done", "infeasible", "waiting")


@dataclass
class Line:
    """One run as the table shows it."""

    record: Record
    run: RunDirectory
    started: float | None = None
    progress: Progress | None = None
    number: int = 0  # in the order in which they started


@dataclass
class Board:
    """The runs of a sweep in their order, and how long one takes."""

    name: str
    total: int
    lines: dict[str, Line] = field(default_factory=dict)
    slots: int = 1
    expected: float | None = None  # seconds of a run, from runs of before
    started: float = field(default_factory=time.monotonic)
    took: list[float] = field(default_factory=list)  # seconds of the runs that this process saw from start to end
    live: Live | None = None
    count: int = 0

    def begin(self, name: str) -> None:
        line = self.lines[name]
        self.count += 1
        line.record = replace(line.record, state="running", error=None)
        line.started, line.progress, line.number = time.monotonic(), None, self.count
        if self.live is None:
            say(f"[{self.position(name)}/{self.total}] {name}: started")

    def elsewhere(self, name: str) -> None:
        """Another process has this run: one that an earlier sweep left behind, or that a user has started."""
        self.lines[name].record = replace(self.lines[name].record, state="running", error=None)
        if self.live is None:
            say(f"[{self.position(name)}/{self.total}] {name}: running in another process; waiting for it")

    def end(self, record: Record, seen: bool) -> None:
        """A run has ended; `seen` where it ran now, rather than having ended before."""
        line = self.lines[record.id]
        line.record = record
        spent = time.monotonic() - line.started if seen and line.started is not None else None
        if spent is not None and record.state in ENDED:
            self.took.append(spent)
        if self.live is None:
            how = " already" if spent is None else f" in {clock(spent)}"
            told = f": {one_line(record.error)}" if record.error else ""
            left = self.eta()
            eta = f"   eta {clock(left)}" if left else ""
            place = f"[{self.position(record.id)}/{self.total}]"
            say(f"{place} {record.id}: {record.state}{how}{told}{reached_text(record)}{eta}")

    def position(self, name: str) -> int:
        return list(self.lines).index(name) + 1

    def each(self) -> float | None:
        """Seconds that a run takes: the mean of those seen, else what was known before."""
        return sum(self.took) / len(self.took) if self.took else self.expected

    def eta(self) -> float | None:
        """Seconds until everything has ended; None where nothing is known of how long a run takes."""
        each = self.each()
        if each is None:
            return None
        now = time.monotonic()
        started = [line.started for line in self.lines.values() if line.record.state == "running" and line.started]
        running = [max(0.0, each - (now - then)) for then in started]
        waiting = self.total - len(self.lines) + sum(line.record.state == "waiting" for line in self.lines.values())
        return max([(sum(running) + waiting * each) / max(1, min(self.slots, waiting + len(running))), *running])

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Live while the sweep runs. Nothing draws by itself: `refresh` does."""
        if not console.is_interactive:
            yield
            return
        with Live(self.render(), console=console, auto_refresh=False, transient=True) as self.live:
            yield
        self.live = None

    def refresh(self, note: str = "") -> None:
        if self.live is not None:
            for line in self.lines.values():
                if line.record.state == "running":
                    line.progress = progress_of(line.run) or line.progress
            self.live.update(self.render(note), refresh=True)

    def render(self, note: str = "") -> RenderableType:
        height = max(4, console.height - 4)
        shown = self._fitting(height)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        keys = list(dict.fromkeys(key for line in self.lines.values() for key in line.record.overrides))
        for title in short_names(keys) or ["run"]:
            table.add_column(title, no_wrap=True, max_width=28, overflow="ellipsis")
        table.add_column("state", no_wrap=True)
        table.add_column("", no_wrap=True, min_width=14)
        table.add_column("", no_wrap=True, overflow="ellipsis")
        for line in shown:
            table.add_row(*([line.record.overrides.get(key, "") for key in keys] or ["defaults"]), *self._cells(line))
        hidden = len(self.lines) - len(shown)
        below = [Text(f"and {hidden} more", style="dim")] if hidden else []
        return Group(self._head(note), table, *below)

    def _fitting(self, height: int) -> list[Line]:
        """As many lines as there is room for, those that matter most now; in the sweep's order."""
        lines = list(self.lines.values())
        if len(lines) <= height:
            return lines
        urgent = sorted(lines, key=lambda line: (ORDER.index(line.record.state), -line.number))[: height - 1]
        return [line for line in lines if any(line is other for other in urgent)]

    def _head(self, note: str) -> Text:
        counts = [(state, sum(line.record.state == state for line in self.lines.values())) for state in ORDER]
        waiting = dict(counts)["waiting"] + self.total - len(self.lines)
        parts = [Text(self.name, style="bold"), Text(f"{self.total} runs")]
        for state, count in [*counts[:-1], ("waiting", waiting)]:
            if count:
                parts.append(Text(f"{count} {state}", style=COLOURS.get(state, "dim")))
        parts.append(Text(clock(time.monotonic() - self.started)))
        if note:
            parts.append(Text(note, style="yellow"))
        else:
            parts.append(Text(f"eta {clock(self.eta())}", style="cyan"))
        return Text("  ").join(parts)

    def _cells(self, line: Line) -> list[RenderableType]:
        state = Text(line.record.state, style=COLOURS.get(line.record.state, "dim"))
        if line.record.state == "running":
            p = line.progress
            spent = clock(time.monotonic() - line.started) if line.started is not None else "another process:"
            counted = f"{p.done}/{p.total}" if p and p.total > 2 else ""
            bar = ProgressBar(p.total, p.done, width=14) if p and p.total > 2 else Text("")
            return [state, bar, Text(" ".join(part for part in (spent, p.stage if p else "", counted) if part))]
        if line.record.state in ENDED:
            spent = clock(line.record.seconds)
            return [state, Text(spent, style="dim", justify="right"), reached(line.record)]
        return [state, Text(""), Text(one_line(line.record.error), style="red")]


def short_names(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or the whole one where two would read the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for name, key in zip(last, keys, strict=True)]


def reached(record: Record) -> Text:
    """The win rates that a run reached: green where a threshold is kept, red where it is not."""
    text = Text()
    for name in record.roles:
        value, kept = record.reached(name), record.numbers.get(f"satisfied/{name}")
        style = {True: "green", False: "red"}.get(kept, "")  # type: ignore[arg-type]
        text.append(f"{name} ", style="dim")
        text.append(f"{value:.3f}  " if value is not None else "–  ", style=style)
    return text


def reached_text(record: Record) -> str:
    found = [f"{name} {record.reached(name):.3f}" for name in record.roles if record.reached(name) is not None]
    return f"   {'  '.join(found)}" if found else ""


def show_results(records: Sequence[Record]) -> None:
    """The table that a sweep ends with: a line a run, the best in bold; then the failures with their errors."""
    ended = [record for record in records if record.state in ENDED]
    if ended:
        say("")
        show(_results_table(records))
    for record in records:
        if record.state == "failed":
            say(f"failed         {record.id}: {one_line(record.error)}")
        elif record.state == "interrupted":
            say(f"interrupted    {record.id}{': ' + one_line(record.error) if record.error else ''}")
    winner, reason = best(records)
    say("")
    if winner is not None:
        exact = " (exact)" if f"exact/{winner.primary}" in winner.numbers else ""
        kept = ", every threshold kept" if winner.asked else ""
        say(f"best           {winner.id}: {winner.primary} {winner.reached(winner.primary or ''):.3f}{exact}{kept}")
    else:
        say(f"best           none: {reason}")


def _results_table(records: Sequence[Record]) -> Table:
    keys = list(dict.fromkeys(key for record in records for key in record.overrides))
    names = list(dict.fromkeys(name for record in records for name in record.roles))
    winner, _ = best(records)
    judged = {name for name in names if any(r.numbers.get(f"satisfied/{name}") is not None for r in records)}
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in short_names(keys) or ["run"]:
        table.add_column(title, no_wrap=True, max_width=40, overflow="ellipsis")
    table.add_column("state", no_wrap=True)
    for title in [*names, "KL", "warnings", "time"]:
        table.add_column(title, justify="right", no_wrap=True)
    for record in records:
        cells = [_number(record, name, name in judged) for name in names]
        kl, warnings = record.numbers.get("kl"), record.numbers.get("warnings")
        table.add_row(
            *([record.overrides.get(key, "") for key in keys] or ["defaults"]),
            Text(record.state, style=COLOURS.get(record.state, "dim")),
            *cells,
            "" if kl is None else f"{kl:.3f}",
            "" if warnings is None else str(warnings),
            "" if record.seconds is None else clock(record.seconds),
            style="bold" if winner is not None and record.id == winner.id else "",
        )
    return table


def _number(record: Record, name: str, judged: bool) -> Text:
    """A win rate, and in a column of which some are judged whether its threshold is kept."""
    value, kept = record.reached(name), record.numbers.get(f"satisfied/{name}")
    mark = {True: " yes", False: "  no"}.get(kept, "    " if judged else "")  # type: ignore[arg-type]
    style = {True: "green", False: "red"}.get(kept, "")  # type: ignore[arg-type]
    return Text("" if value is None else f"{value:.3f}{mark}", style=style)


def show_plan(
    directory: Path, runs: Sequence[tuple[RunDirectory, Record]], total: int, retry: str, expected: Estimate | None
) -> None:
    """What `sweep.dry_run=true` prints: each run, what would be done with it, and how long it is expected to take."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("run", "now", "then"):
        table.add_column(title, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    seconds = []
    for run, record in runs[:total]:
        then = _next(run, record, retry)
        if then != "stays":
            seconds.append(expected.of[record.id] if expected else None)
        about = clock(seconds[-1]) if then != "stays" and seconds[-1] is not None else ""
        table.add_row(record.id, record.state if record.state != "waiting" else "–", then, about)
    say(f"{total} runs in {directory}")
    if total > len(runs):
        say(f"the search proposes {total} points; its first and last possible ones:")
    show(table)
    if expected is None:
        say("time           not known: there is no earlier run with this model and data to go by")
        return
    known = sum(value or 0.0 for value in seconds) * (total / max(1, len(runs)) if total > len(runs) else 1.0)
    say(f"time           about {clock(known + expected.shared)} one after another, {expected.source}")


def _next(run: RunDirectory, record: Record, retry: str) -> str:
    if locked(run):
        return "running now"
    if retry == "all":
        return "anew" if record.state != "waiting" else "starts"
    if record.state in ENDED or (record.state == "failed" and retry == "none"):
        return "stays"
    step = read_json(run.status).get("step") if run.config.exists() and run.status.exists() else None
    return f"goes on from step {step}" if step else "starts"
