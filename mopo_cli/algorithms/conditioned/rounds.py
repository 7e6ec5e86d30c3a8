"""One policy for all of a user's wishes, which its prompt tells: lessons from the data, then rounds of lessons from its
own samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
from accelerate.utils import broadcast_object_list

from mopo_cli.algorithms.conditioned.lessons import (
    Lesson,
    Lessons,
    ScoredData,
    check_scored,
    fit_lessons,
    scored_data,
    split_steps,
)
from mopo_cli.algorithms.contract import EVALUATED, Aligned, aim_of, finished, trained_on
from mopo_cli.algorithms.rollouts import Request, Rollouts, Samples, rollout_settings, support, unusable
from mopo_cli.base.console import say
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json, write_json
from mopo_cli.config.checks import at_least, between, checked
from mopo_cli.data.directions import Directions
from mopo_cli.training.checkpoints import Setting, Work, reached
from mopo_cli.training.stage import kept_policy, mix

WholeNumber = Annotated[int, at_least(0, "a whole number, 0 or more")]
Count = Annotated[int, at_least(1, "a whole number, 1 or more")]
Share = Annotated[float, between(0, 1, "]")]
ItemLessons = dict[int, list[Lesson]]  # of a row


@dataclass(frozen=True, slots=True)
class Round:
    """What was learnt from samples of the policy: each item's lessons."""

    items: list[list[Lesson]]
    samples: int
    off_support: float  # share of the samples that did not end or that the data never show
    told: dict[str, float] = field(default_factory=dict)  # numbers worth reading


@dataclass(frozen=True)
class TaughtInRounds(ABC):
    """What algorithm=dpa and algorithm=ric have in common. `direction` says where this run is evaluated."""

    names: tuple[str, ...]
    unscored: tuple[str, ...] = ()
    direction: Mapping[str, float] | None = field(default=None, metadata=EVALUATED)
    rounds: WholeNumber = 2
    first_share: Share = 0.5  # of the steps, before the first round
    prompts: Count = 1000  # of a round
    responses: Count = 1  # to each request

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_scored(self.unscored, self.name)
        checked(self, "algorithm.")
        self.directions_at((0.0,) * len(self.names), (1.0,) * len(self.names)).condition(
            self.direction, "algorithm.direction"
        )

    @abstractmethod
    def spell(self, wish: np.ndarray) -> str:
        """The condition for a wish (K,)."""

    @abstractmethod
    def outer(self, data: ScoredData) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(K,) the lowest and the highest that each objective may be asked for."""

    @abstractmethod
    def directions_at(self, low: tuple[float, ...], high: tuple[float, ...]) -> Directions:
        """What the policy understands, between these."""

    @abstractmethod
    def first_lessons(self, data: ScoredData) -> Lessons:
        """Those of the data, before the first round."""

    @abstractmethod
    def wishes(self, data: ScoredData, prompts: int, seed: int) -> np.ndarray:
        """(R, K) what a round asks its prompts for, R / prompts of them each."""

    @abstractmethod
    def lessons(
        self, data: ScoredData, samples: Sequence[Samples], wishes: np.ndarray
    ) -> tuple[ItemLessons, dict[str, float]]:
        """What is learnt from a round's samples, one for each wish; a number that is worth reading."""

    @abstractmethod
    def round_lessons(self, data: ScoredData, rounds: Sequence[Round]) -> Lessons:
        """Those of the newest of the rounds so far."""

    # ------------------------------------------------------------------ training

    def align(self, setting: Setting) -> Aligned:
        work = Work()
        key = [rollout_settings(setting), trained_on(self)]
        record = kept_policy(setting, self.name, key, work, lambda: self.fit(setting, work))
        directions = self.directions_at(tuple(record["low"]), tuple(record["high"]))
        return Aligned(
            finished(work),
            aim=aim_of(setting, alike=True),
            condition=directions.condition(self.direction, "algorithm.direction"),
            directions=directions,
            off_support=record["off_support"],
        )

    def fit(self, setting: Setting, work: Work) -> dict[str, Any]:
        """Train setting.inputs.policy; the scales of the values, and what it may be asked for."""
        data = scored_data(setting)
        rollouts = Rollouts(setting, work, support(setting)[0]) if self.rounds else None
        rounds: list[Round] = []
        done, first = reached(setting), 0
        for t, steps in enumerate(split_steps(setting.config.steps, self.first_share, self.rounds)):
            title = f"alignment ({self.name})" + (f", round {t} of {self.rounds}" if t else "")
            if rollouts and t:
                drawn = kept_round(
                    setting, f"{self.name}-round-{t}", work, done > first, partial(self.draw, rollouts, data, t)
                )
                rounds.append(drawn)
                say(f"{title}: " + "  ".join(f"{key} {_number(value)}" for key, value in drawn.told.items()))
            if done > first + steps:  # a run that goes on does not train again what its checkpoint has behind it
                work.steps += steps
            else:
                lessons = self.round_lessons(data, rounds) if t else self.first_lessons(data)
                fit_lessons(setting, lessons, work, title=title, steps=steps, first=first)
            first += steps
        low, high = self.outer(data)
        return {
            "scales": {name: asdict(scale) for name, scale in zip(self.names, data.scales, strict=True)},
            "low": low,
            "high": high,
            "off_support": rounds[-1].off_support if rounds else 0.0,
        }

    def draw(self, rollouts: Rollouts, data: ScoredData, t: int) -> Round:
        """Round t, from the policy as it is."""
        numbers = np.random.default_rng(mix(data.seed, 7, t)).permutation(len(data.rows))[: self.prompts].tolist()
        wishes = self.wishes(data, len(numbers), mix(data.seed, 8, t))
        rows = np.repeat(numbers, len(wishes) // len(numbers)).tolist()
        requests = [Request(i, self.spell(wish)) for i, wish in zip(rows, wishes, strict=True)]
        title = f"samples (round {t} of {self.rounds})"
        samples = rollouts.valued(requests, self.responses, mix(data.seed, 9, t), title)
        items, told = self.lessons(data, samples, wishes)
        count, off = len(requests) * self.responses, unusable(samples)
        return Round(list(items.values()), count, off, {"samples": float(count), **told, "off the data's support": off})


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def kept_round(setting: Setting, name: str, work: Work, passed: bool, draw: Callable[[], Round]) -> Round:
    """A round as it was drawn before the run's checkpoint, else drawn now; the same for every process.

    UserError where the file is torn: the policy that drew it is gone.
    """
    path = setting.run.path / "stages" / f"{name}.json"
    if passed and path.exists():
        try:
            record = dict(read_json(path))
            items = [[Lesson(**lesson) for lesson in item] for item in record.pop("items")]
            drawn = Round(items, **record)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not the samples of a round ({error}); start the run anew") from None
        work.samples += drawn.samples
        return drawn
    result = [draw()]
    if setting.accelerator.num_processes > 1:
        broadcast_object_list(result)
    if setting.accelerator.is_main_process:
        write_json(path, asdict(result[0]))
    return result[0]
