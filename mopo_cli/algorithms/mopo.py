"""MOPO: constrained, KL-regularised alignment with several objectives, straight from pairwise preferences.

Source: Agnihotri, Jain, Ramachandran, Wen, Multi-Objective Preference Optimization, arXiv 2505.10892. The problem:

    maximise  R_p(pi) - tau KL(pi || pi_ref)   subject to  R_j(pi) >= b_j for every secondary j          (P)

Shapes: B prompts, G responses a prompt, K objectives with the primary first, J = K - 1 secondaries. Losses see
log-probs and win rates only, so a language model and a tabular policy share this file.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from scipy.special import chdtri
from torch import Tensor

from mopo_cli.errors import UserError

if TYPE_CHECKING:
    from mopo_cli.stages import Aligned, Setting

Number = TypeVar("Number", float, Tensor)

# --------------------------------------------------------------------------------------------- ratios and bounds


def scalarise(win_rates: Tensor, duals: Tensor) -> Tensor:
    """s_lambda = p_p + sum_j lambda_j p_j: (..., K) win rates and (J,) multipliers to (...)."""
    return win_rates[..., 0] + win_rates[..., 1:] @ duals.to(win_rates)


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


def lower_bound_at(f: Tensor, chi: Tensor, epsilon: float) -> Tensor:
    """-chi log E exp(-f / chi) - chi epsilon over the last axis, for (..., n) f and (...) chi > 0."""
    log_mean = torch.logsumexp(-f / chi[..., None], dim=-1) - math.log(f.shape[-1])
    return -chi * log_mean - chi * epsilon


def chi_gradient(f: Tensor, chi: Tensor, epsilon: float) -> Tensor:
    """d/d chi of `lower_bound_at`: KL(w || uniform) - epsilon with w proportional to exp(-f / chi)."""
    log_w = torch.log_softmax(-f / chi[..., None], dim=-1)
    return (log_w.exp() * (log_w + math.log(f.shape[-1]))).sum(-1) - epsilon


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


def auto_epsilon(n_eff: float, delta: float) -> float:
    """Radius of an empirical-likelihood confidence ball: chi2_{1, 1 - delta} / (2 n_eff)."""
    return float(chdtri(1.0, delta)) / (2.0 * max(n_eff, 1.0))


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


def resolve_epsilon(epsilon: float | str, n_eff: float, delta: float) -> float:
    return auto_epsilon(n_eff, delta) if epsilon == "auto" else float(epsilon)


def weighted_estimate(
    win_rates: Tensor, weights: Tensor, epsilon: float | str, delta: float, self_normalise: bool = True
) -> Estimate:
    """R_k = E_ref[rho p_k] from (n, K) win rates of responses of the behaviour policy and (n,) ratios rho.

    Self-normalised, sum(w p) / sum(w), unless told otherwise; n_eff is the effective sample size of the weights.
    """
    weights, win_rates = weights.double(), win_rates.double()
    if self_normalise:
        weights = weights / weights.mean().clamp(min=1e-300)
    f = weights[:, None] * win_rates
    n_eff = float(effective_sample_size(weights))
    radius = resolve_epsilon(epsilon, n_eff, delta)
    if self_normalise:
        lower, chi = _lower_bound_of_ratio(win_rates[:, 1:], weights, radius)
    else:
        lower, chi = lower_bound(f[:, 1:].T, radius)
    return Estimate(f.mean(0), lower, chi, radius, n_eff)


def _lower_bound_of_ratio(win_rates: Tensor, weights: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The bound around a self-normalised mean: of R + rho (p - R), whose mean is R (linearisation of the ratio)."""
    mean = (weights[:, None] * win_rates).mean(0)
    return lower_bound((mean + weights[:, None] * (win_rates - mean)).T, epsilon)


def sampled_estimate(
    win_rates: Tensor, tau: float, epsilon: float | str, delta: float, known: Tensor | None = None
) -> Estimate:
    """R_k from win rates (N, M, K) of M samples of the policy for each of N prompts.

    Samples outside `known` (N, M) are left out, and prompts without any other; where nothing is left, all count.
    Prompts are the independent units: n_eff is their number and the bound is over their means. With several samples a
    prompt the within-prompt covariance gives the dual's Hessian.
    """
    if known is None or not bool(known.any()):
        known = torch.ones(win_rates.shape[:2], dtype=torch.bool)
    some = known.any(1)
    weights = known[some].double()[..., None]
    win_rates = win_rates[some].double()
    means = (weights * win_rates).sum(1) / weights.sum(1)
    radius = resolve_epsilon(epsilon, len(means), delta)
    lower, chi = lower_bound(means[:, 1:].T, radius)
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
        from mopo_cli.alignment import align

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
