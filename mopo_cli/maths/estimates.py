"""Estimates of R_k from log-probs and win rates: importance-weighted, sampled, enumerated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mopo_cli.base.errors import UserError
from mopo_cli.maths.bounds import effective_sample_size, lower_bound, resolve_epsilon


# --------------------------------------------------------------------------------------------- ratios and bounds
def scalarise(win_rates: Tensor, duals: Tensor) -> Tensor:
    """s_lambda = p_p + sum_j lambda_j p_j: (..., K) win rates to (...), at (J,) multipliers or (B, J), a row's own."""
    duals, secondary = duals.to(win_rates), win_rates[..., 1:]
    weighted = secondary @ duals if duals.dim() == 1 else torch.einsum("bgj,bj->bg", secondary, duals)
    return win_rates[..., 0] + weighted


def importance_ratio(scores: Tensor, tau: float, mask: Tensor | None = None, normalize: str = "prompt") -> Tensor:
    """rho = d pi_lambda / d pi_ref of responses drawn from pi_ref; scores (B, G) s_lambda, mask (B, G).

    normalize "prompt" divides by the prompt's own mean of exp(s / tau), so rho averages to one over its responses and
    is a density ratio; "batch" divides by the mean over the batch; "none" is the form the paper prints,
    exp(s / tau - 1), which lacks the normaliser: at tau = 0.08 it makes E[rho p_j] far larger than one, and a bound in
    [0, 1] cannot bind.
    """
    logits = scores.double() / tau
    mask = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    if normalize == "none":
        return torch.where(mask, torch.exp(logits - 1.0), torch.zeros_like(logits))
    logits = logits.masked_fill(~mask, -math.inf)
    dims = (-1,) if normalize == "prompt" else (-2, -1)
    if normalize not in ("prompt", "batch"):
        raise UserError(f"algorithm.normalize={normalize}: must be prompt, batch or none")
    log_mean = torch.logsumexp(logits, dims, keepdim=True) - mask.sum(dims, keepdim=True).clamp(min=1).double().log()
    return torch.exp(logits - log_mean)


# --------------------------------------------------------------------------------------------- estimates of R_j
def leave_one_out(preferences: Tensor, mask: Tensor) -> Tensor:
    """(B, G, K) mean win rate of each response against the prompt's others, from preferences (B, G, G, K).

    preferences[b, i, k', j] is I or P of response i over k'. Unbiased for p_bar when responses are drawn from mu.
    """
    others = mask[:, None, :] & mask[:, :, None] & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    total = torch.where(others[..., None], preferences, torch.zeros_like(preferences)).sum(2)
    return total / others.sum(2).clamp(min=1)[..., None]


def against_all(win_rates: Tensor, mask: Tensor, from_data: Tensor) -> Tensor:
    """(B, G, K) regression targets: win rates against all n of the prompt's own responses, itself included as a tie.

    Leave-one-out rates of two responses share their own comparison, so differences of them fit G / (G - 1) times
    p_bar(y) - p_bar(y'): twice for pairs. Counting a response against itself as 1/2 takes exactly that factor out; with
    two responses and 0/1 labels the difference is (2 I - 1) / 2, the target of IPO (Azar et al. 2023, arXiv 2310.12036,
    eq. 17). Fresh samples are compared with the data's responses, not with themselves, and stay as they are.
    """
    n = (mask & from_data).sum(-1)[:, None, None].clamp(min=1).to(win_rates)
    return torch.where(from_data[..., None], ((n - 1) * win_rates + 0.5) / n, win_rates)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is known of R_k(pi) at one moment, and how well."""

    win_rates: Tensor  # (K,)
    lower: Tensor  # (J,) pessimistic bound G_j
    chi: Tensor  # (J,)
    epsilon: float
    n_eff: float
    sensitivity: Tensor | None = None  # (J, J) dR_j / dlambda_l, where samples of the policy tell it


def weighted_estimate(
    win_rates: Tensor,
    weights: Tensor,
    epsilon: float | str,
    delta: float,
    self_normalise: bool = True,
    units: Tensor | None = None,
) -> Estimate:
    """R_k = E_ref[rho p_k] from (n, K) win rates of responses of the behaviour policy and (n,) ratios rho.

    Self-normalised, sum(w p) / sum(w), unless told otherwise; n_eff is the effective sample size of the weights.
    units (n,): whole numbers, the same of responses that are not independent of each other; None: all are.
    """
    weights, win_rates = weights.double().cpu(), win_rates.double().cpu()  # where the multipliers are
    if self_normalise:
        weights = weights / weights.mean().clamp(min=1e-300)
    f = weights[:, None] * win_rates
    mean = f.mean(0)
    if self_normalise:  # linearised: R + rho (p - R), whose mean is R and whose variance is n times the ratio's own
        f = mean + weights[:, None] * (win_rates - mean)
    lower, chi, radius = _pessimistic(f[:, 1:], weights, epsilon, delta, units)
    return Estimate(mean, lower, chi, radius, float(effective_sample_size(weights)))


def _pessimistic(
    f: Tensor, weights: Tensor, epsilon: float | str, delta: float, units: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """Lower bounds (J,) of the means of (n, J) values, their chi, and the radius of the ball.

    With `auto` a confidence bound: units are summed up, since only they are independent; the radius counts them once,
    as the spread of f holds that of the weights already; and one more response that loses every comparison stands
    beside them, without which a sample of wins alone would be certain (adjusted empirical likelihood, Chen, Variyath,
    Abraham 2008). A radius that is given is a ball around the responses as they are.
    """
    if epsilon != "auto":
        return *lower_bound(f.T, float(epsilon)), float(epsilon)
    mean, units = f.mean(0), torch.arange(len(f)) if units is None else units.cpu()
    numbered = units.unique(return_inverse=True)[1]
    count = int(numbered.max()) + 1
    sums = torch.zeros(count, f.shape[1], dtype=f.dtype).index_add_(0, numbered, f - mean)
    of_units = mean + sums * count / len(f)
    lost = mean - mean * count / float(effective_sample_size(weights).clamp(min=1.0))
    n_eff = float(effective_sample_size(torch.zeros(count, dtype=f.dtype).index_add_(0, numbered, weights)))
    radius = resolve_epsilon(epsilon, count, delta, min(n_eff, float(count)))
    lower, chi = lower_bound(torch.cat([of_units, lost[None]]).T, radius)
    return lower.clamp(min=0.0), chi, radius


def sampled_estimate(
    win_rates: Tensor,
    tau: float,
    epsilon: float | str,
    delta: float,
    known: Tensor | None = None,
    units: Tensor | None = None,
) -> Estimate:
    """R_k from win rates (N, M, K) of M samples of the policy for each of N prompts.

    Samples outside `known` (N, M) are left out, and prompts without any other; where nothing is left, all count.
    n_eff is the number of prompts, and the bound is over their means; units (N,): whole numbers, the same of prompts
    that are not independent of each other. With several samples a prompt the within-prompt covariance gives the dual's
    Hessian.
    """
    if known is None or not bool(known.any()):
        known = torch.ones(win_rates.shape[:2], dtype=torch.bool)
    some = known.any(1)
    weights = known[some].double()[..., None]
    win_rates = win_rates[some].double()
    means = (weights * win_rates).sum(1) / weights.sum(1)
    alike = torch.ones(len(means), dtype=torch.float64)
    lower, chi, radius = _pessimistic(means[:, 1:], alike, epsilon, delta, None if units is None else units[some])
    sensitivity = None
    if (spare := float((weights.sum(1) - 1).sum())) > 0:
        centred = (weights * (win_rates - means[:, None]))[:, :, 1:]
        sensitivity = torch.einsum("nmj,nml->jl", centred, centred) / (spare * tau)
    return Estimate(means.mean(0), lower, chi, radius, float(len(means)), sensitivity)


def enumerated_estimate(policy: Tensor, win_rates: Tensor, tau: float) -> Estimate:
    """R_k exactly, from probabilities (N, A) of all responses and their win rates (N, A, K): no pessimism is due."""
    policy, win_rates = policy.double(), win_rates.double()
    means = torch.einsum("na,nak->nk", policy, win_rates)
    centred = (win_rates - means[:, None])[:, :, 1:]
    sensitivity = torch.einsum("na,naj,nal->jl", policy, centred, centred) / (len(policy) * tau)
    reached = means.mean(0)
    return Estimate(reached, reached[1:], torch.full_like(reached[1:], math.inf), 0.0, math.inf, sensitivity)
