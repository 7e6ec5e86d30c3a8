"""What a plan is made from: samples of the reference, the held-out labels, and the exact world where there is one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from mopo_cli.base.console import stage, warn
from mopo_cli.base.errors import UserError
from mopo_cli.config.schema import PlanConfig
from mopo_cli.data.assistant import World
from mopo_cli.judging.rows import SUPPORTING, JudgedRows, empirical, judge_rows, judge_samples, support_floor
from mopo_cli.models.preference import PreferenceModel, win_probabilities
from mopo_cli.training.inputs import Inputs
from mopo_cli.training.preference import fit_or_load_judge
from mopo_cli.training.reference import fit_or_load_reference

FEWEST, FEW = 10, 100  # held-out prompts: below the first nothing can be said, below the second little
AT_ONCE = 50  # prompts that are sampled at a time


@dataclass(frozen=True, slots=True)
class ResponsePool:
    """Responses that stand for pi_ref: win rates (N, M, K), and the log of their probabilities (N, M)."""

    win_rates: np.ndarray
    log_reference: np.ndarray

    def of(self, objectives: list[int]) -> ResponsePool:
        """The pool with these objectives only."""
        return ResponsePool(self.win_rates[:, :, objectives], self.log_reference)


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Held-out rows: modelled win rates (N, G, K) of the data's responses, and how far labels lie from the model.

    residuals (N, G, K) are means over a response's labelled pairs of I - P; NaN where nobody judged it, or where a row
    has fewer responses.
    """

    win_rates: np.ndarray
    residuals: np.ndarray
    pairs: int

    def of(self, objectives: list[int]) -> LabelledRows:
        """The rows with these objectives only."""
        return LabelledRows(self.win_rates[:, :, objectives], self.residuals[:, :, objectives], self.pairs)


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of K objectives before an alignment with `tau`."""

    names: tuple[str, ...]
    tau: float
    pool: ResponsePool
    labelled: LabelledRows | None = None  # None: labels without an error
    truth: ResponsePool | None = None  # every response of the same prompts, where the world is enumerable

    def pair(self, first: int, second: int) -> Evidence:
        """Two of the objectives, the others left free."""
        chosen = [first, second]
        labelled = self.labelled and self.labelled.of(chosen)
        truth = self.truth and self.truth.of(chosen)
        return Evidence((self.names[first], self.names[second]), self.tau, self.pool.of(chosen), labelled, truth)


def check_prompts(inputs: Inputs) -> None:
    """UserError where there are too few held-out prompts to say anything, a warning where there are few."""
    prompts = len({str(example.prompt) for example in inputs.examples["heldout"]})
    if prompts < FEWEST:
        raise UserError(
            f"dataset: {prompts} held-out prompts; a plan needs at least {FEWEST}. Give more rows, or raise "
            "dataset.heldout_fraction"
        )
    if prompts < FEW:
        warn(f"{prompts} held-out prompts: the intervals below are wide, and rough themselves; {FEW} or more would do")


def gather(config: PlanConfig, accelerator: Accelerator, inputs: Inputs) -> tuple[Evidence, list[float]]:
    """The evidence, and the preference model's held-out accuracies.

    Fits the reference (left in inputs.policy) and the preference model, or takes them from the cache.
    """
    fit_or_load_reference(config, accelerator, inputs)
    judge, accuracy = fit_or_load_judge(config, accelerator, inputs)
    rows = inputs.examples["heldout"], inputs.tokens["heldout"]
    heldout = judge_rows(judge, inputs.data.objectives, *rows, inputs.policy.collate, "smoothed")
    numbers = _distinct(inputs, config.plan.prompts, config.seed)
    prompts = [str(inputs.examples["heldout"][number].prompt) for number in numbers]
    pool = sample_pool(config, inputs, judge, heldout, numbers)
    labelled = label_rows(judge, inputs, heldout)
    return Evidence(inputs.data.names, config.tau, pool, labelled, true_pool(inputs, prompts)), accuracy


def sample_pool(
    config: PlanConfig, inputs: Inputs, judge: PreferenceModel, heldout: JudgedRows, numbers: list[int]
) -> ResponsePool:
    """Samples of the reference for these held-out rows, judged; what no data are like is left out."""
    policy = inputs.policy
    prompts = [heldout.tokens[number].prompt for number in numbers]
    floor = support_floor(policy.logps(heldout.tokens[:SUPPORTING]), config.onpolicy.support)
    rates, supported = [], []
    with stage("samples", len(prompts)) as progress:
        for start in range(0, len(prompts), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            samples = policy.sample(prompts[part], config.plan.responses, config.sampling, config.seed + start)
            tokens, judged = judge_samples(judge, heldout, numbers[part], samples, policy.collate)
            rates += judged
            supported += [logps >= floor for logps in policy.logps(tokens)]
            progress.advance(min(start + AT_ONCE, len(prompts)))
    return ResponsePool(*empirical(torch.stack(rates), torch.stack(supported)))


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
    rows = zip(heldout.examples, heldout.features, heldout.win_rates, strict=True)
    for n, (example, features, rates) in enumerate(rows):
        win_rates[n, : len(rates)] = rates.numpy()
        p = win_probabilities(judge, features, features).numpy()
        for (a, b), labels in zip(example.pairs, example.labels, strict=True):
            residual = np.array(labels) - p[a, b]
            judged = ~np.isnan(residual)
            pairs += 1
            for response, sign in ((a, 1.0), (b, -1.0)):
                total[n, response] += sign * np.nan_to_num(residual)
                count[n, response] += judged
    residuals = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    for k, objective in enumerate(inputs.data.objectives):
        if objective.scorer is not None:
            residuals[:, :, k] = np.where(np.isnan(residuals[:, :, k]), np.nan, 0.0)  # scored, not modelled
    return LabelledRows(win_rates, residuals, pairs)


def true_pool(inputs: Inputs, prompts: list[str]) -> ResponsePool | None:
    """Every response of the embedded world under mu, for the same prompts."""
    world = inputs.data.world
    if not isinstance(world, World):
        return None
    columns = [world.objectives.index(objective.source) for objective in inputs.data.objectives]
    win_rates = np.stack([world.win_rates(prompt)[:, columns] for prompt in prompts])
    return ResponsePool(win_rates, np.log(np.stack([world.mu(prompt) for prompt in prompts])))
