"""`mopo synthetic`: the method on tables reaches the exact optimum, by every way that should."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import Finished, mopo, read_json

from mopo_cli.base.errors import NotFiniteError
from mopo_cli.config import compose
from mopo_cli.config.schema import RecipeConfig, SyntheticConfig
from mopo_cli.planning.structures import Structure, read_structure
from mopo_cli.planning.tabular import (
    Problem,
    Recipe,
    StructureResult,
    exact_evidence,
    pose,
    run_problem,
    sampled_evidence,
)

DEFAULT = Recipe("exact", "regression", "lagrangian", "onpolicy")
SMALL = (
    "steps=10", "every=5", "pairs=200", "betas=[0.9]", "processes=1", "sizes=[2]",
    "recipes=[{extraction: regression, multipliers: lagrangian, estimator: heldout}]",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings() -> SyntheticConfig:
    return compose.typed(compose.compose("synthetic", []), SyntheticConfig)


def problem(settings: SyntheticConfig, name: str, objectives: int) -> Problem:
    return pose(read_structure(name, settings.structures[name]).first(objectives), settings.tau, None)


def run(settings: SyntheticConfig, name: str, objectives: int, **parts: str) -> StructureResult:
    recipe = replace(DEFAULT, **parts)
    only = RecipeConfig(recipe.extraction, recipe.multipliers, recipe.estimator)
    (found,) = run_problem(
        replace(settings, recipes=[only], betas=[]), problem(settings, name, objectives), recipe.preferences
    )
    return found


def test_numbers_that_are_not_finite_end_it(settings: SyntheticConfig):
    with pytest.raises(
        NotFiniteError, match=r"not finite in 10 steps in a row, .*; lower learning_rate \(now 1e\+308\)"
    ):
        run(replace(settings, learning_rate=1e308), "inconsistent", 2)


class TestEvidence:
    def test_the_list_that_stands_for_mu_gives_its_win_rates(self, settings):
        structure = problem(settings, "inconsistent", 3).structure
        sheet = exact_evidence(structure).train
        n = sheet.actions.shape[1]
        against_all = ((n - 1) * sheet.win_rates[0].numpy() + 0.5) / n
        np.testing.assert_allclose(against_all, structure.win_rates[sheet.actions[0].numpy()], atol=1e-12)

    def test_sampled_pairs_tell_the_win_rates_as_their_number_grows(self, settings):
        structure = problem(settings, "inconsistent", 3).structure
        errors = [
            np.abs(sampled_evidence(structure, pairs, 0).judged.numpy() - structure.win_rates).max()
            for pairs in (500, 200_000)
        ]
        assert errors[1] < 0.01 < errors[0]

    def test_a_fifth_of_the_pairs_is_held_out(self):
        structure = Structure("coin", np.array([[[0.5, 1.0], [0.0, 0.5]]] * 2), np.ones(2))
        found = sampled_evidence(structure, 1000, 1)
        assert len(found.train.actions) == 800
        assert len(found.heldout.actions) == 200
        wins = found.heldout.win_rates[..., 0].numpy()
        better = found.heldout.actions.numpy() == 0  # the first action always wins
        np.testing.assert_array_equal(wins[better[:, 0] != better[:, 1]], better[better[:, 0] != better[:, 1]])


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("name", ["total_order", "partial_order", "antichain", "incomparable", "inconsistent"])
def test_exact_preferences_lead_to_the_optimum(settings, name, objectives):
    found = run(settings, name, objectives)
    assert len(found.reached) == 9
    assert found.distance_to_optimum <= 0.005
    assert found.violation <= 0.005


@pytest.mark.parametrize("name", ["antichain", "incomparable"])
def test_sampled_pairs_lead_close_to_it(settings, name):
    found = run(settings, name, 2, preferences="sampled")
    assert found.distance_to_optimum <= 0.02
    assert found.violation <= 0.02


def test_cloning_agrees_with_regression_where_preferences_are_exact(settings):
    ours, cloned = run(settings, "inconsistent", 2), run(settings, "inconsistent", 2, extraction="bc")
    np.testing.assert_allclose(ours.reached, cloned.reached, atol=0.006)


def test_the_barrier_tends_to_the_lagrangian(settings):
    wide, narrow = (
        run(replace(settings, sigma=sigma), "antichain", 2, multipliers="barrier") for sigma in (0.02, 0.0005)
    )
    assert narrow.distance_to_optimum < 0.02 < wide.distance_to_optimum


def test_the_schedule_holds_what_was_reached(settings):
    chosen = replace(settings, recipes=settings.recipes[:1], betas=[0.9, 1.0])
    _, found = run_problem(chosen, problem(settings, "antichain", 2), "exact")
    assert found.beta == [0.9, 1.0]
    assert math.isnan(found.violation)
    loose, tight = np.array(found.reached)
    assert tight[1] > loose[1]  # the secondary is given up more slowly
    assert tight[0] < loose[0]


class TestCommand:
    def test_records_and_figures(self, tmp_path: Path):
        done = mopo("synthetic", *SMALL, "run.dir=out", cwd=tmp_path)
        assert done.status == 0, done.err
        records = read_json(tmp_path / "out" / "synthetic.json")
        wanted = {
            "structure", "K", "method", "extraction", "estimator", "distance_to_front", "distance_to_optimum",
            "violation", "hypervolume_ratio", "seconds",
        }  # fmt: skip
        assert all(wanted <= set(record) for record in records)
        assert len(records) == 5 * (2 + 1)  # structures; exact, sampled, and one on the schedule
        assert sorted(p.name for p in (tmp_path / "out" / "figures").iterdir()) == [
            "antichain.png", "incomparable.png", "inconsistent.png", "partial_order.png", "total_order.png",
        ]  # fmt: skip
        assert "hypervolume" in done.out

    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            (["thresholds=[0.9]"], "thresholds: 0.9 is out of reach in total_order with K = 2: at most 0.780"),
            (["structures.antichain.preferences=[[[0.5,0.9],[0.2,0.5]],[[0.5,0.5],[0.5,0.5]]]"], "must be 1"),
            (["sizes=[4]"], "structures.total_order has 3 matrices"),
            (["sizes=[1]"], "2 objectives or more"),
            (["tau=0"], "tau=0"),
            (["recipes=[{extraction: dpo}]"], "recipes: extraction=dpo: must be regression or bc"),
            (["preferences=[guessed]"], "preferences"),
            (["betas=[1.5]"], "betas"),
        ],
    )
    def test_bad_input(self, here: Path, run_here: Callable[..., Finished], overrides: list[str], said: str):
        done = run_here("synthetic", *SMALL, "run.dir=out", *overrides)
        assert done.status == 2
        assert said in done.err
        assert "Traceback" not in done.err
        assert not (here / "out").exists()
