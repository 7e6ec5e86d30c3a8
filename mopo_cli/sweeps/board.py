"""What a person sees of a sweep: a live table in a terminal, a line for each start and end elsewhere, the results."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from mopo_cli.runs.record import RunFiles, RunRecord
from mopo_cli.sweeps.results import Choice, best, stays
from mopo_cli.sweeps.worker import JobProgress, progress_of

COLOURS = {"running": "cyan", "done": "green", "infeasible": "yellow", "failed": "red", "interrupted": "yellow"}
ORDER = ("running", "failed", "interrupted", "done", "infeasible", "waiting")
VERDICT = {"yes": "green", "no": "red", "undecided": "yellow", "": ""}  # colours of win rates by their thresholds
TOLD = {
    "yes": "every threshold kept",
    "no": "a threshold missed",
    "undecided": "whether the thresholds are kept is open",
}


@dataclass
class Line:
    """One run as the table shows it."""

    record: RunRecord
    started: float | None = None
    progress: JobProgress | None = None
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
        self.count += 1
        self.lines[name] = Line(_running(self.lines[name].record), time.monotonic(), None, self.count)
        self._say(name, "started")

    def elsewhere(self, name: str) -> None:
        """Another process has this run: one that an earlier sweep left behind, or that a user has started."""
        self.lines[name].record = _running(self.lines[name].record)
        self._say(name, "running in another process; waiting for it")

    def end(self, record: RunRecord, seen: bool) -> None:
        """A run has ended; `seen` where it ran now, rather than having ended before."""
        line = self.lines[record.id]
        line.record = record
        spent = time.monotonic() - line.started if seen and line.started is not None else None
        if spent is not None and record.finished:
            self.took.append(spent)
        how = " already" if spent is None else f" in {clock(spent)}"
        error = f": {one_line(record.problem)}" if record.problem else ""
        rates = "  ".join(f"{name} {record.reached(name):.3f}" for name in record.names if record.finished)
        left = self.eta()
        eta = f"   eta {clock(left)}" if left else ""
        self._say(record.id, f"{record.state}{how}{error}{f'   {rates}' if rates else ''}{eta}")

    def _say(self, name: str, text: str) -> None:
        if self.live is None:
            say(f"[{list(self.lines).index(name) + 1}/{self.total}] {name}: {text}")

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
        waiting = self._counts()["waiting"]
        return max([(sum(running) + waiting * each) / max(1, min(self.slots, waiting + len(running))), *running])

    def _counts(self) -> Counter[str]:
        """How many runs are in each state; those that nobody has proposed yet wait."""
        counts = Counter(line.record.state for line in self.lines.values())
        return counts + Counter(waiting=self.total - len(self.lines))

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
                    line.progress = progress_of(RunDirectory(line.record.path)) or line.progress
            self.live.update(self.render(note), refresh=True)

    def render(self, note: str = "") -> RenderableType:
        lines = self._fitting(max(4, console.height - 4))
        keys = _keys([line.record for line in self.lines.values()])
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for title in short_names(keys) or ["run"]:
            table.add_column(title, no_wrap=True, max_width=28, overflow="ellipsis")
        table.add_column("state", no_wrap=True)
        table.add_column("", no_wrap=True, min_width=14)
        table.add_column("", no_wrap=True, overflow="ellipsis")
        for line in lines:
            table.add_row(*_varying(line.record, keys), _state(line.record), *self._cells(line))
        hidden = len(self.lines) - len(lines)
        return Group(self._head(note), table, *([Text(f"and {hidden} more", style="dim")] if hidden else []))

    def _fitting(self, height: int) -> list[Line]:
        """As many lines as there is room for, those that matter most now; in the sweep's order."""
        lines = list(self.lines.values())
        if len(lines) <= height:
            return lines
        urgent = sorted(lines, key=lambda line: (ORDER.index(line.record.state), -line.number))[: height - 1]
        return [line for line in lines if any(line is other for other in urgent)]

    def _head(self, note: str) -> Text:
        counts = self._counts()
        parts = [Text(self.name, style="bold"), Text(f"{self.total} runs")]
        parts += [Text(f"{counts[s]} {s}", style=COLOURS.get(s, "dim")) for s in ORDER if counts[s]]
        parts.append(Text(clock(time.monotonic() - self.started)))
        parts.append(Text(note, style="yellow") if note else Text(f"eta {clock(self.eta())}", style="cyan"))
        return Text("  ").join(parts)

    def _cells(self, line: Line) -> list[RenderableType]:
        """How far a run is, or what it reached, or why it did not."""
        record, progress = line.record, line.progress
        if record.finished:
            return [Text(clock(record.seconds), style="dim", justify="right"), reached(record)]
        if record.state != "running":
            return [Text(""), Text(one_line(record.problem), style="red")]
        spent = clock(time.monotonic() - line.started) if line.started is not None else "another process:"
        if progress is None or progress.total <= 2:
            return [Text(""), Text(f"{spent} {progress.stage if progress else ''}".strip())]
        bar = ProgressBar(progress.total, progress.done, width=14)
        return [bar, Text(f"{spent} {progress.stage} {progress.done}/{progress.total}")]


def _running(record: RunRecord) -> RunRecord:
    return RunRecord(record.id, RunFiles(record.path), "running", record.varying)


def short_names(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or the whole one where two would read the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for name, key in zip(last, keys, strict=True)]


def _keys(records: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record.varying))


def _varying(record: RunRecord, keys: Sequence[str]) -> list[str]:
    return [record.varying.get(key, "") for key in keys] or ["defaults"]


def _state(record: RunRecord) -> Text:
    return Text(record.state, style=COLOURS.get(record.state, "dim"))


def reached(record: RunRecord) -> Text:
    """The win rates that a run reached, each in the colour of its verdict."""
    text = Text()
    for name, result in record.objectives.items():
        text.append(f"{name} ", style="dim")
        text.append(f"{record.reached(name):.3f}  ", style=VERDICT[result.verdict])
    return text


# --------------------------------------------------------------------------------------------- before and after
def _table(titles: Sequence[str], numbers: Sequence[str], widest: int | None = None) -> Table:
    """A table of columns of text, then of numbers."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in titles:
        table.add_column(title, no_wrap=True, max_width=widest, overflow="ellipsis")
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def show_results(records: Sequence[RunRecord]) -> None:
    """The table that a sweep ends with: a line a run, the best in bold; then the failures with their errors."""
    choice = best(records)
    if any(record.finished for record in records):
        say("")
        show(_results_table(records, choice.run))
    if any(result.verdict == "undecided" for record in records for result in record.objectives.values()):
        say("?: the 95 % interval holds the threshold")
    for record in records:
        if record.state in ("failed", "interrupted"):
            error = f": {one_line(record.problem)}" if record.problem or record.state == "failed" else ""
            say(f"{record.state:<14} {record.id}{error}")
    say("")
    say(f"best           {_told(choice)}")


def _told(choice: Choice) -> str:
    """The best run: the number that it was chosen by, and apart from it what was measured on test prompts."""
    winner, chosen_by = choice.run, choice.chosen_by()
    if winner is None or winner.primary is None or chosen_by is None:
        return f"none: {choice.reason}"
    exact = " (exact)" if winner.objectives[winner.primary].exact is not None else ""
    tested = f"{winner.reached(winner.primary):.3f}{exact} on test prompts"
    verdict = f", {TOLD[winner.verdict]}" if winner.verdict else ""
    if not choice.heldout:
        return f"{winner.id}: {winner.primary} {tested}, by which it was chosen{verdict}"
    return (
        f"{winner.id}: {winner.primary} {chosen_by:.3f} on held-out prompts, by which it was chosen; {tested}{verdict}"
    )


def _results_table(records: Sequence[RunRecord], winner: RunRecord | None) -> Table:
    keys, ended = _keys(records), [record for record in records if record.finished]
    names = list(dict.fromkeys(name for record in ended for name in record.names))
    judged = {n for record in ended for n, result in record.objectives.items() if result.satisfied is not None}
    table = _table([*(short_names(keys) or ["run"]), "state"], [*names, "KL", "warnings", "time"], widest=40)
    for record in records:
        kl, seconds = record.summary.get("kl"), record.seconds
        table.add_row(
            *_varying(record, keys),
            _state(record),
            *(_rate(record, name, name in judged) for name in names),
            "" if kl is None else f"{kl:.3f}",
            str(len(record.warnings)) if record.finished else "",
            "" if seconds is None else clock(seconds),
            style="bold" if record is winner else "",
        )
    return table


def _rate(record: RunRecord, name: str, judged: bool) -> Text:
    """A win rate, and in a column of which some are judged whether its threshold is kept."""
    if not record.finished or name not in record.objectives:
        return Text("")
    result = record.objectives[name]
    kept = {True: " yes", False: "  no", None: "    "}[result.satisfied]
    mark = kept + ("?" if result.verdict == "undecided" else " ") if judged else ""
    return Text(f"{record.reached(name):.3f}{mark}", style=VERDICT[result.verdict])


def show_plan(
    directory: Path, records: Sequence[RunRecord], total: int, retry: str, expected: Mapping[str, float], ended: int
) -> None:
    """What `sweep.dry_run=true` prints: each run, what would be done with it, and how long it is expected to take.

    `expected` are seconds by a run's id, going by `ended` runs; empty where nothing is known.
    """
    table = _table(["run", "now", "then"], ["time"])
    starting = []
    for record in records[:total]:
        then = _next(record, retry)
        seconds = expected.get(record.id) if then != "stays" else None
        starting += [] if then == "stays" else [record.id]
        now = record.state if record.state != "waiting" else "–"
        table.add_row(record.id, now, then, "" if seconds is None else clock(seconds))
    say(f"{total} runs in {directory}")
    if total > len(records):
        say(f"the search proposes {total} points; its first and last possible ones:")
    show(table)
    if not expected:
        say("time           not known: no run of this sweep has ended yet")
        return
    seconds = sum(expected[name] for name in starting) * max(1.0, total / max(1, len(records)))
    source = f"{ended} run{'s' * (ended != 1)} of this sweep"
    say(f"time           about {clock(seconds)} one after another, going by {source}")


def _next(record: RunRecord, retry: str) -> str:
    run = RunDirectory(record.path)
    if locked(run):
        return "running now"
    if retry == "all":
        return "anew" if record.state != "waiting" else "starts"
    if stays(record, retry):
        return "stays"
    step = read_json(run.status).get("step") if run.config.exists() and run.status.exists() else None
    return f"goes on from step {step}" if step else "starts"
