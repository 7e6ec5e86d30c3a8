"""MOPO's pure functions against hand computations, independent solvers and identities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import chi2
from scipy.stats import t as student_t
from torch import Tensor

from mopo_cli.algorithms.mopo.core import (
    Lagrangian,
    LogpBatch,
    MopoSettings,
    bc_loss,
    extraction_loss,
    refresh_due,
    regression_loss,
    scheduled_thresholds,
    unattainable,
)
from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Objective
from mopo_cli.maths.bounds import (
    auto_epsilon,
    chi_gradient,
    dual_newton_step,
    dual_step,
    effective_sample_size,
    least_multiplier,
    lower_bound,
    lower_bound_at,
    resolve_epsilon,
)
from mopo_cli.maths.estimates import (
    Estimate,
    importance_ratio,
    leave_one_out,
    sampled_estimate,
    scalarise,
    weighted_estimate,
)
from mopo_cli.maths.oracle import solve

torch.set_num_threads(1)  # threads only get in each other's way on tensors this small

INF = math.inf


def f64(*values: Any) -> Tensor:
    return torch.tensor(values if len(values) != 1 else values[0], dtype=torch.float64)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ragged_mask(seed: int, rows: int, size: int, least: int = 1) -> Tensor:
    """(rows, size) True for the first few responses of each row."""
    counts = torch.randint(least, size + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(size)[None] < counts


# --------------------------------------------------------------------------------------------- scores and ratios


def test_scalarise_by_hand():
    win_rates = f64([[0.5, 0.2, 0.9], [0.1, 1.0, 0.0]])
    torch.testing.assert_close(scalarise(win_rates, f64(2.0, 0.5)), f64(0.5 + 0.4 + 0.45, 0.1 + 2.0))
    torch.testing.assert_close(scalarise(win_rates, f64(0.0, 0.0)), win_rates[:, 0])
    assert scalarise(win_rates.float(), f64(1.0, 1.0)).dtype == torch.float32
    torch.testing.assert_close(scalarise(win_rates[:, :1], torch.zeros(0)), win_rates[:, 0])


@given(st.integers(0, 999), st.sampled_from([1.0, 0.08, 1e-3]))
@settings(max_examples=30, deadline=None)
def test_ratios_average_to_one_over_each_prompt(seed, tau):
    scores, mask = draw(seed, 5, 4), ragged_mask(seed, 5, 4)
    rho = importance_ratio(scores, tau, mask)
    torch.testing.assert_close((rho * mask).sum(-1) / mask.sum(-1), torch.ones(5, dtype=torch.float64))
    assert not rho[~mask].any()
    torch.testing.assert_close(importance_ratio(scores + 7.0, tau, mask), rho, rtol=1e-6, atol=1e-9)
    batch = importance_ratio(scores, tau, mask, normalize="batch")
    assert float(batch[mask].mean()) == pytest.approx(1.0)


def test_ratios_by_hand():
    scores = f64([[0.3, 0.1], [0.9, 0.0]])
    e = torch.exp(scores / 0.5)
    torch.testing.assert_close(importance_ratio(scores, 0.5), e / e.mean(-1, keepdim=True))
    torch.testing.assert_close(importance_ratio(scores, 0.5, normalize="batch"), e / e.mean())
    printed = importance_ratio(scores, 0.5, torch.tensor([[True, True], [True, False]]), normalize="none")
    torch.testing.assert_close(printed, f64([[math.exp(-0.4), math.exp(-0.8)], [math.exp(0.8), 0.0]]))
    with pytest.raises(UserError, match=r"algorithm\.normalize=mean: must be prompt, batch or none"):
        importance_ratio(scores, 0.5, normalize="mean")


def test_the_printed_ratio_makes_a_bound_in_the_unit_interval_idle():
    p = draw(0, 200, 8)
    scores = 0.9 * p + 0.05
    assert float((importance_ratio(scores, 0.08, normalize="none") * p).mean()) > 100
    assert 0 < float((importance_ratio(scores, 0.08) * p).mean()) < 1


# --------------------------------------------------------------------------------------------- the pessimistic bound


def worst_mean(f: np.ndarray, epsilon: float) -> float:
    """min of w.f over distributions with KL(w || uniform) <= epsilon, in 50 digits, by bisection on the tilt w(t)."""
    with mpmath.workdps(50):
        values = [mpmath.mpf(float(v)) for v in f]
        least = min(values)

        def tilted(t: Any) -> tuple[Any, Any]:
            weights = [mpmath.exp(-t * (v - least)) for v in values]
            total = mpmath.fsum(weights)
            w = [x / total for x in weights]
            kl = mpmath.fsum(x * mpmath.log(x * len(w)) for x in w if x > 0)
            return kl, mpmath.fsum(x * v for x, v in zip(w, values, strict=True))

        low, high = mpmath.mpf(0), mpmath.mpf(1)
        while tilted(high)[0] < epsilon and high < mpmath.mpf(10) ** 12:
            high *= 2
        for _ in range(160):
            middle = (low + high) / 2
            low, high = (middle, high) if tilted(middle)[0] < epsilon else (low, middle)
        return float(tilted(high)[1])


F = st.lists(st.floats(0.0, 3.0), min_size=2, max_size=10).filter(lambda f: max(f) - min(f) > 1e-3)


@given(F, st.floats(1e-6, 4.0))
@settings(max_examples=60, deadline=None)
def test_lower_bound_is_the_constrained_minimum(f, epsilon):
    least = min(f)
    assume(all(v == least or v > least + 1e-6 for v in f))  # chi is never below 1e-8 of the span
    bound, _ = lower_bound(f64(f), epsilon)
    assert float(bound) == pytest.approx(worst_mean(np.array(f), epsilon), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("epsilon", [1e-8, 0.01, 0.15, 1.0, 2.0])
def test_lower_bound_at_any_scale(scale, epsilon):
    f = scale * (draw(1, 9) + 2.0)
    bound, chi = lower_bound(f, epsilon)
    assert float(bound) == pytest.approx(worst_mean(f.numpy(), epsilon), rel=1e-9)
    assert float(chi_gradient(f, chi, epsilon)) == pytest.approx(0.0, abs=1e-8)
    assert float(lower_bound_at(f, chi, epsilon)) == pytest.approx(float(bound), rel=1e-12)
    for factor in (0.9, 1.1):
        assert float(lower_bound_at(f, factor * chi, epsilon)) <= float(bound) + 1e-12 * scale


def test_lower_bound_against_a_general_solver():
    f = draw(2, 6).numpy()

    def kl(w: np.ndarray) -> float:
        return float((w * np.log(np.maximum(w, 1e-300) * len(w))).sum())

    for epsilon in (0.05, 0.5):
        found = minimize(
            lambda w: w @ f,
            np.full(6, 1 / 6),
            jac=lambda w: f,
            method="SLSQP",
            bounds=[(1e-9, 1)] * 6,
            constraints=[
                {"type": "eq", "fun": lambda w: w.sum() - 1},
                {"type": "ineq", "fun": lambda w, e=epsilon: e - kl(w), "jac": lambda w: -np.log(w * 6) - 1},
            ],
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        assert float(lower_bound(torch.tensor(f), epsilon)[0]) == pytest.approx(found.fun, abs=1e-7)


def test_lower_bound_by_hand_on_two_values():
    # w = (q, 1 - q) on f = (0, 1): the bound is 1 - q with KL = epsilon
    q = 0.7
    epsilon = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
    bound, chi = lower_bound(f64(0.0, 1.0), epsilon)
    assert float(bound) == pytest.approx(0.3, abs=1e-12)
    assert float(chi) == pytest.approx(1 / math.log(0.7 / 0.3))  # exp(-1 / chi) = (1 - q) / q


def test_limits_of_the_lower_bound():
    f = draw(3, 4, 7)
    mean, chi = lower_bound(f, 0.0)
    torch.testing.assert_close(mean, f.mean(-1))
    assert torch.isinf(chi).all()
    torch.testing.assert_close(lower_bound(f, 1e-12)[0], f.mean(-1), atol=1e-5, rtol=0.0)
    for epsilon in (math.log(7), 10.0, INF):
        bound, chi = lower_bound(f, epsilon)
        torch.testing.assert_close(bound, f.min(-1).values, atol=1e-8, rtol=0.0)
        assert (chi < 1e-6).all()
    assert float(lower_bound(f64(0.2, 0.2, 0.2), 0.1)[0]) == pytest.approx(0.2)
    ties = f64(0.0, 0.0, 1.0, 1.0)
    assert float(lower_bound(ties, math.log(2))[0]) == 0.0
    assert float(lower_bound(ties, math.log(2) - 1e-3)[0]) > 0.0


@given(st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_lower_bound_falls_with_epsilon_and_moves_with_f(seed):
    f = draw(seed, 8)
    bounds = [float(lower_bound(f, e)[0]) for e in (0.0, 1e-6, 1e-3, 0.01, 0.1, 0.5, 1.0, 2.0, 3.0)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(bounds))
    assert float(f.min()) - 1e-12 <= bounds[-1]
    assert bounds[0] == pytest.approx(float(f.mean()))
    shifted, _ = lower_bound(3.0 * f - 5.0, 0.1)
    assert float(shifted) == pytest.approx(3.0 * bounds[4] - 5.0, abs=1e-9)
    torch.testing.assert_close(lower_bound(f[torch.randperm(8)], 0.1)[0], lower_bound(f, 0.1)[0])
    rows = torch.stack([f, f.flip(0) * 2.0])
    torch.testing.assert_close(lower_bound(rows, 0.1)[0], torch.stack([lower_bound(row, 0.1)[0] for row in rows]))


@given(st.integers(0, 999), st.floats(0.05, 5.0), st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_chi_gradient_is_the_derivative(seed, chi, epsilon):
    f, h = draw(seed, 6), 1e-5 * chi
    numeric = (lower_bound_at(f, f64(chi + h), epsilon) - lower_bound_at(f, f64(chi - h), epsilon)) / (2 * h)
    assert float(chi_gradient(f, f64(chi), epsilon)) == pytest.approx(float(numeric), abs=1e-6)


def test_weights_of_the_bound_count_as_repeated_values():
    f, chi = f64([[0.3, 1.2, 0.7], [0.9, 0.1, 0.4]]), f64(0.8, 2.0)
    repeated, log_weights = f[:, [0, 0, 0, 1, 2, 2]], f64(3.0, 1.0, 2.0).log() - 7.0
    torch.testing.assert_close(lower_bound_at(f, chi, 0.2, log_weights), lower_bound_at(repeated, chi, 0.2))
    torch.testing.assert_close(chi_gradient(f, chi, 0.2, log_weights), chi_gradient(repeated, chi, 0.2))


def test_auto_epsilon_is_the_empirical_likelihood_radius():
    assert auto_epsilon(10**6, 0.1) == pytest.approx(chi2.ppf(0.9, 1) / (2 * 10**6), rel=1e-4)
    assert auto_epsilon(8, 0.2) == pytest.approx(student_t.ppf(0.9, 7) ** 2 / 16)  # of few values: Student's quantile
    assert auto_epsilon(100, 0.2, n_eff=8.0) == pytest.approx(student_t.ppf(0.9, 7) ** 2 / 200)
    assert auto_epsilon(0.0, 0.1) == auto_epsilon(1.0, 0.1)
    assert resolve_epsilon("auto", 50, 0.1) == auto_epsilon(50, 0.1)
    assert resolve_epsilon(0.15, 50, 0.1) == 0.15


def test_the_auto_bound_is_the_usual_confidence_limit():
    # to first order mean - z_{1 - delta / 2} std / sqrt(n), as in empirical likelihood
    f = draw(4, 2000)
    bound, _ = lower_bound(f, auto_epsilon(2000, 0.1))
    assert float(f.mean() - bound) == pytest.approx(1.6448536 * float(f.std()) / math.sqrt(2000), rel=0.02)


def test_effective_sample_size_by_hand():
    assert float(effective_sample_size(torch.ones(7))) == pytest.approx(7.0)
    assert float(effective_sample_size(torch.full((7,), 1e-6))) == pytest.approx(7.0)  # whatever their scale
    assert float(effective_sample_size(f64(3.0, 1.0))) == pytest.approx(16 / 10)
    assert float(effective_sample_size(f64(5.0, 0.0, 0.0))) == pytest.approx(1.0)
    assert effective_sample_size(torch.zeros(2, 3)).tolist() == [0.0, 0.0]


# --------------------------------------------------------------------------------------------- multipliers


def test_dual_step_by_hand():
    found = dual_step(f64(1.0, 0.1, 0.0), f64(0.4, 0.9, 0.2), f64(0.5, 0.5, 0.5), rate=2.0)
    torch.testing.assert_close(found, f64(1.2, 0.0, 0.6))


@pytest.mark.parametrize("seed", range(6))
def test_dual_newton_steps_solve_a_quadratic_dual(seed):
    # R(lambda) = R(0) + H lambda: the dual is quadratic and its minimiser over lambda >= 0 solves an LCP
    a = draw(seed, 3, 3) - 0.3
    hessian = a @ a.T / 3 + 0.05 * torch.eye(3, dtype=torch.float64)
    base, thresholds = 0.5 - 0.2 * draw(seed + 50, 3), 0.35 + 0.2 * draw(seed + 99, 3)
    duals = torch.zeros(3, dtype=torch.float64)
    for _ in range(40):
        duals = dual_newton_step(duals, base + hessian @ duals, thresholds, hessian, gain=1.0)
        assert (duals >= 0).all()
    slack = base + hessian @ duals - thresholds
    assert (slack > -1e-8).all()
    assert float((duals * slack).abs().max()) < 1e-8
    exact = min(
        (quadratic_minimum(hessian, base - thresholds, list(active)) for active in subsets(3)), key=lambda p: p[0]
    )[1]
    torch.testing.assert_close(duals, exact, atol=1e-6, rtol=1e-6)


def subsets(size: int) -> list[tuple[int, ...]]:
    return [c for n in range(size + 1) for c in itertools.combinations(range(size), n)]


def quadratic_minimum(hessian: Tensor, slope: Tensor, active: list[int]) -> tuple[float, Tensor]:
    """(value, point) of slope.x + x.H.x / 2 with only `active` coordinates off zero; inf where one is negative."""
    x = torch.zeros(len(slope), dtype=torch.float64)
    if active:
        x[active] = torch.linalg.solve(hessian[active][:, active], -slope[active])
    return (INF if (x < 0).any() else float(slope @ x + 0.5 * x @ hessian @ x)), x


def test_a_dual_newton_step_is_damped_and_trusted_only_so_far():
    hessian, duals = f64([[0.02]]), f64([3.0])
    ridge = 0.02 + 1e-3 + 0.05 * 0.02
    small = dual_newton_step(duals, f64([0.51]), f64([0.5]), hessian, gain=0.5)
    torch.testing.assert_close(small, duals - 0.5 * 0.01 / ridge)
    far = dual_newton_step(duals, f64([0.2]), f64([0.5]), hessian, gain=1.0)
    assert 3.0 < float(far) < 3.0 + 0.3 / ridge
    assert dual_newton_step(torch.zeros(0), torch.zeros(0), torch.zeros(0), torch.zeros(0, 0), 1.0).shape == (0,)
    met = dual_newton_step(f64([0.0]), f64([0.7]), f64([0.5]), hessian, gain=1.0)
    assert met.tolist() == [0.0]


def test_a_newton_step_leaves_its_arguments_alone():
    duals, hessian = f64(0.5, 0.2), f64([[0.1, 0.02], [0.02, 0.2]])
    dual_newton_step(duals, f64(0.1, 0.9), f64(0.5, 0.5), hessian, gain=1.0)
    assert duals.tolist() == [0.5, 0.2]
    assert hessian.tolist() == [[0.1, 0.02], [0.02, 0.2]]


@pytest.mark.parametrize("sigma", [0.0, 0.03])
def test_a_multiplier_minimises_its_proximal_problem(sigma):
    grid = torch.linspace(1e-9, 4.0, 400001, dtype=torch.float64)
    for centre in (-1.0, -0.1, 0.0, 0.3, 2.0):
        found = least_multiplier(f64([centre]), sigma)
        by_search = grid[((grid - centre) ** 2 / 2 - sigma * grid.log()).argmin()]
        assert float(found) == pytest.approx(float(by_search), abs=2e-5)


@pytest.mark.parametrize("newton", [False, True])
@pytest.mark.parametrize("start", [0.0, 0.01, 5.0])
def test_the_barrier_rests_at_sigma_over_slack(newton, start):
    # R(lambda) = 0.3 + 0.2 lambda against b = 0.5: lambda (0.2 lambda - 0.2) = sigma
    sigma, hessian, duals = 0.03, f64([[0.2]]), f64([start])
    for _ in range(600):
        reached = 0.3 + 0.2 * duals
        if newton:
            duals = dual_newton_step(duals, reached, f64([0.5]), hessian, 0.5, sigma)
        else:
            duals = dual_step(duals, reached, f64([0.5]), 0.5, sigma)
    assert float(duals) == pytest.approx((1 + math.sqrt(1 + 4 * sigma / 0.2)) / 2, abs=1e-9)


# --------------------------------------------------------------------------------------------- schedule


def test_scheduled_thresholds_never_touch_a_fixed_one():
    fixed = torch.tensor([False, True, False])
    found = scheduled_thresholds(f64(0.4, 0.6, 0.5), f64(0.7, 0.1, 0.2), fixed, beta=0.9)
    torch.testing.assert_close(found, f64(0.63, 0.6, 0.18))


def test_thresholds_out_of_reach_are_told_before_training():
    objectives = [
        Objective("helpful", "primary", "helpful"),
        Objective("harmless", "secondary", "harmless", threshold=0.55),
        Objective("concise", "secondary", "concise"),
    ]
    (text,) = unattainable(objectives, [0.95, 0.5], [0.8, 0.7])
    assert text.startswith("objectives.harmless.threshold=0.95 looks out of reach")
    assert "win 0.80 on average" in text
    assert unattainable(objectives, [0.95, 0.5], []) == []


def test_refresh_due():
    assert [s for s in range(6) if refresh_due(s, 1)] == [1, 2, 3, 4, 5]
    assert [s for s in range(10) if refresh_due(s, 3.0)] == [3, 6, 9]
    assert not any(refresh_due(s, INF) for s in range(10))


# --------------------------------------------------------------------------------------------- extraction


def test_bc_loss_by_hand():
    logps = f64([[-1.0, -2.0], [-3.0, -4.0]]).requires_grad_()
    rho = f64([[1.5, 0.5], [2.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss = bc_loss(logps, rho, mask)
    torch.testing.assert_close(loss.detach(), f64((1.5 * 1 + 0.5 * 2) / 2, 6.0))
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, f64([[-0.75, -0.25], [-2.0, 0.0]]))


def test_bc_does_not_differentiate_the_ratio():
    rho = f64([[1.5, 0.5]]).requires_grad_()
    logps = f64([[-1.0, -2.0]]).requires_grad_()
    bc_loss(logps, rho, torch.ones(1, 2, dtype=torch.bool)).sum().backward()
    assert rho.grad is None


def test_bc_of_a_uniform_ratio_is_likelihood_training():
    logps, mask = -draw(0, 3, 4), ragged_mask(1, 3, 4)
    found = bc_loss(logps, importance_ratio(torch.full((3, 4), 0.3), 0.08, mask), mask)
    torch.testing.assert_close(found, -(logps * mask).sum(-1) / mask.sum(-1))


def test_regression_loss_by_hand():
    # IPO (Azar et al. 2023, eq. 17): (h - 1 / (2 tau))^2 with scores 1/2 apart
    policy, reference = f64([[-1.0, -2.5]]), f64([[-1.5, -1.0]])
    h = (-1.0 + 1.5) - (-2.5 + 1.0)
    found = regression_loss(policy, reference, f64([[0.75, 0.25]]), torch.ones(1, 2, dtype=torch.bool), 0.2)
    torch.testing.assert_close(found, f64([(h - 0.5 / 0.2) ** 2]))


@given(st.integers(0, 999), st.integers(2, 6), st.sampled_from([0.05, 0.5]))
@settings(max_examples=40, deadline=None)
def test_regression_is_the_mean_over_explicit_pairs(seed, size, tau):
    policy, reference, scores = (draw(seed + i, 4, size) for i in range(3))
    mask = ragged_mask(seed, 4, size)
    found = regression_loss(policy, reference, scores, mask, tau)
    for b in range(4):
        ratio = policy[b] - reference[b]
        terms = [
            float(ratio[i] - ratio[j] - (scores[b, i] - scores[b, j]) / tau) ** 2
            for i, j in itertools.combinations(range(size), 2)
            if mask[b, i] and mask[b, j]
        ]
        assert float(found[b]) == pytest.approx(float(np.mean(terms)) if terms else 0.0, rel=1e-9, abs=1e-12)


@given(st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_losses_ignore_the_order_of_responses_and_what_is_masked(seed):
    policy, reference, scores = (draw(seed + i, 3, 5) for i in range(3))
    mask = ragged_mask(seed, 3, 5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    junk = torch.where(mask, 0.0, 1e6)
    found = regression_loss(policy, reference, scores, mask, 0.1)
    permuted = regression_loss(policy[:, order], reference[:, order], scores[:, order], mask[:, order], 0.1)
    torch.testing.assert_close(permuted, found)
    torch.testing.assert_close(regression_loss(policy + junk, reference, scores, mask, 0.1), found)
    torch.testing.assert_close(regression_loss(policy, reference - junk, scores + junk, mask, 0.1), found)
    rho = importance_ratio(scores, 0.1, mask)
    bc = bc_loss(policy, rho, mask)
    torch.testing.assert_close(bc_loss(policy[:, order], rho[:, order], mask[:, order]), bc)
    torch.testing.assert_close(bc_loss(policy + junk, importance_ratio(scores + junk, 0.1, mask), mask), bc)
    shifted = regression_loss(policy + 3.0, reference, scores - 2.0, mask, 0.1)
    torch.testing.assert_close(shifted, found)  # a constant a prompt does not matter


def test_the_regressions_minimiser_is_the_optimal_ratio():
    scores, reference = draw(0, 6, 4), -5.0 * draw(1, 6, 4)
    mask = torch.ones(6, 4, dtype=torch.bool)
    policy = (reference + scores / 0.08 - 3.0).requires_grad_()
    loss = regression_loss(policy, reference, scores, mask, 0.08)
    loss.sum().backward()
    assert policy.grad is not None
    assert float(loss.detach().max()) < 1e-20
    assert float(policy.grad.abs().max()) < 1e-9
    off = regression_loss(policy.detach() + draw(2, 6, 4), reference, scores, mask, 0.08)
    assert (off > 1e-3).all()


# --------------------------------------------------------------------------------------------- win rates and estimates


def test_leave_one_out_by_hand():
    p = torch.zeros(1, 3, 3, 1, dtype=torch.float64)
    p[0, :, :, 0] = f64([[9.0, 0.8, 0.6], [0.2, 9.0, 1.0], [0.4, 0.0, 9.0]])  # the diagonal is never read
    found = leave_one_out(p, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(found[0, :, 0], f64(0.7, 0.6, 0.2))
    found = leave_one_out(p, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found[0, :, 0], f64(0.8, 0.2, 0.0))
    assert leave_one_out(p, torch.tensor([[True, False, False]])).abs().sum() == 0


def test_leave_one_out_of_two_responses_is_the_label():
    labels = f64([[1.0, 0.0], [0.5, 1.0], [0.0, 0.5]])  # (B, K): the first over the second
    p = torch.full((3, 2, 2, 2), math.nan, dtype=torch.float64)
    p[:, 0, 1], p[:, 1, 0] = labels, 1.0 - labels
    found = leave_one_out(p, torch.ones(3, 2, dtype=torch.bool))
    torch.testing.assert_close(found[:, 0], labels)
    torch.testing.assert_close(found[:, 1], 1.0 - labels)


@given(st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_leave_one_out_averages_to_a_half(seed):
    raw = draw(seed, 3, 5, 5, 2)
    p = torch.sigmoid(4 * (raw - raw.transpose(1, 2)))
    mask = ragged_mask(seed, 3, 5, least=2)
    found = leave_one_out(p, mask)
    half = torch.full((3, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close((found * mask[..., None]).sum(1) / mask.sum(1)[:, None], half)


def test_weighted_estimate_by_hand():
    rates = f64([[0.5, 0.2], [0.9, 0.6], [0.1, 1.0]])
    weights = f64(1.0, 2.0, 3.0)
    found = weighted_estimate(rates, weights, epsilon=0.1, delta=0.1)
    torch.testing.assert_close(found.win_rates, (weights[:, None] * rates).sum(0) / 6)
    assert found.n_eff == pytest.approx(36 / 14)
    mean = (0.2 + 1.2 + 3.0) / 6
    linear = mean + weights / 2 * (rates[:, 1] - mean)
    torch.testing.assert_close(found.lower, lower_bound(linear, 0.1)[0][None])
    assert found.epsilon == 0.1
    assert found.sensitivity is None
    scaled = weighted_estimate(rates, 100 * weights, epsilon=0.1, delta=0.1)
    torch.testing.assert_close(scaled.lower, found.lower)
    printed = weighted_estimate(rates, weights, 0.1, 0.1, self_normalise=False)
    torch.testing.assert_close(printed.win_rates, (weights[:, None] * rates).mean(0))
    torch.testing.assert_close(printed.lower, lower_bound(weights * rates[:, 1], 0.1)[0][None])


def test_weighted_estimate_of_equal_weights_is_the_mean_with_its_bound():
    rates = draw(0, 40, 3)
    found = weighted_estimate(rates, torch.ones(40), "auto", 0.1)
    torch.testing.assert_close(found.win_rates, rates.mean(0))
    assert found.n_eff == pytest.approx(40)
    assert found.epsilon == auto_epsilon(40, 0.1)
    lost = torch.zeros(1, 2, dtype=torch.float64)
    torch.testing.assert_close(found.lower, lower_bound(torch.cat([rates[:, 1:], lost]).T, found.epsilon)[0])
    torch.testing.assert_close(weighted_estimate(rates, torch.ones(40), 0.0, 0.1).lower, rates.mean(0)[1:])


class TestConfidenceOfTheBound:
    """`epsilon: auto` says 1 - delta / 2 = 90 %, one-sided, for the luck of the prompts: held against fresh draws."""

    @pytest.mark.parametrize("prompts", [4, 8, 32])
    @pytest.mark.parametrize("rate", [0.5, 0.98])
    @pytest.mark.parametrize("wins", [1, 2])
    def test_of_samples(self, prompts: int, rate: float, wins: int):
        rng = np.random.default_rng([prompts, int(100 * rate), wins])
        drawn = f64(rng.binomial(wins, rate, (300, prompts)) / wins)
        bounds = [sampled_estimate(rates[:, None, None].expand(-1, 1, 2), 0.1, "auto", 0.2).lower for rates in drawn]
        assert float((torch.cat(bounds) <= rate).double().mean()) >= 0.9 - 0.035  # two errors of 300 draws

    def test_of_prompts_in_groups(self):
        """Prompts of a group that say nearly the same are few, however many they are."""
        rng = np.random.default_rng(0)
        kept, naive = 0, 0
        for _ in range(200):
            rates = np.clip(np.repeat(rng.beta(2, 2, 20), 10) + rng.normal(0, 0.02, 200), 0, 1)
            column = f64(rates)[:, None, None].expand(-1, 1, 2)
            kept += float(sampled_estimate(column, 0.1, "auto", 0.2, units=torch.arange(200) // 10).lower) <= 0.5
            naive += float(sampled_estimate(column, 0.1, "auto", 0.2).lower) <= 0.5
        assert kept >= 0.865 * 200
        assert naive < 0.8 * 200  # what it was

    @pytest.mark.parametrize(("spread", "responses"), [(0.5, 50), (1.0, 400)])
    def test_of_weighted_responses(self, spread: float, responses: int):
        """The weights' variance counts once: the bound lies as far down as the estimate varies, and no further."""
        rng = np.random.default_rng(1)
        z = rng.normal(size=(400, responses))  # log-ratios; under the policy they are shifted by `spread`
        grid = np.linspace(-8, 8, 2001)
        density = np.exp(-(grid**2) / 2)
        truth = float((density / (1 + np.exp(-grid - spread))).sum() / density.sum())
        wins = f64(rng.random(z.shape) < 1 / (1 + np.exp(-z)))
        weights = f64(np.exp(spread * z))
        found = [
            weighted_estimate(w[:, None].expand(-1, 2), rho, "auto", 0.2) for w, rho in zip(wins, weights, strict=True)
        ]
        lower, rates = (torch.stack([getattr(e, key)[-1] for e in found]) for key in ("lower", "win_rates"))
        assert float((lower <= truth).double().mean()) >= 0.87
        down, varies = float((rates - lower).mean()), 1.2816 * float(rates.std())
        assert varies < down < 1.25 * varies  # 1.4 and 1.7 times before


def test_sampled_estimate_by_hand():
    rates = f64([[[0.5, 0.2, 0.4], [0.7, 0.4, 0.2]], [[0.1, 0.9, 0.6], [0.3, 0.5, 0.0]]])  # two prompts, two samples
    found = sampled_estimate(rates, tau=0.1, epsilon=0.05, delta=0.1)
    torch.testing.assert_close(found.win_rates, f64(0.4, 0.5, 0.3))
    torch.testing.assert_close(found.lower[0], lower_bound(f64(0.3, 0.7), 0.05)[0])
    torch.testing.assert_close(found.lower[1], lower_bound(f64(0.3, 0.3), 0.05)[0])
    assert found.n_eff == 2.0
    # within-prompt covariances, unbiased: prompt 1 (0.02, -0.02, 0.02), prompt 2 (0.08, 0.12, 0.18)
    assert found.sensitivity is not None
    torch.testing.assert_close(found.sensitivity, f64([[0.05, 0.05], [0.05, 0.1]]) / 0.1)
    assert sampled_estimate(rates[:, :1], 0.1, 0.05, 0.1).sensitivity is None


def test_samples_off_the_support_are_left_out_of_the_estimate():
    rates = f64([[[0.5, 0.2], [0.7, 0.4]], [[0.9, 0.9], [0.3, 0.5]], [[0.1, 0.0], [0.2, 0.0]]])
    known = torch.tensor([[True, True], [False, True], [False, False]])
    found = sampled_estimate(rates, 0.1, 0.05, 0.1, known)
    torch.testing.assert_close(found.win_rates, f64(0.45, 0.4))  # of the prompts' means (0.6, 0.3) and (0.3, 0.5)
    torch.testing.assert_close(found.lower[0], lower_bound(f64(0.3, 0.5), 0.05)[0])
    assert found.n_eff == 2.0
    assert found.sensitivity is not None  # one prompt with two samples: variance 0.02
    torch.testing.assert_close(found.sensitivity, f64([[0.02]]) / 0.1)
    whole = sampled_estimate(rates, 0.1, 0.05, 0.1)
    for everything in (torch.ones_like(known), torch.zeros_like(known)):  # nothing known: better all than none
        torch.testing.assert_close(sampled_estimate(rates, 0.1, 0.05, 0.1, everything).win_rates, whole.win_rates)
    alone = torch.tensor([[True, False], [False, True], [False, False]])
    assert sampled_estimate(rates, 0.1, 0.05, 0.1, alone).sensitivity is None


def test_the_sensitivity_is_the_derivative_of_the_win_rates():
    # of pi_lambda proportional to mu exp((p_0 + lambda p_1) / tau), enumerated through equal weights on samples
    p, tau = draw(5, 1, 6, 2), 0.3

    def rates(dual: float) -> Tensor:
        w = torch.softmax(scalarise(p[0], f64([dual])) / tau, -1)
        return w @ p[0, :, 1]

    numeric = (rates(1e-5) - rates(-1e-5)) / 2e-5
    w = torch.softmax(p[0, :, 0] / tau, -1)
    drawn = torch.multinomial(w, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = sampled_estimate(p[:, drawn], tau, 0.0, 0.1).sensitivity
    assert found is not None
    assert float(found) == pytest.approx(float(numeric), rel=0.03)


# --------------------------------------------------------------------------------------------- the method


def method(thresholds: tuple[float | None, ...] = (None,), **changes: Any) -> Lagrangian:
    names = ("helpful", "harmless", "concise")[: len(thresholds) + 1]
    return Lagrangian(
        MopoSettings(names, thresholds, **{"tau": 0.1, "beta": 0.9, "epsilon": 0.0, "t0": INF, **changes})
    )


def logp_batch(win_rates: Tensor, seed: int = 0, from_data: Tensor | None = None, **changes: Any) -> LogpBatch:
    shape = win_rates.shape[:2]
    whole = torch.ones(shape, dtype=torch.bool)
    values = {
        "policy_logps": -3 * draw(seed, *shape),
        "reference_logps": -3 * draw(seed + 1, *shape),
        "behaviour_logps": -3 * draw(seed + 2, *shape),
        "win_rates": win_rates,
        "mask": whole,
        "from_data": whole if from_data is None else from_data,
    }
    return LogpBatch(**{**values, **changes})


@pytest.mark.parametrize("extraction", ["regression", "bc"])
def test_without_multipliers_only_the_primary_objective_counts(extraction):
    rates = draw(0, 4, 3, 3)
    other = torch.cat([rates[..., :1], 1.0 - rates[..., 1:]], -1)
    m = method((None, 0.5), extraction=extraction)
    torch.testing.assert_close(m.loss(logp_batch(rates)), m.loss(logp_batch(other)))
    m.state.duals = [0.5, 0.0]
    assert not torch.allclose(m.loss(logp_batch(rates)), m.loss(logp_batch(other)))


def test_equal_objectives_with_a_multiplier_are_one_at_a_smaller_tau():
    rates = draw(0, 4, 3, 1).expand(4, 3, 2)
    both, alone = method(tau=0.1), method(tau=0.04)
    both.state.duals = [1.5]
    torch.testing.assert_close(both.loss(logp_batch(rates)), alone.loss(logp_batch(rates)))


def test_rows_of_a_batch_may_have_multipliers_of_their_own():
    rates, points = draw(0, 4, 3, 3), [method((0.5, 0.5)), method((0.6, 0.6))]
    for point, duals in zip(points, ([0.5, 0.1], [0.0, 2.0]), strict=True):
        point.state.duals = duals
    batch = logp_batch(rates)
    rows = torch.stack([points[row % 2].duals for row in range(4)])
    found = extraction_loss(points[0].settings, batch, rows)
    alone = [points[row % 2].loss(batch)[row] for row in range(4)]
    torch.testing.assert_close(found, torch.stack(alone))


def test_bc_leaves_fresh_samples_out():
    rates = draw(0, 2, 4, 2)
    from_data = torch.tensor([[True, True, False, False]] * 2)
    m = method(extraction="bc")
    full, part = logp_batch(rates, from_data=from_data), logp_batch(rates[:, :2])
    short = {k: getattr(full, k)[:, :2] for k in ("policy_logps", "reference_logps", "behaviour_logps")}
    torch.testing.assert_close(m.loss(full), m.loss(logp_batch(rates[:, :2], **short)))
    assert part.mask.all()


def population_minimiser(m: Lagrangian, p: Tensor, mu: Tensor) -> Tensor:
    """(A,) log pi / pi_ref that minimises the loss over pairs drawn from mu x mu, every pair weighted by its chance."""
    a = len(mu)
    rows = list(itertools.product(range(a), repeat=2))
    i, j = (torch.tensor(column) for column in zip(*rows, strict=True))
    rates = leave_one_out(
        torch.stack([torch.stack([p[i, i], p[i, j]], 1), torch.stack([p[j, i], p[j, j]], 1)], 1)[..., None].expand(
            -1, -1, -1, 2
        ),
        torch.ones(len(rows), 2, dtype=torch.bool),
    )
    f = torch.zeros(a, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(len(rows), 2, dtype=torch.float64)
    optimiser = torch.optim.LBFGS([f], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        policy = torch.stack([f[i], f[j]], 1)
        loss = (mu[i] * mu[j] * m.loss(logp_batch(rates, policy_logps=policy, reference_logps=zeros))).sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    return f.detach() - f.detach().mean()


def test_pairs_of_the_data_fit_the_optimal_ratio():
    # single labels enter the squared loss by their mean, so P stands for them
    scores = 2.0 * draw(3, 5)
    p, mu = torch.sigmoid(scores[:, None] - scores[None]), torch.softmax(draw(4, 5), -1)
    m = method(tau=0.3)
    optimal = (p @ mu) / 0.3
    torch.testing.assert_close(population_minimiser(m, p, mu), optimal - optimal.mean(), atol=1e-6, rtol=1e-6)


def estimate(lower: float, sensitivity: float | None = None) -> Estimate:
    hessian = None if sensitivity is None else f64([[sensitivity]])
    return Estimate(f64(0.6, lower), f64([lower]), f64([0.3]), 0.01, 50.0, hessian)


@pytest.mark.parametrize("changes", [{}, {"multipliers": "barrier"}])
@pytest.mark.parametrize("sensitivity", [None, 0.2])
def test_a_missed_constraint_raises_its_multiplier(changes, sensitivity):
    m = method((0.6,), **changes)
    m.state.duals = [0.3]
    m.observe(estimate(0.5, sensitivity))
    assert m.state.duals[0] > 0.3
    for _ in range(200):
        m.observe(estimate(0.9, sensitivity))
    assert m.state.duals[0] == pytest.approx(m.settings.sigma / 0.3 if changes else 0.0, abs=5e-3)


@pytest.mark.parametrize("sensitivity", [None, 0.2])
def test_the_multiplier_goes_by_the_pessimistic_bound(sensitivity):
    hessian = None if sensitivity is None else f64([[sensitivity]])
    m = method((0.55,))
    m.state.duals = [0.3]
    met_on_average = Estimate(f64(0.6, 0.62), f64([0.5]), f64([0.3]), 0.01, 50.0, hessian)
    m.observe(met_on_average)
    expected = 0.3 + 0.5 * 0.05  # (b - G) of 0.05, not of -0.07
    if hessian is not None:  # a Newton step of the same sign, half of the way at the first correction
        expected = 0.3 + 0.5 * 0.05 / (0.2 + 1e-3 + 0.05 * 0.2)
    assert m.state.duals[0] == pytest.approx(expected)


@pytest.mark.parametrize(("lower", "gain"), [(0.5, 0.5), (0.56, 0.5 / 3), (0.7, 0.5 / 3)])
def test_a_constraint_missed_by_far_is_answered_at_full_rate(lower, gain):
    m = method((0.6,))
    m.state.duals, m.state.corrections = [1.0], 8
    m.observe(estimate(lower, 0.5))
    step = (0.6 - lower) / (0.5 + 1e-3 + 0.05 * 0.5)
    assert m.state.duals[0] == pytest.approx(1.0 + gain * step)
    assert m.state.corrections == 9


def test_multipliers_start_at_the_offline_duals_and_never_above_their_bound():
    # one prompt, three responses; `harmless` of 0.75 is the most that any policy reaches
    p, log_reference = np.array([[[0.9, 0.25], [0.5, 0.5], [0.1, 0.75]]]), np.log(np.full((1, 3), 1 / 3))
    within = method((0.6,))
    assert within.start(p, log_reference, margin=0.02).tolist() == [0.6]
    assert within.state.duals == pytest.approx(solve(p, log_reference, 0.1, np.array([0.6])).duals.tolist())
    beyond = method((0.9,))
    assert beyond.start(p, log_reference, margin=0.02) == pytest.approx([0.73])
    free = beyond.state.duals[0]
    assert free == pytest.approx(float(solve(p, log_reference, 0.1, np.array([0.73])).duals[0]))
    capped = method((0.9,), max_dual=free - 0.5)
    capped.start(p, log_reference, margin=0.02)
    assert capped.state.duals == [free - 0.5]


def test_recording_moves_nothing():
    m = method((0.6,))
    m.observe(estimate(0.2), record_only=True)
    assert m.state.duals == [0.0]
    assert m.state.lower == [0.2]
    assert m.state.n_eff == 50.0


def test_a_constraint_that_cannot_be_met_is_called_infeasible():
    m = method((0.9,), max_dual=2.0)
    for _ in range(50):
        assert max(m.state.duals) <= 2.0
        m.observe(estimate(0.4, 0.01))
    assert m.infeasible == ("harmless",)
    m.observe(estimate(0.95, 0.01))
    assert m.infeasible == ()


def test_renewal_follows_progress_but_for_the_users_own_thresholds():
    m = method((None, 0.6))
    assert m.state.thresholds == [0.45, 0.6]
    m.renew(f64(0.7, 0.2))
    assert m.state.thresholds == pytest.approx([0.63, 0.6])


def test_the_state_survives_a_checkpoint():
    m, again = method((None, 0.6)), method((None, 0.6))
    m.observe(Estimate(f64(0.6, 0.4, 0.5), f64(0.4, 0.5), f64(INF, 0.1), 0.01, 50.0))
    again.load_state_dict(m.state_dict())
    assert again.state == m.state
    assert torch.equal(again.duals, m.duals)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"extraction": "dpo"}, "algorithm.extraction=dpo: must be regression or bc"),
        ({"multipliers": "none"}, "algorithm.multipliers=none"),
        ({"estimator": "best"}, "algorithm.estimator=best"),
        ({"normalize": "mean"}, "algorithm.normalize=mean"),
        ({"dual_rate": 0.0}, "algorithm.dual_rate=0.0: must be above 0"),
        ({"sigma": -1.0}, "algorithm.sigma=-1.0"),
        ({"delta": 1.0}, "algorithm.delta=1.0: must be in (0, 1)"),
    ],
)
def test_settings_outside_what_is_allowed(change, told):
    with pytest.raises(UserError) as caught:
        method(**change)
    assert told in str(caught.value)
