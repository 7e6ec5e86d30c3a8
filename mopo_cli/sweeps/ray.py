"""Runs of a sweep as Ray tasks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopo_cli.base.errors import UserError, needed
from mopo_cli.base.text import one_line
from mopo_cli.sweeps.pools import PATIENCE, require
from mopo_cli.sweeps.worker import Job, work


@dataclass
class Ray:
    """Each run a Ray task: on this machine, or on the cluster at `address`, with a file system that its nodes share.

    The tasks end with this process, and each has a worker process of its own.
    """

    name: str = "ray"
    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float | None = None

    def check(self) -> None:
        needed("ray", "ray")
        for key in ("cpus", "gpus"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")

    def open(self, directory: Path, runs: int) -> Ray:
        self.ray = needed("ray", "ray")
        self.slots: int | None = None
        self.going: dict[Any, str] = {}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            self.ray.init(
                address=self.address,
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=False if self.address is None else None,
                configure_logging=True,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"launcher.address={self.address}: {one_line(error)[:300]}") from None
        memory = {} if self.memory_gb is None else {"memory": self.memory_gb * 2**30}
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": 0, "max_calls": 1, **memory}
        self.remote = self.ray.remote(**options)(work)
        total = self.ray.cluster_resources()
        self.description = f"Ray tasks ({total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs in all)"
        return self

    def holds(self, name: str) -> bool:
        return False

    def start(self, job: Job) -> None:
        self.going[self.remote.remote(job)] = job.id

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
            return f"Ray: {one_line(error)[:300]}"

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
