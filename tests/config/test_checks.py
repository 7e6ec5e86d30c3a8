"""Settings that check themselves: a message names the key, what was found and what is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from mopo_cli.base.errors import UserError
from mopo_cli.config.checks import Must, above, at_least, between, checked, each, one_of


@dataclass(frozen=True)
class Inside:
    share: Annotated[float, between(0, 1, "[")] = 0.0


@dataclass(frozen=True)
class Settings:
    rounds: Annotated[int, at_least(0)] = 3
    rate: Annotated[float, above(0)] = 0.5
    budget: Annotated[int | None, at_least(1, "a number of tokens, 1 or more")] = None
    merge: Annotated[str, one_of("weights", "outputs")] = "weights"
    bits: Annotated[str | None, one_of("4bit", None)] = None
    fused: bool = True
    betas: Annotated[list[float], each(between(0, 1, "]"))] = field(default_factory=list)
    epsilon: Annotated[Any, Must("a number or auto", lambda value: value == "auto" or value >= 0)] = "auto"
    tags: list[str] | None = None
    names: tuple[str, ...] = ()
    inside: Inside = field(default_factory=Inside)
    several: dict[str, Inside] = field(default_factory=dict)

    def check_together(self, key: str) -> None:
        if self.merge == "outputs" and self.rounds:
            raise UserError(f"{key}merge=outputs: set {key}rounds=0")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": -1}, "rounds=-1: must be 0 or more"),
        ({"rounds": 1.5}, "rounds=1.5: must be a whole number, 0 or more"),
        ({"rounds": True}, "rounds=True: must be a whole number, 0 or more"),
        ({"rounds": None}, "rounds=None: must be a whole number, 0 or more"),
        ({"rate": 0}, "rate=0: must be above 0"),
        ({"rate": math.inf}, "rate=inf: must be above 0"),
        ({"rate": math.nan}, "rate=nan: must be above 0"),
        ({"rate": "high"}, "rate=high: must be a number, above 0"),
        ({"budget": 0}, "budget=0: must be a number of tokens, 1 or more, or null"),
        ({"merge": "both"}, "merge=both: must be weights or outputs"),
        ({"bits": "8bit"}, "bits=8bit: must be 4bit or null"),
        ({"fused": 1}, "fused=1: must be true or false"),
        ({"betas": [0.5, 1.5]}, "betas=[0.5, 1.5]: must be in (0, 1] each"),
        ({"betas": [0.5, [0.5]]}, "betas=[0.5, [0.5]]: must be a list, a number each"),
        ({"betas": [None]}, "betas=[None]: must be a list, a number each"),
        ({"tags": ["a", {"b": 1}]}, "tags=['a', {'b': 1}]: must be a list, a string each, or null"),
        ({"epsilon": [1]}, "epsilon=[1]: must be a number or auto"),
        ({"epsilon": -1}, "epsilon=-1: must be a number or auto"),
        ({"inside": Inside(1.0)}, "inside.share=1.0: must be in [0, 1)"),
        ({"several": {"a": Inside(), "b": Inside(-0.1)}}, "several.b.share=-0.1: must be in [0, 1)"),
        ({"merge": "outputs"}, "merge=outputs: set algorithm.rounds=0"),
    ],
)
def test_a_value_that_may_not_be(values: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        checked(Settings(**values), "algorithm.")
    assert str(caught.value) == f"algorithm.{message}"


@pytest.mark.parametrize(
    "values", [{}, {"rounds": 0}, {"rate": 1}, {"budget": 1}, {"betas": [1, 0.1]}, {"inside": Inside(0)}]
)
def test_values_at_the_edge(values: dict[str, Any]):
    settings = Settings(**values)
    assert checked(settings) is settings
