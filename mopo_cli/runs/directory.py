"""A run directory: who owns it, what state it is in, and files that are whole or absent."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json, write_json
from mopo_cli.base.text import flat, one_line, shown
from mopo_cli.config.compose import with_current_names

STATES = ("running", "done", "infeasible", "failed", "interrupted")
FREE_ON_RESUME = (
    "run",
    "sweep",
    "logger",
    "debug",
    "log_every",
    "checkpoint_every",
    "cache",
    "token_budget",
    "evaluation",
)  # change no trained number


@dataclass(frozen=True)
class RunDirectory:
    """The paths of the contract, in one place."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def reference(self) -> Path:
        return self.path / "reference"

    @property
    def preference_model(self) -> Path:
        return self.path / "preference_model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def state(self) -> str | None:
        """The state that status.json tells; None where there is no such file, UserError where it is no status."""
        if not self.status.exists():
            return None
        record = read_json(self.status)
        state = record.get("state") if isinstance(record, dict) else None
        if state not in STATES:
            raise UserError(f"{self.status}: state is {state!r}; must be one of {', '.join(STATES)}")
        return state

    def set_state(self, state: str, step: int | None = None, error: str | None = None) -> None:
        """Write status.json; the step stays what it was unless given."""
        if step is None and self.status.exists():
            record = read_json(self.status)
            step = record.get("step") if isinstance(record, dict) else None
        write_json(self.status, {"state": state, "step": step, "error": error})

    def settings(self) -> dict[str, Any]:
        """The resolved config that the run was started with; UserError where config.yaml is missing or broken."""
        import yaml
        from omegaconf import OmegaConf

        try:
            values = OmegaConf.to_container(OmegaConf.load(self.config), resolve=True)
        except FileNotFoundError:
            raise UserError(f"{self.config}: no such file; {self.path} holds no run") from None
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.config}: cannot be read ({one_line(error)})") from None
        if not isinstance(values, dict) or not values:
            raise UserError(f"{self.config}: holds no config; the run may have been cut off")
        return with_current_names(values)

    def results(self) -> dict[str, Any]:
        """What summary.json says; UserError where it is missing, torn or no summary."""
        values = read_json(self.summary)
        if not isinstance(values, dict) or "objectives" not in values:
            raise UserError(f"{self.summary}: not the summary of a run (it has no objectives)")
        return values


# --------------------------------------------------------------------------------------------- owning one
def claim(path: str | Path, resume: bool) -> RunDirectory:
    """Check that a run may use this directory; creates nothing, so that a refusal leaves nothing behind."""
    if not str(path):
        raise UserError("run.dir: must not be empty")
    run = RunDirectory(Path(path).expanduser())
    check_place(run.path)
    if not (run.path.is_dir() and any(run.path.iterdir())):
        if resume:
            raise UserError(f"run.resume=true, but run.dir={path} holds no run to go on with")
        return run
    if locked(run):
        raise UserError(f"run.dir={path}: a run is going on there now; choose another run.dir or run.name")
    if resume:
        _check_resumable(run)
        return run
    raise UserError(
        f"run.dir={path}: already in use (state: {_known_state(run)}). "
        "Choose another run.dir or run.name, or go on with it by run.resume=true"
    )


def check_place(path: Path) -> None:
    """UserError where no directory could be made or written at `path`."""
    above = path.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise UserError(f"run.dir={path}: {above} is a file, not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={path}: no permission to write in {above}")


def _known_state(run: RunDirectory) -> str:
    try:
        return run.state() or "unknown"
    except UserError:
        return "unknown"


def _check_resumable(run: RunDirectory) -> None:
    state = run.state()
    if state is None:
        raise UserError(f"run.resume=true, but run.dir={run.path} holds no run (no status.json)")
    if state in ("done", "infeasible"):
        raise UserError(f"run.resume=true, but the run in run.dir={run.path} has ended (state: {state})")


def open_run(run: RunDirectory) -> TextIO:
    """Create the directory and hold it: no other process gets it until the returned file is closed, or this one ends.

    A lock, not a process id in a file: the kernel lets go of it however the process ends, and ids come round again.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        file = open(_lock_of(run), "a", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise UserError(f"run.dir={run.path}: cannot be created ({error.strerror})") from error
    if not _take(file):
        file.close()
        raise UserError(f"run.dir={run.path}: a run is going on there now; choose another run.dir or run.name")
    return file


def _lock_of(run: RunDirectory) -> Path:
    return run.path / ".lock"


def _take(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def locked(run: RunDirectory) -> bool:
    if not _lock_of(run).exists():
        return False
    with open(_lock_of(run), "a", encoding="utf-8") as file:
        return not _take(file)


# --------------------------------------------------------------------------------------------- going on with one
def check_same_settings(run: RunDirectory, settings: dict[str, Any]) -> None:
    """UserError where a run would go on under other settings than it was started with; names the first."""
    started, now = dict(flat(run.settings())), dict(flat(settings))
    for key in [*now, *(key for key in started if key not in now)]:
        if key.partition(".")[0] not in FREE_ON_RESUME and started.get(key) != now.get(key):
            before, after = shown(started.get(key)), shown(now.get(key))
            raise UserError(
                f"{key}={after}: the run in run.dir={run.path} was started with {before}, and goes on with the same "
                f"settings only (its config.yaml has them). Give {key}={before}, or start another run"
            )
