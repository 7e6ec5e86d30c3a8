"""`mopo plan`: predictions against exact answers, errors against a bootstrap, and what a user sees."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import TINY, Finished, read_json

from mopo_cli.commands.plan import advice, objective_table
from mopo_cli.data.assistant import SCORED, World, assistant
from mopo_cli.maths import oracle
from mopo_cli.planning.attainable import (
    ObjectivePlan,
    Plan,
    SettingsPlan,
    _verdicts,
    label_errors,
    optimum,
    pair_front,
    suggestions,
)
from mopo_cli.planning.evidence import Evidence, LabelledRows, ResponsePool

Run = Callable[..., Finished]
TAU = 0.08
NAMES = ("helpful", "harmless", "concise")


@pytest.fixture(scope="module")
def truth() -> ResponsePool:
    """Every response of the embedded world for 60 prompts."""
    corpus = assistant()
    world = corpus.world
    assert isinstance(world, World)
    prompts = [str(example.prompt) for example in corpus.test or ()][:60]
    columns = [world.objectives.index(name) for name in SCORED]
    win_rates = np.stack([world.win_rates(prompt)[:, columns] for prompt in prompts])
    return ResponsePool(win_rates, np.log(np.stack([world.mu(prompt) for prompt in prompts])))


def drawn(truth: ResponsePool, samples: int, seed: int) -> ResponsePool:
    """A pool of samples of mu with their true win rates: what a perfect preference model would give."""
    rng = np.random.default_rng(seed)
    mu = np.exp(truth.log_reference)
    chosen = np.stack([rng.choice(len(p), size=samples, p=p / p.sum()) for p in mu])
    win_rates = np.take_along_axis(truth.win_rates, chosen[:, :, None], axis=1)
    return ResponsePool(win_rates, np.full(chosen.shape, -math.log(samples)))


def silent(objectives: int = 3) -> LabelledRows:
    """Labels that agree with the model to the last bit."""
    rng = np.random.default_rng(0)
    return LabelledRows(rng.random((50, 4, objectives)), np.zeros((50, 4, objectives)), 300)


class TestFronts:
    def test_a_pool_that_is_the_truth_has_no_error(self, truth):
        front = pair_front(Evidence(NAMES, TAU, truth, silent(), truth).pair(0, 1), 9)
        assert front.distance is not None
        assert front.distance < 0.004  # the resolution of the traced curve
        for point in front.points:
            assert point.exact == pytest.approx(point.win_rate, abs=1e-8)

    @pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2), (1, 2)])
    def test_samples_come_close(self, truth, first, second):
        front = pair_front(Evidence(NAMES, TAU, drawn(truth, 64, 0), silent(), truth).pair(first, second), 9)
        assert front.distance is not None
        assert front.distance < 0.03

    def test_from_where_it_binds_to_where_it_is_steep(self, truth):
        front = pair_front(Evidence(NAMES, TAU, truth, silent()).pair(0, 1), 9)
        unconstrained = oracle.solve(truth.win_rates, truth.log_reference, TAU, np.full(2, -np.inf))
        assert front.free == pytest.approx(unconstrained.win_rates[1], abs=1e-9)
        assert front.points[0].dual == pytest.approx(0.0, abs=1e-6)
        assert front.points[-1].dual == pytest.approx(5.0, abs=1e-4)
        assert all(np.diff([p.win_rate for p in front.points]) < 0), "more of one is less of the other"
        assert front.points[-1].threshold < front.attainable

    def test_suggestions_stand_at_round_thresholds(self, truth):
        lines = suggestions(Evidence(NAMES, TAU, truth, silent(), truth))
        assert {line.secondary for line in lines} == {"harmless", "concise"}
        for line in lines:
            assert round(line.at_least / 0.05) * 0.05 == pytest.approx(line.at_least)
            assert line.override == f"objectives.{line.secondary}.threshold={line.at_least:.2f}"
            assert line.primary == pytest.approx(line.exact, abs=1e-8)


class TestErrors:
    def test_of_prompts_agree_with_a_bootstrap(self, truth):
        pool, b = drawn(truth, 64, 1), np.array([0.55])
        pool = ResponsePool(pool.win_rates[:, :, :2], pool.log_reference)
        found = optimum(Evidence(NAMES[:2], TAU, pool), b)
        rng = np.random.default_rng(0)
        values = []
        for _ in range(300):
            rows = rng.integers(len(pool.win_rates), size=len(pool.win_rates))
            values.append(oracle.solve(pool.win_rates[rows], pool.log_reference[rows], TAU, b).win_rates[0])
        assert found.primary_error == pytest.approx(np.std(values), rel=0.2)

    def test_of_labels_agree_with_their_spread_over_draws(self):
        # the residual's weighted mean, over fresh labels of the same rows
        rng = np.random.default_rng(0)
        win_rates = rng.random((400, 2, 2))
        p = rng.random((400, 2))
        means, predicted = [], []
        for _ in range(300):
            labels = (rng.random((400, 2)) < p).astype(float)
            residuals = np.stack([labels - p, -(labels - p)], axis=1)
            rows = LabelledRows(win_rates, residuals, 400)
            errors, _ = label_errors(rows, TAU, np.array([0.5]))
            weights = np.exp(win_rates @ np.array([1.0, 0.5]) / TAU)
            weights /= weights.sum(axis=1, keepdims=True)
            means.append((weights[:, :, None] * residuals).sum(axis=(0, 1)) / len(rows.win_rates))
            predicted.append(errors)
        np.testing.assert_allclose(np.mean(predicted, axis=0), np.std(means, axis=0), rtol=0.1)

    def test_missing_labels_and_short_rows_count_for_nothing(self):
        rng = np.random.default_rng(0)
        win_rates, residuals = rng.random((30, 3, 2)), rng.normal(size=(30, 3, 2))
        residuals[:10, 2] = np.nan
        win_rates[:10, 2] = np.nan
        padded = LabelledRows(win_rates, residuals, 90)
        wider = LabelledRows(
            np.concatenate([win_rates, np.full((30, 1, 2), np.nan)], axis=1),
            np.concatenate([residuals, np.full((30, 1, 2), np.nan)], axis=1),
            90,
        )
        np.testing.assert_allclose(label_errors(padded, TAU, np.ones(1))[0], label_errors(wider, TAU, np.ones(1))[0])


def planned_objectives(**changes: dict[str, Any]) -> dict[str, ObjectivePlan]:
    primary = ObjectivePlan("primary", None, False, 0.5, 0.6, 0.01, 0.8, None, "", 100, 200, 0.01)
    bound = ObjectivePlan("secondary", 0.5, False, 0.4, 0.5, 0.01, 0.7, 0.3, "binds", 100, 67, 0.01)
    objectives = {"helpful": primary, "harmless": bound, "concise": bound}
    return {name: replace(plan, **changes.get(name, {})) for name, plan in objectives.items()}


def plan_of(objectives: dict[str, ObjectivePlan], feasible: bool = True, **settings: float) -> Plan:
    chosen = SettingsPlan(**{"epsilon": 0.01, "n_eff": 2.0, "kl": 0.5, "beta": 0.99, "t0": math.inf, "refreshes": 0,
                             "steps": 600, **settings})  # type: ignore[arg-type]  # fmt: skip
    return Plan(objectives, feasible, 0.034, [], [], chosen, 300, 2, {}, TAU, 12, 8, 0, 1.0)


NO_OPTIMUM: dict[str, Any] = {
    "win_rate": None,
    "ci95": None,
    "dual": None,
    "pairs_needed": None,
    "prompts_needed": None,
}


class TestAdvice:
    def test_thresholds_of_the_user_s_own(self):
        assert "t0          inf: every threshold is your own" in "\n".join(advice(plan_of(planned_objectives())))

    def test_a_schedule_that_never_refreshes_is_not_called_the_user_s_own(self):
        lines = "\n".join(advice(plan_of(planned_objectives(concise={"scheduled": True}), t0=700.0)))
        assert "every threshold is your own" not in lines
        assert "* where the schedule starts, and stays" in lines
        assert "t0=700 steps, and steps=600; for another, set objectives.concise.threshold" in lines

    def test_a_schedule_with_refreshes(self):
        lines = "\n".join(advice(plan_of(planned_objectives(concise={"scheduled": True}), t0=200.0, refreshes=2)))
        assert "* on the schedule; beta=0.99 t0=200" in lines

    def test_what_samples_need_stands_beside_what_there_is(self):
        assert "harmless 67, concise 67; held out are 2" in "\n".join(advice(plan_of(planned_objectives())))

    def test_a_threshold_out_of_reach_has_no_optimum_and_says_what_is_attainable(self):
        beyond = {"threshold": 0.99, "verdict": "infeasible", **NO_OPTIMUM}
        other = {"verdict": "attainable", **NO_OPTIMUM}
        plan = plan_of(planned_objectives(helpful=NO_OPTIMUM, harmless=beyond, concise=other), feasible=False)
        first, second, *rest = advice(plan)
        assert first == "harmless: 0.990 is out of reach; at most 0.700 is attainable, alone"
        assert second == "so there is no optimum to predict: lower a threshold"
        assert not any("optimum" in text or "attainable alone" in text for text in rest if "t0" not in text)
        columns = {column.header: list(column.cells) for column in objective_table(plan).columns}
        assert columns["predicted"] == ["", "", ""]
        assert columns["price λ"] == ["", "", ""]

    def test_thresholds_out_of_reach_together(self):
        together = {"verdict": "infeasible together", **NO_OPTIMUM}
        plan = plan_of(planned_objectives(helpful=NO_OPTIMUM, harmless=together, concise=together), feasible=False)
        assert advice(plan)[0] == (
            "harmless at least 0.500 and concise at least 0.500 are out of reach together: each alone is attainable "
            "(harmless 0.700 and concise 0.700); lowered by 0.034 each, all are"
        )

    def test_verdicts_do_not_call_attainable_what_is_not(self, truth):
        evidence = Evidence(NAMES, TAU, truth, silent(), truth)
        most = oracle.attainable(truth.win_rates, truth.log_reference)[1:]
        for thresholds, verdicts in (
            ([most[0] + 0.01, 0.3], ["infeasible", "attainable"]),
            ([most[0] - 0.01, most[1] - 0.01], ["infeasible together"] * 2),
            ([0.2, 0.2], ["never binds"] * 2),
        ):
            b = np.array(thresholds)
            assert _verdicts(evidence, optimum(evidence, b), b) == verdicts

    def test_a_threshold_at_a_constant_win_rate_is_no_contradiction(self):
        flat = ResponsePool(np.array([[[0.9, 0.5], [0.1, 0.5]]]), np.log([[0.5, 0.5]]))
        evidence = Evidence(NAMES[:2], TAU, flat)
        assert _verdicts(evidence, optimum(evidence, [0.5]), np.array([0.5])) == ["never binds"]


SMALL = ("plan.prompts=12", "plan.responses=8", "plan.thresholds=3")


@pytest.mark.slow
class TestCommand:
    @pytest.fixture(scope="class")
    def planned(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
        from running import mopo

        here = tmp_path_factory.mktemp("plan")
        done = mopo("plan", *TINY, *SMALL, "run.dir=plan", cwd=here)
        assert done.status == 0, done.err
        return here, done

    def test_plan_json(self, planned: tuple[Path, Finished]):
        here, _ = planned
        plan = read_json(here / "plan" / "plan.json")
        assert set(plan["objectives"]) == set(NAMES)
        asked = plan["objectives"]["harmless"]
        assert asked["threshold"] == 0.55
        assert asked["verdict"] in ("binds", "never binds", "infeasible", "infeasible together")
        assert asked["exact"] is not None
        assert [(p["primary"], p["secondary"]) for p in plan["pairs"]] == [
            ("helpful", "harmless"), ("helpful", "concise"), ("harmless", "concise"),
        ]  # fmt: skip
        assert all(len(pair["points"]) == 3 for pair in plan["pairs"])
        assert plan["settings"]["epsilon"] > 0
        json.dumps(plan, allow_nan=False)

    def test_tables_and_a_figure(self, planned: tuple[Path, Finished]):
        here, done = planned
        assert (here / "plan" / "figures" / "plan.png").stat().st_size > 10_000
        for text in ("attainable", "price λ", "verdict", "objectives.harmless.threshold=", "from the exact front"):
            assert text in done.out
        assert not (here / "plan" / "summary.json").exists()

    @pytest.mark.thorough
    def test_what_it_fitted_is_there_for_the_training(self, planned: tuple[Path, Finished]):
        from running import mopo

        here, _ = planned
        done = mopo("train", *TINY, "run.dir=trained", cwd=here)
        assert done.status == 0, done.err
        assert "reference (SFT): from outputs/cache/" in done.out
        assert "preference model: from outputs/cache/" in done.out
        alone = mopo("train", *TINY, "run.dir=alone", "cache=null", cwd=here)
        assert "from outputs/cache" not in alone.out
        both = [read_json(here / name / "summary.json") for name in ("trained", "alone")]
        assert both[0]["oracle"] == both[1]["oracle"], "a cached stage is the same stage"
        assert (here / "trained" / "reference" / "model.safetensors").exists()

    def test_another_seed_or_label_is_another_fit(self, planned: tuple[Path, Finished]):
        from running import mopo

        here, _ = planned
        fitted = ("reference-*", "preference_model-*")
        kept = [len(list((here / "outputs" / "cache").glob(kind))) for kind in fitted]
        assert kept == [1, 1]
        done = mopo("plan", *TINY, *SMALL, "preference_model.steps=6", "run.dir=second", cwd=here)
        assert "reference (SFT): from" in done.out
        now = [len(list((here / "outputs" / "cache").glob(kind))) for kind in fitted]
        assert now == [1, 2], "the preference model alone was fitted anew"

    def test_an_infeasible_threshold_is_named_with_what_is_attainable(self, planned: tuple[Path, Finished]):
        from running import mopo

        here, _ = planned
        done = mopo("plan", *TINY, *SMALL, "objectives.harmless.threshold=0.99", "run.dir=third", cwd=here)
        assert done.status == 0, "to say so is what a plan is for"
        assert "harmless: 0.990 is out of reach; at most 0." in done.out


class TestBadInput:
    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            (["plan.prompts=0"], "plan.prompts=0: must be 1 or more"),
            (["plan.promts=3"], "plan.promts: no such key (did you mean plan.prompts?)"),
            (["tau=0"], "tau=0"),
            (["dataset.max_rows=40", "dataset.heldout_fraction=0.1"], "a plan needs at least 10"),
        ],
    )
    def test_is_told(self, run_here: Run, here: Path, overrides: list[str], said: str):
        done = run_here("plan", *TINY, *overrides)
        assert done.status == 2
        assert said in done.err
        assert not (here / "outputs").exists()
