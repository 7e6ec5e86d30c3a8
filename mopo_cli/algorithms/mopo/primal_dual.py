"""The loop of MOPO around a policy's own steps: when R_k is measured, multipliers move and the reference is renewed.

A language model, one that is told its thresholds, and a table of preferences share it: they say how samples, estimates
and reference log-probs come about.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mopo_cli.algorithms.mopo.core import Lagrangian, refresh_due
from mopo_cli.maths.estimates import Estimate


class PrimalDual(ABC):
    """One policy or several, trained at some points: a Lagrangian each."""

    points: list[Lagrangian]
    every: int  # steps between two measurements
    margin: float  # how far below what is attainable the offline dual keeps a threshold, in win rate
    starts_offline: bool  # whether multipliers start at the offline dual's
    refreshes: int = 0

    @abstractmethod
    def pool(self) -> tuple[np.ndarray, np.ndarray]:
        """Responses of the reference, for the offline dual: win rates (N, A, K) and log pi_ref (N, A)."""

    @abstractmethod
    def estimates(self, step: int) -> Sequence[Estimate | None]:
        """R_k of the policy now at each point; None at those that are not measured."""

    @abstractmethod
    def achieved(self, number: int) -> Tensor | None:
        """(J,) what point `number` is known to reach when its reference is renewed; None where nothing is known."""

    @abstractmethod
    def lag(self, step: int, numbers: Sequence[int]) -> None:
        """pi_ref of these points <- the policy now."""

    def before_step(self, step: int) -> None:
        """Measure, correct the multipliers, refresh the reference: in this order, where each is due."""
        if step == 0 and self.starts_offline:
            self.start()
        elif step % self.every == 0:
            self.measure(step)
        numbers = [number for number, point in enumerate(self.points) if refresh_due(step, point.settings.t0)]
        for number in numbers:
            if (reached := self.achieved(number)) is not None:
                self.points[number].renew(reached)
        if numbers:
            self.refreshes += 1
            self.lag(step, numbers)

    def start(self) -> None:
        """Multipliers from the offline dual: (P) solved on samples of the reference."""
        win_rates, log_reference = self.pool()
        for point in self.points:
            point.start(win_rates, log_reference, self.margin)

    def measure(self, step: int) -> None:
        """R_k of the policy now; the multipliers move."""
        for point, estimate in zip(self.points, self.estimates(step), strict=True):
            if estimate is not None:
                point.observe(estimate)
