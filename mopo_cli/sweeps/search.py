"""`mopo sweep sweeper=optuna`: points found by Optuna's multi-objective TPE instead of a grid.

What has been learnt is in the run directories and sweep.json, so a search that was killed goes on as if it had not
been: each proposal is a function of the seed, its number and the results before it. It learns from win rates on
held-out prompts alone; what runs reach on test prompts is for the results table.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from mopo_cli.base.errors import UserError, needed
from mopo_cli.base.text import one_line
from mopo_cli.runs.record import RunRecord
from mopo_cli.sweeps.points import Point, Points, first_choice, parse, point_of


@dataclass
class Optuna:
    """Points as Optuna proposes them; those of an earlier sweep process come first, in their order."""

    name: str = "optuna"
    trials: int = 20
    startup: int = 8
    seed: int = 0

    fixed = False

    def check(self) -> None:
        for key in ("trials", "startup"):
            if getattr(self, key) < 1:
                raise UserError(f"sweeper.{key}={getattr(self, key)}: must be 1 or more")
        needed("optuna", "optuna")

    def open(self, grids: Sequence[Sequence[str]], zipped: Sequence[str], earlier: Sequence[dict[str, str]]) -> Points:
        if zipped:
            raise UserError(f"sweep.zip=[{','.join(zipped)}]: sweeper=optuna chooses each key by itself")
        if len(grids) > 1:
            raise UserError(
                f"sweep.grid: sweeper=optuna searches one space, and this preset has {len(grids)} grids; give it the "
                "keys of one (algorithm=mopo, say), or use sweeper=grid"
            )
        self.total, self.parsed = self.trials, parse(grids[0])
        self.space = {key: _distribution(override) for key, override in self._swept()}
        if not self.space:
            raise UserError("sweeper=optuna: nothing to search over; give a key a range: tau=interval(0.05,1)")
        if "objectives" in self.space:
            raise UserError("objectives: sweeper=optuna needs the same objectives in every trial")
        self.earlier = [texts for texts in earlier if self._holds(texts)]
        self.proposed: list[tuple[dict[str, Any], Point]] = []
        self.records: dict[str, RunRecord] = {}
        return self

    def known(self) -> list[Point]:
        """The first of every choice, and the last."""
        first = {key: first_choice(o).split("=", 1)[1] for key, o in self._swept()}
        last = {key: _text(d.choices[-1] if hasattr(d, "choices") else d.high) for key, d in self.space.items()}
        return [self._point(first)] + ([self._point(last)] if last != first else [])

    def next(self) -> Point | None:
        number = len(self.proposed)
        if number >= self.total:
            return None
        texts = self.earlier[number] if number < len(self.earlier) else self._propose(number)
        values = {key: _value(self.space[key], texts[key]) for key in self.space}
        self.proposed.append((values, self._point(texts)))
        return self.proposed[-1][1]

    def tell(self, point: Point, record: RunRecord) -> None:
        self.records[point.id] = record

    def _holds(self, texts: dict[str, str]) -> bool:
        """Whether sweep.json's words are a point of this search: nothing else of them may become an override."""
        if texts.keys() != self.space.keys():
            return False
        return all(_allows(self.space[key], text) for key, text in texts.items())

    def _swept(self) -> list[tuple[str, Override]]:
        return [(o.get_key_element().lstrip("+"), o) for o in self.parsed if o.is_sweep_override()]

    def _point(self, texts: dict[str, str]) -> Point:
        read = []
        for override in self.parsed:
            element = override.get_key_element()
            swept = override.is_sweep_override()
            read.append(f"{element}={texts[element.lstrip('+')]}" if swept else first_choice(override))
        return point_of(self.parsed, read)

    def _propose(self, number: int) -> dict[str, str]:
        """Optuna's next point, given every point so far and its result.

        The study is told everything anew each time: what is in the run directories is the truth, also where a run
        that had failed was done again, or a point was read back with the six digits that its override has.
        """
        optuna = needed("optuna", "optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        names = next((r.names for r in self.records.values() if r.finished), ("objective",))
        study = optuna.create_study(directions=["maximize"] * len(names), sampler=optuna.samplers.RandomSampler(seed=0))
        for values, point in self.proposed:
            study.enqueue_trial(values)
            trial = study.ask(self.space)
            record = self.records.get(point.id)
            reached = heldout_of(record) if record is not None and record.finished else None
            if record is not None and reached is not None:
                for name in names:
                    threshold = record.objectives[name].threshold
                    if threshold is not None:
                        trial.set_constraint(name, threshold - reached[name])
                study.tell(trial, [reached[name] for name in names])
            elif record is not None and (record.finished or record.state == "failed"):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that parts of Optuna may change
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=self.startup, seed=self.seed * 100_003 + number, constant_liar=True
            )
            trial = study.ask(self.space)
        return {key: _text(_bounded(self.space[key], value)) for key, value in trial.params.items()}


def heldout_of(record: RunRecord) -> dict[str, float] | None:
    """Win rates on held-out prompts; None of a run of before, which has none."""
    rates = {name: result.heldout for name, result in record.objectives.items() if result.heldout is not None}
    return rates if len(rates) == len(record.names) else None


def _distribution(override: Override) -> Any:
    """What Optuna draws from, for one swept override."""
    distributions, value = needed("optuna", "optuna").distributions, override.value()
    try:
        if isinstance(value, IntervalSweep):
            kind = distributions.IntDistribution if isinstance(value.start, int) else distributions.FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        if isinstance(value, RangeSweep) and all(isinstance(v, int) for v in (value.start, value.stop, value.step)):
            steps = range(int(value.start), int(value.stop), int(value.step))  # type: ignore[arg-type]
            return distributions.IntDistribution(steps[0], steps[-1], step=steps.step)
        assert isinstance(value, ChoiceSweep | RangeSweep)
        return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
    except (ValueError, IndexError, AssertionError, TypeError) as error:
        raise UserError(f"cannot search over {override.input_line!r}: {one_line(error)}") from None


def _text(value: Any) -> str:
    """A value as an override has it; six digits of a float, so that ids stay readable."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _bounded(distribution: Any, value: Any) -> Any:
    return min(max(float(f"{value:.6g}"), distribution.low), distribution.high) if isinstance(value, float) else value


def _allows(distribution: Any, text: str) -> bool:
    if hasattr(distribution, "choices"):
        return text in distribution.choices
    try:
        return distribution.low <= float(text) <= distribution.high
    except (TypeError, ValueError):
        return False


def _value(distribution: Any, text: str) -> Any:
    """The value of an override as Optuna has it."""
    if hasattr(distribution, "choices"):
        return text
    return type(distribution.low)(float(text))
