"""The alignment stage: batches of a method's inputs, measurements of R_j on fresh samples, the lagged reference.

All randomness is a pure function of (seed, step), so a run that goes on from a checkpoint ends where it would have.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from mopo_cli.algorithms.contract import Aligned
from mopo_cli.algorithms.mopo.core import LogpBatch, Mopo, refresh_due, unattainable
from mopo_cli.base.console import warn
from mopo_cli.data.batches import batch_rows
from mopo_cli.data.table import TokenRow, row_length
from mopo_cli.judging.rows import SUPPORTING, JudgedRows, empirical, judge_rows, judge_samples, support_floor
from mopo_cli.maths.estimates import Estimate, sampled_estimate
from mopo_cli.maths.oracle import attainable, solve
from mopo_cli.models.logprobs import response_logps
from mopo_cli.models.policy import Snapshot
from mopo_cli.models.sampling import Drawn
from mopo_cli.training.cache import kept_logps
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.loop import Progressed, Task, Trainer
from mopo_cli.training.stage import mix, run_stage


@dataclass
class Fresh:
    """Responses that the policy gave for one training row, judged against the data's responses."""

    responses: list[list[int]]
    win_rates: Tensor  # (M, K)
    behaviour_logps: Tensor  # (M,)
    reference_logps: Tensor  # (M,)


def align(setting: Setting, method: Mopo) -> Aligned:
    """Run the method on the reference; what it leaves, with its own last estimate of R_k."""
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
        for s, labels in (("train", method.labels), ("heldout", "observed"))
    ]
    stage = Alignment(setting, method, trainer, *judged)
    run_stage(setting, stage, "alignment (mopo)")
    estimate = stage.final_estimate(config.steps)
    names, state = inputs.data.names, method.state
    return Aligned(
        stage.work,
        thresholds=dict(zip(names[1:], state.thresholds, strict=True)),
        duals=dict(zip(names[1:], state.duals, strict=True)),
        estimated=dict(zip(names, estimate.win_rates.tolist(), strict=True)),
        infeasible=method.infeasible,
        estimator=method.estimator,
        attainable=stage.pool_attainable,
        entropy=stage.entropy,
        off_support=stage.off_support,
    )


class Alignment:
    """Runs a method on a policy. The stage's tables hold numbers a row; the only model in memory is the policy."""

    def __init__(self, setting: Setting, method: Mopo, trainer: Trainer, train: JudgedRows, heldout: JudgedRows):
        config, inputs = setting.config, setting.inputs
        self.accelerator, self.trainer, self.method, self.tracker = (
            setting.accelerator,
            trainer,
            method,
            setting.tracker,
        )
        self.policy, self.collate, self.judge, self.cache = (
            inputs.policy,
            inputs.policy.collate,
            setting.judge,
            config.cache,
        )
        self.train, self.heldout, self.objectives = train, heldout, inputs.data.objectives
        self.batch_size, self.onpolicy, self.sampling, self.seed = (
            config.batch_size,
            config.onpolicy,
            config.sampling,
            config.seed,
        )
        self.initial = self.lagged = setting.initial
        self.behaviour: dict[int, Tensor] = {}
        self.reference: dict[int, Tensor] = {}
        self.fresh: dict[int, Fresh] = {}
        self.floor = -math.inf  # log pi_ref below which a sample is not one that the preference model can judge
        self.off_support = 0.0  # share of such samples at the last measurement
        self.kl = 0.0
        self.entropy: list[float] = []  # nats a response, at each measurement on samples
        self.work = Work()
        self.refreshes = 0
        self.pool_attainable: list[float] = []
        self.offline: list[Estimate] = []

    # ------------------------------------------------------------------ batches

    def rows_of(self, step: int) -> list[int]:
        size = self.batch_size * self.trainer.accumulation * self.accelerator.num_processes
        return batch_rows(len(self.train.tokens), size, self.seed, step)

    def upcoming(self, step: int, steps: float) -> list[int]:
        last = int(min(step + steps, self.trainer.steps))
        size = self.batch_size * self.trainer.accumulation * self.accelerator.num_processes
        if (last - step) * size >= 2 * len(self.train.tokens):  # a whole epoch, wherever it begins
            return list(range(len(self.train.tokens)))
        return sorted({row for s in range(step, last) for row in self.rows_of(s)})

    def _table(self, weights: Snapshot, numbers: Sequence[int]) -> dict[int, Tensor]:
        rows = [self.train.tokens[i] for i in numbers]
        return dict(zip(numbers, self.policy.logps_under(weights, rows), strict=True))

    def prepare(self, start: int = 0) -> None:
        """Reference log-probs of every row to come; a checkpoint brings its own, equal to the last bit."""
        numbers = [] if start else self.upcoming(0, math.inf)
        rows = [*self.heldout.tokens[:SUPPORTING], *(self.train.tokens[i] for i in numbers)]
        with self.policy.swapped(self.initial):
            logps = kept_logps(self.accelerator, self.cache, self.policy, rows)
        supporting = len(rows) - len(numbers)
        self.floor = support_floor(logps[:supporting], self.onpolicy.support)
        if not start:
            self.behaviour = dict(zip(numbers, logps[supporting:], strict=True))
            self.reference = dict(self.behaviour)

    def batch(self, numbers: list[int]) -> LogpBatch:
        """The method's view of these rows: the data's responses, and fresh ones where there are any."""
        rows, win_rates, behaviour, reference, counts = [], [], [], [], []
        for i in numbers:
            row, fresh = self.train.tokens[i], self.fresh.get(i)
            counts.append(len(row.responses))
            rows.append(row if fresh is None else TokenRow(row.prompt, row.responses + fresh.responses))
            extra = [] if fresh is None else [fresh]
            win_rates.append(torch.cat([self.train.win_rates[i], *(f.win_rates for f in extra)]))
            behaviour.append(torch.cat([self.behaviour[i], *(f.behaviour_logps for f in extra)]))
            reference.append(torch.cat([self.reference[i], *(f.reference_logps for f in extra)]))
        device = self.accelerator.device
        tokens = self.collate(rows).to(device)
        self.work.pairs += sum(len(self.train.examples[i].pairs) for i in numbers) * self.accelerator.num_processes
        self.work.tokens += sum(map(row_length, rows)) * self.accelerator.num_processes
        slots = torch.arange(tokens.slot.shape[1], device=device)
        return LogpBatch(
            policy_logps=response_logps(self.policy.model, tokens),
            reference_logps=_pad(reference, device),
            behaviour_logps=_pad(behaviour, device),
            win_rates=_pad(win_rates, device),
            mask=tokens.slot >= 0,
            from_data=slots[None, :] < torch.tensor(counts, device=device)[:, None],
        )

    # ------------------------------------------------------------------ what is told of a step

    @property
    def ended(self) -> bool:
        return bool(self.method.infeasible)

    def shown(self) -> dict[str, float]:
        return {f"λ {name}": value for name, value in zip(self.method.names[1:], self.method.state.duals, strict=True)}

    def metrics(self, progressed: Progressed) -> dict[str, Any]:
        state, names = self.method.state, self.method.names
        seconds = time.perf_counter() - self.work.timing.started
        line: dict[str, Any] = {
            "loss": float(progressed.loss),
            "learning_rate": progressed.learning_rate,
            "kl": self.kl,
            "epsilon": state.epsilon,
            "n_eff": state.n_eff,
            "off_support": self.off_support,
            "refreshes": self.refreshes,
            "pairs_per_second": self.work.pairs / seconds,
            "tokens_per_second": self.work.tokens / seconds,
        }
        if state.win_rates is not None:
            line |= {f"win_rate/{name}": rate for name, rate in zip(names, state.win_rates, strict=True)}
        for j, name in enumerate(names[1:]):
            line |= {f"dual/{name}": state.duals[j], f"threshold/{name}": state.thresholds[j]}
            line[f"chi/{name}"] = state.chi[j]
            if state.lower is not None:
                line[f"lower/{name}"] = state.lower[j]
        return line

    # ------------------------------------------------------------------ the step's hooks

    def task(self) -> Task:
        return Task(self.rows_of, self.loss, length_of=self.length_of)

    def length_of(self, number: int) -> int:
        """Tokens of a row with its fresh responses."""
        fresh = self.fresh.get(number)
        return row_length(self.train.tokens[number]) + (sum(map(len, fresh.responses)) if fresh else 0)

    def loss(self, numbers: list[int]) -> Tensor:
        """Summed over these rows."""
        batch = self.batch(numbers)
        if self.method.estimator == "offline":
            with torch.no_grad():
                self.offline.append(self.method.estimate(batch))
        return self.method.loss(batch).sum()

    def before_step(self, step: int) -> None:
        """Measure, correct the multipliers, refresh the reference: in this order, where each is due."""
        measured = step % self.onpolicy.every == 0
        if step == 0 and self.method.dual_init == "offline":
            self.start_duals()
        elif measured and self.method.estimator != "offline":
            self.measure(step)
        if refresh_due(step, self.method.t0):
            self.refresh(step)
        if measured and self.method.fresh_responses:
            self.renew_fresh(step)
        if step == 0:
            for text in unattainable(self.objectives, self.method.state.thresholds, self.pool_attainable):
                warn(text)
                self.tracker.alert(text)

    def after_step(self, progressed: Progressed) -> None:
        self.work.steps = progressed.step
        if self.offline:
            self.method.observe(self.offline[-1])
            self.offline.clear()
            self._follow_main()

    def measure(self, step: int) -> Estimate:
        """R_k of the policy now, on held-out prompts; the multipliers move."""
        started = time.perf_counter()
        estimate = self._estimate(step, self.onpolicy.prompts, self.onpolicy.responses)
        self.method.observe(estimate)
        self._follow_main()
        self.work.timing.estimate += time.perf_counter() - started
        return estimate

    def _estimate(self, step: int, prompts: int, responses: int) -> Estimate:
        if self.method.estimator == "heldout":
            return self._weighted(self.heldout, len(self.heldout.tokens))
        return self._onpolicy(step, prompts, responses)

    def _follow_main(self) -> None:
        """Every process goes on with the main one's multipliers: float noise must not let them drift apart."""
        if self.accelerator.num_processes > 1:
            self.method.load_state_dict(broadcast_object_list([self.method.state_dict()])[0])

    def final_estimate(self, step: int) -> Estimate:
        """The run's own last word on R_k, by the method's estimator; the multipliers stay. Ends the stage.

        On samples it costs as much as one measurement, spent on as many prompts as there are: one response each.
        """
        started = time.perf_counter()
        if self.method.estimator == "offline":
            estimate = self._weighted(self.train, min(len(self.train.tokens), 2000))
        else:
            estimate = self._estimate(step, self.onpolicy.prompts * self.onpolicy.responses, 1)
        self.method.observe(estimate, record_only=True)
        self.work.timing.estimate += time.perf_counter() - started
        self.work.timing.seconds = time.perf_counter() - self.work.timing.started
        return estimate

    def _onpolicy(self, step: int, prompts: int, responses: int) -> Estimate:
        numbers = self._heldout_numbers(step, prompts)
        asked = [self.heldout.tokens[i].prompt for i in numbers]
        seed = mix(self.seed, step, 1)
        drawn = self._draw(asked, responses, seed)
        tokens, rates = judge_samples(self.judge, self.heldout, numbers, drawn, self.collate)
        now = self.policy.logps(tokens)
        before = self.policy.logps_under(self.initial, tokens)
        self.entropy.append(-float(torch.stack([a.mean() for a in now]).mean()))
        self.kl = float(torch.stack([(a - b).mean() for a, b in zip(now, before, strict=True)]).mean())
        return self._sampled(rates, before)

    def _draw(self, prompts: Sequence[list[int]], responses: int, seed: int) -> list[list[Drawn]]:
        self.work.samples += len(prompts) * responses
        return self.policy.sample(prompts, responses, self.sampling, seed)

    def _sampled(self, rates: Sequence[Tensor], reference: Sequence[Tensor]) -> Estimate:
        """The estimate from samples on the data's support, given (M, K) win rates and (M,) log pi_ref a prompt."""
        known = torch.stack(list(reference)) >= self.floor
        self.off_support = 1.0 - float(known.double().mean())
        return sampled_estimate(
            torch.stack(list(rates)), self.method.tau, self.method.epsilon, self.method.delta, known
        )

    def _weighted(self, judged: JudgedRows, count: int) -> Estimate:
        """Importance-weighted estimate from the data's responses of the first `count` rows of a split."""
        rows = judged.tokens[:count]
        now = self.policy.logps(rows)
        before = self.policy.logps_under(self.initial, rows)
        batch = LogpBatch(
            _pad(now, torch.device("cpu")),
            _pad(before, torch.device("cpu")),
            _pad(before, torch.device("cpu")),
            _pad(judged.win_rates[:count], torch.device("cpu")),
            mask := _pad([torch.ones(len(r.responses), dtype=torch.bool) for r in rows], torch.device("cpu")),
            mask,
        )
        log_ratio = torch.cat(now).sub(torch.cat(before)).double()
        weights = log_ratio.clamp(-30, 30).exp()
        self.kl = float((weights / weights.mean() * log_ratio).mean())
        return self.method.estimate(batch)

    def _heldout_numbers(self, step: int, prompts: int) -> list[int]:
        size = len(self.heldout.tokens)
        return np.random.default_rng(mix(self.seed, step, 2)).permutation(size)[: min(prompts, size)].tolist()

    def start_duals(self, responses: int = 32) -> None:
        """Multipliers from the offline dual: solve (P) on samples of the reference, judged by the preference model."""
        started = time.perf_counter()
        numbers = self._heldout_numbers(0, max(1, self.onpolicy.prompts // 8))
        asked = [self.heldout.tokens[i].prompt for i in numbers]
        drawn = self._draw(asked, responses, mix(self.seed, 0, 3))
        tokens, rates = judge_samples(self.judge, self.heldout, numbers, drawn, self.collate)
        before = self.policy.logps_under(self.initial, tokens)
        self.method.observe(self._sampled(rates, before), record_only=True)
        p, uniform = empirical(torch.stack(rates), torch.stack(before) >= self.floor)
        self.pool_attainable = attainable(p, uniform)[1:].tolist()
        thresholds = np.minimum(self.method.thresholds.numpy(), np.array(self.pool_attainable) - 0.02)
        solved = solve(p, uniform, self.method.tau, thresholds)
        self.method.state.duals = np.clip(solved.duals, 0.0, self.method.max_dual).tolist()
        self._follow_main()
        self.work.timing.estimate += time.perf_counter() - started

    def refresh(self, step: int) -> None:
        """pi_ref <- the policy now, and b_j <- beta G_j; reference log-probs for the rows of the next t0 steps."""
        lower = self.method.state.lower
        if lower is not None:
            self.method.renew(torch.tensor(lower, dtype=torch.float64))
        self.lagged = self.policy.snapshot()
        self.refreshes += 1
        self.reference |= self._table(self.lagged, self.upcoming(step, self.method.t0))
        for i, fresh in self.fresh.items():
            row = TokenRow(self.train.tokens[i].prompt, fresh.responses)
            fresh.reference_logps = self.policy.logps_under(self.lagged, [row])[0]

    def renew_fresh(self, step: int) -> None:
        """Fresh responses of the policy for rows that the next steps will train on."""
        started = time.perf_counter()
        numbers = self.upcoming(step, self.onpolicy.every)
        keep = np.random.default_rng(mix(self.seed, step, 4)).permutation(len(numbers))[: self.onpolicy.train_prompts]
        numbers = [numbers[i] for i in sorted(keep.tolist())]
        asked = [self.train.tokens[i].prompt for i in numbers]
        drawn = self._draw(asked, self.onpolicy.train_responses, mix(self.seed, step, 5))
        tokens, rates = judge_samples(self.judge, self.train, numbers, drawn, self.collate)
        behaviour = self.policy.logps_under(self.initial, tokens)
        lagged = behaviour if self.lagged is self.initial else self.policy.logps_under(self.lagged, tokens)
        self.fresh = {
            i: Fresh(token.responses, self._least_off_support(i, rate, b), b, r)
            for i, token, rate, b, r in zip(numbers, tokens, rates, behaviour, lagged, strict=True)
        }
        self.work.timing.fresh += time.perf_counter() - started

    def _least_off_support(self, number: int, rates: Tensor, reference: Tensor) -> Tensor:
        """(M, K) win rates of samples, those off the data's support counting as the worst of the row's responses."""
        worst = self.train.win_rates[number].min(0).values
        return torch.where((reference >= self.floor)[:, None], rates, worst)

    # ------------------------------------------------------------------ checkpoints

    def save(self, directory: Path) -> None:
        extra = {
            "fresh": {i: _fresh_state(f) for i, f in self.fresh.items()},
            "behaviour": _packed_table(self.behaviour),
            "reference": _packed_table(self.reference),
        }
        if self.lagged is not self.initial:
            extra["lagged"] = self.lagged
        torch.save(extra, directory / "alignment.pt")
        record = {
            "method": self.method.state_dict(),
            "kl": self.kl,
            "off_support": self.off_support,
            "refreshes": self.refreshes,
            "attainable": self.pool_attainable,
            "entropy": self.entropy,
        }
        (directory / "alignment.json").write_text(json.dumps(record), encoding="utf-8")

    def restore(self, directory: Path) -> None:
        record = json.loads((directory / "alignment.json").read_text(encoding="utf-8"))
        extra = torch.load(directory / "alignment.pt", weights_only=True)
        self.fresh = {i: Fresh(**f) for i, f in extra["fresh"].items()}
        self.lagged = extra.get("lagged", self.initial)
        self.behaviour, self.reference = (_unpacked_table(extra[name]) for name in ("behaviour", "reference"))
        self.method.load_state_dict(record["method"])
        self.kl, self.refreshes, self.pool_attainable = record["kl"], record["refreshes"], record["attainable"]
        self.entropy, self.off_support = record["entropy"], record["off_support"]


def _packed_table(table: dict[int, Tensor]) -> dict[str, object]:
    """A table of (G,) tensors as one tensor: thousands of small ones would be slow to write."""
    values = torch.cat(list(table.values())) if table else torch.empty(0)
    return {"rows": list(table), "counts": [len(row) for row in table.values()], "values": values}


def _unpacked_table(packed: dict[str, Any]) -> dict[int, Tensor]:
    return dict(zip(packed["rows"], packed["values"].split(packed["counts"]), strict=True))


def _fresh_state(fresh: Fresh) -> dict[str, object]:
    return {name: getattr(fresh, name) for name in ("responses", "win_rates", "behaviour_logps", "reference_logps")}


def _pad(rows: list[Tensor], device: torch.device) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
