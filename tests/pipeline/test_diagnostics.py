"""Each sign that a run is not what its user thinks, on made-up facts and on one real run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation
from running import SMALL, TINY, Finished, read_json, read_metrics

from mopo_cli.algorithms.contract import Aligned
from mopo_cli.base.types import Objective
from mopo_cli.config.schema import OnPolicyConfig, TrainConfig
from mopo_cli.evaluation.records import Exact, Measured
from mopo_cli.maths.significance import verdict
from mopo_cli.pipeline.diagnostics import warnings
from mopo_cli.pipeline.outcome import Outcome
from mopo_cli.training.checkpoints import Work

OBJECTIVES = (
    Objective("helpful", "primary", "helpful"),
    Objective("harmless", "secondary", "harmless", threshold=0.55),
    Objective("concise", "secondary", "concise"),
)
HEALTHY: dict[str, Any] = {
    "objectives": OBJECTIVES,
    "tau": 0.08,
    "beta": 0.9995,
    "t0": 100,
    "steps": 400,
    "batch_size": 32,
    "prompts": 128,
    "rows": {"train": 5000, "heldout": 1000, "test": 144},
    "oracle": None,
    "verdicts": {},
    "duals": [[0.5, 0.1], [0.6, 0.2]],
    "thresholds": [0.55, 0.51],
    "n_eff": [128.0, 256.0],
    "estimator": "onpolicy",
    "kl": 0.4,
    "entropy": [8.0, 7.0],
    "off_support": 0.02,
    "cut_off": 0.1,
    "attainable": [0.8, 0.7],
    "infeasible": (),
    "estimated": {"helpful": 0.7, "harmless": 0.56, "concise": 0.52},
    "evaluated": {"helpful": 0.71, "harmless": 0.55, "concise": 0.53},
    "noise": {"helpful": 0.01, "harmless": 0.01, "concise": 0.01},
    "heldout_accuracy": {"helpful": 0.7, "harmless": 0.65, "concise": math.nan},
}


def outcome(facts: dict[str, Any]) -> Outcome:
    names = [objective.name for objective in facts["objectives"]]
    measured = {}
    for objective, threshold in zip(facts["objectives"], [None, *facts["thresholds"]], strict=True):
        rate, noise = facts["evaluated"][objective.name], facts["noise"][objective.name]
        interval = (rate - noise, rate + noise)
        kept = None if threshold is None else rate >= threshold
        sure = facts["verdicts"].get(objective.name, verdict(interval, threshold))
        measured[objective.name] = Measured(objective.role, threshold, rate, interval, None, kept, "exact", sure)
    duals = [{f"dual/{name}": dual for name, dual in zip(names[1:], row, strict=True)} for row in facts["duals"]]
    return Outcome(
        config=TrainConfig(
            **{key: facts[key] for key in ("tau", "beta", "t0", "steps", "batch_size")},
            onpolicy=OnPolicyConfig(prompts=facts["prompts"]),
        ),
        objectives=facts["objectives"],
        aligned=Aligned(
            Work(),
            **{key: facts[key] for key in ("estimated", "infeasible", "estimator", "attainable", "entropy")},
            off_support=facts["off_support"],
        ),
        evaluation=replace(evaluation(measured, facts["kl"], facts["oracle"]), cut_off=facts["cut_off"]),
        heldout_accuracy=facts["heldout_accuracy"],
        history=[*duals, *({"n_eff": n} for n in facts["n_eff"])],
        rows=facts["rows"],
    )


def told(**changes: Any) -> list[str]:
    return warnings(outcome(HEALTHY | changes))


def only(**changes: Any) -> str:
    """The one warning that these facts give."""
    messages = told(**changes)
    assert len(messages) == 1, messages
    return messages[0]


class TestSigns:
    def test_a_policy_further_away_than_any_optimum(self):
        # s_lambda ranges over 1 + 0.6 + 0.2: at most 1.8 / (2 tau) nats
        assert "(at most 11.2)" in told(kl=11.3, t0=math.inf)[0]
        assert not [text for text in told(kl=11.2, t0=math.inf) if "KL" in text]
        assert not [text for text in told(kl=40.0, t0=100) if "KL" in text], "a lagged reference adds up"

    def test_a_healthy_run_shows_none(self):
        assert told() == []

    def test_a_policy_that_leaves_the_data_s_support(self):
        message = only(off_support=0.25)
        assert message.startswith("25% of the policy's samples")
        assert "sft.steps" in message
        assert "tau=0.08" in message

    def test_samples_that_do_not_end(self):
        message = only(cut_off=0.6)
        assert message.startswith("60% of the samples were cut off")
        assert "sampling.max_new_tokens" in message
        assert told(cut_off=0.5) == told(cut_off=None) == []
        assert len(told(cut_off=0.6, estimator=None)) == 1

    def test_a_multiplier_at_its_bound_is_infeasible_and_tells_what_is_attainable(self):
        text = only(infeasible=("harmless",), thresholds=[0.95, 0.51])
        assert text.startswith("infeasible: the multiplier of harmless grew to its bound while the lower bound of its")
        assert text.endswith("win rate stayed below 0.950; about 0.80 is attainable: lower this threshold")

    def test_a_threshold_that_is_attainable_alone_blames_the_others_or_the_training(self):
        assert "about 0.80 is attainable for it alone: lower another threshold" in only(infeasible=("harmless",))
        assert only(infeasible=("harmless",), attainable=()).endswith("lower this threshold or another one")

    def test_a_missed_threshold_beyond_the_noise(self):
        evaluated = {**HEALTHY["evaluated"], "harmless": 0.535}
        assert only(evaluated=evaluated) == "harmless: the win rate 0.535 ± 0.010 is below the threshold 0.550"
        assert told(evaluated=evaluated, noise={**HEALTHY["noise"], "harmless": 0.02}) == []

    @pytest.mark.parametrize("kl", [0.0, 5e-4, -5e-4])
    def test_a_policy_that_did_not_move_blames_tau_or_the_steps(self, kl: float):
        text = only(kl=kl, tau=50.0)
        assert text.startswith("the policy did not move (KL to the reference")
        assert "tau=50 is too large, or steps=400 too few" in text

    def test_a_collapse_names_the_threshold_that_pressed(self):
        text = only(entropy=[8.0, 5.0, 0.5], duals=[[1.0, 0.1], [9.0, 0.1]])
        assert text == "entropy collapse: 8.00 to 0.50 nats a response; the threshold of harmless is too aggressive"

    def test_a_collapse_without_pressure_blames_tau(self):
        assert only(entropy=[8.0, 0.5]).endswith("tau=0.08 is too small")

    @pytest.mark.parametrize(
        ("estimator", "advice"),
        [
            ("offline", "batch_size=128 or more would do"),
            ("heldout", "hold out 4 times the pairs (dataset.heldout_fraction), or use algorithm.estimator=onpolicy"),
            ("onpolicy", "onpolicy.prompts=512 or more would do"),
        ],
    )
    def test_few_effective_samples_name_the_size_that_would_do(self, estimator: str, advice: str):
        text = only(n_eff=[12.5, 12.5, 400.0], estimator=estimator)
        assert text.startswith(f"the {estimator} estimate of R_j rests on 12 effective samples")
        assert text.endswith(advice)

    @pytest.mark.parametrize(
        ("estimator", "advice"),
        [
            ("offline", "batch_size=128 or more would do, and there are 40 training rows: give more"),
            ("heldout", "4 times the held-out pairs would do, and the data are too few: give more, or use "
                        "algorithm.estimator=onpolicy"),
            ("onpolicy", "8 held-out rows or more would do, and there are 2: give more rows, or raise "
                         "dataset.heldout_fraction"),
        ],
    )  # fmt: skip
    def test_no_advice_that_the_data_cannot_follow(self, estimator: str, advice: str):
        text = only(
            n_eff=[12.5], estimator=estimator, rows={"train": 40, "heldout": 12 if estimator == "heldout" else 2}
        )
        assert text.endswith(advice)

    @pytest.mark.parametrize("unknown", [math.nan, None])
    def test_an_unknown_sample_size_says_nothing(self, unknown: float | None):
        assert told(n_eff=[unknown]) == []

    def test_a_reference_that_is_never_refreshed(self):
        first, second = told(t0=400)
        assert first == "t0=400 is not below steps=400: the reference is never refreshed"
        assert second.startswith("note: concise: no threshold and no refresh, so b stays at beta / 2 = 0.500")

    def test_never_on_purpose_is_a_note_for_objectives_on_the_schedule_only(self):
        assert only(t0=math.inf).startswith("note: concise: no threshold")
        assert told(t0=math.inf, objectives=(*OBJECTIVES[:2], replace(OBJECTIVES[2], threshold=0.5))) == []

    def test_a_bound_that_lags_its_win_rate(self):
        changes = {name: {**HEALTHY[name], "concise": 0.64} for name in ("estimated", "evaluated")}
        text = only(**changes, beta=0.8, thresholds=[0.55, 0.51])
        assert text.startswith("concise: b=0.510 does not follow the win rate 0.640: beta=0.8 is too small, or t0=100")

    def test_a_bound_that_the_schedule_lowered(self):
        changes = {name: {**HEALTHY[name], "concise": 0.4} for name in ("estimated", "evaluated")}
        text = only(**changes, thresholds=[0.55, 0.4])
        assert text.startswith("concise: the schedule lowered b from 0.500 to 0.400, as the win rate fell")
        assert "objectives.concise.threshold" in text

    def test_an_idle_multiplier_is_a_note(self):
        text = only(duals=[[0.5, 0.0], [0.6, 0.0005]])
        assert text == "note: lambda of concise was 0 throughout: this constraint does not bind here"

    def test_a_missed_threshold_with_an_idle_multiplier_does_not_fail_to_bind(self):
        evaluated = {**HEALTHY["evaluated"], "concise": 0.45}
        first, *others = told(duals=[[0.5, 0.0], [0.6, 0.0]], evaluated=evaluated)
        assert first == (
            "concise: the win rate 0.450 ± 0.010 is below the threshold 0.510; its multiplier stayed at 0 (the run's "
            "own estimate: 0.520), so nothing held it"
        )
        assert not any("bind" in text for text in others)

    def test_an_idle_multiplier_of_a_constraint_that_is_left_open(self):
        evaluated = {**HEALTHY["evaluated"], "concise": 0.515}
        text = only(duals=[[0.5, 0.0], [0.6, 0.0]], evaluated=evaluated)
        assert text == (
            "note: lambda of concise was 0 throughout: by the run's own estimate this constraint does not bind; the "
            "evaluation leaves it open"
        )

    def test_the_verdict_decides_what_is_missed_not_another_number(self):
        rates, free = HEALTHY["evaluated"], {"duality_gap": 0.0, "optimum_kl": 0.7, "optimum_duals": {}}
        exact = Exact(rates | {"harmless": 0.548}, {}, 1.0, 64, 64, rates, 0.0, 0.3, feasible=True, attainable={},
                      reference=rates, **free)  # fmt: skip
        assert only(oracle=exact, verdicts={"harmless": "no"}) == (
            "harmless: the exact win rate 0.548 is below the threshold 0.550"
        )
        low = {**rates, "harmless": 0.53}
        assert not [text for text in told(oracle=exact, evaluated=low, verdicts={"harmless": "yes"}) if "below" in text]

    def test_thresholds_that_no_policy_keeps_together(self):
        rates = HEALTHY["evaluated"]
        most = {"harmless": 0.8, "concise": 0.7}
        beyond = Exact(rates, {}, 1.0, 64, 64, None, None, 0.3, None, None, None, False, most, rates, shortfall=0.034)
        assert only(oracle=beyond) == (
            "no policy keeps these thresholds: harmless at least 0.550 and concise at least 0.510 are out of reach "
            "together: each alone is attainable (harmless 0.800 and concise 0.700); lowered by 0.034 each, all are"
        )

    def test_an_optimistic_estimate_gives_both_numbers(self):
        text = only(estimated={**HEALTHY["estimated"], "harmless": 0.61})
        assert text == "harmless: the run's own estimate 0.610 and the evaluation 0.550 disagree; trust the evaluation"
        wide = dict.fromkeys(HEALTHY["noise"], 0.07)
        assert told(estimated={**HEALTHY["estimated"], "harmless": 0.61}, noise=wide) == []

    def test_a_preference_model_that_cannot_tell(self):
        text = only(heldout_accuracy={**HEALTHY["heldout_accuracy"], "harmless": 0.51})
        assert text.startswith("harmless: the preference model orders held-out pairs right in 51% of cases")

    def test_a_run_that_ended_before_its_first_line(self):
        assert told(duals=[], n_eff=[], entropy=[]) == []
        assert only(duals=[], entropy=[8.0, 0.1]).endswith("tau=0.08 is too small")

    def test_one_objective_alone(self):
        alone = {"objectives": OBJECTIVES[:1], "duals": [[], []], "thresholds": [], "attainable": []}
        rates = {name: {"helpful": 0.7} for name in ("estimated", "evaluated", "noise", "heldout_accuracy")}
        assert told(**alone, **rates) == []

    def test_what_harms_comes_first(self):
        messages = told(duals=[[0.5, 0.0]], evaluated={**HEALTHY["evaluated"], "harmless": 0.3}, kl=0.0)
        assert [text.startswith("note") for text in messages] == [False, False, False, True]
        assert messages[0].startswith("harmless: the win rate 0.300")


@pytest.mark.slow
def test_an_infeasible_threshold_ends_the_run_and_keeps_its_model(run_here: Callable[..., Finished], here: Path):
    overrides = ("objectives.harmless.threshold=0.95", "steps=400", "onpolicy.every=2", "log_every=7")
    done = run_here("train", *TINY, *overrides, "evaluation.prompts=64", "run.dir=run")
    assert done.status == 0, done.err
    run = here / "run"
    status, summary = read_json(run / "status.json"), read_json(run / "summary.json")
    assert status["state"] == summary["state"] == "infeasible"
    assert status["step"] == summary["train"]["steps"] == read_metrics(run)[-1]["step"] < 400
    assert summary["duals"]["harmless"] == 20.0
    assert summary["objectives"]["harmless"]["satisfied"] is False
    attainable = summary["oracle"]["attainable"]["harmless"]
    assert summary["oracle"]["feasible"] is False
    for name in ("optimum", "gap", "optimum_kl", "optimum_duals", "duality_gap"):
        assert summary["oracle"][name] is None
    assert f"no optimum: harmless at least 0.950 is out of reach: at most {attainable:.3f} is attainable" in done.out
    page, card = (run / "report.html").read_text(), (run / "model" / "README.md").read_text()
    assert "harmless at least 0.950 (missed:" in card
    for text in (page, card):
        assert f"harmless at least 0.950 is out of reach: at most {attainable:.3f} is attainable" in text
    expected = "infeasible: the multiplier of harmless grew to its bound while the lower bound of its win rate stayed "
    expected += "below 0.950; "
    assert summary["warnings"][0].startswith(f"{expected}about {attainable:.2f} is attainable")
    assert f"warning: {expected}" in done.err
    assert "warning: objectives.harmless.threshold=0.95 looks out of reach" in done.err
    assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_training_on_thirty_rows_decides_nothing(run_here: Callable[..., Finished], here: Path):
    """Its one or two test prompts once gave an interval of no width, and a verdict with confidence."""
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no, not {i}, never"} for i in range(30)]
    (here / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("dataset=pairs", "dataset.path=few.jsonl", "dataset.chosen_means=human", "objectives=human_concise")
    small = (override for override in SMALL if not override.startswith("dataset."))
    done = run_here("train", *small, *data, "objectives.concise.threshold=0.6", "run.dir=run")
    assert done.status == 0, done.err
    summary = read_json(here / "run" / "summary.json")
    concise = summary["objectives"]["concise"]
    assert (concise["win_rate_ci95"], concise["satisfied_with_confidence"]) == ([None, None], "undecided")
    assert summary["evaluation"]["independent_prompts"] < 30
    assert "too few for an interval" in done.err
    again = run_here("eval", "run=run")
    assert again.status == 0, again.err
    later = read_json(here / "run" / "evaluation.json")["objectives"]["concise"]
    assert later["satisfied_with_confidence"] == "undecided"
