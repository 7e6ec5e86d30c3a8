"""Policies that are told what the user wants: texts of directions, what DPA and RiC choose, both end to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import TINY, Finished, read_json, read_metrics
from safetensors.torch import load_file

from mopo_cli.algorithms.conditioned.dpa import Dpa, best, drawn_directions
from mopo_cli.algorithms.conditioned.lessons import (
    Lesson,
    Lessons,
    ScoredData,
    fit_lessons,
    fit_scales,
    listed,
    split_steps,
    standardised,
)
from mopo_cli.algorithms.conditioned.ric import Ric, online_targets, outer_scores, outstanding
from mopo_cli.algorithms.contract import algorithm_of, build_algorithm
from mopo_cli.algorithms.rollouts import Request, Rollouts, Samples
from mopo_cli.base.console import stage
from mopo_cli.base.errors import UserError
from mopo_cli.base.processes import build_accelerator
from mopo_cli.config import compose
from mopo_cli.config.schema import TrainConfig
from mopo_cli.data.directions import MAPS, Directions, directions_of, parsed, shares, spelled
from mopo_cli.data.table import TokenRow
from mopo_cli.judging.scorers import Scale
from mopo_cli.runs.directory import RunDirectory
from mopo_cli.runs.tracking import Tracker
from mopo_cli.training.checkpoints import Setting, Work
from mopo_cli.training.inputs import prepare_inputs
from mopo_cli.training.reference import fit_reference

Run = Callable[..., Finished]
PAIR = ("helpful", "harmless")
PERCENT = Directions(PAIR, (0.0, 0.0), (100.0, 100.0), "l2", 0)


class TestShares:
    @pytest.mark.parametrize("map", MAPS)
    @pytest.mark.parametrize("size", [2, 3, 5])
    def test_all_maps_agree_at_the_corners(self, map: str, size: int):
        for k in range(size):
            corner = [float(j == k) for j in range(size)]
            assert shares(corner, map) == corner

    @pytest.mark.parametrize("size", [2, 3, 5])
    def test_linf_asks_for_everything_where_all_weigh_alike(self, size: int):
        assert shares([1 / size] * size, "linf") == pytest.approx([1.0] * size)

    def test_by_hand(self):
        assert shares([0.7, 0.3], "linear") == [0.7, 0.3]
        assert shares([0.8, 0.2], "linf") == [1.0, 0.4]
        assert shares([4 / 7, 3 / 7], "l2") == pytest.approx([0.8, 0.6])

    def test_l2_maximises_the_weighted_sum_in_the_unit_ball(self):
        weights = np.array([0.5, 0.3, 0.2])
        points = drawn_directions(2000, 3, 0)
        assert np.dot(weights, shares(weights.tolist(), "l2")) >= (points @ weights).max() - 1e-12


class TestDirections:
    def test_texts(self):
        assert PERCENT.condition({"helpful": 0.8, "harmless": 0.6}) == "helpful 80 harmless 60"
        assert PERCENT.condition({"helpful": 8, "harmless": 6}) == "helpful 80 harmless 60"
        assert PERCENT.condition({"harmless": 1}) == "helpful 0 harmless 100"
        assert PERCENT.condition(None) == PERCENT.condition({"helpful": 1, "harmless": 1}) == "helpful 71 harmless 71"
        assert Directions(PAIR, (-2.1, -1.0), (1.5, 3.0), "linear", 1).condition(None) == "helpful -0.3 harmless 1.0"

    def test_zero_has_no_sign(self):
        assert spelled(PAIR, [-0.04, 0.04], 1) == "helpful 0.0 harmless 0.0"

    @pytest.mark.parametrize(
        ("direction", "told"),
        [
            ({"kind": 1.0}, "direction={kind: 1.0}: kind is no objective; the set has helpful, harmless"),
            ({"helpful": -1.0}, "direction.helpful=-1.0: must be a number, 0 or more"),
            ({"helpful": math.inf}, "direction.helpful=inf: must be a number, 0 or more"),
            ({"helpful": 0.0, "harmless": 0.0}, "all are zero; at least one must be above 0"),
        ],
    )
    def test_mistakes(self, direction: dict[str, float], told: str):
        with pytest.raises(UserError) as caught:
            PERCENT.condition(direction)
        assert told in str(caught.value)

    def test_a_model_carries_them(self, tmp_path: Path):
        assert directions_of(tmp_path) is None
        PERCENT.save(tmp_path)
        assert directions_of(tmp_path) == PERCENT
        (tmp_path / "directions.json").write_text('{"other": 1}')
        with pytest.raises(UserError, match="not what a conditioned policy's training writes"):
            directions_of(tmp_path)

    @pytest.mark.parametrize(
        "text",
        [
            "helpful=0.8,concise=0.6",
            "{helpful: 0.8, concise: 0.6}",
            " helpful=0.8, concise=0.6 ",
            "'helpful=.8,concise=.6'",
        ],
    )
    def test_are_read_as_people_write_them(self, text: str):
        assert parsed(text) == {"helpful": 0.8, "concise": 0.6}

    @pytest.mark.parametrize(
        "text", ["", "helpful", "helpful=", "=1", "helpful=much", "helpful=1,,harmless=1", "a=1,a=2", "a=nan"]
    )
    def test_anything_else_is_a_mistake(self, text: str):
        with pytest.raises(UserError, match="expected a weight an objective"):
            parsed(text)


class TestBest:
    rewards = np.array([[0.0, 3.0], [2.0, -1.0], [1.5, 1.5]])

    def test_a_corner_takes_the_best_of_its_own_objective(self):
        assert best(self.rewards, np.array([1.0, 0.0])) == 1
        assert best(self.rewards, np.array([0.0, 1.0])) == 0
        assert best(self.rewards, np.array([0.8, 0.6])) == 2

    def test_length_of_the_direction_does_not_matter(self):
        for v in drawn_directions(50, 2, 1):
            assert best(self.rewards, v) == best(self.rewards, 7.0 * v)

    def test_of_one_is_that_one(self):
        assert best(self.rewards[:1], np.array([0.6, 0.8])) == 0

    def test_what_nobody_can_judge_is_never_taken(self):
        assert best(self.rewards, np.array([1.0, 0.0]), np.array([True, False, True])) == 2
        assert best(self.rewards, np.array([1.0, 0.0]), np.zeros(3, bool)) is None


class TestDrawnDirections:
    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_are_unit_vectors_without_negative_parts(self, size: int):
        vectors = drawn_directions(500, size, 3)
        assert vectors.shape == (500, size)
        assert (vectors >= 0).all()
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0)

    def test_meet_every_corner_and_are_the_seed_s(self):
        vectors = drawn_directions(500, 3, 3)
        for corner in np.eye(3):
            assert (vectors == corner).all(1).any()
        assert (vectors == drawn_directions(500, 3, 3)).all()
        assert (vectors != drawn_directions(500, 3, 4)).any()


class TestScores:
    def test_outer_scores_of_normal_draws_are_the_code_s_and_the_seed_s(self):
        scores = np.zeros((4, 3))
        low, high = outer_scores(scores, "normal", 5)
        assert ((low > -5.5) & (low < -3.7) & (high > 3.7) & (high < 5.5)).all()
        assert (outer_scores(scores, "normal", 5)[0] == low).all()
        assert (low * 10 == (low * 10).round()).all()

    def test_outer_scores_of_data_lie_inside_them(self):
        scores = np.stack([np.linspace(-3, 1, 1001), np.linspace(0, 50, 1001)], 1)
        low, high = outer_scores(scores, "data", 0)
        assert low.tolist() == [-3.0, 0.5]
        assert high.tolist() == [1.0, 9.9]  # no longer than a condition has room for

    def test_online_targets_ask_for_the_highest_of_all_but_one(self):
        low, high = np.array([-2.0, -1.0, 0.0]), np.array([2.0, 1.0, 3.0])
        targets = online_targets(300, low, high, 0)
        assert ((targets >= low) & (targets <= high)).all()
        assert ((targets == high).sum(1) == 2).all()
        assert set((targets != high).argmax(1)) == {0, 1, 2}

    def test_filter(self):
        scores = np.random.default_rng(0).normal(size=(400, 3))
        assert outstanding(scores, 0.0).all()
        kept = outstanding(scores, 0.7)
        assert (kept == (scores >= np.quantile(scores, 0.7, axis=0)).any(1)).all()
        assert 0.6 < kept.mean() < 0.7  # 1 - 0.7^3
        assert outstanding(scores[:, :1], 0.7).mean() == pytest.approx(0.3, abs=0.01)

    def test_scales_are_fitted_on_all_responses(self):
        values = [torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[5.0, 5.0]])]
        scales = fit_scales(values)
        z = np.concatenate([standardised(v, scales) for v in values])
        assert z[:, 0] == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])
        assert z[:, 1].tolist() == [0.0, 0.0, 0.0]  # all the same: nothing to divide by


@pytest.mark.parametrize(
    ("steps", "share", "rounds", "parts"),
    [(600, 0.4, 3, [240, 120, 120, 120]), (600, 0.4, 0, [600]), (20, 1.0, 2, [18, 1, 1]), (2, 0.5, 3, [1, 1, 1, 1])],
)
def test_steps_are_shared(steps: int, share: float, rounds: int, parts: list[int]):
    assert split_steps(steps, share, rounds) == parts


class TestSettings:
    @pytest.mark.parametrize("method", [Dpa, Ric])
    @pytest.mark.parametrize(
        ("wrong", "told"),
        [
            ({"rounds": -1}, "algorithm.rounds=-1: must be a whole number, 0 or more"),
            ({"prompts": 0}, "algorithm.prompts=0: must be a whole number, 1 or more"),
            ({"responses": 0}, "algorithm.responses=0: must be a whole number, 1 or more"),
            ({"first_share": 0.0}, "algorithm.first_share=0.0: must be in (0, 1]"),
            ({"direction": {"kind": 1}}, "algorithm.direction={kind: 1}: kind is no objective; the set has helpful"),
            ({"direction": {"helpful": 0}}, "algorithm.direction={helpful: 0}: all are zero"),
            ({"unscored": ("helpful",)}, "preference_model.form=general only compares two (helpful)"),
        ],
    )
    def test_mistakes(self, method: Any, wrong: dict[str, Any], told: str):
        with pytest.raises(UserError) as caught:
            method(PAIR, **wrong)
        assert told in str(caught.value)

    @pytest.mark.parametrize(
        ("wrong", "told"),
        [
            ({"map": "l1"}, "algorithm.map=l1: must be linear, l2 or linf"),
            ({"extremes": "all"}, "algorithm.extremes=all: must be data or normal"),
            ({"quantile": 1.0}, "algorithm.quantile=1.0: must be in [0, 1)"),
            ({"data_rows": -1}, "algorithm.data_rows=-1: must be a whole number, 0 or more"),
        ],
    )
    def test_mistakes_of_ric(self, wrong: dict[str, Any], told: str):
        with pytest.raises(UserError) as caught:
            Ric(PAIR, **wrong)
        assert told in str(caught.value)

    @pytest.mark.parametrize("method", [Dpa, Ric])
    def test_the_longest_condition_is_the_longest(self, method: Any):
        made = method(PAIR)
        for values in ([0.0, 1.0], [0.5, 0.5], [-9.9, 1.0], [-50.0, 50.0]):
            if method is Ric or min(values) >= 0:
                assert len(made.spell(np.array(values))) <= len(made.longest_condition)

    @pytest.mark.parametrize("name", ["dpa", "ric"])
    def test_values_are_needed_of_objectives_that_nobody_computes(self, name: str):
        general = ("preference_model.form=general", f"algorithm={name}")
        with pytest.raises(UserError, match=r"set preference_model\.form=bradley_terry"):
            build_algorithm(composed(*general), PAIR, (None,))
        computed = ("objectives={concise: {role: primary, computed: {_target_: mopo_cli.data.computed.concise}}}",)
        build_algorithm(composed(*general, "~objectives", f"+{computed[0]}"), ("concise",), ())


# --------------------------------------------------------------------------------------------- learning


def composed(*overrides: str) -> TrainConfig:
    typed: TrainConfig = compose.typed(
        compose.compose("train", [*TINY, "objectives=assistant_pair", *overrides]), TrainConfig
    )
    return typed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """An untrained policy on little data, without a judge."""
    config = composed("dataset.max_rows=100", "algorithm=ric", "cache=null")
    accelerator = build_accelerator()
    inputs = prepare_inputs(config, algorithm_of(config).longest_condition)
    run = RunDirectory(tmp_path_factory.mktemp("small"))
    run.config.touch()
    tracker = Tracker(run, config.logger, {}, "small", active=False)
    return Setting(config, accelerator, inputs, None, inputs.policy.snapshot(), run, tracker)  # type: ignore[arg-type]


@pytest.fixture
def setting(small: Setting) -> Setting:
    """`small` with the policy as it was."""
    small.inputs.policy.put(small.initial)
    return small


def learn(setting: Setting, lessons: Lessons, steps: int, batch_size: int) -> None:
    config = replace(setting.config, optimiser=setting.config.sft.optimiser, batch_size=batch_size)
    fit_lessons(replace(setting, config=config), lessons, Work(), title="test", steps=steps)


class TestLearning:
    def test_prompts_are_encoded_together_as_they_are_alone(self, setting: Setting):
        encoder, examples = setting.inputs.policy.encoder, setting.inputs.examples["train"][:3]
        asked = [(example, told) for example in examples for told in ("", "helpful 80 harmless 60")]
        alone = [encoder.conditioned(told).prompt_ids(e.prompt, e.responses[0]) for e, told in asked]
        assert encoder.conditioned_prompts(asked) == alone
        text = encoder.tokenizer.decode(alone[1])
        assert str(text).startswith("helpful 80 harmless 60\n")

    def test_without_conditions_it_is_plain_sft(self, setting: Setting):
        inputs, config = setting.inputs, setting.config
        rows = inputs.tokens["train"]
        learn(
            setting,
            Lessons(len(rows), lambda i: [Lesson(i, "", r) for r in rows[i].responses]),
            3,
            config.sft.batch_size,
        )
        ours = inputs.policy.snapshot()
        inputs.policy.put(setting.initial)
        with stage("test", 3) as shown:
            fit_reference(
                setting.accelerator,
                inputs.policy,
                rows,
                replace(config.sft, steps=3),
                config.seed,
                shown,
            )
        for name, value in inputs.policy.snapshot().items():
            assert torch.allclose(value, ours[name], atol=2e-5), name

    def test_the_policy_says_what_it_is_told(self, setting: Setting):
        inputs = setting.inputs
        examples = inputs.examples["train"]
        answers = {
            told: inputs.policy.encoder.response_ids(said) for told, said in (("helpful", "Sure!"), ("harmless", "No."))
        }
        learn(setting, listed([[Lesson(i, told, r) for told, r in answers.items()] for i in range(40)]), 80, 8)
        prompts = inputs.policy.encoder.conditioned_prompts([(examples[60], told) for told in answers])
        rows = [TokenRow(prompt, list(answers.values())) for prompt in prompts]
        helpful, harmless = inputs.policy.logps(rows)
        assert helpful[0] > helpful[1] + 1.0
        assert harmless[1] > harmless[0] + 1.0


def samples(condition: str, scores: list[list[float]], on_support: list[bool], ended: list[bool]) -> Samples:
    """Responses [10], [11], ... to row 3."""
    responses = [[10 + m] for m in range(len(scores))]
    row, numbers = TokenRow([1], responses), torch.tensor(scores)
    flags = torch.tensor(on_support), torch.tensor(ended)
    return Samples(3, condition, row, row, numbers, torch.zeros(len(scores)), *flags)


class TestWhatIsLearntOfSamples:
    """Only what ended, and lies on the data's support: of anything else a judge's value is a guess."""

    DATA = ScoredData([], [], [Scale(0.0, 1.0, "as they are", 1)] * 2, 0)
    # by the judge: the first is best but off the support, the second better but cut off
    SCORES = ([[9.0, 9.0], [8.0, 8.0], [1.0, 0.5], [0.2, 0.1]], [False, True, True, True], [True, False, True, True])

    def test_dpa(self):
        drawn, direction = samples("helpful 100", *self.SCORES), np.array([[1.0, 0.0]])
        items, told = Dpa(PAIR).lessons(self.DATA, [drawn], direction)
        assert items == {3: [Lesson(3, "helpful 100", [12])]}
        assert told["best above their mean"] == pytest.approx(1.0 - (9.0 + 8.0 + 1.0 + 0.2) / 4)
        nothing = samples("helpful 100", [[9.0, 9.0]], [False], [True])
        assert Dpa(PAIR).lessons(self.DATA, [nothing, drawn], np.repeat(direction, 2, 0))[0] == items

    def test_ric(self):
        items, told = Ric(PAIR, quantile=0.0).lessons(self.DATA, [samples("asked", *self.SCORES)], np.zeros((1, 2)))
        learnt = [Lesson(3, "helpful 1.0 harmless 0.5", [12]), Lesson(3, "helpful 0.2 harmless 0.1", [13])]
        assert items == {3: learnt}
        assert told == {"kept": 2.0}

    def test_the_support_is_where_the_reference_finds_a_response_likely(self, setting: Setting):
        setting.inputs.policy.put(setting.initial)
        rows, end = setting.inputs.tokens["train"][:2], setting.inputs.policy.tokenizer.eos_token_id
        plain = [TokenRow(row.prompt, [row.responses[0], [*row.responses[1][:-1], 7]]) for row in rows]
        assert all(row.responses[0][-1] == end for row in plain)
        logps = setting.inputs.policy.logps(plain)
        floor = float(torch.cat(logps).sort().values[2])
        rollouts = Rollouts(setting, Work(), floor)
        found = rollouts._samples(
            [Request(0), Request(1)], [row.prompt for row in rows], plain, [torch.zeros(2, 2)] * 2
        )
        for one, expected in zip(found, logps, strict=True):
            assert torch.allclose(one.reference_logps, expected)
            assert one.on_support.tolist() == [float(value) >= floor for value in expected]
            assert one.ended.tolist() == [True, False]
            assert one.usable.tolist() == [bool(one.on_support[0]), False]
        assert sum(one.on_support.sum().item() for one in found) == 2


# --------------------------------------------------------------------------------------------- end to end

ROUNDS = {
    "dpa": ("algorithm.rounds=2", "algorithm.prompts=20", "algorithm.directions=2", "algorithm.responses=3"),
    "ric": ("algorithm.rounds=2", "algorithm.prompts=60", "algorithm.data_rows=30"),
}
LATE = "debug.fail_at_step=38"  # of 40, in the second round


def trained(run: Run, name: str, where: Path, *overrides: str) -> Finished:
    return run(
        "train", *TINY, f"algorithm={name}", *ROUNDS[name], "objectives=assistant_pair", "checkpoint_every=3",
        "onpolicy.support=0", "sampling.max_new_tokens=60", f"run.dir={where}", *overrides,
    )  # fmt: skip


@pytest.mark.slow
class TestRuns:
    @pytest.mark.parametrize("name", ["dpa", "ric"])
    def test_a_run_that_was_cut_off_in_a_round_ends_where_it_would_have(self, name: str, run_here: Run, here: Path):
        whole, cut = here / "whole", here / "cut"
        done = trained(run_here, name, whole, "cache=null")
        assert done.status == 0, done.err
        assert trained(run_here, name, cut, "cache=null", LATE).status == 1
        rounds = sorted(path.name for path in (cut / "stages").iterdir())
        assert rounds == [f"{name}-round-1.json", f"{name}-round-2.json"]
        again = trained(run_here, name, cut, "cache=null", "run.resume=true")
        assert again.status == 0, again.err
        ours, theirs = (load_file(where / "model" / "model.safetensors") for where in (cut, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert [line["loss"] for line in read_metrics(cut)] == [line["loss"] for line in read_metrics(whole)]
        first, second = (read_json(where / "summary.json") for where in (whole, cut))
        assert first["train"]["steps"] == second["train"]["steps"] == 40
        assert first["train"]["samples"] == second["train"]["samples"] > 0
        assert first["objectives"] == second["objectives"]

    def test_one_training_serves_every_direction(self, run_here: Run, here: Path):
        first = here / "first"
        assert trained(run_here, "ric", first, "cache=cache").status == 0
        other = trained(run_here, "ric", here / "other", "cache=cache", "algorithm.direction={harmless: 1}")
        assert other.status == 0, other.err
        summaries = [read_json(here / run / "summary.json") for run in ("first", "other")]
        assert [s["train"]["reused_steps"] for s in summaries] == [0, 40]
        assert summaries[0]["condition"] != summaries[1]["condition"]
        assert directions_of(first / "model") == directions_of(here / "other" / "model")

        asked = ("prompt=How can I plant a tree?", "n=2", "compare=2", "sampling.max_new_tokens=8")
        plain = run_here("sample", f"run={first}", *asked)
        assert plain.status == 0, plain.err
        assert f"told: {summaries[0]['condition']}\n" in plain.out
        told = run_here("sample", f"run={first}", *asked, "direction=harmless=1,helpful=0")
        assert f"told: {summaries[1]['condition']}\n" in told.out
        assert plain.out.splitlines()[-1] != told.out.splitlines()[-1]

        folder = here / "folder"
        assert run_here("export", f"run={first}", f"to={folder}").status == 0
        card = (folder / "README.md").read_text()
        assert f"`{summaries[0]['condition']}`" in card
        assert f"| harmless=1 | `{summaries[1]['condition']}` |" in card
        shared = run_here("sample", f"run={folder}", *asked, "direction={harmless: 1}")
        assert shared.status == 0, shared.err
        assert f"told: {summaries[1]['condition']}\n" in shared.out
        assert f"told: {summaries[0]['condition']}\n" in run_here("sample", f"run={folder}", *asked).out

        for direction, message in (
            ("kind=1", "direction={kind: 1.0}: kind is no objective; the set has helpful, harmless"),
            ("helpful=0", "all are zero"),
            ("helpful=-1,harmless=1", "direction.helpful=-1.0: must be a number, 0 or more"),
            ("helpful", "expected a weight an objective"),
        ):
            done = run_here("sample", f"run={first}", "prompt=a", f"direction={direction}")
            assert done.status == 2
            assert message in done.err
            assert done.err.count("\n") == 1

        judged = run_here("eval", f"run=[{first},{here / 'other'}]", "evaluation.prompts=8", "evaluation.responses=1")
        assert judged.status == 0, judged.err


@pytest.mark.slow
def test_a_run_of_another_method_takes_no_direction(smoke: Path, run_here: Run):
    done = run_here("sample", f"run={smoke}", "prompt=a", "direction=helpful=1")
    assert done.status == 2
    assert "takes no direction; policies trained by algorithm=dpa, ric or mopo_conditioned do" in done.err
