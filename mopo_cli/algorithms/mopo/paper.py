"""Algorithm 1 of arXiv 2505.10892, line by line: algorithm=mopo_paper.

For t = 1 .. T, on a batch of the data's responses and with one learning rate eta for all:

1. chi(t)  = [chi(t-1) - eta d/dchi J(chi; rho_lambda(t-1))]+, a gradient step on the robust bound G_j(chi)
2. lambda(t) = [lambda(t-1) - eta (G_j(chi(t)) - b_j)]+, of the same rho
3. rho_lambda(t) = exp((p_p + lambda.p_j) / tau - 1), without a normaliser
4. psi(t)  = psi(t-1) - eta d/dpsi -E_ref[rho log pi_psi]
5. t mod t0 = 0: b <- beta G(rho of t - t0), pi_ref <- pi_psi of t - t0; no new data are drawn, so expectations under
   pi_ref are weighted by pi_ref / mu from there on

Readings taken where the quotations of it leave something open:

- J(chi) is -sum_j G_j, not weighed by lambda, which is 0 at first; chi(0) = 1, lambda(0) = 0.
- G(rho of 0) is that of the first batch. The weights of a batch under pi_ref sum to one in G_j, since the ball around
  pi_ref is one of distributions; in line 4 they stay as they are.
- psi steps by AdamW; eta is the optimiser's learning rate of the step. beta is one number for all objectives.
- A threshold that the user gave stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from mopo_cli.algorithms.mopo.alignment import Alignment, Mopo, Thresholds
from mopo_cli.algorithms.mopo.core import Lagrangian, LogpBatch, log_lag, refresh_due
from mopo_cli.base.console import warn
from mopo_cli.config.checks import above
from mopo_cli.maths.bounds import chi_gradient, dual_step, effective_sample_size, lower_bound_at, resolve_epsilon
from mopo_cli.maths.estimates import Estimate, importance_ratio, scalarise
from mopo_cli.models.policy import Snapshot
from mopo_cli.training.checkpoints import Setting, Work

FIRST_CHI, LEAST_CHI = 1.0, 1e-8  # the bound is a limit at chi = 0


# --------------------------------------------------------------------------------------------- lines 1 and 2
def robust_estimate(point: Lagrangian, batch: LogpBatch, chi: Tensor) -> Estimate:
    """E_ref[rho p_k] of a batch and G_j at this chi (J,), with rho of the multipliers as they are."""
    f, log_weights = _under_reference(point, batch)
    settings, n_eff = point.settings, float(effective_sample_size(log_weights.exp()))
    epsilon = resolve_epsilon(settings.epsilon, n_eff, settings.delta)
    mean = f @ log_weights.softmax(-1)
    return Estimate(mean, lower_bound_at(f[1:], chi, epsilon, log_weights), chi, epsilon, n_eff)


def gradient_step(point: Lagrangian, batch: LogpBatch, rate: float) -> None:
    """Lines 1 and 2: chi, then the multipliers, by one gradient step each; rho is that of the multipliers before."""
    if not point.state.duals:
        return
    before = robust_estimate(point, batch, chi := _chi(point))
    f, log_weights = _under_reference(point, batch)
    slope = chi_gradient(f[1:], chi, before.epsilon, log_weights)
    found = robust_estimate(point, batch, (chi + rate * slope).clamp(min=LEAST_CHI))
    point.note(found)
    point.move(dual_step(point.duals, found.lower, point.thresholds, rate), found.lower)


def _chi(point: Lagrangian) -> Tensor:
    return torch.tensor(point.state.chi, dtype=torch.float64)


def _under_reference(point: Lagrangian, batch: LogpBatch) -> tuple[Tensor, Tensor]:
    """(K, n) rho p_k of the batch's responses, and (n,) log pi_ref / mu."""
    settings, use, win_rates = point.settings, batch.mask & batch.from_data, batch.win_rates.double()
    rho = importance_ratio(scalarise(win_rates, point.duals), settings.tau, use, settings.normalize)
    return (rho[use][:, None] * win_rates[use]).T, log_lag(batch)[use].double()


# --------------------------------------------------------------------------------------------- the method
@dataclass(frozen=True)
class MopoPaper(Mopo):
    """The settings of algorithm=mopo_paper. max_dual: where a run gives up on a threshold; the paper has no bound."""

    extraction: str = field(default="bc", init=False)
    multipliers: str = field(default="lagrangian", init=False)
    estimator: str = field(default="offline", init=False)
    labels: str = field(default="observed", init=False)
    normalize: str = field(default="none", init=False)
    dual_init: str = field(default="zero", init=False)
    dual_rate: float = field(default=math.nan, init=False)  # the optimiser's
    sigma: float = field(default=math.nan, init=False)
    fresh_responses: bool = field(default=False, init=False)
    max_dual: Annotated[float, above(0)] = 20.0

    name = "mopo_paper"

    def stage(self, setting: Setting) -> Alignment:
        model = setting.config.model
        if model.init == "pretrained" and not model.lora.r:
            warn("algorithm=mopo_paper: the paper fine-tunes LoRA; set model.lora.r=16, say (its rank is not known)")
        return PaperAlignment(setting, self, self, self.grid(None), Work())


@dataclass(frozen=True, slots=True)
class Past:
    """What line 5 takes t0 steps later."""

    lower: list[float]  # (J,) G(rho)
    weights: Snapshot


class PaperAlignment(Alignment):
    """The stage. Line 5 of a step, then lines 1 to 3 of the next, are done before that; `loss` is line 4."""

    past: Past

    def place(self, grid: Sequence[Thresholds]) -> None:
        super().place(grid)
        for point in self.points:
            point.state.chi = [FIRST_CHI] * len(point.state.chi)

    def watch(self, batch: LogpBatch, units: Tensor) -> None:
        """The multipliers have moved already, on this batch."""

    def estimate_of(self, batch: LogpBatch, units: Tensor) -> Estimate:
        """The paper's bound takes the responses as they come, whatever they depend on."""
        return robust_estimate(self.points[0], batch, _chi(self.points[0]))

    def before_step(self, step: int) -> None:
        super().before_step(step)
        (point,), batch = self.points, self.train_rows.of_data(self.rows_of(step))
        if step == 0:
            point.note(robust_estimate(point, batch, _chi(point)))
        if step == 0 or refresh_due(step, point.settings.t0):
            self.past = Past(point.state.lower or [], self.setting.inputs.policy.snapshot())
        gradient_step(point, batch, self.trainer.optimiser.param_groups[0]["lr"])
        point.load_state_dict(self._agreed(point.state_dict()))

    def achieved(self, number: int) -> Tensor:
        return torch.tensor(self.past.lower, dtype=torch.float64)

    def lag(self, step: int, numbers: Sequence[int]) -> None:
        self.train_rows.lag(self.past.weights, self.upcoming(step, self.shared.t0))

    # ------------------------------------------------------------------ checkpoints

    def save(self, directory: Path) -> None:
        super().save(directory)
        torch.save({"lower": self.past.lower, "weights": self.past.weights}, directory / "past.pt")

    def restore(self, directory: Path) -> None:
        super().restore(directory)
        self.past = Past(**torch.load(directory / "past.pt", weights_only=True))
