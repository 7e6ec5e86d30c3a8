"""One policy for all thresholds: MOPO with the thresholds in the prompt. This project's own addition.

(P) is solved for every point of a grid of thresholds at once. Each point has multipliers of its own, from the offline
dual and corrected on the policy's samples as MOPO's are; each training row is asked at one point, and its regression
target is that point's s_lambda. The policy of a threshold between two points is that of the next higher point, which
keeps the promise.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mopo_cli.algorithms.conditioned.lessons import policy_settings
from mopo_cli.algorithms.contract import Aligned, finished
from mopo_cli.algorithms.mopo.core import Mopo, regression_loss, unattainable
from mopo_cli.base.console import warn
from mopo_cli.base.errors import UserError
from mopo_cli.data.batches import batch_rows
from mopo_cli.data.directions import Levels, spelled
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.table import TokenRow, row_length
from mopo_cli.judging.judges import encoded_prompt
from mopo_cli.judging.rows import SUPPORTING, JudgedRows, empirical, judge_rows, judge_samples, support_floor
from mopo_cli.maths.estimates import Estimate, against_all, sampled_estimate
from mopo_cli.maths.oracle import attainable, policy_win_rates, solve
from mopo_cli.models.logprobs import response_logps
from mopo_cli.models.sampling import Drawn
from mopo_cli.training.cache import kept_logps
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.loop import Progressed, Task, Trainer
from mopo_cli.training.stage import kept_policy, mix, rows_a_step, run_stage

POOL = 32  # samples of the reference a prompt, for the offline dual
LEAST = 4  # prompts of a measurement, for each point of the grid
REACH = 0.9  # of the way from the reference's win rate to the attainable one: the highest threshold of a grid


def grid_of(levels: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Every combination of the secondaries' thresholds."""
    return list(itertools.product(*levels))


def spread_levels(least: float, best: float, count: int) -> tuple[float, ...]:
    """`count` thresholds in whole per cent from what the reference reaches to nearly what is attainable."""
    top = least + REACH * max(0.0, best - least)
    return tuple(sorted({round(float(b), 2) for b in np.linspace(least, top, count)}))


@dataclass
class Fresh:
    """Responses that the policy gave for one training row at one point of the grid, judged."""

    responses: list[list[int]]
    win_rates: Tensor  # (M, K)
    reference_logps: Tensor  # (M,)


class MopoConditioned:
    """The settings of algorithm=mopo_conditioned; see Mopo for tau, epsilon, delta, dual_rate and max_dual."""

    def __init__(
        self,
        names: tuple[str, ...],
        thresholds: tuple[float | None, ...],
        tau: float,
        epsilon: float | str,
        levels: int | Mapping[str, Sequence[float]] = 5,
        delta: float = 0.2,
        dual_rate: float = 0.5,
        max_dual: float = 20.0,
        fresh_responses: bool = True,
    ):
        if len(names) < 2:
            raise UserError("algorithm=mopo_conditioned: needs a secondary objective, whose threshold is the condition")
        self.names, self.thresholds, self.tau, self.epsilon = names, thresholds, tau, epsilon
        self.delta, self.dual_rate, self.max_dual, self.fresh_responses = delta, dual_rate, max_dual, fresh_responses
        self.levels = _checked_levels(names[1:], levels)
        self.longest_condition = spelled(names[1:], [100.0] * (len(names) - 1), 0)
        self.method((0.5,) * (len(names) - 1))  # raises where a setting is wrong

    def method(self, thresholds: tuple[float, ...]) -> Mopo:
        """MOPO at one point of the grid."""
        return Mopo(
            self.names,
            thresholds,
            self.tau,
            beta=1.0,
            epsilon=self.epsilon,
            t0=math.inf,
            dual_rate=self.dual_rate,
            delta=self.delta,
            max_dual=self.max_dual,
            fresh_responses=self.fresh_responses,
        )

    def align(self, setting: Setting) -> Aligned:
        work = Work()
        about = [
            getattr(self, key)
            for key in ("tau", "epsilon", "levels", "delta", "dual_rate", "max_dual", "fresh_responses")
        ]
        about += policy_settings(setting)

        def fit() -> dict[str, Any]:
            return train(setting, self, work)

        found = kept_policy(setting, "mopo_conditioned", about, work, fit)
        grid = [tuple(point) for point in found["grid"]]
        secondaries = self.names[1:]
        known = Levels(secondaries, tuple(tuple(sorted({p[j] for p in grid})) for j in range(len(secondaries))))
        given = zip(secondaries, self.thresholds, strict=True)
        asked = {name: 0.5 if b is None else b for name, b in given}  # without one, as good as the data's responses
        point = known.point(asked)
        for (name, b), level in zip(asked.items(), point, strict=True):
            if b > level + 1e-9:
                warn(f"objectives.{name}.threshold={b:g}: the policy was trained for at most {level:g}")
        for text in unattainable(setting.inputs.data.objectives, point, found["attainable"]):
            warn(text)
        place = grid.index(point)
        duals, estimated = found["duals"][place], found["estimated"][place]
        return Aligned(
            finished(work),
            condition=known.told(point),
            directions=known,
            thresholds=asked,
            duals=dict(zip(secondaries, duals, strict=True)),
            estimated=dict(zip(self.names, estimated, strict=True)),
            estimator="onpolicy",
            attainable=found["attainable"],
            off_support=found["off_support"],
        )


def _checked_levels(
    secondaries: Sequence[str], levels: int | Mapping[str, Sequence[float]]
) -> int | dict[str, list[float]]:
    """How many levels each secondary gets, or its own list; UserError where that makes no grid."""
    if isinstance(levels, int) and not isinstance(levels, bool):
        if levels < 2:
            raise UserError(f"algorithm.levels={levels}: must be 2 or more thresholds a secondary objective")
        return levels
    if not isinstance(levels, Mapping) or set(levels) != set(secondaries):
        found = ", ".join(levels) if isinstance(levels, Mapping) else levels
        raise UserError(f"algorithm.levels={found}: must be a number, or a list for each of {', '.join(secondaries)}")
    for name, values in levels.items():
        right = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
        if not right or not all(isinstance(b, int | float) and 0 < b < 1 for b in values):
            raise UserError(f"algorithm.levels.{name}={values}: must be a list of win rates in (0, 1)")
    return {name: sorted({round(float(b), 2) for b in levels[name]}) for name in secondaries}


def train(setting: Setting, settings: MopoConditioned, work: Work) -> dict[str, Any]:
    """Train the policy for all thresholds; the grid, and each point's multipliers and last estimate."""
    config, inputs = setting.config, setting.inputs
    trainer = Trainer(
        setting.accelerator,
        inputs.policy.model,
        config.optimiser,
        config.steps,
        config.gradient_accumulation,
        config.token_budget,
    )
    judged = [
        judge_rows(
            setting.judge, inputs.data.objectives, inputs.examples[s], inputs.tokens[s], inputs.policy.collate, labels
        )
        for s, labels in (("train", "smoothed"), ("heldout", "observed"))
    ]
    stage = Grid(setting, settings, trainer, work, *judged)
    run_stage(setting, stage, "alignment (mopo_conditioned)")
    estimates = stage.measure(config.steps, record_only=True)
    setting.accelerator.free_memory()
    return {
        "grid": [list(point) for point in stage.grid],
        "duals": [method.state.duals for method in stage.methods],
        "estimated": [estimate.win_rates.tolist() for estimate in estimates],
        "attainable": stage.attainable,
        "off_support": stage.off_support,
    }


class Grid:
    """The stage: a row is trained on, and asked, at one point of the grid; its number says which."""

    ended = False

    def __init__(
        self,
        setting: Setting,
        settings: MopoConditioned,
        trainer: Trainer,
        work: Work,
        train: JudgedRows,
        heldout: JudgedRows,
    ):
        config, inputs = setting.config, setting.inputs
        self.setting, self.settings, self.trainer, self.work = setting, settings, trainer, work
        self.train, self.heldout = train, heldout
        self.policy, self.encoder, self.collate = inputs.policy, inputs.policy.encoder, inputs.policy.collate
        self.onpolicy, self.seed, self.initial = config.onpolicy, config.seed, setting.initial
        self.size = rows_a_step(setting)
        self.floor = -math.inf
        self.reference: dict[int, Tensor] = {}
        self.fresh: dict[int, Fresh] = {}
        self.grid: list[tuple[float, ...]] = []
        self.methods: list[Mopo] = []
        self.encoders: list[Encoder] = []
        self.attainable: list[float] = []
        self.off_support = self.kl = 0.0

    # ------------------------------------------------------------------ rows: number = row * points + point

    def rows_of(self, step: int) -> list[int]:
        rows, points = batch_rows(len(self.train.tokens), self.size, self.seed, step), len(self.grid)
        return [row * points + (step * self.size + place) % points for place, row in enumerate(rows)]

    def upcoming(self, step: int, steps: int) -> list[int]:
        last = min(step + steps, self.trainer.steps)
        return sorted({number for s in range(step, last) for number in self.rows_of(s)})

    def asked(self, judged: JudgedRows, row: int, point: int) -> list[int]:
        """A row's prompt behind the condition of a point."""
        return encoded_prompt(self.encoders[point], judged.examples[row])

    def task(self) -> Task:
        return Task(self.rows_of, self.loss, length_of=self.length_of)

    def length_of(self, number: int) -> int:
        row, fresh = number // len(self.grid), self.fresh.get(number // len(self.grid))
        return row_length(self.train.tokens[row]) + self.encoder.room + (sum(map(len, fresh.responses)) if fresh else 0)

    def loss(self, numbers: list[int]) -> Tensor:
        """Summed over these rows."""
        rows, win_rates, reference, counts, duals = [], [], [], [], []
        for number in numbers:
            row, point = divmod(number, len(self.grid))
            own, fresh = self.train.tokens[row].responses, self.fresh.get(row)
            counts.append(len(own))
            rows.append(TokenRow(self.asked(self.train, row, point), own + (fresh.responses if fresh else [])))
            win_rates.append(torch.cat([self.train.win_rates[row], *([fresh.win_rates] if fresh else [])]))
            reference.append(torch.cat([self.reference[row], *([fresh.reference_logps] if fresh else [])]))
            duals.append(self.methods[point].duals)
        device = self.setting.accelerator.device
        tokens = self.collate(rows).to(device)
        processes = self.setting.accelerator.num_processes
        self.work.pairs += sum(len(self.train.examples[n // len(self.grid)].pairs) for n in numbers) * processes
        self.work.tokens += sum(map(row_length, rows)) * processes
        mask = tokens.slot >= 0
        slots = torch.arange(mask.shape[1], device=device)
        from_data = slots[None, :] < torch.tensor(counts, device=device)[:, None]
        p = against_all(pad_sequence(win_rates, batch_first=True).to(device), mask, from_data)
        scores = p[..., 0] + torch.einsum("bgj,bj->bg", p[..., 1:], torch.stack(duals).to(p))
        before = pad_sequence(reference, batch_first=True).to(device)
        return regression_loss(response_logps(self.policy.model, tokens), before, scores, mask, self.settings.tau).sum()

    # ------------------------------------------------------------------ the stage's hooks

    def prepare(self, start: int) -> None:
        """Log pi_ref of the rows to come, the support of the data, the grid; a checkpoint brings its own."""
        if start:
            return
        steps = range(self.trainer.steps)
        visited = sorted({row for s in steps for row in batch_rows(len(self.train.tokens), self.size, self.seed, s)})
        rows = [*self.heldout.tokens[:SUPPORTING], *(self.train.tokens[i] for i in visited)]
        logps = kept_logps(self.setting.accelerator, self.setting.config.cache, self.policy, rows)
        supporting = len(rows) - len(visited)
        self.floor = support_floor(logps[:supporting], self.onpolicy.support)
        self.reference = dict(zip(visited, logps[supporting:], strict=True))
        self.begin()

    def begin(self) -> None:
        """The grid and its multipliers, from the dual of (P) on samples of the reference."""
        started = time.perf_counter()
        numbers = self._heldout_numbers(0, max(1, self.onpolicy.prompts // 8))
        drawn = self._draw([self.heldout.tokens[i].prompt for i in numbers], POOL, mix(self.seed, 0, 3))
        tokens, rates = judge_samples(self.setting.judge, self.heldout, numbers, drawn, self.collate)
        before = self.policy.logps_under(self.initial, tokens)
        p, uniform = empirical(torch.stack(rates), torch.stack(before) >= self.floor)
        self.attainable = attainable(p, uniform)[1:].tolist()
        now = policy_win_rates(uniform, p)[1:].tolist()
        levels = self.settings.levels
        found = (
            [spread_levels(least, best, levels) for least, best in zip(now, self.attainable, strict=True)]
            if isinstance(levels, int)
            else [tuple(levels[name]) for name in self.settings.names[1:]]
        )
        if self.setting.accelerator.num_processes > 1:  # float noise must not round them apart
            found, self.attainable = broadcast_object_list([found, self.attainable])
        self._set_grid(grid_of(found))
        self._check_size()
        for method in self.methods:
            reach = np.minimum(method.thresholds.numpy(), np.array(self.attainable) - 0.02)
            method.state.thresholds = reach.tolist()  # else its multiplier grows until it weighs down all others
            method.state.duals = np.clip(
                solve(p, uniform, self.settings.tau, reach).duals, 0.0, self.settings.max_dual
            ).tolist()
        self._follow_main()
        self.work.timing.estimate += time.perf_counter() - started

    def _check_size(self) -> None:
        """UserError where the points of the grid are too many to be measured."""
        prompts, points = min(self.onpolicy.prompts, len(self.heldout.tokens)), len(self.grid)
        if LEAST * points > prompts:
            raise UserError(
                f"algorithm.levels: a grid of {points} thresholds, each measured on {LEAST} prompts or more, needs "
                f"{LEAST * points}; there are onpolicy.prompts={self.onpolicy.prompts} of "
                f"{len(self.heldout.tokens)} held-out rows: give fewer levels, or more prompts"
            )

    def _set_grid(self, grid: Sequence[tuple[float, ...]]) -> None:
        self.grid = list(grid)
        self.methods = [self.settings.method(point) for point in self.grid]
        texts = [spelled(self.settings.names[1:], [100.0 * b for b in point], 0) for point in self.grid]
        self.encoders = [self.encoder.conditioned(text) for text in texts]

    def before_step(self, step: int) -> None:
        if step % self.onpolicy.every:
            return
        if step:
            self.measure(step)
        if self.settings.fresh_responses:
            self.renew_fresh(step)

    def after_step(self, progressed: Progressed) -> None:
        self.work.steps = progressed.step

    def measure(self, step: int, record_only: bool = False) -> list[Estimate]:
        """R_k of the policy at each point on its share of held-out prompts; the multipliers move."""
        started, points = time.perf_counter(), len(self.grid)
        numbers = self._heldout_numbers(step, self.onpolicy.prompts)
        asked = [self.asked(self.heldout, i, place % points) for place, i in enumerate(numbers)]
        drawn = self._draw(asked, self.onpolicy.responses, mix(self.seed, step, 1))
        tokens, rates = judge_samples(self.setting.judge, self.heldout, numbers, drawn, self.collate)
        told = [TokenRow(prompt, row.responses) for prompt, row in zip(asked, tokens, strict=True)]
        now = self.policy.logps(told)
        before = self.policy.logps_under(self.initial, tokens)
        self.kl = float(torch.stack([(a - b).mean() for a, b in zip(now, before, strict=True)]).mean())
        known = torch.stack(before) >= self.floor
        self.off_support = 1.0 - float(known.double().mean())
        estimates = []
        for point, method in enumerate(self.methods):
            part = slice(point, None, points)
            estimate = sampled_estimate(torch.stack(rates[part]), method.tau, method.epsilon, method.delta, known[part])
            method.observe(estimate, record_only)
            estimates.append(estimate)
        self._follow_main()
        self.work.timing.estimate += time.perf_counter() - started
        return estimates

    def renew_fresh(self, step: int) -> None:
        """Fresh responses for rows that the next steps will train on, asked at the point where they will be."""
        started = time.perf_counter()
        numbers = self.upcoming(step, self.onpolicy.every)
        keep = np.random.default_rng(mix(self.seed, step, 4)).permutation(len(numbers))[: self.onpolicy.train_prompts]
        pairs = [divmod(numbers[i], len(self.grid)) for i in sorted(keep.tolist())]
        asked = [self.asked(self.train, row, point) for row, point in pairs]
        drawn = self._draw(asked, self.onpolicy.train_responses, mix(self.seed, step, 5))
        rows = [row for row, _ in pairs]
        tokens, rates = judge_samples(self.setting.judge, self.train, rows, drawn, self.collate)
        before = self.policy.logps_under(self.initial, tokens)
        self.fresh = {}
        for row, token, found, reference in zip(rows, tokens, rates, before, strict=True):
            worst = self.train.win_rates[row].min(0).values
            judged = torch.where((reference >= self.floor)[:, None], found, worst)
            self.fresh[row] = Fresh(token.responses, judged, reference)
        self.work.timing.fresh += time.perf_counter() - started

    def _draw(self, prompts: Sequence[list[int]], responses: int, seed: int) -> list[list[Drawn]]:
        self.work.samples += len(prompts) * responses
        return self.policy.sample(prompts, responses, self.setting.config.sampling, seed)

    def _heldout_numbers(self, step: int, prompts: int) -> list[int]:
        size = len(self.heldout.tokens)
        return np.random.default_rng(mix(self.seed, step, 2)).permutation(size)[: min(prompts, size)].tolist()

    def _follow_main(self) -> None:
        """Every process goes on with the main one's multipliers: float noise must not let them drift apart."""
        if self.setting.accelerator.num_processes > 1:
            states = broadcast_object_list([[method.state_dict() for method in self.methods]])[0]
            for method, state in zip(self.methods, states, strict=True):
                method.load_state_dict(state)

    # ------------------------------------------------------------------ what is told, and kept

    def shown(self) -> dict[str, float]:
        highest = self.methods[-1].state.duals
        return {f"λ {name}": value for name, value in zip(self.settings.names[1:], highest, strict=True)}

    def metrics(self, progressed: Progressed) -> dict[str, Any]:
        """Of the grid's points together, with the multipliers of each point under its condition's name."""
        seconds = time.perf_counter() - self.work.timing.started
        line: dict[str, Any] = {
            "loss": float(progressed.loss),
            "learning_rate": progressed.learning_rate,
            "kl": self.kl,
            "off_support": self.off_support,
            "pairs_per_second": self.work.pairs / seconds,
            "tokens_per_second": self.work.tokens / seconds,
        }
        for encoder, method in zip(self.encoders, self.methods, strict=True):
            names = self.settings.names[1:]
            line |= {f"point/{encoder.condition}/dual/{n}": d for n, d in zip(names, method.state.duals, strict=True)}
            if method.state.win_rates is not None:
                rates = zip(self.settings.names, method.state.win_rates, strict=True)
                line |= {f"point/{encoder.condition}/win_rate/{name}": rate for name, rate in rates}
        return line

    def save(self, directory: Path) -> None:
        fresh = {row: asdict(one) for row, one in self.fresh.items()}
        torch.save({"fresh": fresh, "reference": self.reference}, directory / "grid.pt")
        record = {
            "grid": [list(point) for point in self.grid],
            "methods": [method.state_dict() for method in self.methods],
            "attainable": self.attainable,
            "kl": self.kl,
            "off_support": self.off_support,
            "floor": self.floor,
        }
        (directory / "grid.json").write_text(json.dumps(record), encoding="utf-8")

    def restore(self, directory: Path) -> None:
        record = json.loads((directory / "grid.json").read_text(encoding="utf-8"))
        self._set_grid([tuple(point) for point in record["grid"]])
        for method, state in zip(self.methods, record["methods"], strict=True):
            method.load_state_dict(state)
        self.attainable, self.kl, self.off_support = record["attainable"], record["kl"], record["off_support"]
        self.floor = record["floor"]
        extra = torch.load(directory / "grid.pt", weights_only=True)
        self.fresh = {row: Fresh(**one) for row, one in extra["fresh"].items()}
        self.reference = extra["reference"]
