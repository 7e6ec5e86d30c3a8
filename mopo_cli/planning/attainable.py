"""`mopo plan`: what is attainable, and at what price, before any alignment.

The reference and the preference model are the ones that `mopo train` would fit with the same settings, and are kept for
it. Samples of the reference, judged by the preference model, stand for the responses of each prompt; on them the dual
of (P) is solved exactly (oracle.py). Where the world is enumerable the exact answers stand beside the predictions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from mopo_cli.algorithms.mopo import Mopo
from mopo_cli.algorithms.mopo.core import Lagrangian
from mopo_cli.config.schema import PlanConfig
from mopo_cli.maths import oracle
from mopo_cli.maths.bounds import resolve_epsilon
from mopo_cli.planning.evidence import Evidence, LabelledRows, ResponsePool
from mopo_cli.training.inputs import Inputs

STEEPEST = 5.0  # price at which a front is left: more than five points of one objective for one of the other
CONFIDENCE = 1.96  # standard errors of a 95 % interval
WANTED = 0.02  # half-width of the interval that the numbers of pairs are for
GIVEN_UP = 0.05  # share of a threshold that the schedule may give up over a run
ROUND = 0.05  # between two suggested thresholds


# --------------------------------------------------------------------------------------------- plan.json
@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One threshold of a pair's front: as much of `primary` as possible with `secondary` >= threshold."""

    threshold: float
    win_rate: float  # of the primary
    ci95: float  # half-width
    dual: float
    kl: float
    exact: float | None = None  # of the primary, at the exact optimum


@dataclass(frozen=True, slots=True)
class PairFront:
    """What is attainable between two objectives, the others left free."""

    primary: str
    secondary: str
    free: float  # the secondary's win rate where nothing is asked of it: a threshold below never binds
    attainable: float  # the most that any policy on the reference's support reaches
    points: list[FrontPoint]
    exact_front: list[tuple[float, float]] | None = None  # (secondary, primary)
    exact_attainable: float | None = None
    distance: float | None = None  # the largest distance of a point to the exact front, in win rate


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What to set for one secondary, and what it would cost the primary, the others left free."""

    secondary: str
    at_least: float
    primary: float  # win rate
    ci95: float  # half-width
    dual: float
    kl: float
    override: str
    exact: float | None


@dataclass(frozen=True, slots=True)
class ObjectivePlan:
    """One objective of the set, at the optimum of (P) with all thresholds together; None where there is no optimum."""

    role: str
    threshold: float | None
    scheduled: bool  # the threshold is only where the schedule starts
    reference: float  # win rate of the reference
    win_rate: float | None
    ci95: float | None
    attainable: float  # alone
    dual: float | None
    verdict: (
        str  # "" (primary), "binds", "never binds", "infeasible", "infeasible together" or "attainable" beside those
    )
    pairs_needed: int | None  # labelled pairs for +- 0.02
    prompts_needed: int | None  # prompts of one on-policy estimate for +- 0.02
    pessimism: float  # what epsilon takes off an on-policy estimate
    exact: float | None = None


@dataclass(frozen=True, slots=True)
class SettingsPlan:
    """What to expect of, or to choose for, the method's own settings."""

    epsilon: float
    n_eff: float
    kl: float
    beta: float
    t0: float
    refreshes: int
    steps: int  # of the training


@dataclass(frozen=True, slots=True)
class Plan:
    """plan.json."""

    objectives: dict[str, ObjectivePlan]
    feasible: bool
    shortfall: float  # what all thresholds must be lowered by before they can be met together
    pairs: list[PairFront]
    suggestions: list[Suggestion]
    settings: SettingsPlan
    labelled_pairs: int
    heldout_prompts: int
    heldout_accuracy: dict[str, float]
    tau: float
    prompts: int
    responses: int
    seed: int
    seconds: float


# --------------------------------------------------------------------------------------------- the optimum
@dataclass(frozen=True, slots=True)
class PlannedOptimum:
    """The optimum of (P) on a pool, with standard errors."""

    win_rates: np.ndarray  # (K,)
    errors: np.ndarray  # (K,) standard errors, of prompts and labels together
    label_errors: np.ndarray  # (K,) those of the labels alone
    primary_error: float  # standard error of the primary at this threshold
    duals: np.ndarray  # (J,)
    kl: float
    feasible: bool
    attainable: np.ndarray  # (J,)
    shortfall: float  # see Optimum of maths/oracle.py


def optimum(evidence: Evidence, thresholds: Sequence[float] | np.ndarray) -> PlannedOptimum:
    """Solve (P) on the pool and say how well its win rates are known.

    Two errors add up: the pool's prompts are a sample, and the preference model was fitted to noisy labels. The second
    is that of an importance-weighted mean of held-out residuals I - P under the optimum's ratio. At a fixed threshold
    an error of R_j moves the primary by lambda_j times as much (envelope theorem), so the primary's is that of
    R_p + sum_j lambda_j R_j.
    """
    pool, tau = evidence.pool, evidence.tau
    best = oracle.solve(pool.win_rates, pool.log_reference, tau, np.asarray(thresholds))
    per_prompt = np.einsum("na,nak->nk", np.exp(best.log_policy), pool.win_rates)
    price = np.concatenate([[1.0], best.duals])
    of_prompts = per_prompt.std(axis=0) / math.sqrt(len(per_prompt))
    of_price = float((per_prompt @ price).std() / math.sqrt(len(per_prompt)))
    of_labels, of_labels_price = np.zeros(len(price)), 0.0
    if evidence.labelled is not None:
        of_labels, of_labels_price = label_errors(evidence.labelled, tau, best.duals)
    return PlannedOptimum(
        win_rates=best.win_rates,
        errors=np.hypot(of_prompts, of_labels),
        label_errors=of_labels,
        primary_error=math.hypot(of_price, of_labels_price),
        duals=best.duals,
        kl=best.kl,
        feasible=best.feasible,
        attainable=best.attainable,
        shortfall=best.shortfall,
    )


def exact_win_rates(evidence: Evidence, thresholds: Sequence[float] | np.ndarray) -> np.ndarray | None:
    """(K,) win rates of the exact optimum; None where it is not known, or there is none."""
    if evidence.truth is None:
        return None
    truth = evidence.truth
    best = oracle.solve(truth.win_rates, truth.log_reference, evidence.tau, np.asarray(thresholds))
    return best.win_rates if best.feasible else None


def label_errors(labelled: LabelledRows, tau: float, duals: np.ndarray) -> tuple[np.ndarray, float]:
    """Standard errors (K,) of the mean residual under the tilted policy, and that of s_lambda; rows are independent."""
    weights = _tilted(labelled, tau, duals)
    judged = ~np.isnan(labelled.residuals)
    weighted = weights[:, :, None] * np.nan_to_num(labelled.residuals)
    total = np.maximum((weights[:, :, None] * judged).sum(axis=(0, 1)), 1e-12)
    rows = weighted.sum(axis=1)  # (N, K)
    price = np.concatenate([[1.0], duals])
    return np.sqrt((rows**2).sum(axis=0)) / total, float(np.sqrt(((rows / total @ price) ** 2).sum()))


def _tilted(labelled: LabelledRows, tau: float, duals: np.ndarray) -> np.ndarray:
    """(N, G) the tilted policy over each row's responses, which are draws from mu."""
    missing = np.isnan(labelled.win_rates).any(axis=2)
    return np.exp(oracle.tilt(np.nan_to_num(labelled.win_rates), np.where(missing, -np.inf, 0.0), tau, duals))


# --------------------------------------------------------------------------------------------- fronts of pairs
def front_point(pair: Evidence, threshold: float) -> FrontPoint:
    """As much of the first objective as possible with the second at least `threshold`."""
    best, exact = optimum(pair, [threshold]), exact_win_rates(pair, [threshold])
    return FrontPoint(
        threshold=float(threshold),
        win_rate=float(best.win_rates[0]),
        ci95=CONFIDENCE * best.primary_error,
        dual=float(best.duals[0]),
        kl=best.kl,
        exact=None if exact is None else float(exact[0]),
    )


def span(pair: Evidence) -> tuple[float, float]:
    """The second's win rate where nothing is asked of it, and where it costs STEEPEST."""
    free, steep = (float(_at_price(pair.pool, pair.tau, price)[1]) for price in (0.0, STEEPEST))
    return free, steep


def pair_front(pair: Evidence, count: int) -> PairFront:
    """So many thresholds of the second objective, from where they begin to bind to where they cost more than STEEPEST.

    Where the truth is known, the exact front beside the predicted one, and how far they lie apart.
    """
    free, steep = span(pair)
    points = [front_point(pair, threshold) for threshold in np.linspace(free, steep, count)]
    primary, secondary = pair.names
    front = PairFront(primary, secondary, free, _attainable(pair.pool), points)
    if pair.truth is None:
        return front
    prices = np.concatenate([[0.0], np.geomspace(1e-2, 1e2, 200)])
    exact = np.array([_at_price(pair.truth, pair.tau, price) for price in prices])  # (C, 2) primary, secondary
    predicted = np.array([[point.win_rate, point.threshold] for point in points])
    apart = np.abs(predicted[:, None] - exact[None]).max(axis=2).min(axis=1)
    return replace(
        front,
        exact_front=[(float(y), float(x)) for x, y in exact],
        exact_attainable=_attainable(pair.truth),
        distance=float(apart.max()),
    )


def _at_price(pool: ResponsePool, tau: float, price: float) -> np.ndarray:
    """(2,) win rates of the optimum at a multiplier."""
    tilted = oracle.tilt(pool.win_rates, pool.log_reference, tau, np.array([price]))
    return oracle.policy_win_rates(tilted, pool.win_rates)


def _attainable(pool: ResponsePool) -> float:
    """The most of a pair's second objective."""
    return float(oracle.attainable(pool.win_rates, pool.log_reference)[1])


def suggestions(evidence: Evidence) -> list[Suggestion]:
    """As much of the primary as possible with one secondary at least x, for round x, the others left free."""
    lines = []
    for j, name in enumerate(evidence.names[1:], 1):
        pair = evidence.pair(0, j)
        free, steep = span(pair)
        for x in np.arange(math.ceil(free / ROUND), math.floor(steep / ROUND) + 1) * ROUND:
            point = front_point(pair, x)
            lines.append(
                Suggestion(
                    secondary=name,
                    at_least=round(point.threshold, 4),
                    primary=point.win_rate,
                    ci95=point.ci95,
                    dual=point.dual,
                    kl=point.kl,
                    override=f"objectives.{name}.threshold={x:.2f}",
                    exact=point.exact,
                )
            )
    return lines


# --------------------------------------------------------------------------------------------- the objective set
def make_plan(
    config: PlanConfig,
    algorithm: Mopo,
    inputs: Inputs,
    evidence: Evidence,
    accuracy: Sequence[float],
    started: float,
) -> Plan:
    """All predictions; accuracy (K,) is the preference model's, `started` a time.perf_counter()."""
    thresholds = Lagrangian(algorithm).thresholds.numpy()
    best = optimum(evidence, thresholds)
    heldout = len(inputs.examples["heldout"])
    n_eff = float(min(config.onpolicy.prompts, heldout))
    epsilon = resolve_epsilon(config.epsilon, n_eff, algorithm.delta)
    scheduled = [objective.threshold is None for objective in inputs.data.objectives[1:]]
    objectives = plan_objectives(config, evidence, best, thresholds, epsilon, scheduled)
    assert evidence.labelled is not None
    pairs = combinations(range(len(evidence.names)), 2)
    return Plan(
        objectives=objectives,
        feasible=best.feasible,
        shortfall=best.shortfall,
        pairs=[pair_front(evidence.pair(i, k), config.plan.thresholds) for i, k in pairs],
        suggestions=suggestions(evidence),
        settings=plan_settings(config, objectives, epsilon, n_eff, best.kl),
        labelled_pairs=evidence.labelled.pairs,
        heldout_prompts=heldout,
        heldout_accuracy=dict(zip(evidence.names, accuracy, strict=True)),
        tau=config.tau,
        prompts=len(evidence.pool.win_rates),
        responses=config.plan.responses,
        seed=config.seed,
        seconds=time.perf_counter() - started,
    )


def plan_objectives(
    config: PlanConfig,
    evidence: Evidence,
    best: PlannedOptimum,
    thresholds: np.ndarray,
    epsilon: float,
    scheduled: Sequence[bool],
) -> dict[str, ObjectivePlan]:
    """The objective set as it stands: which thresholds bind, which never do, which cannot be met.

    thresholds (J,), and scheduled whether each is only where the schedule starts.
    """
    pool, labelled = evidence.pool, evidence.labelled
    assert labelled is not None
    reference = oracle.policy_win_rates(pool.log_reference, pool.win_rates)
    attainable = oracle.attainable(pool.win_rates, pool.log_reference)
    noise = _sample_variance(evidence, best, config.onpolicy.responses)
    exact = exact_win_rates(evidence, thresholds)
    verdicts = _verdicts(evidence, best, thresholds)
    plans = {}
    for k, name in enumerate(evidence.names):
        j, met = k - 1, best.feasible
        plans[name] = ObjectivePlan(
            role="secondary" if k else "primary",
            threshold=float(thresholds[j]) if k else None,
            scheduled=bool(k and scheduled[j]),
            reference=float(reference[k]),
            win_rate=float(best.win_rates[k]) if met else None,
            ci95=CONFIDENCE * float(best.errors[k] if k else best.primary_error) if met else None,
            attainable=float(attainable[k]),
            dual=float(best.duals[j]) if k and met else None,
            verdict=verdicts[j] if k else "",
            pairs_needed=math.ceil(labelled.pairs * (CONFIDENCE * best.label_errors[k] / WANTED) ** 2) if met else None,
            prompts_needed=math.ceil((CONFIDENCE / WANTED) ** 2 * noise[k]) if met else None,
            pessimism=math.sqrt(2.0 * epsilon * noise[k]),
            exact=None if exact is None else float(exact[k]),
        )
    return plans


def _verdicts(evidence: Evidence, best: PlannedOptimum, thresholds: np.ndarray) -> list[str]:
    """Of each threshold (J,). Where some are out of reach alone, whether the others are is asked without them."""
    if best.feasible:
        return ["binds" if dual > 1e-4 else "never binds" for dual in best.duals]
    alone = thresholds >= best.attainable
    others = np.where(alone, -np.inf, thresholds)
    rest = "attainable" if alone.any() and optimum(evidence, others).feasible else "infeasible together"
    return ["infeasible" if out else rest for out in alone]


def _sample_variance(evidence: Evidence, best: PlannedOptimum, responses: int) -> np.ndarray:
    """(K,) variance of a prompt's mean win rate over the policy's samples, as an on-policy estimate takes them."""
    pool = evidence.pool
    policy = np.exp(oracle.tilt(pool.win_rates, pool.log_reference, evidence.tau, best.duals))
    means = np.einsum("na,nak->nk", policy, pool.win_rates)
    within = np.einsum("na,nak->nk", policy, pool.win_rates**2) - means**2
    return means.var(axis=0) + within.mean(axis=0) / responses


def plan_settings(
    config: PlanConfig, objectives: dict[str, ObjectivePlan], epsilon: float, n_eff: float, kl: float
) -> SettingsPlan:
    """What to expect of epsilon, and a schedule that neither starves nor gives everything away.

    A refresh sets b_j <- beta G_j, with G_j below R_j by the pessimism of its estimate. Unless beta takes off less than
    that, b_j rises above what was reached only in as far as G_j exceeds it: (1 - beta) R_j is the room that the primary
    gets at each refresh. It should exceed the pessimism, or noise decides; and all refreshes together should not give
    up more than GIVEN_UP, which bounds their number and so t0.
    """
    free = [objective for objective in objectives.values() if objective.scheduled]
    if not free:
        return SettingsPlan(epsilon, n_eff, kl, config.beta, math.inf, 0, config.steps)
    room = max(objective.pessimism / objective.reference for objective in free)
    beta = max(0.5, math.floor((1.0 - room) * 1e4) / 1e4)
    most = max(1, int(math.log(1.0 - GIVEN_UP) / math.log(beta))) if beta < 1 else config.steps
    t0 = max(2 * config.onpolicy.every, math.ceil(config.steps / most))
    return SettingsPlan(epsilon, n_eff, kl, beta, float(t0), max(0, (config.steps - 1) // t0), config.steps)
