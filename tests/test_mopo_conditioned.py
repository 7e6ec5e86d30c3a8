"""MOPO with its thresholds in the prompt: the grid, the conditions, and one training for all thresholds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL

import pytest
from running import TINY, Finished, read_json, read_metrics, results, stop_when

from mopo_cli.algorithms.mopo_conditioned import (
    MopoConditioned,
    condition_text,
    grid_of,
    nearest_above,
    spread_levels,
)
from mopo_cli.errors import UserError

NAMES = ("helpful", "harmless", "concise")
ARGUMENTS = (*TINY, "algorithm=mopo_conditioned", "objectives=assistant_pair")


def method(**settings: object) -> MopoConditioned:
    arguments = {"names": NAMES, "thresholds": (0.55, None), "tau": 0.1, "epsilon": "auto", **settings}
    return MopoConditioned(**arguments)  # type: ignore[arg-type]


class TestGrid:
    def test_every_combination(self):
        assert grid_of([(0.4, 0.5), (0.6,)]) == [(0.4, 0.6), (0.5, 0.6)]

    def test_a_threshold_between_two_levels_is_kept_by_the_higher(self):
        levels = (0.45, 0.55, 0.65)
        assert [nearest_above(levels, b) for b in (0.3, 0.45, 0.451, 0.55, 0.6)] == [0.45, 0.45, 0.55, 0.55, 0.65]
        assert nearest_above(levels, 0.7) == 0.65

    def test_levels_go_from_what_is_to_nearly_what_is_attainable(self):
        assert spread_levels(0.5, 0.7, 3) == (0.5, 0.59, 0.68)
        assert spread_levels(0.5, 0.5, 3) == (0.5,)  # nothing to gain

    def test_the_condition_is_in_per_cent(self):
        assert condition_text(NAMES[1:], (0.55, 0.5)) == "harmless 55 concise 50"

    def test_the_context_keeps_room_for_the_longest(self):
        assert len(method().longest_condition) >= len(condition_text(NAMES[1:], (0.99, 0.99)))


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"levels": 1}, "algorithm.levels=1: must be 2 or more"),
            ({"levels": {"harmless": [0.5]}}, "must be a number, or a list for each of harmless, concise"),
            ({"levels": {"harmless": [0.5], "concise": [1.5]}}, r"algorithm.levels.concise=\[1.5\]: must be a list"),
            ({"levels": {"harmless": [0.5], "concise": []}}, r"algorithm.levels.concise=\[\]: must be a list"),
            ({"levels": "many"}, "algorithm.levels=many"),
            ({"names": ("helpful",), "thresholds": ()}, "needs a secondary objective"),
            ({"delta": 2.0}, "algorithm.delta=2.0"),
        ],
    )
    def test_what_is_wrong_is_said(self, settings: dict[str, object], message: str):
        with pytest.raises(UserError, match=message):
            method(**settings)

    def test_levels_are_rounded_as_their_conditions_are(self):
        assert method(levels={"harmless": [0.551, 0.5, 0.5], "concise": [0.5]}).levels == {
            "harmless": [0.5, 0.55],
            "concise": [0.5],
        }


@pytest.mark.slow
class TestTraining:
    Run = Callable[..., Finished]

    def test_one_training_serves_every_threshold(self, run_here: Run, here: Path):
        levels = "algorithm.levels={harmless:[0.5,0.6]}"
        for b, condition, reused in ((0.5, "harmless 50", 0), (0.57, "harmless 60", 40)):
            run = f"run.dir=b{b}"
            done = run_here("train", *ARGUMENTS, levels, f"objectives.harmless.threshold={b}", run)
            assert done.status == 0, done.err
            summary = read_json(here / f"b{b}" / "summary.json")
            assert summary["condition"] == condition
            assert summary["objectives"]["harmless"]["threshold"] == b
            assert (summary["train"]["steps"], summary["train"]["reused_steps"]) == (40, reused)
            assert set(summary["duals"]) == {"harmless"}
        weights = [(here / f"b{b}" / "model" / "model.safetensors").read_bytes() for b in (0.5, 0.57)]
        assert weights[0] == weights[1]
        assert "point/harmless 60/dual/harmless" in read_metrics(here / "b0.5")[-1]

    def test_a_killed_run_goes_on_to_the_same_end(self, run_here: Run, here: Path):
        assert run_here("train", *ARGUMENTS, "cache=null", "run.dir=whole").status == 0
        arguments = ("train", *ARGUMENTS, "cache=null", "run.dir=killed")
        killed = stop_when(lambda: any((here / "killed").glob("checkpoints/step-*")), SIGKILL, *arguments, cwd=here)
        assert killed.status == -SIGKILL
        done = run_here(*arguments, "run.resume=true")
        assert done.status == 0, done.err
        assert results(here / "killed") == results(here / "whole")
