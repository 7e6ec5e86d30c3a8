"""Algorithm 1 of arXiv 2505.10892 against an independent computation on a table, line by line, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from running import TINY, Finished, cache_of, read_json, read_metrics
from torch import Tensor

from mopo_cli.algorithms.contract import algorithm_of
from mopo_cli.algorithms.mopo import paper
from mopo_cli.algorithms.mopo.core import Lagrangian, LogpBatch, extraction_loss
from mopo_cli.algorithms.mopo.paper import MopoPaper, PaperAlignment, gradient_step, robust_estimate
from mopo_cli.algorithms.mopo.rows import TrainRows
from mopo_cli.base.types import Objective
from mopo_cli.config import compose
from mopo_cli.config.schema import TrainConfig
from mopo_cli.data.table import TokenRow
from mopo_cli.judging.rows import JudgedRows
from mopo_cli.training.checkpoints import Work

NAMES, ACTIONS, STEPS, ETA = ("helpful", "harmless", "concise"), 4, 23, 0.05
SETTINGS: dict[str, Any] = {"tau": 0.7, "beta": 0.9, "epsilon": 0.15, "t0": 5}


# --------------------------------------------------------------------------------------------- the table
def problem(seed: int = 0) -> tuple[np.ndarray, list[list[int]], list[np.ndarray]]:
    """Logits of the first policy; rows of two or three actions, with the win rates (G, K) of each."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(ACTIONS, size=2 + i % 2).tolist() for i in range(6)]
    return rng.normal(size=ACTIONS), rows, [rng.random((len(row), 3)) for row in rows]


def batch_of(step: int) -> list[int]:
    return [(2 * step) % 6, (2 * step + 1) % 6]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum())


class Algorithm1:
    """The quotation, in NumPy, keeping all of its history."""

    def __init__(self, thresholds: tuple[float | None, ...], tau: float, beta: float, epsilon: float, t0: float):
        self.logits, self.rows, self.rates = problem()
        self.tau, self.beta, self.epsilon, self.t0, self.fixed = tau, beta, epsilon, t0, thresholds
        self.mu = self.reference = log_softmax(self.logits)
        self.b = np.array([beta * 0.5 if b is None else b for b in thresholds])
        self.chi, self.duals = np.ones(2), np.zeros(2)
        self.past = [self.logits.copy()]
        self.bounds = [self.bound(*self.flat(batch_of(0)))]

    def flat(self, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(n, 2) rho p_j and (n,) weights of the batch under pi_ref, which sum to one."""
        actions = np.concatenate([self.rows[i] for i in numbers]).astype(int)
        rates = np.concatenate([self.rates[i] for i in numbers])
        weights = np.exp(self.reference - self.mu)[actions]
        return self.rho(rates)[:, None] * rates[:, 1:], weights / weights.sum()

    def rho(self, rates: np.ndarray) -> np.ndarray:
        return np.exp((rates[:, 0] + rates[:, 1:] @ self.duals) / self.tau - 1.0)

    def bound(self, f: np.ndarray, weights: np.ndarray) -> np.ndarray:
        mean = (weights[:, None] * np.exp(-f / self.chi)).sum(0)
        return -self.chi * np.log(mean) - self.chi * self.epsilon

    def step(self, t: int) -> float:
        """Iteration t = 1, 2, ...; the loss of line 4."""
        numbers = batch_of(t - 1)
        f, weights = self.flat(numbers)
        worst = weights[:, None] * np.exp(-f / self.chi)
        worst /= worst.sum(0)
        divergence = (worst * np.log(worst / weights[:, None])).sum(0)
        self.chi = np.maximum(self.chi - ETA * (self.epsilon - divergence), 1e-8)  # 1
        lower = self.bound(f, weights)
        self.duals = np.maximum(self.duals - ETA * (lower - self.b), 0.0)  # 2
        loss, gradient = 0.0, np.zeros(ACTIONS)
        policy = log_softmax(self.logits)
        for i in numbers:
            actions, rho = np.array(self.rows[i]), self.rho(self.rates[i])  # 3
            ratio = rho * np.exp(self.reference - self.mu)[actions]
            loss -= (ratio * policy[actions]).mean() / 2
            slope = np.eye(ACTIONS)[actions] - np.exp(policy)
            gradient -= (ratio[:, None] * slope).mean(0) / 2
        self.logits = self.logits - ETA * gradient  # 4
        self.past.append(self.logits.copy())
        self.bounds.append(lower)
        if t % self.t0 == 0:  # 5
            renewed = self.beta * self.bounds[t - int(self.t0)]
            self.b = np.array([r if given is None else given for r, given in zip(renewed, self.fixed, strict=True)])
            self.reference = log_softmax(self.past[t - int(self.t0)])
        return float(loss)


class TableRollouts:
    """Log-probs of a table of logits in place of a model's; a response is one token, the action."""

    def __init__(self, logits: Tensor):
        self.setting = SimpleNamespace(initial={"logits": logits.detach().clone()})

    def reference(self, rows: list[TokenRow], weights: Any = None) -> list[Tensor]:
        logps = (weights or self.setting.initial)["logits"].log_softmax(-1)
        return [logps[[response[0] for response in row.responses]] for row in rows]


def method(thresholds: tuple[float | None, ...] = (0.9, None), **changes: Any) -> MopoPaper:
    return MopoPaper(NAMES, thresholds, **{**SETTINGS, **changes})


def stage_of(settings: MopoPaper) -> tuple[PaperAlignment, Tensor]:
    """The stage on the table, and the logits that its policy has now."""
    start, rows, rates = problem()
    logits = torch.tensor(start, requires_grad=True)
    tokens = [TokenRow([9], [[action] for action in row]) for row in rows]
    judged = JudgedRows((), [], tokens, [], [torch.tensor(values) for values in rates], torch.arange(6))
    stage = PaperAlignment.__new__(PaperAlignment)
    stage.family = stage.shared = settings
    stage.attainable, stage.offline, stage.work, stage.every = [], [], Work(), 3
    stage.starts_offline, stage.seed, stage.size = False, 0, 2
    stage.train_rows = TrainRows(TableRollouts(logits), judged)  # type: ignore[arg-type]
    stage.train_rows.begin(range(6), stage.train_rows.rollouts.reference(tokens))
    objectives = [Objective(name, "secondary", name) for name in NAMES]
    stage.setting = SimpleNamespace(  # type: ignore[assignment]
        accelerator=SimpleNamespace(num_processes=1),
        inputs=SimpleNamespace(
            data=SimpleNamespace(objectives=objectives),
            policy=SimpleNamespace(snapshot=lambda: {"logits": logits.detach().clone()}),
        ),
    )
    optimiser = SimpleNamespace(param_groups=[{"lr": ETA}])
    stage.trainer = SimpleNamespace(steps=STEPS, optimiser=optimiser)  # type: ignore[assignment]
    stage.rows_of = batch_of  # type: ignore[method-assign]
    stage._visited = batch_of  # type: ignore[method-assign]
    stage.place(settings.grid(None))
    return stage, logits


def line_4(stage: PaperAlignment, logits: Tensor, numbers: list[int]) -> Tensor:
    """The mean loss of a step, with the gradient left in the logits."""
    batch = stage.train_rows.of_data(numbers)
    policy = logits.log_softmax(-1)
    rows = [policy[[r[0] for r in stage.train_rows.judged.tokens[i].responses]] for i in numbers]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logits.grad = None
    loss = extraction_loss(stage.shared, replace(batch, policy_logps=padded), stage.points[0].duals).mean()
    loss.backward()
    return loss.detach()


# --------------------------------------------------------------------------------------------- Algorithm 1
@pytest.mark.parametrize("thresholds", [(None, None), (0.9, None)])
@pytest.mark.parametrize("t0", [1, 5, math.inf])
def test_every_step_is_the_quotations(t0: float, thresholds: tuple[float | None, ...]):
    expected = Algorithm1(thresholds, **{**SETTINGS, "t0": t0})
    stage, logits = stage_of(method(thresholds, t0=t0))
    references, moved = [], []
    for step in range(STEPS):
        stage.before_step(step)
        reference, b = expected.reference, expected.b  # as line 5 of the step before has left them
        loss = expected.step(step + 1)
        state = stage.points[0].state
        np.testing.assert_allclose(state.chi, expected.chi, rtol=1e-11)
        np.testing.assert_allclose(state.duals, expected.duals, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(list(state.lower or []), expected.bounds[-1], rtol=1e-10)
        np.testing.assert_allclose(list(state.thresholds or []), b, rtol=1e-10)
        for i in batch_of(step):
            np.testing.assert_allclose(stage.train_rows.reference[i], reference[expected.rows[i]], rtol=1e-10)
        assert float(line_4(stage, logits, batch_of(step))) == pytest.approx(loss, rel=1e-10)
        with torch.no_grad():
            logits -= ETA * logits.grad  # type: ignore[operator]
        np.testing.assert_allclose(logits.detach(), expected.logits, rtol=1e-10)
        references.append(reference)
        moved.append(state.duals)
    lagging = [not np.array_equal(reference, expected.mu) for reference in references]
    assert lagging == [math.isfinite(t0) and step >= 2 * t0 for step in range(STEPS)]  # of t0 steps before a refresh
    assert np.ptp(moved, axis=0).max() > 0.01  # or the test would show nothing
    assert stage.refreshes == (0 if t0 == math.inf else (STEPS - 1) // t0)


def test_chi_follows_the_gradient_of_the_bound():
    """Line 1 in the direction that a difference quotient tells, with the multipliers of the step before."""
    stage, _ = stage_of(method((0.9, 0.9)))
    (point,), batch = stage.points, stage.train_rows.of_data([0, 1, 2])
    point.state.duals = [0.3, 0.1]
    chi, h = torch.tensor([1.0, 1.0], dtype=torch.float64), 1e-6
    quotient = (robust_estimate(point, batch, chi + h).lower - robust_estimate(point, batch, chi - h).lower) / (2 * h)
    gradient_step(point, batch, 0.01)
    torch.testing.assert_close(
        torch.tensor(point.state.chi, dtype=torch.float64), chi + 0.01 * quotient, atol=1e-9, rtol=0
    )


def test_chi_settles_where_the_bound_is_highest():
    """Steps of line 1 alone end at the closed form's bound: the ball's worst mean."""
    from mopo_cli.maths.bounds import lower_bound

    point, rates = Lagrangian(method((0.01, 0.01), epsilon=0.05)), torch.rand(1, 9, 3, dtype=torch.float64)
    zeros, whole = torch.zeros(1, 9, dtype=torch.float64), torch.ones(1, 9, dtype=torch.bool)
    batch = LogpBatch(zeros, zeros, zeros, rates, whole, whole)
    point.state.chi = [1.0, 1.0]
    for _ in range(600):
        gradient_step(point, batch, 0.5)
    assert point.state.duals == [0.0, 0.0]  # thresholds that are met: rho stays
    f = torch.exp(rates[0, :, 0] / 0.7 - 1.0)[:, None] * rates[0, :, 1:]
    bound, chi = lower_bound(f.T, 0.05)
    torch.testing.assert_close(torch.tensor(point.state.lower, dtype=torch.float64), bound, atol=1e-7, rtol=0)
    torch.testing.assert_close(torch.tensor(point.state.chi, dtype=torch.float64), chi, atol=1e-3, rtol=1e-3)


def test_a_refresh_reweights_the_cloning():
    """The data stay mu's, so a response's weight is rho pi_ref / mu; without a refresh that is rho."""
    rates = torch.tensor([[[0.9, 0.2], [0.1, 0.8]]], dtype=torch.float64)
    policy, behaviour = torch.tensor([[-1.0, -2.0]]).double(), torch.tensor([[-1.0, -3.0]]).double()
    whole, settings = torch.ones(1, 2, dtype=torch.bool), MopoPaper(NAMES[:2], (None,), **SETTINGS)
    rho = torch.exp(rates[..., 0] / 0.7 - 1.0)
    duals = torch.zeros(1, dtype=torch.float64)
    for reference in (behaviour, behaviour + torch.tensor([[0.5, -0.25]])):
        batch = LogpBatch(policy, reference, behaviour, rates, whole, whole)
        weights = rho * torch.exp(reference - behaviour)
        torch.testing.assert_close(extraction_loss(settings, batch, duals), -(weights * policy).mean(-1))


def test_the_policys_learning_rate_is_that_of_the_multipliers():
    stages = [stage_of(method())[0] for _ in range(2)]
    stages[1].trainer.optimiser.param_groups[0]["lr"] = 2 * ETA
    for stage in stages:
        stage.before_step(0)
    moved = [stage.points[0].state.chi[0] - 1.0 for stage in stages]
    assert moved[1] == pytest.approx(2 * moved[0], rel=1e-9)


# --------------------------------------------------------------------------------------------- as a run
def composed(*overrides: str) -> TrainConfig:
    typed: TrainConfig = compose.typed(compose.compose("train", ["algorithm=mopo_paper", *overrides]), TrainConfig)
    return typed


def test_the_settings_are_the_papers():
    config = composed("hparams=paper")
    found = algorithm_of(config)
    assert isinstance(found, MopoPaper)
    assert (found.extraction, found.normalize, found.labels, found.fresh_responses) == ("bc", "none", "observed", False)
    assert (found.tau, found.epsilon, found.beta, found.t0) == (0.08, 0.15, 0.9995, 500)
    assert (config.steps, config.batch_size) == (10_000, 8)
    assert (config.optimiser.warmup, config.optimiser.final_fraction) == (0, 1.0)  # eta is one number


@pytest.mark.parametrize(("overrides", "told"), [((), True), (("model.lora.r=16",), False), (("model=tiny",), False)])
def test_full_fine_tuning_of_a_pretrained_model_is_said_to_differ(
    monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], told: bool
):
    said: list[str] = []
    monkeypatch.setattr(paper, "warn", said.append)
    monkeypatch.setattr(paper, "PaperAlignment", lambda *_: None)
    config = composed("model=opt125m", *overrides) if "model=tiny" not in overrides else composed(*overrides)
    method().stage(SimpleNamespace(config=config))  # type: ignore[arg-type]
    assert ["LoRA" in text for text in said] == [True] * told


@pytest.mark.slow
def test_a_run_that_was_cut_off_between_two_refreshes_ends_where_it_would_have(
    smoke: Path, run_here: Callable[..., Finished], here: Path
):
    arguments = ("train", *TINY, "algorithm=mopo_paper", "objectives.concise.threshold=null", "t0=4", "steps=14",
                 "checkpoint_every=6", f"cache={cache_of(smoke)}", "optimiser.learning_rate=1e-4")  # fmt: skip
    assert run_here(*arguments, "run.dir=whole").status == 0
    whole = read_metrics(here / "whole")
    assert [line["refreshes"] for line in whole] == [1, 2, 3]
    assert len({line["threshold/concise"] for line in whole}) > 1
    assert run_here(*arguments, "run.dir=cut", "debug.fail_at_step=13").status == 1
    done = run_here(*arguments, "run.dir=cut", "run.resume=true")
    assert done.status == 0, done.err
    losses = [[line["loss"] for line in read_metrics(here / run)] for run in ("whole", "cut")]
    assert losses[0] == losses[1]
    summaries = [read_json(here / run / "summary.json") for run in ("whole", "cut")]
    assert summaries[0]["objectives"] == summaries[1]["objectives"]
    assert summaries[0]["duals"] == summaries[1]["duals"]
