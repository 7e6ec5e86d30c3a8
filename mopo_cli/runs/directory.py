"""A run directory: who owns it, what state it is in, and files that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mopo_cli.base.errors import RunLostError, UserError
from mopo_cli.base.files import read_json, write_json
from mopo_cli.base.secrets import holds_masked, masked
from mopo_cli.base.text import flat, one_line, shown
from mopo_cli.config import trust
from mopo_cli.config.compose import with_current_names

if TYPE_CHECKING:
    from filelock import FileLock

ENDED = ("done", "infeasible")
STATES = ("running", *ENDED, "failed", "interrupted")
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system that has none
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


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads as OmegaConf does, whose own parser is ten times slower: 1e-05 is a number, and a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
        return self.recorded_state() if self.status.exists() else None

    def recorded_state(self) -> str:
        """The state that status.json tells; UserError where there is no such file, or it is no status."""
        record = read_json(self.status)
        state = record.get("state") if isinstance(record, dict) else None
        if state not in STATES:
            raise UserError(f"{self.status}: state is {state!r}; must be one of {', '.join(STATES)}")
        return state

    def known_state(self) -> str:
        """The state, or "unknown" where nothing tells it."""
        try:
            return self.state() or "unknown"
        except UserError:
            return "unknown"

    def set_state(self, state: str, step: int | None = None, error: str | None = None) -> None:
        """Write status.json; the step stays what it was unless given, and is None where the file was torn."""
        if step is None:
            step = self._step()
        error = masked(error)
        try:
            write_json(self.status, {"state": state, "step": step, "error": error})
        except OSError as full:
            if full.errno not in FULL or not self.status.exists():
                raise
            text = json.dumps({"state": state, "step": step, "error": error and error[:500]})
            with open(self.status, "r+", encoding="utf-8") as file:  # there is no room beside it
                file.write(text)
                file.truncate()

    def _step(self) -> int | None:
        try:
            record = read_json(self.status)
        except UserError:
            return None
        return record.get("step") if isinstance(record, dict) else None

    def check_there(self, file: Path | None = None) -> None:
        """RunLostError where the directory is gone, going by `file` (config.yaml): nobody trains on for nothing."""
        file = file or self.config
        if not file.exists():
            raise RunLostError(
                f"run.dir={self.path}: was removed or moved while its run went on ({file.name} is not there any more); "
                "what was not written by then is lost"
            )

    def settings(self) -> dict[str, Any]:
        """The resolved config that the run was started with; UserError where config.yaml is missing or broken."""
        try:
            text = self.config.read_text(encoding="utf-8")
            values = yaml.load(text, _Loader)
        except FileNotFoundError:
            raise UserError(f"{self.config}: no such file; {self.path} holds no run") from None
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.config}: cannot be read ({one_line(error)})") from None
        if not isinstance(values, dict) or not values:
            raise UserError(f"{self.config}: holds no config; the run may have been cut off")
        try:
            return with_current_names(trust.resolved(values, self.config))
        except RecursionError:
            raise UserError(f"{self.config}: holds itself by an alias (&, *)") from None
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{self.config}: is not the config of a run ({one_line(error)})") from None

    def results(self) -> dict[str, Any]:
        """What summary.json says; UserError where it is missing, torn or no summary."""
        values = read_json(self.summary)
        if not isinstance(values, dict) or "objectives" not in values:
            raise UserError(f"{self.summary}: not the summary of a run (it has no objectives)")
        return values


# --------------------------------------------------------------------------------------------- owning one
def check_links(path: Path) -> None:
    """UserError where something in the directory of a run or sweep is a link that leads out of it.

    What it leads to would be given away by reading, and changed by writing. W&B's own folders are left out: they hold
    links to its logs, and mopo reads nothing there.
    """
    root = os.path.realpath(path)
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            entry = os.path.join(place, name)
            if os.path.islink(entry) and os.path.commonpath([root, os.path.realpath(entry)]) != root:
                found = path / os.path.relpath(entry, root)
                raise UserError(
                    f"{found}: a link to {os.path.realpath(entry)}, out of {path}; mopo neither reads nor writes "
                    "through it. Put what it leads to in its place, where you trust it"
                )
        folders[:] = [name for name in folders if name != "wandb"]


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
    check_links(run.path)
    if locked(run):
        raise _taken(path)
    if resume:
        _check_resumable(run)
        return run
    raise UserError(
        f"run.dir={path}: already in use (state: {run.known_state()}). "
        "Choose another run.dir or run.name, or go on with it by run.resume=true"
    )


def _taken(path: str | Path) -> UserError:
    return UserError(f"run.dir={path}: a run is going on there now; choose another run.dir or run.name")


def check_place(path: Path) -> None:
    """UserError where no directory could be made or written at `path`."""
    above = path.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise UserError(f"run.dir={path}: {above} is a file, not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={path}: no permission to write in {above}")


def _check_resumable(run: RunDirectory) -> None:
    state = run.state()
    if state is None:
        raise UserError(f"run.resume=true, but run.dir={run.path} holds no run (no status.json)")
    if state in ENDED:
        raise UserError(f"run.resume=true, but the run in run.dir={run.path} has ended (state: {state})")


def open_run(run: RunDirectory) -> ExitStack:
    """Create the directory and hold it: no other process gets it until the result is closed, or this process ends.

    A lock, not a process id in a file: the kernel lets go of it however the process ends, and ids come round again.
    """
    from filelock import Timeout

    lock = _lock_of(run)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise _taken(run.path) from None
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise UserError(f"run.dir={run.path}: cannot be created ({error.strerror})") from error
    held = ExitStack()
    held.callback(lock.release)
    return held


def _lock_of(run: RunDirectory) -> FileLock:
    from filelock import FileLock  # here, as it takes longer to import than all else that finds a run

    return FileLock(run.path / ".lock", timeout=0, thread_local=False)


def locked(run: RunDirectory) -> bool:
    """Whether a process has this run now."""
    if not (run.path / ".lock").exists():
        return False
    from filelock import Timeout

    try:
        with _lock_of(run):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a file system without locks
        return False


# --------------------------------------------------------------------------------------------- going on with one
def check_same_settings(run: RunDirectory, settings: dict[str, Any]) -> None:
    """UserError where a run would go on under other settings than it was started with; names the first."""
    trust.check_typed(run.settings(), settings, run.config)
    started, now = dict(flat(run.settings())), dict(flat(masked(settings)))
    for key in [*now, *(key for key in started if key not in now)]:
        if key.partition(".")[0] not in FREE_ON_RESUME and started.get(key) != now.get(key):
            before, after = shown(started.get(key)), shown(now.get(key))
            secret = " (with the secret, which was masked when it was written)" if holds_masked(before) else ""
            raise UserError(
                f"{key}={after}: the run in run.dir={run.path} was started with {before}, and goes on with the same "
                f"settings only (its config.yaml has them). Give {key}={before}{secret}, or start another run"
            )
