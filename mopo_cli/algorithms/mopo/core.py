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
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from mopo_cli.base.types import Objective
from mopo_cli.config.checks import above, between, checked, one_of
from mopo_cli.maths.bounds import dual_newton_step, dual_step
from mopo_cli.maths.estimates import (
    Estimate,
    against_all,
    importance_ratio,
    sampled_estimate,
    scalarise,
    weighted_estimate,
)
from mopo_cli.maths.oracle import attainable, solve


# --------------------------------------------------------------------------------------------- schedule
def scheduled_thresholds(thresholds: Tensor, achieved: Tensor, fixed: Tensor, beta: float) -> Tensor:
    """b_j <- beta G_j(t - t0) for objectives on the schedule; a user's own threshold (fixed) is never touched."""
    return torch.where(fixed, thresholds, beta * achieved)


def refresh_due(step: int, t0: float) -> bool:
    """Whether pi_ref and b are renewed before this step: every t0 steps, not at the start, never for t0 = inf."""
    return math.isfinite(t0) and step > 0 and step % int(t0) == 0


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


# --------------------------------------------------------------------------------------------- settings and state
@dataclass(frozen=True)
class MopoSettings:
    """What the method may be told; conf/algorithm/mopo.yaml says what each does. UserError where one is wrong."""

    names: tuple[str, ...]  # K objectives, the primary first
    thresholds: tuple[float | None, ...]  # (J,) None: on the adaptive schedule
    tau: float
    beta: float
    epsilon: float | str
    t0: float
    extraction: Annotated[str, one_of("regression", "bc")] = "regression"
    multipliers: Annotated[str, one_of("lagrangian", "barrier")] = "lagrangian"
    estimator: Annotated[str, one_of("onpolicy", "heldout", "offline")] = "onpolicy"
    labels: Annotated[str, one_of("smoothed", "observed")] = "smoothed"
    normalize: Annotated[str, one_of("prompt", "batch", "none")] = "prompt"
    dual_init: Annotated[str, one_of("offline", "zero")] = "offline"
    dual_rate: Annotated[float, above(0)] = 0.5
    sigma: Annotated[float, above(0)] = 0.01
    delta: Annotated[float, between(0, 1)] = 0.1
    max_dual: float = 20.0
    fresh_responses: bool = True

    def __post_init__(self) -> None:
        checked(self, "algorithm.")


@dataclass(frozen=True, slots=True)
class LogpBatch:
    """What the loss may see of a batch."""

    policy_logps: Tensor  # (B, G) with gradient
    reference_logps: Tensor  # (B, G) the lagged reference
    behaviour_logps: Tensor  # (B, G) the first reference, a stand-in for mu
    win_rates: Tensor  # (B, G, K) p_bar of each response: from labels or from the preference model
    mask: Tensor  # (B, G) False where a row has fewer responses
    from_data: Tensor  # (B, G) False on fresh samples of the policy


def extraction_loss(settings: MopoSettings, batch: LogpBatch, duals: Tensor) -> Tensor:
    """(B,) unreduced losses at multipliers (J,), or (B, J) where rows have their own."""
    if settings.extraction == "bc":
        use = batch.mask & batch.from_data
        return bc_loss(batch.policy_logps, optimal_ratio(settings, batch, duals, use), use)
    scores = scalarise(against_all(batch.win_rates, batch.mask, batch.from_data), duals)
    return regression_loss(batch.policy_logps, batch.reference_logps, scores, batch.mask, settings.tau)


def optimal_ratio(settings: MopoSettings, batch: LogpBatch, duals: Tensor, use: Tensor) -> Tensor:
    """(B, G) d pi_lambda / d mu of the responses in `use`: rho = d pi_lambda / d pi_ref, times d pi_ref / d mu.

    The responses are mu's also when the reference has moved on: expectations under pi_ref are then weighted by the
    second ratio, which is one until the first refresh.
    """
    scores = scalarise(batch.win_rates, duals) + settings.tau * log_lag(batch)
    return importance_ratio(scores, settings.tau, use, settings.normalize)


def log_lag(batch: LogpBatch) -> Tensor:
    """(B, G) log pi_ref / mu."""
    return (batch.reference_logps - batch.behaviour_logps).clamp(-30, 30)


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


class Lagrangian:
    """(P)'s Lagrangian at one set of thresholds: the multipliers that hold them, and the loss at these.

    `loss` is called each step, `observe` whenever R_k is measured.
    """

    def __init__(self, settings: MopoSettings):
        self.settings = settings
        size = len(settings.names) - 1
        self.fixed = torch.tensor([b is not None for b in settings.thresholds], dtype=torch.bool)
        start = [settings.beta * 0.5 if b is None else float(b) for b in settings.thresholds]
        self.state = State([0.0] * size, start, [math.inf] * size)

    @property
    def duals(self) -> Tensor:
        return torch.tensor(self.state.duals, dtype=torch.float64)

    @property
    def thresholds(self) -> Tensor:
        return torch.tensor(self.state.thresholds, dtype=torch.float64)

    def loss(self, batch: LogpBatch) -> Tensor:
        """(B,) unreduced losses."""
        return extraction_loss(self.settings, batch, self.duals)

    def ratios(self, batch: LogpBatch) -> Tensor:
        """(B, G) rho of the offline and held-out estimates: the optimal ratio for bc (the paper's), else pi / mu."""
        if self.settings.extraction == "bc":
            return optimal_ratio(self.settings, batch, self.duals, batch.mask & batch.from_data)
        return (batch.policy_logps.detach() - batch.behaviour_logps).double().clamp(-30, 30).exp()

    def estimate(self, batch: LogpBatch, units: Tensor | None = None) -> Estimate:
        """R_k from a batch of the data's responses (offline: training pairs; held-out: pairs kept out of training).

        units (B,): numbers, the same of rows that are not independent of each other; None: all are.
        """
        settings, use = self.settings, batch.mask & batch.from_data
        printed = settings.extraction == "bc" and settings.normalize == "none"
        ratios = self.ratios(batch)[use]
        of_rows = torch.arange(len(use)) if units is None else units
        of_responses = of_rows[:, None].expand(use.shape)[use.cpu()]
        rates, epsilon, delta = batch.win_rates[use], settings.epsilon, settings.delta
        return weighted_estimate(rates, ratios, epsilon, delta, not printed, of_responses)

    def sampled(self, win_rates: Tensor, on_support: Tensor | None = None, units: Tensor | None = None) -> Estimate:
        """R_k from win rates (N, M, K) of M samples of the policy for each of N prompts; those off the data's support
        (N, M) are left out. units (N,): numbers, the same of prompts that are not independent of each other."""
        settings = self.settings
        return sampled_estimate(win_rates, settings.tau, settings.epsilon, settings.delta, on_support, units)

    def start(self, win_rates: np.ndarray, log_reference: np.ndarray, margin: float) -> np.ndarray:
        """Multipliers from the offline dual: those of (P)'s solution where win_rates (N, A, K) of the reference's
        responses and log pi_ref (N, A) are all there is. Returns the thresholds that it was solved for, (J,).

        A threshold above what is attainable, or less than `margin` below, counts as that: its multiplier would have no
        bound.
        """
        most = attainable(win_rates, log_reference)[1:]
        within_reach = np.minimum(self.thresholds.numpy(), most - margin)
        duals = solve(win_rates, log_reference, self.settings.tau, within_reach).duals
        self.state.duals = np.clip(duals, 0.0, self.settings.max_dual).tolist()
        return within_reach

    def observe(self, estimate: Estimate, record_only: bool = False) -> None:
        """Move the multipliers by what was measured. `record_only` keeps them and notes the numbers."""
        settings = self.settings
        self.note(estimate)
        if record_only or not self.state.duals:
            return
        sigma = settings.sigma if settings.multipliers == "barrier" else 0.0
        if estimate.sensitivity is not None:
            gain = self._gain(estimate)
            duals = dual_newton_step(self.duals, estimate.lower, self.thresholds, estimate.sensitivity, gain, sigma)
        else:
            duals = dual_step(self.duals, estimate.lower, self.thresholds, settings.dual_rate, sigma)
        self.move(duals, estimate.lower)

    def note(self, estimate: Estimate) -> None:
        """Keep the numbers."""
        s = self.state
        s.win_rates, s.lower = estimate.win_rates.tolist(), estimate.lower.tolist()
        s.chi, s.epsilon, s.n_eff = estimate.chi.tolist(), estimate.epsilon, estimate.n_eff

    def move(self, duals: Tensor, lower: Tensor) -> None:
        """The multipliers to these, within their bound; a constraint that they cannot hold there is counted."""
        s, most = self.state, self.settings.max_dual
        s.duals = duals.clamp(max=most).tolist()
        s.corrections += 1
        stuck = (duals >= most) & (lower < self.thresholds)
        s.stuck = s.stuck + 1 if bool(stuck.any()) else 0

    def _gain(self, estimate: Estimate) -> float:
        """Robbins-Monro: later corrections average the noise, unless a constraint is missed by far."""
        missed = bool((self.thresholds - estimate.lower > 0.05).any())
        rate = self.settings.dual_rate
        return rate if missed else rate / (1.0 + self.state.corrections / 4.0)

    @property
    def infeasible(self) -> tuple[str, ...]:
        """Objectives whose multiplier has stood at its bound for three measurements while R_j stayed below b_j."""
        s = self.state
        if s.stuck < 3 or s.lower is None:
            return ()
        rows = zip(self.settings.names[1:], s.duals, s.lower, s.thresholds, strict=True)
        return tuple(name for name, dual, lower, b in rows if dual >= self.settings.max_dual and lower < b)

    def renew(self, achieved: Tensor) -> None:
        """The schedule's part of a refresh: b_j <- beta G_j for objectives without a threshold of their own."""
        renewed = scheduled_thresholds(self.thresholds, achieved, self.fixed, self.settings.beta)
        self.state.thresholds, self.state.corrections = renewed.tolist(), 0

    def numbers(self) -> dict[str, float]:
        """What is worth a line in the log, by name."""
        s, names = self.state, self.settings.names
        line = {"epsilon": s.epsilon, "n_eff": s.n_eff}
        line |= {f"win_rate/{name}": rate for name, rate in zip(names, s.win_rates or [], strict=False)}
        for j, name in enumerate(names[1:]):
            line |= {f"dual/{name}": s.duals[j], f"threshold/{name}": s.thresholds[j], f"chi/{name}": s.chi[j]}
            if s.lower is not None:
                line[f"lower/{name}"] = s.lower[j]
        return line

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.state = State(**values)
