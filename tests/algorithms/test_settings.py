"""What an algorithm's settings have in common: a key that no setting is left out of."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from mopo_cli.algorithms.conditioned.dpa import Dpa
from mopo_cli.algorithms.conditioned.ric import Ric
from mopo_cli.algorithms.contract import trained_on
from mopo_cli.algorithms.mopo.conditioned import MopoConditioned
from mopo_cli.algorithms.pairwise.dpo import Dpo

PAIR = ("helpful", "harmless")
ALGORITHMS = [
    Dpa(PAIR),
    Ric(PAIR),
    MopoConditioned(PAIR, (0.5,), 0.1, "auto"),
    Dpo(PAIR, 0.1),
]
OTHER = {
    "names": ("helpful", "concise"), "unscored": None, "tau": 0.2, "epsilon": 0.1, "levels": 4, "loss": "hinge",
    "weights": {"helpful": 0.5, "harmless": 0.5}, "extremes": "normal", "thresholds": (0.6,), "map": "linf",
    "direction": {"helpful": 1.0},
}  # fmt: skip
EVALUATED = {"direction", "map", "thresholds"}


def changed(value: Any) -> Any:
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2 + 0.01


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: type(algorithm).__name__)
def test_every_setting_but_where_it_is_evaluated_changes_the_key(algorithm: Any):
    for setting in fields(algorithm):
        if setting.name == "unscored":  # may only be empty where these are built
            continue
        value = OTHER[setting.name] if setting.name in OTHER else changed(getattr(algorithm, setting.name))
        same = trained_on(replace(algorithm, **{setting.name: value})) == trained_on(algorithm)
        assert same == (setting.name in EVALUATED), setting.name
