"""Where the runs of a sweep go: processes of this machine, Slurm jobs (submitit) or Ray tasks.

A launcher is a record of settings (conf/launcher/). `open` gives the pool that starts tasks and tells which have ended;
what became of a run is read from its directory, never from the pool.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mopo_cli.errors import UserError, needed
from mopo_cli.runs import read_json, write_json
from mopo_cli.worker import Task, work

PRELOAD = ["mopo_cli.train", "mopo_cli.figures", "matplotlib.backends.backend_agg", "transformers.generation.utils"]
PATIENCE = 60.0  # seconds for an interrupted run to put its state down
T = TypeVar("T")


class Pool(Protocol):
    """Runs tasks; `slots` at once, or as many as there are where it is None."""

    slots: int | None
    description: str

    def holds(self, name: str) -> bool:
        """Whether a sweep that has gone has left this run going on here; `start` then only takes it up."""
        ...

    def start(self, task: Task) -> None: ...

    def ended(self) -> dict[str, str]:
        """The tasks that ended since the last call, each with how it was ended from outside ("" where it was not)."""
        ...

    def wait(self, seconds: float) -> None:
        """Until a task ends, or so long."""
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
    context.set_forkserver_preload([*PRELOAD, "mopo_cli.launchers"])
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
    """Each task a process of this machine, killed without harm to the others; none outlives the sweep."""

    def __init__(self, jobs: int, threads: int | None, gpus: list[str]):
        self.slots: int | None = jobs
        self.threads, self.gpus = threads, gpus
        self.going: dict[str, Any] = {}
        self.slot_of: dict[str, int] = {}
        each = f"{threads} thread{'s' * (threads != 1)} each" if threads else ""
        device = f"GPU {', '.join(gpus)}" if gpus else ""
        details = ", ".join(text for text in (device, each) if text)
        self.description = ("one after another" if jobs == 1 else f"{jobs} at a time") + (
            f" ({details})" if details else ""
        )
        start_server()

    def holds(self, name: str) -> bool:
        return False

    def start(self, task: Task) -> None:
        slot = min(set(range(self.slots or 1)) - {self.slot_of[name] for name in self.going})
        self.slot_of[task.id] = slot
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_child, args=(task, environment, self.threads), name=task.id)
        process.start()
        self.going[task.id] = process

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


def _child(task: Task, environment: dict[str, str], threads: int | None) -> None:
    """The life of one process: it ends with its task, or with the sweep."""
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads:
        import torch

        torch.set_num_threads(threads)
    work(task)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


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
            _require(getattr(self, key) is None or getattr(self, key) >= 1, key, getattr(self, key), "1 or more")

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


def _require(condition: bool, key: str, found: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"launcher.{key}={found}: must be {allowed}")


# --------------------------------------------------------------------------------------------- Slurm


@dataclass
class Slurm:
    """Each run a Slurm job, submitted through submitit. The directory of the sweep must be one that the nodes share."""

    name: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    timeout_min: int = 1440
    cpus_per_task: int = 4
    gpus_per_node: int | None = None
    mem_gb: float | None = None
    requeues: int = 3
    jobs: int | None = None
    poll: float = 5.0
    additional_parameters: Any = None

    def check(self) -> None:
        needed("submitit", "slurm")
        for key in ("timeout_min", "cpus_per_task", "poll"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "above 0")
        _require(self.jobs is None or self.jobs >= 1, "jobs", self.jobs, "1 or more, or null")
        missing = [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]
        if missing:
            raise UserError(f"launcher=slurm: there is no {missing[0]} here; run mopo where Slurm's commands are")
        reached = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True)
        if reached.returncode:
            raise UserError(f"launcher=slurm: squeue says: {' '.join(reached.stderr.split())}")

    def open(self, directory: Path, runs: int) -> Pool:
        return SlurmJobs(self, directory)


class SlurmJobs:
    """Jobs are written down beside the runs, so that a sweep that comes back finds those that are still going on."""

    GRACE = 5.0  # seconds that a shared file system may take to show what a job wrote last
    LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED")
    LIVE += ("STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "RESV_DEL_HOLD", "SPECIAL_EXIT", "PREEMPTED")

    def __init__(self, settings: Slurm, directory: Path):
        submitit = needed("submitit", "slurm")
        self.slots = settings.jobs
        self.poll = settings.poll
        self.folder = (directory / "jobs").absolute()
        self.description = f"Slurm jobs{f' in {settings.partition}' if settings.partition else ''}"
        self.going: dict[str, str] = {}
        self.over: dict[str, tuple[float, str]] = {}
        self.asked = 0.0
        self.executor = submitit.SlurmExecutor(self.folder, max_num_timeout=settings.requeues)
        given = {
            "partition": settings.partition,
            "account": settings.account,
            "qos": settings.qos,
            "constraint": settings.constraint,
            "time": settings.timeout_min,
            "cpus_per_task": settings.cpus_per_task,
            "gpus_per_node": settings.gpus_per_node,
            "mem": None if settings.mem_gb is None else f"{round(settings.mem_gb * 1024)}MB",
            "additional_parameters": settings.additional_parameters or None,
        }
        self.executor.update_parameters(
            job_name=f"mopo {directory.name}",
            stderr_to_stdout=True,
            **{key: value for key, value in given.items() if value is not None},
        )

    def holds(self, name: str) -> bool:
        path = self._note_of(name)
        return path.exists() and self.states().get(read_json(path)["job"]) in self.LIVE

    def _note_of(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def start(self, task: Task) -> None:
        """Submit the task, unless its job of an earlier sweep process is still going on."""
        if self.holds(task.id):
            self.going[task.id] = read_json(self._note_of(task.id))["job"]
            return
        try:
            self.going[task.id] = self.executor.submit(SlurmTask(task)).job_id
        except Exception as error:  # submitit passes on what sbatch says
            raise UserError(f"launcher=slurm: sbatch refused: {' '.join(str(error).split())[-500:]}") from None
        write_json(self._note_of(task.id), {"job": self.going[task.id]})

    def states(self) -> dict[str, str]:
        """Of every job of this user that Slurm remembers; raises subprocess.CalledProcessError where it is silent."""
        asked = ["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T"]
        lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
        return dict(line.strip().split("|", 1) for line in lines if "|" in line)

    def ended(self) -> dict[str, str]:
        now = time.monotonic()
        if self.going.keys() - self.over.keys() and now - self.asked >= self.poll:
            self.asked = now
            with contextlib.suppress(subprocess.CalledProcessError):  # the controller is away: ask again
                self._note(self.states(), now)
        ready = {name: note for name, (since, note) in self.over.items() if now - since >= self.GRACE}
        for name in ready:
            del self.over[name], self.going[name]
        return ready

    def _note(self, states: dict[str, str], now: float) -> None:
        for name, job in self.going.items():
            state = states.get(job, "gone")
            if name not in self.over and state not in self.LIVE:
                told = "" if state == "COMPLETED" else f"Slurm job {job}: {state}"
                hint = f" (see {self.folder / f'{job}_0_log.out'})" if told else ""
                self.over[name] = (now, told + hint)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def stop(self) -> None:
        """scancel sends SIGTERM first, which a run takes as Ctrl-C."""
        if not self.going:
            return
        subprocess.run(["scancel", *self.going.values()], capture_output=True)
        until = time.monotonic() + PATIENCE
        while self.going and time.monotonic() < until:
            self.asked = 0.0
            self.ended()
            time.sleep(0.5)


class SlurmTask:
    """A task as submitit runs it: at the time limit the job goes back into the queue, then on from its checkpoint."""

    def __init__(self, task: Task):
        self.task = task

    def __call__(self) -> None:
        work(self.task)

    def checkpoint(self) -> Any:
        return needed("submitit.helpers", "slurm").DelayedSubmission(self)


# --------------------------------------------------------------------------------------------- Ray


@dataclass
class Ray:
    """Each run a Ray task: on this machine, or on the cluster at `address`, with a file system that its nodes share."""

    name: str = "ray"
    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float | None = None

    def check(self) -> None:
        needed("ray", "ray")
        for key in ("cpus", "gpus"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")

    def open(self, directory: Path, runs: int) -> Pool:
        return RayTasks(self)


class RayTasks:
    """Tasks of one Ray driver: they end with it, and each has a worker process of its own."""

    def __init__(self, settings: Ray):
        self.ray = ray = needed("ray", "ray")
        self.slots: int | None = None
        self.going: dict[Any, str] = {}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(
                address=settings.address,
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=False if settings.address is None else None,
                configure_logging=True,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"launcher.address={settings.address}: {' '.join(str(error).split())[:300]}") from None
        resources = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
        if settings.memory_gb is not None:
            resources["memory"] = settings.memory_gb * 2**30
        self.remote = ray.remote(max_retries=0, max_calls=1, **resources)(work)
        found = ray.cluster_resources()
        self.description = f"Ray tasks ({found.get('CPU', 0):g} CPUs, {found.get('GPU', 0):g} GPUs in all)"

    def holds(self, name: str) -> bool:
        return False  # a driver's tasks end with it

    def start(self, task: Task) -> None:
        self.going[self.remote.remote(task)] = task.id

    def ended(self) -> dict[str, str]:
        if not self.going:
            return {}
        finished, _ = self.ray.wait(list(self.going), num_returns=len(self.going), timeout=0)
        return {self.going.pop(reference): self._note(reference) for reference in finished}

    def _note(self, reference: Any) -> str:
        try:
            self.ray.get(reference)
            return ""
        except self.ray.exceptions.RayError as error:
            return f"Ray: {' '.join(str(error).split())[:300]}"

    def wait(self, seconds: float) -> None:
        if self.going:
            self.ray.wait(list(self.going), num_returns=1, timeout=seconds)

    def stop(self) -> None:
        for reference in self.going:
            self.ray.cancel(reference, force=False)
        if self.going:
            self.ray.wait(list(self.going), num_returns=len(self.going), timeout=PATIENCE)
        self.going.clear()
        self.ray.shutdown()
