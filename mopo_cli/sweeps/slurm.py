"""Runs of a sweep as Slurm jobs (submitit)."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopo_cli.base.errors import UserError, needed
from mopo_cli.base.files import read_json, write_json
from mopo_cli.base.text import one_line
from mopo_cli.sweeps.pools import PATIENCE, require
from mopo_cli.sweeps.worker import Job, work

GRACE = 5.0  # seconds that a shared file system may take to show what a job wrote last
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED")
LIVE += ("STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "RESV_DEL_HOLD", "SPECIAL_EXIT", "PREEMPTED")


@dataclass
class Slurm:
    """Each run a Slurm job, submitted through submitit. The directory of the sweep must be one that the nodes share.

    Jobs are written down beside the runs, so that a sweep that comes back finds those that are still going on.
    """

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
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0")
        require(self.jobs is None or self.jobs >= 1, "jobs", self.jobs, "1 or more, or null")
        missing = [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]
        if missing:
            raise UserError(f"launcher=slurm: there is no {missing[0]} here; run mopo where Slurm's commands are")
        answer = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True)
        if answer.returncode:
            raise UserError(f"launcher=slurm: squeue says: {one_line(answer.stderr)}")

    def open(self, directory: Path, runs: int) -> Slurm:
        self.slots = self.jobs
        self.folder = (directory / "jobs").absolute()
        self.description = f"Slurm jobs{f' in {self.partition}' if self.partition else ''}"
        self.going: dict[str, str] = {}
        self.over: dict[str, tuple[float, str]] = {}
        self.polled = 0.0
        self.executor = needed("submitit", "slurm").SlurmExecutor(self.folder, max_num_timeout=self.requeues)
        options = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "time": self.timeout_min,
            "cpus_per_task": self.cpus_per_task,
            "gpus_per_node": self.gpus_per_node,
            "mem": None if self.mem_gb is None else f"{round(self.mem_gb * 1024)}MB",
            "additional_parameters": self.additional_parameters or None,
        }
        self.executor.update_parameters(
            job_name=f"mopo {directory.name}",
            stderr_to_stdout=True,
            **{key: value for key, value in options.items() if value is not None},
        )
        return self

    def holds(self, name: str) -> bool:
        path = self._note_of(name)
        return path.exists() and self.states().get(read_json(path)["job"]) in LIVE

    def _note_of(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def start(self, job: Job) -> None:
        """Submit the run, unless its Slurm job of an earlier sweep process is still going on."""
        if self.holds(job.id):
            self.going[job.id] = read_json(self._note_of(job.id))["job"]
            return
        try:
            self.going[job.id] = self.executor.submit(Requeued(job)).job_id
        except Exception as error:  # submitit passes on what sbatch says
            raise UserError(f"launcher=slurm: sbatch refused: {one_line(error)[-500:]}") from None
        write_json(self._note_of(job.id), {"job": self.going[job.id]})

    def states(self) -> dict[str, str]:
        """Of every job of this user that Slurm remembers; raises subprocess.CalledProcessError where it is silent."""
        query = ["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        return dict(line.strip().split("|", 1) for line in lines if "|" in line)

    def ended(self) -> dict[str, str]:
        now = time.monotonic()
        if self.going.keys() - self.over.keys() and now - self.polled >= self.poll:
            self.polled = now
            with contextlib.suppress(subprocess.CalledProcessError):  # the controller is away: ask again
                self._note(self.states(), now)
        ready = {name: note for name, (since, note) in self.over.items() if now - since >= GRACE}
        for name in ready:
            del self.over[name], self.going[name]
        return ready

    def _note(self, states: dict[str, str], now: float) -> None:
        for name, number in self.going.items():
            state = states.get(number, "gone")
            if name not in self.over and state not in LIVE:
                log = self.folder / f"{number}_0_log.out"
                self.over[name] = (now, "" if state == "COMPLETED" else f"Slurm job {number}: {state} (see {log})")

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def stop(self) -> None:
        """scancel sends SIGTERM first, which a run takes as Ctrl-C."""
        if not self.going:
            return
        subprocess.run(["scancel", *self.going.values()], capture_output=True)
        until = time.monotonic() + PATIENCE
        while self.going and time.monotonic() < until:
            self.polled = 0.0
            self.ended()
            time.sleep(0.5)


@dataclass
class Requeued:
    """A run as submitit calls it: at the time limit the job goes back into the queue, then on from its checkpoint."""

    job: Job

    def __call__(self) -> None:
        work(self.job)

    def checkpoint(self) -> Any:
        return needed("submitit.helpers", "slurm").DelayedSubmission(self)
