"""`mopo sweep tau=0.1,0.5`: a run at every point, each in a process of its own, and their numbers in results.csv.

The same command again, with the same sweep.name or sweep.dir, runs what is missing, failed or interrupted.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from mopo_cli.base.console import say
from mopo_cli.base.errors import UserError
from mopo_cli.base.processes import alone, interrupt
from mopo_cli.config import compose, schema, trust
from mopo_cli.runs.directory import RunDirectory, check_links, check_place, check_same_settings, locked
from mopo_cli.runs.record import RunRecord, read_point
from mopo_cli.sweeps.board import Board, Line, show_results
from mopo_cli.sweeps.points import Point, Points, Trial, compose_point, settings_of
from mopo_cli.sweeps.pools import Pool, apart
from mopo_cli.sweeps.results import draw, publish, stays, with_every_key, write_page, write_results
from mopo_cli.sweeps.worker import Job, forget, log_of

POLL = 0.5  # seconds between two looks at the runs
SEARCHED = 4  # trials of a search at once where the launcher sets no bound: the next ones learn from them


# --------------------------------------------------------------------------------------------- before anything starts
def check(trials: Sequence[Trial], directory: Path, settings: schema.SweepConfig) -> None:
    """UserError where a point cannot start: all are looked at before any does."""
    if not alone():
        raise UserError("mopo sweep: starts its own processes; launch `mopo train` for several on one run")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"sweep.dir={directory}: this is a file, not a directory")
    check_links(directory)
    there = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if there - {".lock"} and not there & {"sweep.json", "runs"}:
        raise UserError(f"sweep.dir={directory}: already in use, and not by a sweep; choose another")
    if locked(RunDirectory(directory)):
        raise UserError(f"sweep.dir={directory}: a sweep is going on there now; choose another sweep.dir or sweep.name")
    check_place(directory)
    starting = [settings_of(trial) for trial in trials if not stays(record_of(trial), settings.retry)]
    if starting:
        apart(check_points, starting)
    for trial in trials:
        if trial.run.config.exists() and settings.retry != "all":
            check_same_settings(trial.run, settings_of(trial))


def check_points(points: Sequence[dict[str, Any]]) -> None:
    """What `mopo train` would say of each point before it begins; in a process that has torch."""
    from mopo_cli.pipeline import train

    for settings in points:
        trust.find_own_modules(settings)
        train.check(compose.typed(OmegaConf.create(settings), schema.TrainConfig))


def record_of(trial: Trial) -> RunRecord:
    return read_point(trial.run, trial.point.varying)


# --------------------------------------------------------------------------------------------- while it runs
class Sweep:
    """A sweep while it runs: where its points come from, which are going on, and what became of the others."""

    def __init__(
        self, directory: Path, retry: str, points: Points, trials: dict[str, Trial], user_config_dir: str | None
    ):
        self.directory, self.retry, self.points, self.trials = directory, retry, points, trials
        self.user_config_dir = user_config_dir
        self.board = Board(directory.name, points.total)
        self.going: dict[str, Trial] = {}
        self.elsewhere: dict[str, Trial] = {}  # held by a process that an earlier sweep, or a user, has started
        self.others: list[RunRecord] = []  # runs of earlier sweeps in this directory that are not asked for now
        self.stopping = False

    def run(
        self, launcher: Any, earlier: Sequence[tuple[str, dict[str, str]]], expected: Sequence[float], again: str
    ) -> int:
        """Run everything and tell how it went.

        `expected` are the seconds that runs are expected to take, where that is known; `again` is the command that
        goes on.
        """
        if self.points.fixed:
            for trial in self.trials.values():
                self._add(trial)
        wanted = {*self.board.lines, *(point.id for point in self.points.known())}
        self.others = [
            read_point(RunDirectory(self.directory / "runs" / name), overrides)
            for name, overrides in earlier
            if name not in wanted and self.points.fixed
        ]
        old = signal.signal(signal.SIGTERM, interrupt)
        try:
            self.pool: Pool = launcher.open(self.directory, self.points.total)
            self.slots = self.pool.slots or (self.points.total if self.points.fixed else SEARCHED)
            self.board.slots, self.board.expected = self.slots, fmean(expected) if expected else None
            say(f"{self.points.total} runs in {self.directory}, {self.pool.description}")
            self._write("running")
            self._guarded(again)
        finally:
            signal.signal(signal.SIGTERM, old)
        return self._finish(again)

    def _guarded(self, again: str) -> None:
        """Whatever breaks the sweep off, its runs are stopped and their states written."""
        try:
            with self.board.shown():
                try:
                    self._drive()
                except BaseException:
                    self._break_off()
                    raise
        except KeyboardInterrupt:
            self._write("interrupted")
            show_results(self._records())
            say(f"interrupted; go on with: {again}")
            raise
        finally:
            self.pool.stop()

    def _drive(self) -> None:
        while True:
            for name, how in self.pool.ended().items():
                self._end(self.going.pop(name), how)
            for name in [name for name, trial in self.elsewhere.items() if not locked(trial.run)]:
                if self._room():
                    self._begin(self.elsewhere.pop(name))
            while self._room() and (point := self.points.next()) is not None:
                self._begin(self._trial(point))
            if not self.going and not self.elsewhere:
                return
            self.board.refresh()
            self.pool.wait(POLL)

    def _room(self) -> bool:
        return len(self.going) < self.slots

    def _trial(self, point: Point) -> Trial:
        if point.id not in self.trials:
            self.trials[point.id] = compose_point(point, self.directory, self.user_config_dir)
        trial = self.trials[point.id]
        if trial.point.id not in self.board.lines:
            self._add(trial)
        return trial

    def _add(self, trial: Trial) -> None:
        self.board.lines[trial.point.id] = Line(record_of(trial))

    def _begin(self, trial: Trial) -> None:
        """Start a run, or take it as it is where it has ended, or wait for it where another process has it."""
        name, record = trial.point.id, record_of(trial)
        held = self.pool.holds(name)
        if not held and stays(record, self.retry):
            self._took(trial, record, seen=False)
        elif not held and locked(trial.run):
            self.elsewhere[name] = trial
            self.board.elsewhere(name)
        else:
            if self.retry == "all" and not held:
                forget(trial.run)
            self.board.begin(name)
            self._start(trial)

    def _start(self, trial: Trial) -> None:
        job = Job(trial.point.id, settings_of(trial), str(trial.run.path), os.getcwd(), trial.point.overrides)
        self.going[trial.point.id] = trial
        self._write("running")
        try:
            self.pool.start(job)
        except UserError as error:
            del self.going[trial.point.id]
            self._end(trial, str(error))

    def _end(self, trial: Trial, how: str) -> None:
        """A run's process has gone; `how` says what ended it where that came from outside."""
        run = trial.run
        if locked(run):
            self.elsewhere[trial.point.id] = trial
            return
        if not run.status.exists() or run.state() == "running":  # it had no time to say
            run.path.mkdir(parents=True, exist_ok=True)
            error = how or f"its process ended without a word; see {log_of(run)}"
            run.set_state(*("interrupted", None, None) if self.stopping else ("failed", None, error))
        self._took(trial, record_of(trial), seen=True)

    def _took(self, trial: Trial, record: RunRecord, seen: bool) -> None:
        self.board.end(record, seen)
        self.points.tell(trial.point, record)
        self._write("running")

    def _break_off(self) -> None:
        self.stopping = True
        self.board.refresh("stopping the runs")
        if not self.board.live:
            say("stopping the runs")
        self.pool.stop()
        for trial in self.going.values():
            self._end(trial, "")

    def _records(self) -> list[RunRecord]:
        return with_every_key([line.record for line in self.board.lines.values()] + self.others)

    def _write(self, state: str) -> None:
        write_results(self.directory, self._records(), state)

    def _finish(self, again: str) -> int:
        records = self._records()
        failed = [line for line in self.board.lines.values() if not line.record.finished]
        self._write("failed" if failed else "done")
        ended = any(record.finished for record in records)
        with ThreadPoolExecutor(1) as beside:  # the page is made while the figures are
            page = beside.submit(apart, write_page, self.directory) if ended and self.board.count else None
            figures = apart(draw, self.directory) if page else []
            upload = self._publish(figures, again) if self.board.count else None
        show_results(records)
        say(f"results        {self.directory / 'results.csv'}")
        for path in figures:
            say(f"figure         {path}")
        if page:
            say(page.result())
        if failed:
            say(f"log            {self.directory / 'runs' / '*' / 'log.txt'}")
            say(f"{len(failed)} of {self.points.total} runs have not ended well; go on with: {again}")
        if upload:
            say(f"upload to Weights & Biases: {upload}")
        return 1 if failed else 0

    def _publish(self, figures: Sequence[Path], again: str) -> str | None:
        """The sweep's own run on W&B; the command that uploads everything that was logged offline."""
        first = next(iter(self.trials.values()))
        logger: schema.LoggerConfig = compose.typed(first.composed, schema.TrainConfig).logger
        if logger.name != "wandb":
            return None
        logger.tags = []
        sync = apart(publish, self.directory, logger, self._records(), again, figures)
        return sync and f"wandb sync {self.directory}/runs/*/wandb/offline-run-* {self.directory}/wandb/offline-run-*"
