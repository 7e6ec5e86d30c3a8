"""Pessimistic bounds over a KL ball, and the steps of the multipliers (arXiv 2505.10892)."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from scipy.special import stdtrit
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def lower_bound_at(f: Tensor, chi: Tensor, epsilon: float, log_weights: Tensor | None = None) -> Tensor:
    """-chi log E exp(-f / chi) - chi epsilon over the last axis, for (..., n) f and (...) chi > 0.

    E is the mean under weights (n,), given by their logs, up to a constant; over all n alike without them.
    """
    log_p = _log_shares(f, log_weights)
    return -chi * torch.logsumexp(log_p - f / chi[..., None], dim=-1) - chi * epsilon


def chi_gradient(f: Tensor, chi: Tensor, epsilon: float, log_weights: Tensor | None = None) -> Tensor:
    """d/d chi of `lower_bound_at`: KL(w || p) - epsilon with w proportional to p exp(-f / chi), p the shares of the
    weights."""
    log_p = _log_shares(f, log_weights)
    log_w = torch.log_softmax(log_p - f / chi[..., None], dim=-1)
    return (log_w.exp() * (log_w - log_p)).sum(-1) - epsilon


def _log_shares(f: Tensor, log_weights: Tensor | None) -> Tensor:
    """(n,) logs of weights that sum to one."""
    weights = torch.zeros(f.shape[-1], dtype=f.dtype) if log_weights is None else log_weights
    return torch.log_softmax(weights, dim=-1)


def lower_bound(f: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Pessimistic mean of f (..., n): its least mean over distributions within KL epsilon of the sample's.

    G = max_{chi > 0} -chi log E exp(-f / chi) - chi epsilon (arXiv 2505.10892, the dual of the KL ball). epsilon = 0 is
    the mean, epsilon >= log n (or inf) the minimum. Returns (G, chi), each (...), in float64; chi solves
    KL(w || uniform) = epsilon, and is inf or 0 at the two limits.
    """
    f = f.double()
    least = f.min(-1).values
    span = (f.max(-1).values - least).clamp(min=1e-300)
    if epsilon <= 0:
        return f.mean(-1), torch.full_like(span, math.inf)
    ties = (f == least[..., None]).double().mean(-1)
    at_minimum = epsilon >= -torch.log(ties) - 1e-12
    chi = 1.0 / _inverse_chi(f, span, epsilon, at_minimum)
    bound = torch.where(at_minimum, least, torch.maximum(lower_bound_at(f, chi, epsilon), least))
    return bound, torch.where(at_minimum, torch.zeros_like(chi), chi)


def _inverse_chi(f: Tensor, span: Tensor, epsilon: float, skip: Tensor) -> Tensor:
    """u = 1 / chi at which KL(w || uniform) = epsilon for w proportional to exp(-u f).

    Newton on sqrt(KL), nearly linear in u (KL = u^2 Var / 2 + ...), within a bracket that is halved on the log scale
    where a step leaves it.
    """
    low, high = 1.0 / (span * (1e8 + 1.0 / epsilon)), 1e8 / span
    u = (math.sqrt(2.0 * epsilon) / f.std(-1, correction=0).clamp(min=1e-300)).clamp(low, high)
    shifted = f - f.min(-1, keepdim=True).values
    for _ in range(100):
        log_w = torch.log_softmax(-u[..., None] * shifted, dim=-1)
        w = log_w.exp()
        kl = (w * (log_w + math.log(f.shape[-1]))).sum(-1).clamp(min=0.0)
        variance = (w * shifted**2).sum(-1) - (w * shifted).sum(-1) ** 2
        low, high = torch.where(kl <= epsilon, u, low), torch.where(kl > epsilon, u, high)
        newton = u - 2.0 * (kl - (epsilon * kl).sqrt()) / (u * variance).clamp(min=1e-300)
        step = torch.where((newton >= low) & (newton <= high), newton, (low * high).sqrt())
        moved, u = (step - u).abs() > 1e-9 * u, step
        if not bool((moved & ~skip).any()):
            break
    return u


def auto_epsilon(n: float, delta: float, n_eff: float | None = None) -> float:
    """Radius of an empirical-likelihood confidence ball around the mean of n values: t^2_{1 - delta / 2} / (2 n).

    The quantile is Student's with n_eff - 1 degrees of freedom (n - 1 where nothing else is said), which tends to the
    chi2_{1, 1 - delta} / (2 n) of many values.
    """
    freedom = max((n if n_eff is None else n_eff) - 1.0, 1.0)
    return float(stdtrit(freedom, 1.0 - delta / 2.0)) ** 2 / (2.0 * max(n, 1.0))


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the last axis; 0 where all weights vanish."""
    weights = weights.double()
    square = (weights**2).sum(-1)
    return torch.where(square > 0, weights.sum(-1) ** 2 / square.clamp(min=1e-300), torch.zeros_like(square))


# --------------------------------------------------------------------------------------------- multipliers
def least_multiplier(centre: Number, weight: float) -> Number:
    """argmin over lambda >= 0 of (lambda - centre)^2 / 2 - weight log lambda; max(0, centre) where weight = 0."""
    return (centre + (centre * centre + 4.0 * weight) ** 0.5) / 2.0  # type: ignore[return-value]


def dual_step(duals: Tensor, estimates: Tensor, thresholds: Tensor, rate: float, sigma: float = 0.0) -> Tensor:
    """Proximal gradient step on the dual g(lambda) - sigma sum_j log lambda_j, all (J,).

    sigma = 0 is the Lagrangian, max(0, lambda - rate (R_j - b_j)). With sigma > 0 the step rests where
    lambda_j = sigma / (R_j - b_j): the multipliers of the log-barrier sigma sum_j log(R_j - b_j) in (P). The dual form
    is defined, and its step finite, where a constraint is violated, so the barrier needs no continuation there.
    """
    return least_multiplier(duals - rate * (estimates - thresholds), rate * sigma)


def dual_newton_step(
    duals: Tensor, estimates: Tensor, thresholds: Tensor, sensitivity: Tensor, gain: float, sigma: float = 0.0
) -> Tensor:
    """A damped Newton step on g(lambda) - sigma sum_j log lambda_j, with lambda >= 0 (sigma as in `dual_step`).

    sensitivity (J, J) is dR_j / dlambda_l = E_x Cov_{y~pi}(p_j, p_l) / tau, the dual's Hessian. Minimises the quadratic
    model of g less the logarithm by coordinate descent (J is small), then moves `gain` of the way, by at most
    max(1, lambda_j) in each coordinate.
    """
    if not len(duals):
        return duals
    ridge = 1e-3 + 0.05 * float(sensitivity.diagonal().mean())
    found = _least_of_quadratic(duals.tolist(), (estimates - thresholds).tolist(), sensitivity.tolist(), ridge, sigma)
    target = torch.tensor(found, dtype=duals.dtype)
    trust = duals.clamp(min=1.0)
    return (duals + gain * (target - duals).clamp(-trust, trust)).clamp(min=0.0)


def _least_of_quadratic(
    start: list[float], gradient: list[float], hessian: list[list[float]], ridge: float, sigma: float
) -> list[float]:
    """argmin over lambda >= 0 of gradient.d + d.(hessian + ridge).d / 2 - sigma sum log lambda, d = lambda - start.

    In plain numbers: for a handful of them a tensor operation costs a hundred times the arithmetic.
    """
    size = len(start)
    found = list(start)
    for _ in range(200):
        moved = 0.0
        for j in range(size):
            curvature = hessian[j][j] + ridge
            slope = gradient[j] + ridge * (found[j] - start[j])
            slope += sum(hessian[j][k] * (found[k] - start[k]) for k in range(size))
            best = least_multiplier(found[j] - slope / curvature, sigma / curvature)
            moved, found[j] = max(moved, abs(best - found[j])), best
        if moved < 1e-12:
            break
    return found


def resolve_epsilon(epsilon: float | str, n: float, delta: float, n_eff: float | None = None) -> float:
    return auto_epsilon(n, delta, n_eff) if epsilon == "auto" else float(epsilon)
