"""What a person sees: a progress bar for each stage in a terminal, plain lines elsewhere, and the final table."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TextIO
from unicodedata import category

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn
from rich.table import Column, Table
from rich.text import Text

from mopo_cli.base.processes import is_main

console = Console(soft_wrap=False, highlight=False)
PLAIN_EVERY = 10.0  # seconds between two plain lines of one stage
PLAIN_WIDTH = 200  # of a table that goes to a file or a pipe
follower: Callable[[str, int, int], None] | None = None  # told of every stage: its name, steps done, steps in all


def clock(seconds: float | None) -> str:
    """0:07, 12:34 or 1:02:03; -:-- where it is not known yet."""
    if seconds is None:
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class _Name(ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        return Text(f"{task.description:<16}", style="bold")


class _Numbers(ProgressColumn):
    """Steps and times; of a stage that has ended, only how long it took. Then what was last measured."""

    def render(self, task: bars.Task) -> Text:
        counted = task.total is not None and task.total > 1
        steps = f"{int(task.completed)}/{int(task.total)}" if task.total and counted else ""
        left = f" eta {clock(task.time_remaining)}" if counted and not task.finished else ""
        elapsed = clock(task.finished_time if task.finished else task.elapsed)
        return Text.assemble(f"{steps:>7} {elapsed:>5}", (left, "cyan"), "  ", (task.fields["numbers"], "dim"))


class Progress:
    """Progress of one stage; `advance` takes the step just done and a few numbers worth reading."""

    def __init__(
        self, name: str, total: int, progress: bars.Progress | None = None, start: int = 0, quiet: bool = False
    ):
        self.name, self.total, self.progress, self.start, self.quiet = name, total, progress, start, quiet
        self.started = self.printed = time.monotonic()
        # A stage of one step has nothing to count: its bar only shows that it is alive.
        known = total if total > 1 else None
        self.task = progress.add_task(name, total=known, completed=start, numbers="") if progress else None
        self.counted, self.rows, self.since = "", 0, self.started

    def advance(self, done: int, **numbers: float) -> None:
        if follower is not None:
            follower(self.name, done, self.total)
        text = "  ".join(f"{key} {value:.3g}" for key, value in numbers.items())
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, total=self.total, numbers=text)
            return
        now = time.monotonic()
        if not self.quiet and done < self.total and now - self.printed >= PLAIN_EVERY:
            self.printed = now
            left = (self.total - done) * (now - self.started) / max(done - self.start, 1)
            _write(f"{self.name}: {done}/{self.total}  {text}  eta {clock(left)}")

    def count(self, rows: int, done: str) -> None:
        """So many rows more have been read, say; nobody knows yet how many there are."""
        now = time.monotonic()
        if done != self.counted:
            self.counted, self.rows, self.since = done, 0, now
        self.rows += rows
        text = f"{self.rows:,} rows {done}  {self.rows / max(now - self.since, 0.1):,.0f} rows/s"
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, numbers=text)
        elif rows and not self.quiet and now - self.printed >= PLAIN_EVERY:
            self.printed = now
            _write(f"{self.name}: {text}")


_open: list[Progress] = []  # the stage that runs now


def count_rows(rows: int, done: str = "read") -> None:
    """Tells the stage that runs now, if there is one, what has been done to so many rows more."""
    if _open:
        _open[-1].count(rows, done)


def stage_name() -> str:
    """Of the stage that runs now."""
    return _open[-1].name if _open else "training"


@contextmanager
def stage(name: str, total: int, start: int = 0, brief: bool = False) -> Iterator[Progress]:
    """One stage of a run, from step `start`; says what it is when it starts and how long it took when it ends.

    A brief one is not worth these lines where nobody watches; it still says how far it is, every PLAIN_EVERY seconds.
    """
    with _shown(name, total, start, brief) as running:
        _open.append(running)
        try:
            yield running
        finally:
            _open.pop()


@contextmanager
def _shown(name: str, total: int, start: int, brief: bool) -> Iterator[Progress]:
    if follower is not None:
        follower(name, start, total)
    if not is_main():
        yield Progress(name, total, quiet=True)
    elif console.is_interactive:
        columns = (
            _Name(Column(no_wrap=True, min_width=16)),
            BarColumn(bar_width=16, table_column=Column(min_width=8)),
            _Numbers(Column(no_wrap=True, overflow="ellipsis")),
        )
        with bars.Progress(*columns, console=console) as progress:
            yield Progress(name, total, progress, start)
    else:
        running = Progress(name, total, start=start)
        if not brief:
            _write(f"{name}: started")
        yield running
        if not brief:
            _write(f"{name}: done in {time.monotonic() - running.started:.1f}s")


def printable(text: str) -> str:
    """For a terminal, the text without control characters, which could write anything on it; else as it is."""
    if not console.is_terminal:
        return text
    return "".join(c for c in text if c in "\n\t" or category(c) != "Cc")


def say(text: str) -> None:
    """One line, as it is: a path is not wrapped, and brackets stay."""
    if is_main() and console.is_interactive:
        console.print(printable(text), markup=False, soft_wrap=True)
    elif is_main():
        _write(text)


def show(table: RenderableType, width: int = PLAIN_WIDTH) -> None:
    """A table: as wide as the terminal, or as wide as it needs to be elsewhere, up to `width`."""
    if is_main() and console.is_interactive:
        console.print(table)
    elif is_main():
        plain = Console(file=StringIO(), width=width)
        plain.print(table)
        _write("\n".join(line.rstrip() for line in plain.file.getvalue().splitlines()))  # type: ignore[attr-defined]


def table(left: Iterable[str], right: Iterable[str] = (), gap: int = 3, header: str = "bold") -> Table:
    """A table without lines: columns of text, then columns of numbers, so many spaces apart."""
    columns = [Column(title, no_wrap=True) for title in left]
    columns += [Column(title, justify="right", no_wrap=True) for title in right]
    return Table(*columns, header_style=header, box=None, pad_edge=False, padding=(0, gap, 0, 0))


def warn(text: str) -> None:
    """A warning, wrapped beside its heading in a terminal; a line of standard error elsewhere."""
    if is_main() and console.is_interactive:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text("warning", style="bold yellow"), Text(printable(text)))
        console.print(grid)
    elif is_main():
        _write(f"warning: {text}", sys.stderr)


def _write(text: str, file: TextIO | None = None) -> None:
    """A line at once. Where nobody reads any more (`mopo train | head`), the run goes on without a word."""
    out = file or sys.stdout
    try:
        print(text, file=out, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
