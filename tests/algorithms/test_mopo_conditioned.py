"""MOPO with its thresholds in the prompt: the grid, the conditions, and one training for all thresholds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL

import pytest
from running import TINY, Finished, read_json, read_metrics, results, stop_when

from mopo_cli.algorithms.mopo.conditioned import MopoConditioned, grid_of, spread_levels
from mopo_cli.base.errors import UserError
from mopo_cli.data.directions import Levels, directions_of

NAMES = ("helpful", "harmless", "concise")
ARGUMENTS = (*TINY, "algorithm=mopo_conditioned", "objectives=assistant_pair")


def method(**settings: object) -> MopoConditioned:
    arguments = {"names": NAMES, "thresholds": (0.55, None), "tau": 0.1, "epsilon": "auto", **settings}
    return MopoConditioned(**arguments)  # type: ignore[arg-type]


class TestGrid:
    def test_every_combination(self):
        assert grid_of([(0.4, 0.5), (0.6,)]) == [(0.4, 0.6), (0.5, 0.6)]

    def test_a_threshold_between_two_levels_is_kept_by_the_higher(self):
        levels = Levels(("harmless",), ((0.45, 0.55, 0.65),))
        asked = (0.3, 0.45, 0.451, 0.55, 0.6, 0.7)
        assert [levels.point({"harmless": b})[0] for b in asked] == [0.45, 0.45, 0.55, 0.55, 0.65, 0.65]

    def test_levels_go_from_what_is_to_nearly_what_is_attainable(self):
        assert spread_levels(0.5, 0.7, 3) == (0.5, 0.59, 0.68)
        assert spread_levels(0.5, 0.5, 3) == (0.5,)  # nothing to gain

    def test_the_condition_is_in_per_cent(self, tmp_path: Path):
        levels = Levels(NAMES[1:], ((0.45, 0.55), (0.5,)))
        assert levels.condition({"harmless": 0.5}) == "harmless 55 concise 50"
        assert levels.condition(None) == "harmless 45 concise 50"
        levels.save(tmp_path)
        assert directions_of(tmp_path) == levels

    @pytest.mark.parametrize(
        ("direction", "message"),
        [
            ({"helpful": 0.5}, "direction: helpful has no threshold; this policy is told those of harmless, concise"),
            ({"harmless": 55.0}, "direction: harmless=55: must be a threshold, a win rate"),
            ({"harmless": 0.6}, "direction: harmless=0.6: the policy was trained for at most 0.55"),
        ],
    )
    def test_what_it_cannot_be_told_is_said(self, direction: dict[str, float], message: str):
        with pytest.raises(UserError, match=message):
            Levels(NAMES[1:], ((0.45, 0.55), (0.5,))).condition(direction)

    def test_the_context_keeps_room_for_the_longest(self):
        assert len(method().longest_condition) >= len("harmless 99 concise 99")


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"levels": 1}, "algorithm.levels=1: must be 2 or more"),
            ({"levels": {"harmless": [0.5]}}, "must be a number, a list for each of harmless, concise, or null"),
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
        told = run_here("sample", "run=b0.5", "prompt=How do I bake a cake?", "direction=harmless=0.55", "compare=0")
        assert (told.status, "told: harmless 60" in told.out) == (0, True), told.err
        assert "point/harmless 60/dual/harmless" in read_metrics(here / "b0.5")[-1]

    def test_more_thresholds_than_prompts_to_measure_them_on(self, run_here: Run, here: Path):
        done = run_here("train", *ARGUMENTS, "onpolicy.prompts=16", "algorithm.levels=5", "run.dir=run")
        assert done.status == 2
        assert "algorithm.levels: a grid of 5 thresholds" in done.err

    @pytest.mark.thorough
    def test_a_killed_run_goes_on_to_the_same_end(self, run_here: Run, here: Path):
        assert run_here("train", *ARGUMENTS, "cache=null", "run.dir=whole").status == 0
        arguments = ("train", *ARGUMENTS, "cache=null", "run.dir=killed")
        killed = stop_when(lambda: any((here / "killed").glob("checkpoints/step-*")), SIGKILL, *arguments, cwd=here)
        assert killed.status == -SIGKILL
        done = run_here(*arguments, "run.resume=true")
        assert done.status == 0, done.err
        assert results(here / "killed") == results(here / "whole")
