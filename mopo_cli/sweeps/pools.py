"""Where the runs of a sweep go: processes of this machine, Slurm jobs (submitit) or Ray tasks.

A launcher is a record of settings (conf/launcher/). `open` gives the pool that starts jobs and tells which have ended;
what became of a run is read from its directory, never from the pool.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mopo_cli.base.errors import UserError
from mopo_cli.base.processes import interrupt
from mopo_cli.sweeps.worker import Job, work

PRELOAD = [
    "mopo_cli.pipeline.train",
    "mopo_cli.report.build",
    "transformers.generation.utils",
]
PATIENCE = 60.0  # seconds for an interrupted run to put its state down
T = TypeVar("T")


class Pool(Protocol):
    """Does jobs; `slots` at once, or as many as there are where it is None."""

    slots: int | None
    description: str

    def holds(self, name: str) -> bool:
        """Whether a sweep that has gone has left this run going on here; `start` then only takes it up."""
        ...

    def start(self, job: Job) -> None: ...

    def ended(self) -> dict[str, str]:
        """The jobs that ended since the last call, each with how it was ended from outside ("" where it was not)."""
        ...

    def wait(self, seconds: float) -> None:
        """Until a job ends, or so long."""
        ...

    def stop(self) -> None:
        """Interrupt whatever is going on, and wait for it."""
        ...


# --------------------------------------------------------------------------------------------- processes
def start_server() -> None:
    """Start importing what every run needs, once, in a server that processes are forked from. Returns at once.

    The server is deaf to Ctrl-C, and so are its children: the sweep tells them itself, once each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "mopo_cli.sweeps.pools"])
    old = signal.signal(signal.SIGINT, signal.SIG_IGN) if threading.current_thread() is threading.main_thread() else 0
    try:
        forkserver.ensure_running()
    finally:
        if old:
            signal.signal(signal.SIGINT, old)


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a process of its own, which has everything imported; raises what it raises."""
    from concurrent.futures import ProcessPoolExecutor

    start_server()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(_with_environment, dict(os.environ), os.getcwd(), function, arguments).result()


def _with_environment(environment: dict[str, str], cwd: str, function: Callable[..., T], arguments: tuple) -> T:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    return function(*arguments)


class Processes:
    """Each job a process of this machine, killed without harm to the others; none outlives the sweep."""

    def __init__(self, jobs: int, threads: int | None, gpus: list[str]):
        self.slots: int | None = jobs
        self.threads, self.gpus = threads, gpus
        self.going: dict[str, Any] = {}
        self.slot_of: dict[str, int] = {}
        device = [f"GPU {', '.join(gpus)}"] if gpus else []
        each = [f"{threads} thread{'s' * (threads != 1)} each"] if threads else []
        details = f" ({', '.join(device + each)})" if device or each else ""
        self.description = ("one after another" if jobs == 1 else f"{jobs} at a time") + details
        start_server()

    def holds(self, name: str) -> bool:
        return False

    def start(self, job: Job) -> None:
        slot = min(set(range(self.slots or 1)) - {self.slot_of[name] for name in self.going})
        self.slot_of[job.id] = slot
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_child, args=(job, environment, self.threads), name=job.id)
        process.start()
        self.going[job.id] = process

    def ended(self) -> dict[str, str]:
        finished = {name: process for name, process in self.going.items() if not process.is_alive()}
        for name, process in finished.items():
            process.join()
            del self.going[name]
        return {name: _exit_note(process.exitcode) for name, process in finished.items()}

    def wait(self, seconds: float) -> None:
        multiprocessing.connection.wait([process.sentinel for process in self.going.values()], seconds)

    def stop(self) -> None:
        for process in self.going.values():
            process.terminate()
        until = time.monotonic() + PATIENCE
        try:
            for process in self.going.values():
                process.join(max(0.0, until - time.monotonic()))
        finally:
            for process in self.going.values():
                process.kill()
            self.going.clear()


def _exit_note(status: int | None) -> str:
    if not status:
        return ""
    if status > 0:
        return f"its process ended with exit status {status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"killed by signal {-status}{hint}"


def _child(job: Job, environment: dict[str, str], threads: int | None) -> None:
    """The life of one process: it ends with its job, or with the sweep."""
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads:
        import torch

        torch.set_num_threads(threads)
    work(job)


def _end_with_parent() -> None:
    """A sweep that was killed leaves no process behind: its runs are interrupted, as by Ctrl-C."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Local:
    """One run after another, each in a process of its own."""

    name: str = "local"

    def check(self) -> None:
        pass

    def open(self, directory: Path, runs: int) -> Pool:
        return Processes(1, None, [])


@dataclass
class Parallel:
    """Several runs at once on this machine: one to a GPU, or as many as its cores carry."""

    name: str = "parallel"
    jobs: int | None = None
    threads: int | None = None

    def check(self) -> None:
        for key in ("jobs", "threads"):
            require(getattr(self, key) is None or getattr(self, key) >= 1, key, getattr(self, key), "1 or more")

    def open(self, directory: Path, runs: int) -> Pool:
        gpus, cores = visible_gpus(), usable_cores()
        jobs = self.jobs or len(gpus) or max(1, cores // (self.threads or 1))
        jobs = max(1, min(jobs, runs))
        return Processes(jobs, self.threads or max(1, cores // jobs), gpus)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name and name != "-1"]
    return [str(number) for number in range(apart(_count_gpus))] if shutil.which("nvidia-smi") else []


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """UserError where a setting of a launcher does not hold."""
    if not condition:
        raise UserError(f"launcher.{key}={value}: must be {allowed}")
