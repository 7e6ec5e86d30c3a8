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
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mopo_cli.algorithms.mopo.core import Mopo
from mopo_cli.base.console import stage, warn
from mopo_cli.base.errors import UserError
from mopo_cli.config.schema import PlanConfig
from mopo_cli.data.assistant import World
from mopo_cli.judging.rows import SUPPORTING, JudgedRows, empirical, judge_rows, judge_samples, support_floor
from mopo_cli.maths import oracle
from mopo_cli.maths.bounds import resolve_epsilon
from mopo_cli.models.preference import PreferenceModel, win_probabilities
from mopo_cli.training.inputs import Inputs
from mopo_cli.training.preference import fit_or_load_judge
from mopo_cli.training.reference import fit_or_load_reference

FEWEST, FEW = 10, 100  # held-out prompts: below the first nothing can be said, below the second little
STEEPEST = 5.0  # price at which a front is left: more than five points of one objective for one of the other
CONFIDENCE = 1.96  # standard errors of a 95 % interval
WANTED = 0.02  # half-width of the interval that the numbers of pairs are for
GIVEN_UP = 0.05  # share of a threshold that the schedule may give up over a run


# --------------------------------------------------------------------------------------------- what is known
@dataclass(frozen=True, slots=True)
class Pool:
    """Responses that stand for pi_ref: win rates (N, M, K), and the log of their probabilities (N, M)."""

    win_rates: np.ndarray
    log_reference: np.ndarray


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Held-out rows: modelled win rates (N, G, K) of the data's responses, and how far labels lie from the model.

    residuals (N, G, K) are means over a response's labelled pairs of I - P; NaN where nobody judged it, or where a row
    has fewer responses.
    """

    win_rates: np.ndarray
    residuals: np.ndarray
    pairs: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The optimum of (P) on a pool, with standard errors."""

    win_rates: np.ndarray  # (K,)
    errors: np.ndarray  # (K,) standard errors, of prompts and labels together
    label_errors: np.ndarray  # (K,) those of the labels alone
    primary_error: float  # standard error of the primary at this threshold
    duals: np.ndarray  # (J,)
    kl: float
    feasible: bool
    attainable: np.ndarray  # (J,)


def answer(pool: Pool, labelled: LabelledRows | None, tau: float, thresholds: np.ndarray) -> Answer:
    """Solve (P) on the pool and say how well its win rates are known.

    Two errors add up: the pool's prompts are a sample, and the preference model was fitted to noisy labels. The second
    is that of an importance-weighted mean of held-out residuals I - P under the optimum's ratio. At a fixed threshold
    an error of R_j moves the primary by lambda_j times as much (envelope theorem), so the primary's is that of
    R_p + sum_j lambda_j R_j.
    """
    best = oracle.solve(pool.win_rates, pool.log_reference, tau, thresholds)
    per_prompt = np.einsum("na,nak->nk", np.exp(best.log_policy), pool.win_rates)
    price = np.concatenate([[1.0], best.duals])
    of_prompts = per_prompt.std(axis=0) / math.sqrt(len(per_prompt))
    of_price = float((per_prompt @ price).std() / math.sqrt(len(per_prompt)))
    of_labels, of_labels_price = np.zeros(len(price)), 0.0
    if labelled is not None:
        of_labels, of_labels_price = label_errors(labelled, tau, best.duals)
    return Answer(
        best.win_rates,
        np.hypot(of_prompts, of_labels),
        of_labels,
        math.hypot(of_price, of_labels_price),
        best.duals,
        best.kl,
        best.feasible,
        best.attainable,
    )


def label_errors(labelled: LabelledRows, tau: float, duals: np.ndarray) -> tuple[np.ndarray, float]:
    """Standard errors (K,) of the mean residual under the tilted policy, and that of s_lambda; rows are independent."""
    weights = _tilted(labelled, tau, duals)
    known = ~np.isnan(labelled.residuals)
    weighted = weights[:, :, None] * np.nan_to_num(labelled.residuals)
    total = np.maximum((weights[:, :, None] * known).sum(axis=(0, 1)), 1e-12)
    rows = weighted.sum(axis=1)  # (N, K)
    price = np.concatenate([[1.0], duals])
    return np.sqrt((rows**2).sum(axis=0)) / total, float(np.sqrt(((rows / total @ price) ** 2).sum()))


def _tilted(labelled: LabelledRows, tau: float, duals: np.ndarray) -> np.ndarray:
    """(N, G) the tilted policy over each row's responses, which are draws from mu."""
    missing = np.isnan(labelled.win_rates).any(axis=2)
    return np.exp(oracle.tilt(np.nan_to_num(labelled.win_rates), np.where(missing, -np.inf, 0.0), tau, duals))


# --------------------------------------------------------------------------------------------- the plan
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
class Asked:
    """One objective of the set, at the optimum of (P) with all thresholds together."""

    role: str
    threshold: float | None
    scheduled: bool  # the threshold is only where the schedule starts
    reference: float  # win rate of the reference
    win_rate: float
    ci95: float
    attainable: float  # alone
    dual: float | None
    verdict: str  # "" (primary), "binds", "never binds", "infeasible" or "infeasible together"
    pairs_needed: int  # labelled pairs for +- 0.02
    prompts_needed: int  # prompts of one on-policy estimate for +- 0.02
    pessimism: float  # what epsilon takes off an on-policy estimate
    exact: float | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What to expect of, or to choose for, the method's own settings."""

    epsilon: float
    n_eff: float
    kl: float
    beta: float
    t0: float
    refreshes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """plan.json."""

    objectives: dict[str, Asked]
    feasible: bool
    pairs: list[PairFront]
    suggestions: list[dict[str, Any]]
    settings: Settings
    labelled_pairs: int
    heldout_accuracy: dict[str, float]
    tau: float
    prompts: int
    responses: int
    seed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two objectives of the pools, the others left free."""

    pool: Pool
    labelled: LabelledRows
    truth: Pool | None
    tau: float

    def point(self, threshold: float) -> FrontPoint:
        """As much of the first as possible with the second at least `threshold`."""
        found = answer(self.pool, self.labelled, self.tau, np.array([threshold]))
        exact = None
        if self.truth is not None:
            best = oracle.solve(self.truth.win_rates, self.truth.log_reference, self.tau, np.array([threshold]))
            exact = float(best.win_rates[0]) if best.feasible else None
        return FrontPoint(
            float(threshold),
            float(found.win_rates[0]),
            CONFIDENCE * found.primary_error,
            float(found.duals[0]),
            found.kl,
            exact,
        )

    def span(self) -> tuple[float, float]:
        """The second's win rate where nothing is asked of it, and where it costs STEEPEST."""
        free, steep = (float(_at_price(self.pool, self.tau, price)[1]) for price in (0.0, STEEPEST))
        return free, steep


def pair_of(first: int, second: int, pool: Pool, labelled: LabelledRows, truth: Pool | None, tau: float) -> Pair:
    columns = [first, second]
    rows = LabelledRows(labelled.win_rates[:, :, columns], labelled.residuals[:, :, columns], labelled.pairs)
    seen, exact = (p and Pool(p.win_rates[:, :, columns], p.log_reference) for p in (pool, truth))
    assert seen is not None
    return Pair(seen, rows, exact, tau)


def pair_front(
    names: Sequence[str],
    first: int,
    second: int,
    pool: Pool,
    labelled: LabelledRows,
    truth: Pool | None,
    tau: float,
    count: int,
) -> PairFront:
    """Thresholds of `second` from where they begin to bind to where they cost more than STEEPEST."""
    pair = pair_of(first, second, pool, labelled, truth, tau)
    free, steep = pair.span()
    points = [pair.point(threshold) for threshold in np.linspace(free, steep, count)]
    most = float(oracle.attainable(pair.pool.win_rates, pair.pool.log_reference)[1])
    front = PairFront(names[first], names[second], free, most, points)
    return front if pair.truth is None else _with_truth(front, pair.truth, tau)


def _at_price(pool: Pool, tau: float, price: float) -> np.ndarray:
    """(2,) win rates of the optimum at a multiplier."""
    tilted = oracle.tilt(pool.win_rates, pool.log_reference, tau, np.array([price]))
    return oracle.policy_win_rates(tilted, pool.win_rates)


def _with_truth(front: PairFront, truth: Pool, tau: float) -> PairFront:
    """The exact front beside the predicted one, and how far they lie apart."""
    prices = np.concatenate([[0.0], np.geomspace(1e-2, 1e2, 200)])
    exact = np.array([_at_price(truth, tau, price) for price in prices])  # (C, 2) primary, secondary
    predicted = np.array([[p.win_rate, p.threshold] for p in front.points])
    apart = np.abs(predicted[:, None] - exact[None]).max(axis=2).min(axis=1)
    return replace(
        front,
        exact_front=[(float(s), float(p)) for p, s in exact],
        exact_attainable=float(oracle.attainable(truth.win_rates, truth.log_reference)[1]),
        distance=float(apart.max()),
    )


def suggestions(
    names: Sequence[str], pool: Pool, labelled: LabelledRows, truth: Pool | None, tau: float, step: float = 0.05
) -> list[dict[str, Any]]:
    """As much of the primary as possible with one secondary at least x, for round x, the others left free."""
    found = []
    for j, name in enumerate(names[1:], 1):
        pair = pair_of(0, j, pool, labelled, truth, tau)
        free, steep = pair.span()
        for x in np.arange(math.ceil(free / step), math.floor(steep / step) + 1) * step:
            point = pair.point(x)
            found.append(
                {
                    "secondary": name,
                    "at_least": round(point.threshold, 4),
                    "primary": point.win_rate,
                    "ci95": point.ci95,
                    "dual": point.dual,
                    "kl": point.kl,
                    "override": f"objectives.{name}.threshold={x:.2f}",
                    "exact": point.exact,
                }
            )
    return found


def judge_thresholds(
    config: PlanConfig, algorithm: Mopo, inputs: Inputs, pool: Pool, labelled: LabelledRows, truth: Pool | None
) -> tuple[dict[str, Asked], Answer, float]:
    """The objective set as it stands: which thresholds bind, which never do, which cannot be met; also epsilon."""
    objectives = inputs.data.objectives
    thresholds = algorithm.thresholds.numpy()
    best = answer(pool, labelled, config.tau, thresholds)
    n_eff = float(min(config.onpolicy.prompts, len(inputs.examples["heldout"])))
    epsilon = resolve_epsilon(config.epsilon, n_eff, algorithm.delta)
    reference = oracle.policy_win_rates(pool.log_reference, pool.win_rates)
    noise = _sample_variance(pool, best, config)
    exact = None
    if truth is not None:
        exact = oracle.solve(truth.win_rates, truth.log_reference, config.tau, thresholds)
    asked = {}
    for k, objective in enumerate(objectives):
        j = k - 1
        asked[objective.name] = Asked(
            role=objective.role,
            threshold=float(thresholds[j]) if k else None,
            scheduled=bool(k and objective.threshold is None),
            reference=float(reference[k]),
            win_rate=float(best.win_rates[k]),
            ci95=CONFIDENCE * float(best.errors[k] if k else best.primary_error),
            attainable=float(oracle.attainable(pool.win_rates, pool.log_reference)[k]),
            dual=float(best.duals[j]) if k else None,
            verdict=_verdict(best, thresholds, j) if k else "",
            pairs_needed=math.ceil(labelled.pairs * (CONFIDENCE * best.label_errors[k] / WANTED) ** 2),
            prompts_needed=math.ceil((CONFIDENCE / WANTED) ** 2 * noise[k]),
            pessimism=math.sqrt(2.0 * epsilon * noise[k]),
            exact=float(exact.win_rates[k]) if exact is not None and exact.feasible else None,
        )
    return asked, best, epsilon


def _verdict(best: Answer, thresholds: np.ndarray, j: int) -> str:
    if thresholds[j] >= best.attainable[j]:
        return "infeasible"
    if not best.feasible:
        return "infeasible together"
    return "binds" if best.duals[j] > 1e-4 else "never binds"


def _sample_variance(pool: Pool, best: Answer, config: PlanConfig) -> np.ndarray:
    """(K,) variance of a prompt's mean win rate over the policy's samples, as an on-policy estimate takes them."""
    policy = np.exp(oracle.tilt(pool.win_rates, pool.log_reference, config.tau, best.duals))
    means = np.einsum("na,nak->nk", policy, pool.win_rates)
    within = np.einsum("na,nak->nk", policy, pool.win_rates**2) - means**2
    return means.var(axis=0) + within.mean(axis=0) / config.onpolicy.responses


def expect(config: PlanConfig, inputs: Inputs, asked: dict[str, Asked], best: Answer, epsilon: float) -> Settings:
    """What to expect of epsilon, and a schedule that neither starves nor gives everything away.

    A refresh sets b_j <- beta G_j, with G_j below R_j by the pessimism of its estimate. Unless beta takes off less than
    that, b_j rises above what was reached only in as far as G_j exceeds it: (1 - beta) R_j is the room that the primary
    gets at each refresh. It should exceed the pessimism, or noise decides; and all refreshes together should not give
    up more than GIVEN_UP, which bounds their number and so t0.
    """
    n_eff = float(min(config.onpolicy.prompts, len(inputs.examples["heldout"])))
    if all(objective.threshold is not None for objective in inputs.data.objectives[1:]):
        return Settings(epsilon, n_eff, best.kl, config.beta, math.inf, 0)
    free = [a for a in asked.values() if a.scheduled]
    room = max(a.pessimism / a.reference for a in free)
    beta = max(0.5, math.floor((1.0 - room) * 1e4) / 1e4)
    most = max(1, int(math.log(1.0 - GIVEN_UP) / math.log(beta))) if beta < 1 else config.steps
    t0 = max(2 * config.onpolicy.every, math.ceil(config.steps / most))
    return Settings(epsilon, n_eff, best.kl, beta, float(t0), max(0, (config.steps - 1) // t0))


# --------------------------------------------------------------------------------------------- what it is made from
def fit(config: PlanConfig, accelerator: Accelerator, inputs: Inputs) -> tuple[PreferenceModel, list[float]]:
    """The reference (left in inputs.policy) and the preference model, from the cache where they are there."""
    fit_or_load_reference(config, accelerator, inputs)
    return fit_or_load_judge(config, accelerator, inputs)


def sample_pool(
    config: PlanConfig, inputs: Inputs, judge: PreferenceModel, heldout: JudgedRows
) -> tuple[Pool, list[str]]:
    """Samples of the reference for distinct held-out prompts, judged; what no data are like is left out.

    Also the prompts.
    """
    numbers = _distinct(inputs, config.plan.prompts, config.seed)
    asked = [heldout.tokens[i].prompt for i in numbers]
    policy = inputs.policy
    floor = support_floor(policy.logps(heldout.tokens[:SUPPORTING]), config.onpolicy.support)
    rates, known = [], []
    with stage("samples", len(asked)) as progress:
        for start in range(0, len(asked), 50):
            part = slice(start, start + 50)
            drawn = policy.sample(asked[part], config.plan.responses, config.sampling, config.seed + start)
            tokens, judged = judge_samples(judge, heldout, numbers[part], drawn, policy.collate)
            logps = policy.logps(tokens)
            rates += judged
            known += [values >= floor for values in logps]
            progress.advance(min(start + 50, len(asked)))
    pool = Pool(*empirical(torch.stack(rates), torch.stack(known)))
    return pool, [str(inputs.examples["heldout"][i].prompt) for i in numbers]


def _distinct(inputs: Inputs, count: int, seed: int) -> list[int]:
    """Numbers of held-out rows with different prompts."""
    first: dict[str, int] = {}
    for number, example in enumerate(inputs.examples["heldout"]):
        first.setdefault(str(example.prompt), number)
    rows = list(first.values())
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    return sorted(rows[i] for i in order)


def label_rows(judge: PreferenceModel, inputs: Inputs, heldout: JudgedRows) -> LabelledRows:
    """Held-out labels against what the preference model says of the same pairs."""
    most = max(len(row.responses) for row in heldout.tokens)
    shape = (len(heldout.tokens), most, len(inputs.data.names))
    win_rates, total, count = np.full(shape, np.nan), np.zeros(shape), np.zeros(shape)
    pairs = 0
    for n, (example, features, rates) in enumerate(
        zip(heldout.examples, heldout.features, heldout.win_rates, strict=True)
    ):
        win_rates[n, : len(rates)] = rates.numpy()
        p = win_probabilities(judge, features, features).numpy()
        for (a, b), labels in zip(example.pairs, example.labels, strict=True):
            residual = np.array(labels) - p[a, b]
            known = ~np.isnan(residual)
            pairs += 1
            for response, sign in ((a, 1.0), (b, -1.0)):
                total[n, response] += sign * np.nan_to_num(residual)
                count[n, response] += known
    residuals = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    for k, objective in enumerate(inputs.data.objectives):
        if objective.scorer is not None:
            residuals[:, :, k] = np.where(np.isnan(residuals[:, :, k]), np.nan, 0.0)  # scored, not modelled
    return LabelledRows(win_rates, residuals, pairs)


def true_pool(inputs: Inputs, prompts: Sequence[str]) -> Pool | None:
    """Every response of the embedded world under mu, for the same prompts."""
    world = inputs.data.world
    if not isinstance(world, World):
        return None
    columns = [world.objectives.index(o.source) for o in inputs.data.objectives]
    win_rates = np.stack([world.win_rates(prompt)[:, columns] for prompt in prompts])
    return Pool(win_rates, np.log(np.stack([world.mu(prompt) for prompt in prompts])))


def check_pairs(inputs: Inputs) -> None:
    """UserError where there are too few held-out prompts to say anything, a warning where there are few."""
    found = len({str(example.prompt) for example in inputs.examples["heldout"]})
    if found < FEWEST:
        raise UserError(
            f"dataset: {found} held-out prompts; a plan needs at least {FEWEST}. Give more rows, or raise "
            "dataset.heldout_fraction"
        )
    if found < FEW:
        warn(f"{found} held-out prompts: the intervals below are wide, and rough themselves; {FEW} or more would do")


def make_plan(
    config: PlanConfig,
    algorithm: Mopo,
    inputs: Inputs,
    judge: PreferenceModel,
    accuracy: Sequence[float],
    started: float,
) -> Plan:
    names = inputs.data.names
    rows = inputs.examples["heldout"], inputs.tokens["heldout"]
    heldout = judge_rows(judge, inputs.data.objectives, *rows, inputs.policy.collate, "smoothed")
    labelled = label_rows(judge, inputs, heldout)
    pool, prompts = sample_pool(config, inputs, judge, heldout)
    truth = true_pool(inputs, prompts)
    asked, best, epsilon = judge_thresholds(config, algorithm, inputs, pool, labelled, truth)
    fronts = [
        pair_front(names, i, k, pool, labelled, truth, config.tau, config.plan.thresholds)
        for i, k in combinations(range(len(names)), 2)
    ]
    return Plan(
        objectives=asked,
        feasible=best.feasible,
        pairs=fronts,
        suggestions=suggestions(names, pool, labelled, truth, config.tau),
        settings=expect(config, inputs, asked, best, epsilon),
        labelled_pairs=labelled.pairs,
        heldout_accuracy=dict(zip(names, accuracy, strict=True)),
        tau=config.tau,
        prompts=len(prompts),
        responses=config.plan.responses,
        seed=config.seed,
        seconds=time.perf_counter() - started,
    )
