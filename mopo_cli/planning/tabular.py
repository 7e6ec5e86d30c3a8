"""`mopo synthetic`: the method on tabular preference structures, beside the exact front and the exact optimum of (P).

The losses, multipliers and estimators are those that language models are trained with (algorithms/mopo); only the
policy is a table. Win rates of a policy are exact, whatever the method was allowed to see.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from mopo_cli.algorithms.mopo.core import Lagrangian, LogpBatch, MopoSettings
from mopo_cli.algorithms.mopo.primal_dual import PrimalDual
from mopo_cli.base.errors import UserError
from mopo_cli.config.schema import OptimiserConfig, SyntheticConfig
from mopo_cli.maths import oracle, pareto
from mopo_cli.maths.estimates import Estimate, enumerated_estimate, leave_one_out
from mopo_cli.planning.policy import TabularPolicy
from mopo_cli.planning.structures import Structure
from mopo_cli.training.loop import Task, Trainer

LISTED = 100  # responses that stand for mu where preferences are exact
ROWS = 400  # sampled pairs a step
SAMPLES = (4000, 2)  # of the policy, in groups, for one on-policy estimate from sampled preferences
GRID = 9  # thresholds
OFFLINE = 5  # steps between two offline estimates


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to run the method."""

    preferences: str
    extraction: str
    multipliers: str
    estimator: str

    @property
    def label(self) -> str:
        return f"{self.extraction}, {self.multipliers}, {self.estimator}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A structure with the thresholds asked of it and their exact answers."""

    structure: Structure
    thresholds: np.ndarray  # (T, J)
    optima: np.ndarray  # (T, K) win rates of the optimum of (P)
    front: np.ndarray  # (D, K) vertices of the exact front
    floor: np.ndarray  # (K,) the least win rate of an action: where volumes are measured from
    regularised: np.ndarray  # (C, K) win rates of the optima of (P) as the multipliers move


@dataclass(frozen=True, slots=True)
class StructureResult:
    """One line of synthetic.json. Distances and violations are the worst over thresholds, in win rate."""

    structure: str
    K: int
    method: str
    preferences: str
    extraction: str
    estimator: str
    multipliers: str
    distance_to_front: float
    distance_to_optimum: float
    violation: float
    hypervolume_ratio: float
    seconds: float
    thresholds: list[list[float]]
    optimum: list[list[float]]
    reached: list[list[float]]
    beta: list[float] | None = None  # of runs on the adaptive schedule, which have no thresholds of a user


# --------------------------------------------------------------------------------------------- exact answers
def pose(structure: Structure, tau: float, thresholds: Sequence[float] | None) -> Problem:
    """The problem at each threshold; UserError where one is out of reach."""
    win_rates, log_mu = structure.win_rates[None], np.log(structure.mu)[None]
    objectives = win_rates.shape[2]
    if thresholds is None:
        wanted = _grid(win_rates, log_mu, tau)
    else:
        wanted = np.repeat(np.array(thresholds, np.float64)[:, None], objectives - 1, axis=1)
        _check_attainable(structure, wanted)
    optima = np.stack([oracle.solve(win_rates, log_mu, tau, b).win_rates for b in wanted])
    curve = _curve(win_rates, log_mu, tau)
    vertices = pareto.front(win_rates, pareto.directions(objectives, 200 if objectives == 2 else 60))
    return Problem(structure, wanted, optima, np.unique(vertices, axis=0), win_rates[0].min(axis=0), curve)


def _grid(win_rates: np.ndarray, log_mu: np.ndarray, tau: float) -> np.ndarray:
    """(9, J) thresholds that bind: what the optimum reaches as the multipliers go from 0.1 to 1.5.

    With larger ones a threshold may stand so close to the edge of what is attainable that 20 000 pairs cannot tell on
    which side.
    """
    objectives = win_rates.shape[2]
    steps = np.geomspace(0.1, 1.5, GRID if objectives == 2 else round(GRID ** (1 / (objectives - 1))))
    duals = np.array(list(product(steps, repeat=objectives - 1)))
    return np.stack([oracle.policy_win_rates(oracle.tilt(win_rates, log_mu, tau, d), win_rates)[1:] for d in duals])


def _curve(win_rates: np.ndarray, log_mu: np.ndarray, tau: float) -> np.ndarray:
    objectives = win_rates.shape[2]
    duals = np.concatenate([[0.0], np.geomspace(1e-2, 1e2, 120 if objectives == 2 else 12)])
    grid = product(duals, repeat=objectives - 1)
    return np.stack(
        [oracle.policy_win_rates(oracle.tilt(win_rates, log_mu, tau, np.array(d)), win_rates) for d in grid]
    )


def _check_attainable(structure: Structure, thresholds: np.ndarray) -> None:
    values = structure.win_rates[None, :, 1:]
    most = values.max(axis=(0, 1))
    for wanted in thresholds:
        if oracle.least_slack(values, wanted) < 1e-9:
            each = ", ".join(f"{m:.3f}" for m in most)
            raise UserError(
                f"thresholds: {wanted[0]:g} is out of reach in {structure.name} with K = {len(most) + 1}: at most "
                f"{each} is attainable for each secondary alone" + (", less for all at once" if len(most) > 1 else "")
            )


# --------------------------------------------------------------------------------------------- what the method sees
@dataclass(frozen=True, slots=True)
class Sheet:
    """Rows of responses with leave-one-out win rates, as a method's batch has them."""

    actions: Tensor  # (R, G)
    win_rates: Tensor  # (R, G, K)


@dataclass(frozen=True, slots=True)
class TabularEvidence:
    """What a run may know of its structure: rows to train on, rows held out, and a judge of any action."""

    train: Sheet
    heldout: Sheet
    judged: Tensor  # (A, K) win rates of the actions, exact or by the tabular preference model
    exact: bool


def exact_evidence(structure: Structure) -> TabularEvidence:
    """One row that lists mu, with exact preferences."""
    actions = torch.as_tensor(np.repeat(np.arange(len(structure.mu)), _shares(structure.mu, LISTED)))
    sheet = _sheet(actions[None], torch.as_tensor(structure.preferences))
    return TabularEvidence(sheet, sheet, torch.as_tensor(structure.win_rates), exact=True)


def sampled_evidence(structure: Structure, pairs: int, seed: int) -> TabularEvidence:
    """Pairs drawn from mu with one 0/1 label an objective; a fifth is held out.

    The judge is the table of observed win frequencies, with half a win added on either side.
    """
    rng = np.random.default_rng(seed)
    actions = rng.choice(len(structure.mu), size=(pairs, 2), p=structure.mu)
    labels = rng.random((pairs, len(structure.preferences))) < structure.preferences[:, actions[:, 0], actions[:, 1]].T
    cut = pairs - pairs // 5
    judge = _frequencies(actions[:cut], labels[:cut], len(structure.mu))
    share = np.bincount(actions[:cut].ravel(), minlength=len(structure.mu)) / (2 * cut)
    observed = torch.as_tensor(np.stack([labels[cut:], 1 - labels[cut:]], axis=1).astype(np.float64))
    return TabularEvidence(
        _sheet(torch.as_tensor(actions[:cut]), torch.as_tensor(judge)),
        Sheet(torch.as_tensor(actions[cut:]), observed),
        torch.as_tensor((judge @ share).T),
        exact=False,
    )


def _shares(mu: np.ndarray, total: int) -> np.ndarray:
    """(A,) whole numbers that sum to `total`, as close to mu as can be (largest remainders)."""
    counts = np.floor(mu * total).astype(int)
    counts[np.argsort(mu * total - counts)[::-1][: total - counts.sum()]] += 1
    return counts


def _frequencies(actions: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """(K, A, A) observed shares of wins."""
    wins = np.zeros((labels.shape[1], size, size))
    for k in range(len(wins)):
        np.add.at(wins[k], (actions[:, 0], actions[:, 1]), labels[:, k])
        np.add.at(wins[k], (actions[:, 1], actions[:, 0]), 1.0 - labels[:, k])
    total = wins + wins.transpose(0, 2, 1)
    return (wins + 0.5) / (total + 1.0)


def _sheet(actions: Tensor, preferences: Tensor) -> Sheet:
    """Rows (R, G) of actions with their leave-one-out win rates under (K, A, A) preferences."""
    p = preferences[:, actions[:, :, None], actions[:, None, :]].permute(1, 2, 3, 0)
    return Sheet(actions, leave_one_out(p, torch.ones(actions.shape, dtype=torch.bool)))


# --------------------------------------------------------------------------------------------- runs
class TabularAlignment(PrimalDual):
    """Some runs of the method side by side, in which none sees another: one row of the policy's table and one point
    each."""

    margin = 0.001
    starts_offline = True

    def __init__(
        self, config: SyntheticConfig, evidence: TabularEvidence, mu: np.ndarray, points: list[Lagrangian], seed: int
    ):
        self.config, self.evidence, self.points, self.every = config, evidence, points, config.every
        self.behaviour = torch.as_tensor(np.log(mu))
        self.policy = TabularPolicy(self.behaviour.repeat(len(points), 1))
        self.reference = self.policy().detach()
        self.generator = torch.Generator().manual_seed(seed)

    def fit(self, accelerator: Accelerator) -> None:
        optimiser = OptimiserConfig(self.config.learning_rate, warmup=1, max_grad_norm=0.0, final_fraction=0.01)
        task = Task(rows_of=lambda step: [step], loss_of=self._loss)
        Trainer(accelerator, self.policy, optimiser, self.config.steps, key="").fit(task, self.before_step)

    def win_rates(self, structure: Structure) -> np.ndarray:
        """(T, K) exact win rates of every run's policy."""
        return self._logps().exp().numpy() @ structure.win_rates

    # ------------------------------------------------------------------ batches

    def _logps(self) -> Tensor:
        """(T, A)"""
        return self.policy().detach()

    def _batch(self, number: int, logps: Tensor, sheet: Sheet) -> LogpBatch:
        """What one run sees of some rows."""
        actions = sheet.actions
        everywhere = torch.ones(actions.shape, dtype=torch.bool)
        return LogpBatch(
            policy_logps=logps[number][actions],
            reference_logps=self.reference[number][actions],
            behaviour_logps=self.behaviour[actions],
            win_rates=sheet.win_rates,
            mask=everywhere,
            from_data=everywhere,
        )

    def _loss(self, steps: list[int]) -> Tensor:
        logps, train = self.policy(), self.evidence.train
        rows = torch.randint(len(train.actions), (min(ROWS, len(train.actions)),), generator=self.generator)
        sheet = Sheet(train.actions[rows], train.win_rates[rows])
        total = torch.zeros((), dtype=torch.float64)
        for number, point in enumerate(self.points):
            batch = self._batch(number, logps, sheet)
            if point.settings.estimator == "offline" and steps[0] % OFFLINE == 0:
                point.observe(point.estimate(batch))
            total = total + point.loss(batch).mean()
        return total

    # ------------------------------------------------------------------ what the multipliers go by

    def pool(self) -> tuple[np.ndarray, np.ndarray]:
        return self.evidence.judged.numpy()[None], self.behaviour.numpy()[None]

    def estimates(self, step: int) -> list[Estimate | None]:
        logps = self._logps()
        return [
            None if point.settings.estimator == "offline" else self._estimate(number, logps)
            for number, point in enumerate(self.points)
        ]

    def achieved(self, number: int) -> Tensor:
        return self._estimate(number, self._logps()).lower

    def lag(self, step: int, numbers: Sequence[int]) -> None:
        self.reference[numbers] = self._logps()[numbers]

    def _estimate(self, number: int, logps: Tensor) -> Estimate:
        point = self.points[number]
        if point.settings.estimator != "onpolicy":
            sheet = self.evidence.heldout if point.settings.estimator == "heldout" else self.evidence.train
            return point.estimate(self._batch(number, logps, sheet))
        probabilities = logps[number].exp()
        if self.evidence.exact:
            return enumerated_estimate(probabilities[None], self.evidence.judged[None], point.settings.tau)
        drawn = torch.multinomial(probabilities, math.prod(SAMPLES), replacement=True, generator=self.generator)
        return point.sampled(self.evidence.judged[drawn].view(*SAMPLES, -1))


def points_of(
    config: SyntheticConfig, recipe: Recipe, wanted: Sequence[tuple[tuple[float | None, ...], float, float]]
) -> list[Lagrangian]:
    """One point for each (thresholds, beta, t0).

    The offline estimate costs no sampling and is made more often, so its share of the dual rate is smaller.
    """
    rate = config.dual_rate * (OFFLINE / config.every if recipe.estimator == "offline" else 1.0)
    return [
        Lagrangian(
            MopoSettings(
                ("primary", *(f"secondary {j + 1}" for j in range(len(thresholds)))),
                thresholds,
                config.tau,
                beta,
                0.0 if recipe.preferences == "exact" else "auto",
                t0,
                extraction=recipe.extraction,
                multipliers=recipe.multipliers,
                estimator=recipe.estimator,
                sigma=config.sigma,
                dual_rate=rate,
                max_dual=100.0,
            )
        )
        for thresholds, beta, t0 in wanted
    ]


@dataclass(frozen=True, slots=True)
class RecipeRuns:
    """A recipe at every threshold of a problem, or on the adaptive schedule at every beta."""

    recipe: Recipe
    scheduled: bool
    points: list[Lagrangian]


def runs_of(config: SyntheticConfig, problem: Problem, preferences: str) -> list[RecipeRuns]:
    """Every recipe at the thresholds; the first recipe on the schedule, too, from the first kind of preferences."""
    fixed = [(tuple(b), 1.0, math.inf) for b in problem.thresholds.tolist()]
    chosen = list(recipes(config, preferences))
    runs = [RecipeRuns(recipe, False, points_of(config, recipe, fixed)) for recipe in chosen]
    if config.betas and preferences == config.preferences[0]:
        free = (None,) * problem.thresholds.shape[1]
        scheduled = [(free, beta, float(config.t0)) for beta in config.betas]
        runs.append(RecipeRuns(chosen[0], True, points_of(config, chosen[0], scheduled)))
    return runs


def run_problem(config: SyntheticConfig, problem: Problem, preferences: str) -> list[StructureResult]:
    """Every recipe on a problem, from one kind of preferences: one training, in which no run sees another."""
    started = time.perf_counter()
    structure = problem.structure
    exact = preferences == "exact"
    evidence = exact_evidence(structure) if exact else sampled_evidence(structure, config.pairs, config.seed)
    runs = runs_of(config, problem, preferences)
    points = [point for some in runs for point in some.points]
    alignment = TabularAlignment(config, evidence, structure.mu, points, config.seed)
    alignment.fit(Accelerator(cpu=True))
    seconds = (time.perf_counter() - started) / len(points)
    reached = np.split(alignment.win_rates(structure), np.cumsum([len(some.points) for some in runs])[:-1])
    return [_result(config, problem, some, rates, seconds) for some, rates in zip(runs, reached, strict=True)]


def _result(
    config: SyntheticConfig, problem: Problem, runs: RecipeRuns, reached: np.ndarray, seconds: float
) -> StructureResult:
    """What they reached, (T, K), beside what they should have; on the schedule nothing is asked of a run."""
    recipe, scheduled = runs.recipe, runs.scheduled
    nothing = np.zeros((len(reached), 0))
    wanted, optimum = (nothing, nothing) if scheduled else (problem.thresholds, problem.optima)
    win_rates = problem.structure.win_rates[None]
    return StructureResult(
        structure=problem.structure.name,
        K=reached.shape[1],
        method=recipe.label,
        preferences=recipe.preferences,
        extraction=recipe.extraction,
        estimator=recipe.estimator,
        multipliers=recipe.multipliers,
        distance_to_front=max(pareto.distance_to_front(point, win_rates) for point in reached),
        distance_to_optimum=math.nan if scheduled else float(np.abs(reached - optimum).max()),
        violation=math.nan if scheduled else float(np.maximum(wanted - reached[:, 1:], 0.0).max()),
        hypervolume_ratio=_volume_ratio(problem, reached),
        seconds=seconds * len(runs.points),
        thresholds=wanted.tolist(),
        optimum=optimum.tolist(),
        reached=reached.tolist(),
        beta=list(config.betas) if scheduled else None,
    )


def _volume_ratio(problem: Problem, reached: np.ndarray) -> float:
    """The volume that mixtures of these points dominate, as a share of what mixtures of the exact optima dominate."""
    return pareto.dominated_volume(reached, problem.floor) / pareto.dominated_volume(problem.front, problem.floor)


def recipes(config: SyntheticConfig, preferences: str) -> Iterator[Recipe]:
    for chosen in config.recipes:
        yield Recipe(preferences, chosen.extraction, chosen.multipliers, chosen.estimator)
