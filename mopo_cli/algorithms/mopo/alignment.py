"""MOPO on a language model: batches, measurements of R_k on fresh samples, the lagged reference, for one set of
thresholds or for a grid of them.

All randomness is a pure function of (seed, step), so a run that goes on from a checkpoint ends where it would have.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from mopo_cli.algorithms.contract import Aligned, finished
from mopo_cli.algorithms.mopo.core import Lagrangian, LogpBatch, MopoSettings, extraction_loss, unattainable
from mopo_cli.algorithms.mopo.primal_dual import PrimalDual
from mopo_cli.algorithms.mopo.rows import TrainRows, padded, read_checkpoint
from mopo_cli.algorithms.rollouts import Request, Rollouts, Samples, support
from mopo_cli.base.console import warn
from mopo_cli.data.batches import batch_rows
from mopo_cli.data.table import row_length
from mopo_cli.judging.rows import JudgedRows, empirical, judge_rows
from mopo_cli.maths.estimates import Estimate
from mopo_cli.maths.oracle import attainable, policy_win_rates
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.loop import Progressed, Task, Trainer
from mopo_cli.training.stage import mix, rows_a_step, run_stage

MARGIN = 0.02  # of win rate, below what is attainable: the highest threshold that the offline dual is solved for
POOL = 32  # samples of the reference a prompt, for the offline dual
Thresholds = tuple[float, ...]  # (J,)


class Family(Protocol):
    """What one policy is trained for: the thresholds of a run, which is the one point (), or a grid of thresholds with
    a condition each."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def grid(self, stage: Alignment) -> list[Thresholds]:
        """All points, when the offline dual's pool has told what is attainable."""
        ...

    def settings(self, thresholds: Thresholds, attainable: Sequence[float]) -> MopoSettings:
        """MOPO's at one point."""
        ...

    def condition(self, thresholds: Thresholds) -> str:
        """What the policy is told to be asked for a point."""
        ...


@dataclass(frozen=True)
class Mopo(MopoSettings):
    """The settings of algorithm=mopo."""

    name = "mopo"
    longest_condition = ""

    def stage(self, setting: Setting) -> Alignment:
        return Alignment(setting, self, self, self.grid(None), Work())

    def grid(self, stage: Alignment | None) -> list[Thresholds]:
        return [()]

    def settings(self, thresholds: Thresholds, attainable: Sequence[float]) -> MopoSettings:
        return self

    def condition(self, thresholds: Thresholds) -> str:
        return ""

    def align(self, setting: Setting) -> Aligned:
        """Train setting.inputs.policy; what that leaves, with the run's own last estimate of R_k."""
        stage = self.stage(setting)
        (estimate,) = stage.train(f"alignment ({self.name})")
        (point,) = stage.points
        secondaries, state = self.names[1:], point.state
        return Aligned(
            finished(stage.work),
            thresholds=dict(zip(secondaries, state.thresholds, strict=True)),
            duals=dict(zip(secondaries, state.duals, strict=True)),
            estimated=dict(zip(self.names, estimate.win_rates.tolist(), strict=True)),
            infeasible=point.infeasible,
            estimator=self.estimator,
            attainable=stage.attainable,
            entropy=stage.entropy,
            off_support=stage.off_support,
        )


class Alignment(PrimalDual):
    """The stage. A row is trained on, and asked, at one point of the grid: number = row * points + point.

    Its tables hold numbers a row; the only model in memory is the policy. shared: settings that all points have in
    common. grid: the points, empty where the family chooses them by what is attainable.
    """

    margin = MARGIN

    def __init__(self, setting: Setting, family: Family, shared: MopoSettings, grid: Sequence[Thresholds], work: Work):
        config, inputs = setting.config, setting.inputs
        self.setting, self.family, self.shared, self.work = setting, family, shared, work
        self.trainer = Trainer(
            setting.accelerator,
            inputs.policy.model,
            config.optimiser,
            config.steps,
            config.gradient_accumulation,
            config.token_budget,
        )
        self.rollouts = Rollouts(setting, work, -math.inf)
        self.train_rows = TrainRows(self.rollouts, self._judged("train", shared.labels))
        self.heldout = self._judged("heldout", "observed")
        self.onpolicy, self.seed, self.size = config.onpolicy, config.seed, rows_a_step(setting)
        self.every, self.starts_offline = config.onpolicy.every, shared.dual_init == "offline"
        self.attainable: list[float] = []  # (J,) of the pool's prompts
        self.reached: list[float] = []  # (J,) by the reference, of the pool's prompts
        self.off_support = 0.0  # share of the last measurement's samples that no judge can have an opinion of
        self.kl = 0.0
        self.entropy: list[float] = []  # nats a response, at each measurement on samples
        self.offline: list[Estimate] = []
        self.place(grid)

    def _judged(self, split: str, labels: str) -> JudgedRows:
        inputs = self.setting.inputs
        examples, tokens = inputs.examples[split], inputs.tokens[split]
        return judge_rows(self.setting.judge, inputs.data.objectives, examples, tokens, inputs.policy.collate, labels)

    def place(self, grid: Sequence[Thresholds]) -> None:
        """The points that are trained for, from here on."""
        self.grid = list(grid)
        self.points = [Lagrangian(self.family.settings(point, self.attainable)) for point in grid]
        self.conditions = [self.family.condition(point) for point in grid]

    def train(self, title: str) -> list[Estimate]:
        """All steps; then the run's own last word on R_k at each point, while the multipliers stay.

        On samples it costs as much as one measurement. For a single point these are spent on as many prompts as there
        are, one response each.
        """
        run_stage(self.setting, self, title)
        step, started, onpolicy = self.trainer.steps, time.perf_counter(), self.onpolicy
        if self.shared.estimator == "offline":
            estimates = [self._weighted(self.train_rows.judged, min(len(self.train_rows), 2000))]
        elif len(self.points) == 1:
            estimates = self._estimates(step, onpolicy.prompts * onpolicy.responses, 1)
        else:
            estimates = self._estimates(step, onpolicy.prompts, onpolicy.responses)
        for point, estimate in zip(self.points, estimates, strict=True):
            point.observe(estimate, record_only=True)
        self.setting.tracker.amend(kl=self.kl, **self._numbers(("win_rate/", "lower/")))
        self.work.timing.estimate += time.perf_counter() - started
        self.setting.accelerator.free_memory()
        return estimates

    # ------------------------------------------------------------------ rows

    def rows_of(self, step: int) -> list[int]:
        points = len(self.points)
        return [row * points + (step * self.size + place) % points for place, row in enumerate(self._visited(step))]

    def _visited(self, step: int) -> list[int]:
        return batch_rows(len(self.train_rows), self.size, self.seed, step)

    def upcoming(self, step: int, steps: float) -> list[int]:
        """The rows of these steps."""
        count, last = len(self.train_rows), int(min(step + steps, self.trainer.steps))
        if (last - step) * self.size >= 2 * count:  # a whole epoch, wherever it begins
            return list(range(count))
        return sorted({row for s in range(step, last) for row in self._visited(s)})

    def request(self, number: int) -> Request:
        row, point = divmod(number, len(self.points))
        return Request(row, self.conditions[point])

    def length_of(self, number: int) -> int:
        """Tokens of a row with its fresh responses, and room for its condition."""
        return self.train_rows.length_of(number // len(self.points)) + self.setting.inputs.policy.encoder.room

    def prepare(self, start: int = 0) -> None:
        """Reference log-probs of every row to come; a checkpoint brings its own, equal to the last bit."""
        numbers = [] if start else self.upcoming(0, math.inf)
        self.rollouts.floor, logps = support(self.setting, self.train_rows.plain(numbers))
        if not start:
            self.train_rows.begin(numbers, logps)

    # ------------------------------------------------------------------ the step's hooks

    def task(self) -> Task:
        return Task(self.rows_of, self.loss, length_of=self.length_of, source_of=self._source)

    def _source(self, number: int) -> str:
        row = number // len(self.points)
        return self.train_rows.judged.examples[row].source or str(row)

    def loss(self, numbers: list[int]) -> Tensor:
        """Summed over these rows."""
        requests = [self.request(number) for number in numbers]
        rows, processes = self.train_rows.told(requests), self.setting.accelerator.num_processes
        examples = self.train_rows.judged.examples
        self.work.pairs += sum(len(examples[request.row].pairs) for request in requests) * processes
        self.work.tokens += sum(map(row_length, rows)) * processes
        batch = self.train_rows.batch(self.trainer.model, requests, rows)
        self.watch(batch, self.train_rows.judged.units[[request.row for request in requests]])
        points = len(self.points)
        duals = [point.duals for point in self.points]
        of_rows = duals[0] if points == 1 else torch.stack([duals[number % points] for number in numbers])
        return extraction_loss(self.shared, batch, of_rows).sum()

    def watch(self, batch: LogpBatch, units: Tensor) -> None:
        """What an offline estimate takes from a step's own batch."""
        if self.shared.estimator == "offline":
            with torch.no_grad():
                self.offline.append(self.estimate_of(batch, units))

    def estimate_of(self, batch: LogpBatch, units: Tensor) -> Estimate:
        """R_k from a batch of the data's responses; of one point, as these tell nothing of a grid's."""
        return self.points[0].estimate(batch, units)

    def before_step(self, step: int) -> None:
        super().before_step(step)
        if step % self.every == 0 and self.shared.fresh_responses:
            self.renew_fresh(step)
        if step == 0 and not any(self.conditions):  # else a run is warned of what it asks for, in the end
            objectives, thresholds = self.setting.inputs.data.objectives, self.points[0].state.thresholds
            for text in unattainable(objectives, thresholds, self.attainable):
                warn(text)
                self.setting.tracker.alert(text)

    def after_step(self, progressed: Progressed) -> None:
        self.work.steps = progressed.step
        if self.offline:
            self.points[0].observe(self._agreed(self.offline[-1]))
            self.offline.clear()

    def _agreed(self, value: Any) -> Any:
        """The main process's: float noise must not let multipliers, or a grid that is rounded, drift apart."""
        return broadcast_object_list([value])[0] if self.setting.accelerator.num_processes > 1 else value

    # ------------------------------------------------------------------ what the multipliers go by

    def pool(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples of the reference, which the policy still is; the grid, where it goes by them."""
        numbers = self._heldout_numbers(0, max(1, self.onpolicy.prompts // 8))
        samples = self.rollouts.compared(self.heldout, [Request(i) for i in numbers], POOL, mix(self.seed, 0, 3))
        self._note_support(samples)
        win_rates, log_reference = self._agreed(
            empirical(torch.stack([s.scores for s in samples]), torch.stack([s.on_support for s in samples]))
        )
        self.attainable = attainable(win_rates, log_reference)[1:].tolist()
        self.reached = policy_win_rates(log_reference, win_rates)[1:].tolist()
        if not self.points:
            self.place(self.family.grid(self))
        for point in self.points:
            point.observe(self._agreed(self._sampled(point, samples)), record_only=True)
        return win_rates, log_reference

    def start(self) -> None:
        started = time.perf_counter()
        super().start()
        self.work.timing.estimate += time.perf_counter() - started

    def measure(self, step: int) -> None:
        started = time.perf_counter()
        super().measure(step)
        self.work.timing.estimate += time.perf_counter() - started

    def estimates(self, step: int) -> Sequence[Estimate | None]:
        if self.shared.estimator == "offline":  # each step's own batch tells
            return [None]
        return self._estimates(step, self.onpolicy.prompts, self.onpolicy.responses)

    def _estimates(self, step: int, prompts: int, responses: int) -> list[Estimate]:
        """On held-out prompts, of which each point has its share."""
        if self.shared.estimator == "heldout":
            return self._agreed([self._weighted(self.heldout, len(self.heldout.tokens))])
        points = len(self.points)
        numbers = self._heldout_numbers(step, prompts)
        requests = [Request(i, self.conditions[place % points]) for place, i in enumerate(numbers)]
        samples = self.rollouts.compared(self.heldout, requests, responses, mix(self.seed, step, 1))
        now, before = self.rollouts.logps([s.told for s in samples]), [s.reference_logps for s in samples]
        self.entropy.append(-float(torch.stack([a.mean() for a in now]).mean()))
        self.kl = float(torch.stack([(a - b).mean() for a, b in zip(now, before, strict=True)]).mean())
        self._note_support(samples)
        return self._agreed([self._sampled(point, samples[n::points]) for n, point in enumerate(self.points)])

    def _note_support(self, samples: Sequence[Samples]) -> None:
        self.off_support = 1.0 - float(torch.stack([s.on_support for s in samples]).double().mean())

    def _sampled(self, point: Lagrangian, samples: Sequence[Samples]) -> Estimate:
        on_support = torch.stack([s.on_support for s in samples])
        units = self.heldout.units[[s.row for s in samples]]
        return point.sampled(torch.stack([s.scores for s in samples]), on_support, units)

    def _weighted(self, judged: JudgedRows, count: int) -> Estimate:
        """Importance-weighted estimate from the data's responses of the first `count` rows of a split."""
        rows, cpu = judged.tokens[:count], torch.device("cpu")
        now, before = self.rollouts.logps(rows), self.rollouts.reference(rows)
        initial, lagged = self.setting.initial, self.train_rows.lagged
        reference = before if lagged is initial else self.rollouts.reference(rows, lagged)
        mask = padded([torch.ones(len(row.responses), dtype=torch.bool) for row in rows], cpu)
        ours, theirs, drawn = (padded(values, cpu) for values in (now, reference, before))
        batch = LogpBatch(ours, theirs, drawn, padded(judged.win_rates[:count], cpu), mask, mask)
        log_ratio = torch.cat(now).sub(torch.cat(before)).double()
        weights = log_ratio.clamp(-30, 30).exp()
        self.kl = float((weights / weights.mean() * log_ratio).mean())
        return self.estimate_of(batch, judged.units[:count])

    def _heldout_numbers(self, step: int, prompts: int) -> list[int]:
        size = len(self.heldout.tokens)
        return np.random.default_rng(mix(self.seed, step, 2)).permutation(size)[: min(prompts, size)].tolist()

    # ------------------------------------------------------------------ the reference, and fresh responses

    def achieved(self, number: int) -> Tensor | None:
        lower = self.points[number].state.lower
        return None if lower is None else torch.tensor(lower, dtype=torch.float64)

    def lag(self, step: int, numbers: Sequence[int]) -> None:
        """Reference log-probs for the rows of the next t0 steps."""
        self.train_rows.lag(self.setting.inputs.policy.snapshot(), self.upcoming(step, self.shared.t0))

    def renew_fresh(self, step: int) -> None:
        """Fresh responses for rows that the next steps train on, asked at the point where they will be."""
        started = time.perf_counter()
        last = min(step + self.every, self.trainer.steps)
        numbers = sorted({number for s in range(step, last) for number in self.rows_of(s)})
        chosen = np.random.default_rng(mix(self.seed, step, 4)).permutation(len(numbers))
        requests = [self.request(numbers[i]) for i in sorted(chosen[: self.onpolicy.train_prompts].tolist())]
        self.train_rows.renew(requests, self.onpolicy.train_responses, mix(self.seed, step, 5))
        self.work.timing.fresh += time.perf_counter() - started

    # ------------------------------------------------------------------ what is told of a step

    @property
    def ended(self) -> bool:
        return all(point.infeasible for point in self.points)

    def shown(self) -> dict[str, float]:
        """The multipliers; of a grid, at its highest thresholds."""
        duals = self.points[-1].state.duals
        return {f"λ {name}": value for name, value in zip(self.family.names[1:], duals, strict=True)}

    def metrics(self, progressed: Progressed) -> dict[str, Any]:
        """Of all points together, and of each."""
        seconds = time.perf_counter() - self.work.timing.started
        line: dict[str, Any] = {
            "loss": float(progressed.loss),
            "learning_rate": progressed.learning_rate,
            "kl": self.kl,
            "off_support": self.off_support,
            "refreshes": self.refreshes,
            "pairs_per_second": self.work.pairs / seconds,
            "tokens_per_second": self.work.tokens / seconds,
        }
        return line | self._numbers()

    def _numbers(self, kinds: tuple[str, ...] = ("",)) -> dict[str, float]:
        """Each point's numbers whose names begin so; those of a grid stand under their conditions."""
        return {
            (f"point/{condition}/" if condition else "") + key: value
            for point, condition in zip(self.points, self.conditions, strict=True)
            for key, value in point.numbers().items()
            if key.startswith(kinds)
        }

    # ------------------------------------------------------------------ checkpoints

    def save(self, directory: Path) -> None:
        torch.save(self.train_rows.state_dict(), directory / "alignment.pt")
        states = [point.state_dict() for point in self.points]
        record = {
            "method": states[0],
            "grid": self.grid,
            "methods": states,
            "kl": self.kl,
            "off_support": self.off_support,
            "refreshes": self.refreshes,
            "attainable": self.attainable,
            "entropy": self.entropy,
        }
        (directory / "alignment.json").write_text(json.dumps(record), encoding="utf-8")

    def restore(self, directory: Path) -> None:
        record, tables = read_checkpoint(directory)
        self.attainable = record["attainable"]
        if "grid" in record:
            self.place([tuple(point) for point in record["grid"]])
        for point, state in zip(self.points, record.get("methods") or [record["method"]], strict=True):
            point.load_state_dict(state)
        self.kl, self.off_support, self.refreshes = record["kl"], record["off_support"], record["refreshes"]
        self.entropy = record["entropy"]
        self.train_rows.load_state_dict(tables)
