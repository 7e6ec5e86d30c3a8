"""The oracle against independent solvers, its certificate, and what it calls infeasible."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog, minimize

from mopo_cli.maths.oracle import (
    Optimum,
    _certify,
    attainable,
    dual_value,
    least_slack,
    mean_kl,
    policy_win_rates,
    solve,
    tilt,
)

FREE = -np.inf


def problem(
    seed: int, prompts: int = 2, responses: int = 4, objectives: int = 2, cyclic: bool = False, uniform: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Win rates (N, A, K) of random preferences against mu = pi_ref, and log pi_ref."""
    rng = np.random.default_rng(seed)
    shape = (prompts, objectives, responses)
    if cyclic:
        raw = rng.normal(size=(*shape, responses)) * 2
        logits = raw - raw.swapaxes(-1, -2)
    else:
        scores = rng.normal(size=shape) * 2
        logits = scores[..., :, None] - scores[..., None, :]
    mu = (
        np.full((prompts, responses), 1 / responses) if uniform else rng.dirichlet(np.ones(responses) * 2, size=prompts)
    )
    return np.einsum("nkab,nb->nak", 1 / (1 + np.exp(-logits)), mu), np.log(mu)


def reachable(win_rates: np.ndarray, log_reference: np.ndarray, seed: int, slack: float = 1e-3) -> np.ndarray:
    """Thresholds a little below what some policy far from the reference reaches."""
    rng = np.random.default_rng(seed)
    policy = rng.dirichlet(np.full(win_rates.shape[1], 0.3), size=len(win_rates)) * np.isfinite(log_reference)
    policy /= policy.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        return policy_win_rates(np.log(policy), win_rates)[1:] - slack


def assert_certified(optimum: Optimum, tolerance: float = 1e-8) -> None:
    assert optimum.feasible
    tolerance *= 1.0 + optimum.duals.sum()
    assert abs(optimum.duality_gap) < tolerance
    assert optimum.kkt_residual < tolerance
    assert (optimum.duals >= 0).all()
    np.testing.assert_allclose(np.exp(optimum.log_policy).sum(axis=1), 1.0, atol=1e-12)


def directly(win_rates: np.ndarray, log_reference: np.ndarray, tau: float, thresholds: np.ndarray) -> np.ndarray:
    """(N, A) the policy that maximises R_p - tau KL under the constraints, by SLSQP over all probabilities."""
    n, a, _ = win_rates.shape
    reference = np.exp(log_reference)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        p = flat.reshape(n, a)
        log_ratio = np.log(p / reference)
        value = (p * win_rates[..., 0]).sum() - tau * (p * log_ratio).sum()
        return -value, -(win_rates[..., 0] - tau * (log_ratio + 1.0)).ravel()

    rows = np.kron(np.eye(n), np.ones(a))
    constraints = [{"type": "eq", "fun": lambda x: rows @ x - 1.0, "jac": lambda x: rows}]
    for j, b in enumerate(thresholds):
        if np.isfinite(b):
            slope = win_rates[..., j + 1].ravel() / n
            constraints.append(
                {"type": "ineq", "fun": lambda x, s=slope, b=b: s @ x - b, "jac": lambda x, s=slope: s}
            )  # fmt: skip
    found = minimize(
        objective,
        reference.ravel(),
        jac=True,
        method="SLSQP",
        bounds=[(1e-12, 1.0)] * (n * a),
        constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    return found.x.reshape(n, a)


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_direct_maximisation(seed, objectives, cyclic):
    win_rates, log_reference = problem(seed, 3, 4, objectives, cyclic, uniform=seed % 2 == 0)
    tau = [0.08, 0.3, 0.15, 1.0][seed]
    thresholds = np.minimum(reachable(win_rates, log_reference, seed), 0.65)
    found = solve(win_rates, log_reference, tau, thresholds)
    assert_certified(found)
    policy = directly(win_rates, log_reference, tau, thresholds)
    log_policy = np.log(policy / policy.sum(axis=1, keepdims=True))
    value = policy_win_rates(log_policy, win_rates)[0] - tau * mean_kl(log_policy, log_reference)
    assert abs(found.value - value) < 1e-7
    np.testing.assert_allclose(found.win_rates, policy_win_rates(log_policy, win_rates), atol=2e-4)
    np.testing.assert_allclose(np.exp(found.log_policy), policy, atol=2e-3)


@pytest.mark.parametrize("tau", [1.0, 0.08, 1e-3])
@pytest.mark.parametrize("seed", range(3))
def test_the_multiplier_is_the_root_of_its_constraint(seed, tau):
    win_rates, log_reference = problem(seed, 5, 6)
    low, high = policy_win_rates(tilt(win_rates, log_reference, tau, np.zeros(1)), win_rates)[1], 1.0
    high = attainable(win_rates, log_reference)[1]
    b = 0.5 * (low + high)

    def excess(dual: float) -> float:
        return policy_win_rates(tilt(win_rates, log_reference, tau, np.array([dual])), win_rates)[1] - b

    found = solve(win_rates, log_reference, tau, np.array([b]))
    assert_certified(found)
    assert found.duals[0] == pytest.approx(brentq(excess, 0.0, 1e3, xtol=1e-14), rel=1e-6)


@given(
    st.integers(0, 10_000),
    st.integers(4, 8),
    st.integers(5, 7),
    st.integers(2, 3),
    st.booleans(),
    st.sampled_from([1.0, 0.08, 0.01, 1e-3]),
)
@settings(max_examples=80, deadline=None)
def test_every_feasible_problem_is_certified(seed, prompts, responses, objectives, cyclic, tau):
    win_rates, log_reference = problem(seed, prompts, responses, objectives, cyclic)
    found = solve(win_rates, log_reference, tau, reachable(win_rates, log_reference, seed))
    assert_certified(found)
    # no policy of a random bunch that keeps the constraints does better
    rng = np.random.default_rng(seed)
    for size in (0.01, 0.3):
        noisy = found.log_policy + size * rng.normal(size=found.log_policy.shape)
        noisy -= np.log(np.exp(noisy).sum(axis=1, keepdims=True))
        rates = policy_win_rates(noisy, win_rates)
        lagrangian = rates[0] - tau * mean_kl(noisy, log_reference) + found.duals @ (rates[1:] - found.win_rates[1:])
        assert lagrangian <= found.value + 1e-9


def test_hardly_feasible_problems_with_few_responses_are_certified():
    # more constraints than a prompt's responses have freedom for, met with 0.001 to spare: the Hessian is singular
    for tau in (1.0, 0.08, 1e-3):
        for objectives in (3, 4, 5):
            for seed in range(30):
                win_rates, log_reference = problem(seed, 1, 3, objectives, cyclic=seed % 2 == 0)
                found = solve(win_rates, log_reference, tau, reachable(win_rates, log_reference, seed))
                assert_certified(found, tolerance=1e-7)


def test_a_small_tau_tends_to_the_linear_programme():
    win_rates, log_reference = problem(7, 3, 5, 3)
    thresholds = reachable(win_rates, log_reference, 7)
    n, a, _ = win_rates.shape
    best = linprog(
        -win_rates[..., 0].ravel() / n,
        A_ub=-np.stack([win_rates[..., j].ravel() for j in (1, 2)]) / n,
        b_ub=-thresholds,
        A_eq=np.kron(np.eye(n), np.ones(a)),
        b_eq=np.ones(n),
    )
    found = solve(win_rates, log_reference, 1e-3, thresholds)
    assert_certified(found)
    assert 0.0 <= -best.fun - found.win_rates[0] < 5e-3
    assert found.kl <= np.log(1 / np.exp(log_reference).min())


# --------------------------------------------------------------------------------------------- by hand


def test_without_constraints_the_optimum_is_the_tilted_reference():
    win_rates, log_reference = problem(0, objectives=3)
    found = solve(win_rates, log_reference, 0.1, np.array([FREE, FREE]))
    weights = np.exp(log_reference + win_rates[..., 0] / 0.1)
    np.testing.assert_allclose(np.exp(found.log_policy), weights / weights.sum(axis=1, keepdims=True))
    assert found.duals.tolist() == [0.0, 0.0]
    assert found.value == pytest.approx(0.1 * np.log(weights.sum(axis=1)).mean())
    assert_certified(found)


def test_a_single_objective():
    win_rates, log_reference = problem(0, objectives=1)
    found = solve(win_rates, log_reference, 0.1, np.zeros(0))
    assert_certified(found)
    assert found.duals.shape == (0,)


def test_two_responses_by_hand():
    win_rates = np.array([[[0.8, 0.2], [0.2, 0.8]]])  # one prompt: the first response is helpful, the second harmless
    found = solve(win_rates, np.log([[0.5, 0.5]]), 0.2, np.array([0.56]))
    q = (0.56 - 0.2) / 0.6  # the share of the second response that just meets the threshold
    np.testing.assert_allclose(np.exp(found.log_policy), [[1 - q, q]], atol=1e-9)
    assert found.win_rates[0] == pytest.approx(0.8 - 0.6 * q)
    kl = q * np.log(2 * q) + (1 - q) * np.log(2 * (1 - q))
    assert found.kl == pytest.approx(kl)
    # stationarity: log(q / (1 - q)) = (s_2 - s_1) / tau with s = p_1 + lambda p_2
    assert found.duals[0] == pytest.approx(1 + 0.2 * np.log(q / (1 - q)) / 0.6)


def test_one_free_and_one_constrained_objective():
    win_rates, log_reference = problem(3, objectives=3)
    b = 0.5 * (0.5 + attainable(win_rates, log_reference)[2])
    both = solve(win_rates, log_reference, 0.1, np.array([FREE, b]))
    alone = solve(win_rates[..., [0, 2]], log_reference, 0.1, np.array([b]))
    assert_certified(both)
    assert both.duals[0] == 0.0
    assert both.duals[1] == pytest.approx(alone.duals[0])
    np.testing.assert_allclose(both.log_policy, alone.log_policy, atol=1e-8)


def test_a_slack_constraint_costs_nothing():
    win_rates, log_reference = problem(4)
    free = solve(win_rates, log_reference, 0.1, np.array([FREE]))
    slack = solve(win_rates, log_reference, 0.1, free.win_rates[1:] - 0.01)
    assert slack.duals.tolist() == [0.0]
    assert slack.value == pytest.approx(free.value)


def test_responses_outside_the_support_stay_there():
    win_rates, log_reference = problem(5, responses=5)
    win_rates[:, 0, :] = 0.99  # the best response of all, which the reference never gives
    log_reference[:, 0] = -np.inf
    log_reference -= np.log(np.exp(log_reference).sum(axis=1, keepdims=True))
    best = attainable(win_rates, log_reference)
    assert (best < 0.99).all()
    found = solve(win_rates, log_reference, 0.1, np.array([best[1] - 0.02]))
    assert_certified(found)
    assert not np.exp(found.log_policy[:, 0]).any()
    assert not solve(win_rates, log_reference, 0.1, np.array([0.985])).feasible


def test_a_start_changes_the_path_and_not_the_answer():
    win_rates, log_reference = problem(6, objectives=3)
    thresholds = reachable(win_rates, log_reference, 6)
    cold = solve(win_rates, log_reference, 0.1, thresholds)
    for start in (cold.duals, np.zeros(2), np.array([30.0, 5.0])):
        warm = solve(win_rates, log_reference, 0.1, thresholds, start=start)
        assert_certified(warm)
        np.testing.assert_allclose(warm.log_policy, cold.log_policy, atol=1e-7)


def test_objectives_that_say_the_same_share_the_multiplier():
    win_rates, log_reference = problem(8, objectives=3)
    win_rates[..., 2] = win_rates[..., 1]
    b = reachable(win_rates, log_reference, 8)
    alone = solve(win_rates[..., :2], log_reference, 0.1, b[:1])
    found = solve(win_rates, log_reference, 0.1, b)
    assert_certified(found)
    assert found.duals.sum() == pytest.approx(alone.duals[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_dual_is_convex_with_the_slack_as_its_gradient(seed):
    win_rates, log_reference = problem(seed, objectives=3, cyclic=True)
    thresholds, rng = np.array([0.55, 0.6]), np.random.default_rng(seed)
    x, y = rng.uniform(0, 3, size=(2, 2))

    def g(duals: np.ndarray) -> float:
        return dual_value(win_rates, log_reference, 0.2, thresholds, duals)

    assert g((x + y) / 2) <= (g(x) + g(y)) / 2 + 1e-12
    numeric = [(g(x + h) - g(x - h)) / 2e-5 for h in 1e-5 * np.eye(2)]
    slack = policy_win_rates(tilt(win_rates, log_reference, 0.2, x), win_rates)[1:] - thresholds
    np.testing.assert_allclose(numeric, slack, atol=1e-8)


@pytest.mark.parametrize(
    ("dual", "b", "residual"), [(2.0, 0.1, 0.2), (0.0, 0.1, 0.0), (2.0, 0.3, 0.2), (0.5, 0.25, 0.05)]
)
def test_the_certificate_tells_of_a_missed_threshold_and_of_an_idle_multiplier(dual, b, residual):
    """max of (b - R)+ and lambda |R - b|: a multiplier above 0 on a slack constraint is no solution."""
    win_rates, log_reference = np.array([[[0.6, 0.2], [0.6, 0.2]]]), np.log([[0.5, 0.5]])  # every policy has R = 0.2
    best = attainable(win_rates, log_reference)[1:]
    found = _certify(win_rates, log_reference, 0.1, np.array([b]), np.array([dual]), best)
    assert found.kkt_residual == pytest.approx(residual)
    assert found.duality_gap == pytest.approx(dual * (0.2 - b))


# --------------------------------------------------------------------------------------------- infeasible


def test_a_threshold_above_the_attainable_maximum():
    win_rates, log_reference = problem(1)
    best = attainable(win_rates, log_reference)
    np.testing.assert_allclose(best, win_rates.max(axis=1).mean(axis=0))
    for b, feasible in ((best[1] - 1e-4, True), (best[1] + 1e-4, False), (0.999, False)):
        found = solve(win_rates, log_reference, 0.1, np.array([b]))
        assert found.feasible == feasible
        np.testing.assert_allclose(found.attainable, best[1:])
        if not feasible:  # the policy that comes nearest
            assert found.win_rates[1] == pytest.approx(best[1], abs=1e-3)


@pytest.mark.parametrize("tau", [0.5, 0.08, 1e-3])
def test_thresholds_that_only_together_are_out_of_reach(tau):
    win_rates = np.array([[[0.5, 0.9, 0.1], [0.5, 0.1, 0.9], [0.5, 0.3, 0.3]]])
    log_reference = np.log(np.full((1, 3), 1 / 3))
    for b, feasible in ((0.49, True), (0.51, False), (0.8, False)):
        found = solve(win_rates, log_reference, tau, np.array([b, b]))
        assert (found.attainable > b).all()
        assert found.feasible == feasible
        if feasible:
            assert_certified(found)
        assert least_slack(win_rates[..., 1:], np.array([b, b])) == pytest.approx(0.5 - b, abs=1e-8)


def test_trading_one_prompt_for_another_makes_thresholds_reachable():
    first = [[0.5, 0.9, 0.1], [0.5, 0.5, 0.5]]
    second = [[0.5, 0.1, 0.9], [0.5, 0.5, 0.5]]
    win_rates, log_reference = np.array([first, second]), np.log(np.full((2, 2), 0.5))
    assert solve(win_rates, log_reference, 0.1, np.array([0.49, 0.49])).feasible
    assert not solve(win_rates, log_reference, 0.1, np.array([0.6, 0.6])).feasible


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 5), st.integers(3, 4))
@settings(max_examples=40, deadline=None)
def test_the_least_slack_is_the_linear_programmes(seed, prompts, responses, objectives):
    win_rates, log_reference = problem(seed, prompts, responses, objectives)
    thresholds = np.random.default_rng(seed).uniform(0.3, 0.8, objectives - 1)
    slack = largest_slack(win_rates, thresholds)
    assert least_slack(win_rates[..., 1:], thresholds) == pytest.approx(slack, abs=1e-7)
    if abs(slack) > 1e-6:
        assert solve(win_rates, log_reference, 0.1, thresholds).feasible == (slack > 0)


def largest_slack(win_rates: np.ndarray, thresholds: np.ndarray) -> float:
    """max over policies of min_j (R_j - b_j), as a linear programme over all probabilities at once."""
    n, a, k = win_rates.shape
    gains = np.stack([win_rates[..., j].ravel() / n for j in range(1, k)])
    best = linprog(
        np.append(np.zeros(n * a), -1.0),
        A_ub=np.column_stack([-gains, np.ones(k - 1)]),
        b_ub=-thresholds,
        A_eq=np.column_stack([np.kron(np.eye(n), np.ones(a)), np.zeros(n)]),
        b_eq=np.ones(n),
        bounds=[(0, 1)] * (n * a) + [(None, None)],
    )
    return -best.fun


def table(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Any table: smooth, with ties, of responses hardly apart, or of nothing but 0 and 1; thresholds up to the edge and
    beyond."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(rng.integers(low, high)) for low, high in ((1, 5), (2, 7), (2, 5)))
    smooth = rng.random(shape)
    kinds = (smooth, smooth.round(1), 0.5 + 1e-3 * smooth, (smooth < 0.5).astype(float))
    win_rates = kinds[seed % len(kinds)]
    mu = np.maximum(rng.dirichlet(np.full(shape[1], rng.choice([0.3, 2.0])), size=shape[0]), 1e-12)
    least, most = win_rates[..., 1:].min(axis=1).mean(axis=0), win_rates[..., 1:].max(axis=1).mean(axis=0)
    thresholds = least + (most - least) * rng.uniform(0.2, 1.02, shape[2] - 1)
    return win_rates, np.log(mu / mu.sum(axis=1, keepdims=True)), thresholds


@given(st.integers(0, 100_000), st.floats(-3.0, 3.0))
@example(193, 3.0)
@example(113, 2.9)
@settings(max_examples=80, deadline=None)
def test_feasible_is_what_the_linear_programme_says_at_any_tau_and_then_the_optimum_is_one(seed, magnitude):
    win_rates, log_reference, thresholds = table(seed)
    slack = largest_slack(win_rates, thresholds)
    if abs(slack) < 1e-7:
        return
    found = solve(win_rates, log_reference, 10.0**magnitude, thresholds)
    assert found.feasible == (slack > 0)
    if found.feasible:
        assert (found.win_rates[1:] >= thresholds - 1e-7).all()
        assert_certified(found)
        assert found.shortfall == 0.0
    else:
        assert found.shortfall == pytest.approx(-slack, abs=1e-7)


@pytest.mark.parametrize("tau", [1e-3, 0.1, 100.0, 1e3])
def test_a_high_temperature_needs_a_multiplier_as_high(tau):
    """Nearly all mass on the better of two responses: lambda / tau is log odds over the gap, whatever tau."""
    win_rates, log_reference = np.array([[[0.5, 0.4], [0.5, 0.6]]]), np.log([[0.5, 0.5]])
    found = solve(win_rates, log_reference, tau, np.array([0.5998]))
    assert_certified(found)
    assert found.win_rates[1] == pytest.approx(0.5998, abs=1e-9)
    assert found.duals[0] / tau == pytest.approx(np.log(0.999 / 0.001) / 0.2, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tau": 0.0}, "tau=0.0: must be above 0"),
        ({"tau": -1.0}, "tau=-1.0: must be above 0"),
        ({"tau": np.nan}, "tau=nan: must be above 0"),
        ({"tau": np.inf}, "tau=inf: must be above 0"),
        ({"win_rates": np.nan}, "win_rates[1, 2, 0]=nan: must be a number"),
        ({"win_rates": np.inf}, "win_rates[1, 2, 0]=inf: must be a number"),
        ({"thresholds": np.nan}, "thresholds[1]=nan: must be a number, or -inf for none"),
        ({"thresholds": np.inf}, "thresholds[1]=inf: must be a number, or -inf for none"),
        ({"log_reference": np.nan}, "log_reference[1, 2]=nan: must be a number, or -inf"),
        ({"log_reference": 0.0}, "sum of exp(log_reference)[1]=1."),
        ({"log_reference": -np.inf}, "sum of exp(log_reference)[1]=0."),
    ],
)
def test_what_poses_no_problem_is_refused_with_its_place(change, said):
    win_rates, log_reference = problem(0, objectives=3)
    thresholds, tau = np.array([0.5, 0.5]), change.get("tau", 0.1)
    if "win_rates" in change:
        win_rates[1, 2, 0] = change["win_rates"]
    if "thresholds" in change:
        thresholds[1] = change["thresholds"]
    if "log_reference" in change:
        log_reference[1, 2] = change["log_reference"]
    with pytest.raises(ValueError, match=re.escape(said)):
        solve(win_rates, log_reference, tau, thresholds)


# --------------------------------------------------------------------------------------------- properties

SEEDS = st.integers(0, 10_000)


@given(SEEDS, st.integers(1, 3), st.integers(2, 6), st.booleans(), st.sampled_from([0.5, 0.08, 0.01]))
@settings(deadline=None, max_examples=60)
def test_strong_duality(seed, prompts, responses, cyclic, tau):
    win_rates, log_reference = problem(seed, prompts, responses, 3, cyclic)
    found = solve(win_rates, log_reference, tau, reachable(win_rates, log_reference, seed))
    assert_certified(found)


@given(SEEDS, st.booleans())
@settings(deadline=None, max_examples=60)
def test_relabelling_responses_and_reordering_objectives_change_nothing(seed, cyclic):
    win_rates, log_reference = problem(seed, 2, 5, 3, cyclic)
    b = reachable(win_rates, log_reference, seed)
    rng = np.random.default_rng(seed)
    order, secondaries = rng.permutation(5), rng.permutation(2)
    found = solve(win_rates, log_reference, 0.1, b)
    relabelled = solve(win_rates[:, order], log_reference[:, order], 0.1, b)
    np.testing.assert_allclose(relabelled.win_rates, found.win_rates, atol=1e-7)
    np.testing.assert_allclose(np.exp(relabelled.log_policy), np.exp(found.log_policy)[:, order], atol=1e-6)
    columns = np.concatenate([[0], 1 + secondaries])
    reordered = solve(win_rates[:, :, columns], log_reference, 0.1, b[secondaries])
    np.testing.assert_allclose(reordered.win_rates, found.win_rates[columns], atol=1e-7)


@given(SEEDS, st.floats(1e-3, 1.0), st.floats(0.0, 1e3))
@settings(deadline=None, max_examples=100)
def test_nothing_overflows_at_small_tau_and_large_multipliers(seed, tau, dual):
    win_rates, log_reference = problem(seed, 3, 6, 2)
    duals = np.array([dual])
    policy = np.exp(tilt(win_rates, log_reference, tau, duals))
    assert np.isfinite(policy).all()
    np.testing.assert_allclose(policy.sum(axis=1), 1.0, atol=1e-12)
    assert np.isfinite(dual_value(win_rates, log_reference, tau, np.array([0.5]), duals))
    assert np.isfinite(mean_kl(np.log(np.maximum(policy, 1e-300)), log_reference))


@given(SEEDS, st.floats(-0.2, 0.2))
@settings(deadline=None, max_examples=60)
def test_a_multiplier_is_unbounded_exactly_where_its_threshold_is_infeasible(seed, beyond):
    win_rates, log_reference = problem(seed, 2, 4, 2)
    most = float(attainable(win_rates, log_reference)[1])
    if abs(beyond) < 1e-3 or not 0 < most + beyond < 1:
        return
    found = solve(win_rates, log_reference, 0.1, np.array([most + beyond]))
    assert found.feasible == (beyond < 0)
    assert (found.duals[0] > 1e3) == (beyond > 0)


@given(SEEDS)
@settings(deadline=None, max_examples=30)
def test_with_two_responses_and_one_prompt_the_optimum_is_known_in_closed_form(seed):
    rng = np.random.default_rng(seed)
    a, c = rng.random(2)  # P(first over second), under each objective
    mu = rng.uniform(0.1, 0.9)
    first, second = (
        np.array([0.5 * mu + x * (1 - mu) for x in (a, c)]),
        np.array([(1 - x) * mu + 0.5 * (1 - mu) for x in (a, c)]),
    )
    win_rates = np.stack([first, second])[None]
    b = float(rng.uniform(min(first[1], second[1]), max(first[1], second[1])))
    found = solve(win_rates, np.log([[mu, 1 - mu]]), 0.1, np.array([b]))
    free = 1 / (1 + (1 - mu) / mu * np.exp(-(first[0] - second[0]) / 0.1))
    needed = (b - second[1]) / (first[1] - second[1])  # the share of the first response at which R = b
    share = max(free, needed) if first[1] > second[1] else min(free, needed)
    assert np.exp(found.log_policy[0, 0]) == pytest.approx(share, abs=1e-6)
