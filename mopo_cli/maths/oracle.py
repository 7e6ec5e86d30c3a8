"""Exact answers to (P) where the responses can be listed: the regularised optimum, its certificate, feasibility.

    maximise  R_p(pi) - tau KL(pi || pi_ref)   subject to  R_j(pi) >= b_j

Source: the convex dual of (P), arXiv 2505.10892; with s = p_p + sum_j lambda_j p_j the optimum is
pi_ref exp(s / tau) / Z, the dual g(lambda) = tau E_x log E_ref exp(s / tau) - lambda.b, and dg/dlambda_j = R_j - b_j.
Everything is float64 and vectorised over prompts. N prompts, A responses a prompt, K objectives (0 is the primary).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog
from scipy.special import logsumexp

CERTAIN = 1e-8  # a KKT residual below this, per unit of 1 + the multipliers' sum, is a solution
MAX_TILT = 1e9  # a multiplier beyond this many tau means a threshold on the edge of what is attainable
EDGE = 1e-9  # of win rate: thresholds that leave less slack than this count as out of reach
NORMALISED = 1e-6  # by which a prompt's reference probabilities may miss one in sum


@dataclass(frozen=True, slots=True)
class Optimum:
    """The solution of (P) and the proof that it is one."""

    win_rates: np.ndarray  # (K,)
    duals: np.ndarray  # (K-1,) lambda
    log_policy: np.ndarray  # (N, A)
    kl: float  # mean over prompts of KL(pi || pi_ref), in nats
    value: float  # R_p - tau KL
    duality_gap: float  # g(lambda) - value
    kkt_residual: float  # the largest violation of R_j >= b_j and of lambda_j (R_j - b_j) = 0
    feasible: bool
    attainable: np.ndarray  # (K-1,) the largest R_j that any policy on the support reaches, each alone
    shortfall: float = 0.0  # what all thresholds must be lowered by before they can be met together


def tilt(win_rates: np.ndarray, log_reference: np.ndarray, tau: float, duals: np.ndarray) -> np.ndarray:
    """(N, A) log of pi_ref exp(s_lambda / tau) / Z, for win_rates (N, A, K), log_reference (N, A), duals (K-1,)."""
    logits = log_reference + (win_rates @ np.concatenate([[1.0], duals])) / tau
    return logits - np.asarray(logsumexp(logits, axis=1, keepdims=True))


def policy_win_rates(log_policy: np.ndarray, win_rates: np.ndarray) -> np.ndarray:
    """(K,) R_k = E_x E_{y~pi} p_k(x, y), prompts weighing the same."""
    return np.einsum("na,nak->k", np.exp(log_policy), win_rates) / len(win_rates)


def mean_kl(log_policy: np.ndarray, log_reference: np.ndarray) -> float:
    """E_x KL(pi || pi_ref) in nats; responses of zero probability under pi count nothing."""
    p = np.exp(log_policy)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_policy - log_reference), 0.0)
    return float(terms.sum() / len(log_policy))


def attainable(win_rates: np.ndarray, log_reference: np.ndarray) -> np.ndarray:
    """(K,) the largest R_k over all policies on the reference's support, each objective alone."""
    masked = np.where(np.isfinite(log_reference)[:, :, None], win_rates, -np.inf)
    return masked.max(axis=1).mean(axis=0)


def least_slack(values: np.ndarray, thresholds: np.ndarray, tolerance: float = 1e-9) -> float:
    """max over policies of min_j (R_j - b_j), for values (N, A, J) of responses and thresholds (J,).

    Negative exactly when the thresholds cannot all be met. Equals min over w in the simplex of E_x max_y w.(p_j - b_j);
    solved by cutting planes on w. Responses outside the support have values of -inf.
    """
    gains = values - thresholds
    known = np.where(np.isfinite(gains), gains, -1e9)
    size = len(thresholds)
    w, cuts, lower = np.full(size, 1.0 / size), [], -np.inf
    upper = np.inf
    for _ in range(200):
        best = known @ w
        chosen = np.take_along_axis(gains, best.argmax(axis=1)[:, None, None], axis=1)[:, 0]
        cuts.append(chosen.mean(axis=0))
        upper = min(upper, float(cuts[-1] @ w))
        planes = np.column_stack([np.array(cuts), -np.ones(len(cuts))])  # cut . w - t <= 0, minimise t
        simplex = np.concatenate([np.ones(size), [0.0]])[None]
        solved = linprog(
            np.concatenate([np.zeros(size), [1.0]]),
            A_ub=planes,
            b_ub=np.zeros(len(cuts)),
            A_eq=simplex,
            b_eq=[1.0],
            bounds=[(0, 1)] * size + [(None, None)],
        )
        w, lower = solved.x[:size], solved.fun
        if upper - lower < tolerance:
            break
    return upper


def solve(
    win_rates: np.ndarray,
    log_reference: np.ndarray,
    tau: float,
    thresholds: np.ndarray,
    start: np.ndarray | None = None,
) -> Optimum:
    """The exact optimum of (P).

    win_rates (N, A, K) p_bar; log_reference (N, A), normalised, -inf outside the support; thresholds (K-1,) b, where
    -inf means unconstrained. Infeasible thresholds give feasible=False and the policy at the largest multipliers tried.
    ValueError, with the place, where a number is none or the reference is no distribution.
    """
    win_rates, log_reference = np.asarray(win_rates, np.float64), np.asarray(log_reference, np.float64)
    thresholds = np.asarray(thresholds, np.float64)
    _check(win_rates, log_reference, tau, thresholds)
    best = attainable(win_rates, log_reference)[1:]
    asked = np.flatnonzero(np.isfinite(thresholds))
    duals = np.zeros(len(thresholds)) if start is None else np.clip(start, 0.0, 1e-3 * MAX_TILT * tau)
    duals[np.setdiff1d(np.arange(len(duals)), asked)] = 0.0
    if len(asked):
        duals = _minimise_dual(win_rates, log_reference, tau, thresholds, asked, duals)
    found = _certify(win_rates, log_reference, tau, thresholds, duals, best)
    if found.kkt_residual < CERTAIN * (1.0 + duals.sum()):  # the policy itself shows that the thresholds can be met
        return found
    values = np.where(np.isfinite(log_reference)[:, :, None], win_rates[:, :, asked + 1], -np.inf)
    slack = least_slack(values, thresholds[asked])
    return replace(found, feasible=slack > EDGE, shortfall=max(0.0, -slack))


def _check(win_rates: np.ndarray, log_reference: np.ndarray, tau: float, thresholds: np.ndarray) -> None:
    """ValueError where (P) is not posed: what was found, and where."""
    if not 0 < tau < np.inf:
        raise ValueError(f"tau={tau}: must be above 0")
    _refuse("win_rates", win_rates, ~np.isfinite(win_rates), "a number")
    _refuse("thresholds", thresholds, np.isnan(thresholds) | (thresholds == np.inf), "a number, or -inf for none")
    _refuse("log_reference", log_reference, np.isnan(log_reference) | (log_reference == np.inf), "a number, or -inf")
    total = np.exp(log_reference).sum(axis=1)
    _refuse("sum of exp(log_reference)", total, np.abs(total - 1.0) > NORMALISED, "1: the probabilities of a prompt")


def _refuse(name: str, values: np.ndarray, wrong: np.ndarray, allowed: str) -> None:
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{name}[{', '.join(map(str, place))}]={values[place]}: must be {allowed}")


def dual_value(
    win_rates: np.ndarray, log_reference: np.ndarray, tau: float, thresholds: np.ndarray, duals: np.ndarray
) -> float:
    """g(lambda), see the module's docstring; an unconstrained objective (b = -inf) adds nothing."""
    logits = log_reference + (win_rates @ np.concatenate([[1.0], duals])) / tau
    bound = float(duals @ np.where(np.isfinite(thresholds), thresholds, 0.0))
    return tau * float(np.asarray(logsumexp(logits, axis=1)).mean()) - bound


def _minimise_dual(win_rates, log_reference, tau, thresholds, asked, duals):
    """Projected Newton with backtracking, followed down from a mild temperature so that tiny tau stays well behaved."""
    temperatures = [tau]
    while temperatures[-1] < 0.05:
        temperatures.append(2.0 * temperatures[-1])
    duals, secondary = duals.copy(), win_rates[:, :, asked + 1]
    for temperature in reversed(temperatures):
        untilted = log_reference + win_rates[:, :, 0] / temperature
        tilts = _newton(untilted, secondary, thresholds[asked], duals[asked] / temperature)
        duals[asked] = temperature * tilts
    return duals


def _newton(untilted, secondary, thresholds, tilts, steps=300, tolerance=1e-11):
    """(J,) lambda / tau that minimise the dual / tau, E_x log E_ref exp((p_p + lambda.p) / tau) - lambda.b / tau.

    In these units neither gradient nor Hessian knows tau. Damping grows where a step does not descend, so a singular
    Hessian does no harm. untilted (N, A): log pi_ref + p_p / tau.
    """

    def logits_and_value(tilts):
        logits = untilted + secondary @ tilts
        total = np.asarray(logsumexp(logits, axis=1, keepdims=True))
        return logits - total, float(total.mean()) - float(tilts @ thresholds)

    log_policy, value = logits_and_value(tilts)
    damping = 1e-9
    for _ in range(steps):
        policy = np.exp(log_policy)
        means = np.einsum("na,nak->nk", policy, secondary)
        gradient = means.mean(axis=0) - thresholds
        free = (tilts > 0) | (gradient < 0)
        if not np.any(free) or np.abs(gradient[free]).max() < tolerance or tilts.max() >= MAX_TILT:
            break
        deviations = secondary - means[:, None]
        second = np.einsum("na,nak,nal->kl", policy, deviations, deviations) / len(policy)
        hessian = second[np.ix_(free, free)]
        scale = np.trace(hessian) / free.sum() + 1e-12
        noise = 4e-16 * (1.0 + abs(value) + float(tilts @ np.abs(thresholds)))
        moved = False
        while damping < 1e16 and not moved:
            step = -np.linalg.solve(hessian + damping * scale * np.eye(free.sum()), gradient[free])
            step *= min(1.0, (100.0 + tilts.max()) / np.abs(step).max())
            trial = tilts.copy()
            trial[free] = np.clip(trial[free] + step, 0.0, MAX_TILT)
            trial_logits, trial_value = logits_and_value(trial)
            descent = gradient @ (trial - tilts)
            moved = descent < 0 and trial_value <= value + 1e-4 * descent + noise
            damping = damping / 10 if moved else max(10 * damping, 1e-6)
        if not moved:
            break
        tilts, log_policy, value, damping = trial, trial_logits, trial_value, max(damping, 1e-9)
    return tilts


def _certify(win_rates, log_reference, tau, thresholds, duals, best) -> Optimum:
    log_policy = tilt(win_rates, log_reference, tau, duals)
    reached = policy_win_rates(log_policy, win_rates)
    kl = mean_kl(log_policy, log_reference)
    value = float(reached[0] - tau * kl)
    slack = np.where(np.isfinite(thresholds), reached[1:] - thresholds, 0.0)
    residual = float(np.max(np.maximum(np.maximum(-slack, 0.0), np.abs(duals * slack)), initial=0.0))
    gap = dual_value(win_rates, log_reference, tau, thresholds, duals) - value
    return Optimum(reached, duals, log_policy, kl, value, gap, residual, True, best)
