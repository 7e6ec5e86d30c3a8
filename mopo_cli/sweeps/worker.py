"""One run of a sweep, in a process of its own: what it says goes to log.txt, how far it is to progress.json.

Whoever started it need not be there any more: everything that matters is in the run directory.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mopo_cli.base import invocation
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json
from mopo_cli.base.secrets import masked
from mopo_cli.config import trust
from mopo_cli.runs.directory import ENDED, RunDirectory, locked

EVERY = 0.5  # seconds between two writes of progress.json


@dataclass(frozen=True, slots=True)
class Job:
    """A run as it travels to the process that does it: plain values, so that any machine can read them."""

    id: str
    settings: dict[str, Any]  # the resolved train config
    directory: str
    cwd: str  # relative paths in the settings start here
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What would run it alone: only a sweep takes a preset."""
        preset = any(override.lstrip("+").startswith("experiment=") for override in self.overrides)
        return "sweep" if preset else "train"


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a run is: the stage, its steps, and the seconds since the stage and this attempt began."""

    stage: str
    done: int
    total: int
    stage_seconds: float
    seconds: float
    stages: dict[str, list[float]] = field(default_factory=dict)  # those that ended: name -> [steps, seconds]


def log_of(run: RunDirectory) -> Path:
    return run.path / "log.txt"


def progress_of(run: RunDirectory) -> JobProgress | None:
    """What progress.json says; None where there is none (yet), or it is no progress."""
    try:
        return JobProgress(**read_json(run.path / "progress.json"))
    except (UserError, TypeError):
        return None


class Reporter:
    """Follows the stages of a run and keeps progress.json up to date."""

    def __init__(self, path: Path):
        self.path = path
        self.started = self.stage_started = time.monotonic()
        self.written = 0.0
        self.stage, self.first, self.done, self.total = "start", 0, 0, 1
        self.stages: dict[str, list[float]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.close_stage()
            self.stage, self.first, self.stage_started, self.written = stage, done, now, 0.0
        self.done, self.total = done, total
        if now - self.written >= EVERY:
            self.write()

    def close_stage(self) -> None:
        self.stages[self.stage] = [self.done - self.first, round(time.monotonic() - self.stage_started, 3)]

    def write(self) -> None:
        """Readers see a whole file or none; it need not survive a power cut, so nothing waits for the disk."""
        self.written = now = time.monotonic()
        record = JobProgress(
            self.stage,
            self.done,
            self.total,
            round(now - self.stage_started, 3),
            round(now - self.started, 3),
            self.stages,
        )
        temporary = self.path.with_name(".progress.json.tmp")
        temporary.unlink(missing_ok=True)
        temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")
        temporary.replace(self.path)


def work(job: Job) -> None:
    """Begin the run, or go on with it from its checkpoint; how it ended is in status.json. Never raises Exception.

    Nothing is done where the run has ended or another process holds it, so starting it once too often is harmless.
    """
    os.chdir(job.cwd)
    trust.find_own_modules(job.settings)  # whoever started the sweep has typed them
    invocation.begin((job.command, *job.overrides))
    run = RunDirectory(Path(job.directory))
    if locked(run) or (run.status.exists() and run.state() in ENDED):
        return
    run.path.mkdir(parents=True, exist_ok=True)
    with _output_to(log_of(run)):
        _train(job, run)


def _train(job: Job, run: RunDirectory) -> None:
    from mopo_cli.base import console

    report = Reporter(run.path / "progress.json")
    console.console.is_interactive = False
    console.follower = report
    try:
        _attempt(job, run)
    except UserError as error:
        _failed(run, error)
    except Exception as error:
        print(masked(traceback.format_exc()), file=sys.stderr)
        _failed(run, error)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        if not locked(run):
            run.set_state("interrupted")
    finally:
        console.follower = None
        report.close_stage()
        report.write()


def _attempt(job: Job, run: RunDirectory) -> None:
    from omegaconf import OmegaConf

    from mopo_cli.base.processes import build_accelerator
    from mopo_cli.config import compose, schema
    from mopo_cli.pipeline import train

    composed = OmegaConf.create(job.settings)
    composed.run.resume = bool(run.config.exists() and run.state())
    if run.status.exists():
        run.set_state("running")  # not what an earlier attempt ended with
    config: schema.TrainConfig = compose.typed(composed, schema.TrainConfig)
    train.check(config)
    train.train(config, composed, run, build_accelerator())


def _failed(run: RunDirectory, error: Exception) -> None:
    """Say so in status.json, unless somebody else has taken the run meanwhile."""
    text = masked(f"{type(error).__name__}: {error}")
    print(f"failed: {text}", flush=True)
    if not locked(run):
        run.set_state("failed", error=text)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Standard output and error, of libraries as well, appended to a file."""
    streams = os.dup(1), os.dup(2)
    with open(path, "a", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), streams, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def forget(run: RunDirectory) -> None:
    """Remove a run, so that it begins anew."""
    shutil.rmtree(run.path, ignore_errors=True)
