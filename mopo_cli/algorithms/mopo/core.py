"""MOPO: constrained, KL-regularised alignment with several objectives, straight from pairwise preferences.

Source: Agnihotri, Jain, Ramachandran, Wen, Multi-Objective Preference Optimization, arXiv 2505.10892. The problem:

    maximise  R_p(pi) - tau KL(pi || pi_ref)   subject to  R_j(pi) >= b_j for every secondary j          (P)

Shapes: B prompts, G responses a prompt, K objectives with the primary first, J = K - 1 secondaries. Losses see
log-probs and win rates only, so a language model and a tabular policy share this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Objective
from mopo_cli.maths.bounds import dual_newton_step, dual_step
from mopo_cli.maths.estimates import Estimate, against_all, importance_ratio, scalarise, weighted_estimate

if TYPE_CHECKING:
    from mopo_cli.algorithms.contract import Aligned
    from mopo_cli.training.checkpoints import Setting


# --------------------------------------------------------------------------------------------- schedule
def scheduled_thresholds(thresholds: Tensor, achieved: Tensor, fixed: Tensor, beta: float) -> Tensor:
    """b_j <- beta G_j(t - t0) for objectives on the schedule; a user's own threshold (fixed) is never touched."""
    return torch.where(fixed, thresholds, beta * achieved)


def refresh_due(step: int, t0: float) -> bool:
    """Whether pi_ref and b are renewed before this step: every t0 steps, not at the start, never for t0 = inf."""
    return math.isfinite(t0) and step > 0 and step % int(t0) == 0


# --------------------------------------------------------------------------------------------- extraction
def bc_loss(policy_logps: Tensor, rho: Tensor, mask: Tensor) -> Tensor:
    """(B,) -mean_g stopgrad(rho) log pi(y_g|x) over all responses of a prompt (the paper's extraction)."""
    weights = rho.detach().to(policy_logps.dtype) * mask
    return -(weights * policy_logps).sum(-1) / mask.sum(-1).clamp(min=1)


def regression_loss(policy_logps: Tensor, reference_logps: Tensor, scores: Tensor, mask: Tensor, tau: float) -> Tensor:
    """(B,) mean over the prompt's pairs of (h - (s(y) - s(y')) / tau)^2.

    h = log pi/pi_ref (y) - log pi/pi_ref (y'). Its minimiser over pairs is log pi/pi_ref = s_lambda / tau + const, the
    optimum of (P): the argument of IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17) with a lambda-weighted label. All
    G (G - 1) / 2 pairs count the same, whatever the order of the responses: the sum over pairs of squared differences
    is n sum_g (d_g - mean d)^2.
    """
    residual = (policy_logps - reference_logps - (scores / tau).to(policy_logps.dtype)) * mask
    n = mask.sum(-1).clamp(min=1)
    centred = (residual - residual.sum(-1, keepdim=True) / n[:, None]) * mask
    return 2.0 * (centred**2).sum(-1) / (n - 1).clamp(min=1)


# --------------------------------------------------------------------------------------------- the method
@dataclass(frozen=True, slots=True)
class LogpBatch:
    """What a method's loss may see of a batch."""

    policy_logps: Tensor  # (B, G) with gradient
    reference_logps: Tensor  # (B, G) the lagged reference
    behaviour_logps: Tensor  # (B, G) the first reference, a stand-in for mu
    win_rates: Tensor  # (B, G, K) p_bar of each response: from labels or from the preference model
    mask: Tensor  # (B, G) False where a row has fewer responses
    from_data: Tensor  # (B, G) False on fresh samples of the policy


@dataclass(slots=True)
class State:
    """Everything MOPO carries from step to step; plain lists, so that it goes into a checkpoint and a log line."""

    duals: list[float]
    thresholds: list[float]
    chi: list[float]
    corrections: int = 0  # measurements that moved the multipliers since the last refresh
    stuck: int = 0  # measurements in a row with a multiplier at its bound and its constraint missed
    epsilon: float = math.nan
    n_eff: float = math.nan
    lower: list[float] | None = None
    win_rates: list[float] | None = None


class Mopo:
    """The method's settings and state. `loss` is called each step, `observe` whenever R_j is measured."""

    longest_condition = ""

    def __init__(
        self,
        names: tuple[str, ...],
        thresholds: tuple[float | None, ...],  # (J,) None: on the adaptive schedule
        tau: float,
        beta: float,
        epsilon: float | str,
        t0: float,
        extraction: str = "regression",
        multipliers: str = "lagrangian",
        estimator: str = "onpolicy",
        labels: str = "smoothed",
        normalize: str = "prompt",
        dual_init: str = "offline",
        dual_rate: float = 0.5,
        sigma: float = 0.01,
        delta: float = 0.1,
        max_dual: float = 20.0,
        fresh_responses: bool = True,
    ):
        self.names, self.tau, self.beta, self.epsilon, self.t0 = names, tau, beta, epsilon, t0
        self.extraction, self.multipliers, self.estimator, self.labels = extraction, multipliers, estimator, labels
        self.normalize, self.dual_init, self.dual_rate, self.sigma, self.delta = (
            normalize,
            dual_init,
            dual_rate,
            sigma,
            delta,
        )
        self.max_dual, self.fresh_responses = max_dual, fresh_responses
        self._check()
        size = len(names) - 1
        self.fixed = torch.tensor([t is not None for t in thresholds], dtype=torch.bool)
        self.state = State([0.0] * size, [beta * 0.5 if t is None else float(t) for t in thresholds], [math.inf] * size)

    def _check(self) -> None:
        allowed = {
            "extraction": ("regression", "bc"),
            "multipliers": ("lagrangian", "barrier"),
            "estimator": ("onpolicy", "heldout", "offline"),
            "labels": ("smoothed", "observed"),
            "normalize": ("prompt", "batch", "none"),
            "dual_init": ("offline", "zero"),
        }
        for key, options in allowed.items():
            if getattr(self, key) not in options:
                raise UserError(f"algorithm.{key}={getattr(self, key)}: must be {' or '.join(options)}")
        for key in ("dual_rate", "sigma"):
            if not getattr(self, key) > 0:
                raise UserError(f"algorithm.{key}={getattr(self, key)}: must be above 0")
        if not 0 < self.delta < 1:
            raise UserError(f"algorithm.delta={self.delta}: must be in (0, 1)")

    @property
    def duals(self) -> Tensor:
        return torch.tensor(self.state.duals, dtype=torch.float64)

    @property
    def thresholds(self) -> Tensor:
        return torch.tensor(self.state.thresholds, dtype=torch.float64)

    def align(self, setting: Setting) -> Aligned:
        """Train setting.inputs.policy (alignment.py)."""
        from mopo_cli.algorithms.mopo.alignment import align

        return align(setting, self)

    def loss(self, batch: LogpBatch) -> Tensor:
        """(B,) unreduced losses."""
        if self.extraction == "bc":
            scores = scalarise(batch.win_rates, self.duals)
            rho = importance_ratio(scores, self.tau, batch.mask & batch.from_data, self.normalize)
            return bc_loss(batch.policy_logps, rho, batch.mask & batch.from_data)
        scores = scalarise(against_all(batch.win_rates, batch.mask, batch.from_data), self.duals)
        return regression_loss(batch.policy_logps, batch.reference_logps, scores, batch.mask, self.tau)

    def ratios(self, batch: LogpBatch) -> Tensor:
        """(B, G) rho of the offline and held-out estimates: the optimal ratio for bc (the paper's), else pi / mu."""
        if self.extraction == "bc":
            return importance_ratio(scalarise(batch.win_rates, self.duals), self.tau, batch.mask, self.normalize)
        return (batch.policy_logps.detach() - batch.behaviour_logps).double().clamp(-30, 30).exp()

    def estimate(self, batch: LogpBatch) -> Estimate:
        """R_k from a batch of the data's responses (offline: training pairs; held-out: pairs kept out of training)."""
        use = batch.mask & batch.from_data
        printed = self.extraction == "bc" and self.normalize == "none"
        return weighted_estimate(batch.win_rates[use], self.ratios(batch)[use], self.epsilon, self.delta, not printed)

    def observe(self, estimate: Estimate, record_only: bool = False) -> None:
        """Move the multipliers by what was measured. `record_only` keeps them and notes the numbers."""
        s = self.state
        s.win_rates, s.lower = estimate.win_rates.tolist(), estimate.lower.tolist()
        s.chi, s.epsilon, s.n_eff = estimate.chi.tolist(), estimate.epsilon, estimate.n_eff
        if record_only or not s.duals:
            return
        sigma = self.sigma if self.multipliers == "barrier" else 0.0
        if estimate.sensitivity is not None:
            gain = self._gain(estimate)
            duals = dual_newton_step(self.duals, estimate.lower, self.thresholds, estimate.sensitivity, gain, sigma)
        else:
            duals = dual_step(self.duals, estimate.lower, self.thresholds, self.dual_rate, sigma)
        s.duals = duals.clamp(max=self.max_dual).tolist()
        s.corrections += 1
        stuck = (duals >= self.max_dual) & (estimate.lower < self.thresholds)
        s.stuck = s.stuck + 1 if bool(stuck.any()) else 0

    def _gain(self, estimate: Estimate) -> float:
        """Robbins-Monro: later corrections average the noise, unless a constraint is missed by far."""
        missed = bool((self.thresholds - estimate.lower > 0.05).any())
        return self.dual_rate if missed else self.dual_rate / (1.0 + self.state.corrections / 4.0)

    @property
    def infeasible(self) -> tuple[str, ...]:
        """Objectives whose multiplier has stood at its bound for three measurements while R_j stayed below b_j."""
        s = self.state
        if s.stuck < 3 or s.lower is None:
            return ()
        rows = zip(self.names[1:], s.duals, s.lower, s.thresholds, strict=True)
        return tuple(name for name, dual, lower, b in rows if dual >= self.max_dual and lower < b)

    def renew(self, achieved: Tensor) -> None:
        """The schedule's part of a refresh: b_j <- beta G_j for objectives without a threshold of their own."""
        self.state.thresholds = scheduled_thresholds(self.thresholds, achieved, self.fixed, self.beta).tolist()
        self.state.corrections = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.state = State(**values)


def unattainable(
    objectives: Sequence[Objective], thresholds: Sequence[float], attainable: Sequence[float]
) -> list[str]:
    """Before training: thresholds above what the reference's own samples reach at best."""
    return [
        f"objectives.{o.name}.threshold={b:g} looks out of reach: the best of the reference's samples for each prompt "
        f"win {best:.2f} on average"
        for o, b, best in zip(objectives[1:], thresholds, attainable, strict=False)
        if b > best
    ]
