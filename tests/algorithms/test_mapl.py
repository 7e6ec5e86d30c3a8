"""MAPL: its losses' identities, that it is DPO without augmentation, and runs that were killed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pytest
import torch
from running import TINY, Finished, read_json, read_metrics, results, stop_when
from safetensors.torch import load_file
from test_logprobs import ARCHITECTURES, PACKED, build, by_hand, some_rows
from torch import Tensor

from mopo_cli.algorithms.pairwise.comparisons import (
    ToldTask,
    condition_loss,
    index_of,
    model_margins,
    policy_margins,
    preference_margins,
    reward_margins,
)
from mopo_cli.algorithms.pairwise.instructions import Told, inter_margins, inter_responses, intra_sample
from mopo_cli.algorithms.pairwise.mapl import Mapl
from mopo_cli.base.errors import UserError
from mopo_cli.config.compose import compose, typed
from mopo_cli.config.schema import TrainConfig
from mopo_cli.data.table import TokenRow
from mopo_cli.models.logprobs import all_logps
from mopo_cli.models.preference import PreferenceModel, build_preference_model
from mopo_cli.pipeline import train
from mopo_cli.training.loop import Task, joined

Run = Callable[..., Finished]
FOLLOWED = np.array([[2, 1, 0], [1, 0, 2]])  # by two conditions and three responses, of two instructions
PAIRS = ((0, 1), (0, 2), (1, 2))
BOTH = {"intra": 1.0, "inter": 1.0}


def told_rows() -> list[Told]:
    """Two prompts, each behind two conditions."""
    (a, b, *_), (c, *_) = some_rows(0), some_rows(1)
    rows = [(a, TokenRow(c.prompt + a.prompt, a.responses)), (TokenRow([9, 8, *b.prompt], b.responses), b)]
    return [
        Told(rows[0], intra_sample(FOLLOWED, 2), inter_margins(FOLLOWED, PAIRS)),
        Told(rows[1], intra_sample(FOLLOWED[:, 1:], 2), inter_margins(FOLLOWED[:, 1:], ((0, 1),))),
    ]


class TestLosses:
    def test_by_hand(self):
        rewards = torch.tensor([[1.0, 2.0, 0.5], [0.0, 3.0, 0.25]])
        intra = reward_margins(rewards, index_of([intra_sample(FOLLOWED, 2)]))
        torch.testing.assert_close(intra, torch.tensor([1.0, -1.0, -0.25]))
        inter = reward_margins(rewards, index_of([inter_margins(FOLLOWED, PAIRS)]))
        first = [1.0 - 2.0, 1.0 - 0.5, 2.0 - 0.5]
        second = [0.0 - 3.0, 0.0 - 0.25, 3.0 - 0.25]
        favour = [(2 - 1) - (1 - 0), (2 - 0) - (1 - 2), (1 - 0) - (0 - 2)]
        expected = [np.sign(f) * (a - b) for f, a, b in zip(favour, first, second, strict=True) if f]
        assert inter.tolist() == pytest.approx(expected)
        assert condition_loss(inter).tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in expected])

    def test_rows_of_several_prompts(self):
        rewards = torch.arange(12.0).view(4, 3)
        index = index_of([[(((0, 1), (1, 2)),)], [(((1, 0), (0, 1)),)]])
        torch.testing.assert_close(reward_margins(rewards, index), torch.tensor([1.0 - 5.0, 9.0 - 7.0]))
        assert len(reward_margins(rewards, index_of([[], []]))) == 0

    def test_intra_is_log_2_where_the_prompts_are_the_same(self):
        rewards = torch.randn(1, 3).expand(2, 3)
        found = condition_loss(reward_margins(rewards, index_of([intra_sample(FOLLOWED, 2)])))
        torch.testing.assert_close(found, torch.full((3,), math.log(2.0)))

    def test_inter_is_log_2_where_rewards_do_not_depend_on_the_prompt(self):
        rewards = torch.randn(1, 3).expand(2, 3)
        found = condition_loss(reward_margins(rewards, index_of([inter_margins(FOLLOWED, PAIRS)])))
        torch.testing.assert_close(found, torch.full((2,), math.log(2.0)))

    def test_what_depends_on_the_prompt_alone_is_in_no_margin(self):
        """DPO's r is known up to a function of the prompt; the other two kinds of comparison see it."""
        rewards, shift = torch.randn(2, 3), torch.tensor([[4.0], [-1.0]])
        for rule, unmoved in ((inter_margins, True), (inter_responses, False)):
            index = index_of([rule(FOLLOWED, PAIRS)])
            before, after = (reward_margins(r, index) for r in (rewards, rewards + shift))
            assert torch.allclose(before, after, atol=1e-5) is unmoved

    @pytest.mark.parametrize("form", ["bradley_terry", "general"])
    def test_of_a_preference_model(self, form: str):
        model = PreferenceModel(torch.nn.Identity(), 4, 2, form, rank=2)
        features = torch.randn(2, 3, 2, 1 + 2 * model.rank)
        index = index_of([inter_margins(FOLLOWED, PAIRS)])
        found = preference_margins(model, features, index)
        assert found.shape == (2, 2)
        for row, comparison in zip(found, inter_margins(FOLLOWED, PAIRS), strict=True):
            logits = [model.logits(features[first], features[second]) for first, second in comparison]
            torch.testing.assert_close(row, logits[0] + logits[1])
        if form == "bradley_terry":
            for k in range(2):
                torch.testing.assert_close(found[:, k], reward_margins(features[:, :, k, 0], index))
        torch.testing.assert_close(preference_margins(model, features, index.flip(2)), -found)


class TestTask:
    def reference(self, told: Sequence[Told], values: float = 0.0) -> dict[int, Tensor]:
        return {i: torch.full((2, len(one.rows[0].responses)), values) for i, one in enumerate(told)}

    def task(self, factors: dict[str, float] = BOTH, tau: float = 0.3) -> tuple[torch.nn.Module, ToldTask]:
        model, told = build(ARCHITECTURES["llama"]), told_rows()
        margins = policy_margins(model, told, self.reference(told), tau, PACKED)
        return model, ToldTask(told, factors, margins, lambda step: [0, 1], beside=10.0, rows=2)

    def test_the_loss_by_hand(self):
        model, task = self.task({"intra": 2.0, "inter": 0.5})
        with torch.no_grad():
            expected = 0.0
            for one in told_rows():
                r = 0.3 * torch.tensor(by_hand(model, list(one.rows)))
                for factor, comparisons in ((2.0, one.intra), (0.5, one.inter)):
                    for comparison in comparisons:
                        margin = sum(float(r[first] - r[second]) for first, second in comparison)
                        size = sum(len(one.intra if factor == 2.0 else one.inter) for one in told_rows())
                        expected += factor * math.log1p(math.exp(-margin)) / size
            assert task.loss_of([0, 1]).item() / 10.0 == pytest.approx(expected, rel=1e-4)  # a mean of each kind

    def test_the_gradient_does_not_depend_on_how_rows_are_parted(self):
        gradients = []
        for parts in ([[0, 1]], [[0], [1]]):
            model, task = self.task()
            for part in parts:
                task.loss_of(part).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)

    def test_log_2_at_the_reference(self):
        model, told = build(ARCHITECTURES["llama"]), told_rows()
        logps = all_logps(model, [row for one in told for row in one.rows], PACKED)
        reference = {i: torch.stack(logps[2 * i : 2 * i + 2]) for i in range(2)}
        task = ToldTask(told, BOTH, policy_margins(model, told, reference, 0.3, PACKED), lambda step: [0, 1], 1.0, 2)
        with torch.no_grad():
            assert task.loss_of([0, 1]).item() == pytest.approx(2 * math.log(2.0), rel=1e-4)

    def test_a_preference_model_has_a_loss_for_each_objective(self):
        policy, told = build(ARCHITECTURES["llama"]), told_rows()
        model = build_preference_model(policy, 3, "bradley_terry", 1, seed=0)
        task = ToldTask(told, BOTH, model_margins(model, told, PACKED), lambda step: [0, 1], 1.0, 2)
        loss = task.loss_of([0, 1])
        assert loss.item() == pytest.approx(3 * 2 * math.log(2.0), rel=0.5)
        loss.backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in model.head.parameters() if p.grad is not None)

    def test_joined_tasks_share_one_mean(self):
        w = torch.tensor(2.0, requires_grad=True)
        first = Task(lambda step: [0, 2], lambda rows: w * sum(rows), len, lambda i: 10 + i)
        second = Task(
            lambda step: [1], lambda rows: w * 100.0 * sum(rows), lambda rows: 3.0 * len(rows), lambda i: 20 + i
        )
        both = joined(first, second, size=5)
        rows = both.rows_of(0)
        assert rows == [0, 2, 6]
        assert both.loss_of(rows).item() == (both.loss_of([0, 2]) + both.loss_of([6])).item() == 2.0 * 102
        assert both.weight_of(rows) == 5.0
        assert both.length_of is not None
        assert [both.length_of(i) for i in rows] == [10, 12, 21]


NAMES = ("helpful", "harmless")


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"intra": -1.0}, r"algorithm\.intra=-1\.0: must be a number, 0 or more"),
            ({"inter": math.inf}, r"algorithm\.inter=inf: must be"),
            ({"intra": "much"}, r"algorithm\.intra=much: must be"),
            ({"across": "samples"}, r"algorithm\.across=samples: must be margins or responses"),
            ({"augmented": 1.0}, r"algorithm\.augmented=1\.0: must be in \[0, 1\)"),
            ({"instructions": 0}, r"algorithm\.instructions=0: must be a whole number, 1 or more"),
            ({"kinds": ["rhymes"]}, "algorithm.kinds: no kind of instruction rhymes; must be of at_most_words, "),
            ({"kinds": []}, "algorithm.kinds: no kind of instruction; must be of"),
            ({"weights": {"witty": 1}}, r"algorithm\.weights=\{witty: 1\}: witty is no objective"),
            ({"smoothing": 0.5}, r"algorithm\.smoothing=0\.5"),
            ({"preference_model": {"intra": -1}}, r"algorithm\.preference_model\.intra=-1: must be a number"),
            (
                {"preference_model": {"both": 1}},
                r"algorithm\.preference_model\.both: no such key; must be intra or inter",
            ),
        ],
    )
    def test_a_setting_is_named(self, settings: dict, message: str):
        with pytest.raises(UserError, match=message):
            Mapl(NAMES, 0.1, **settings)

    def test_before_data_are_loaded(self):
        composed = compose("train", ["algorithm=mapl", "algorithm.intra=-2"])
        with pytest.raises(UserError, match=r"algorithm\.intra=-2"):
            train.check(typed(composed, TrainConfig))

    def test_a_step_has_plain_rows_and_told_ones(self):
        assert [Mapl(NAMES, 0.1, augmented=0.5).doubles(rows, "batch_size") for rows in (3, 4, 8, 32)] == [1, 1, 2, 8]
        assert Mapl(NAMES, 0.1, augmented=0.01).doubles(8, "batch_size") == 1
        assert Mapl(NAMES, 0.1, augmented=0.99).doubles(8, "batch_size") == 3
        with pytest.raises(UserError, match="batch_size: a step of 2 rows has no room for a plain one and two with"):
            Mapl(NAMES, 0.1).doubles(2, "batch_size")


@pytest.mark.slow
class TestRuns:
    """On the embedded world, with one cache: the reference and preference model are fitted once."""

    DPO = ("algorithm=dpo", "algorithm.weights={helpful: 2, concise: 1}")

    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("mapl")

    def run(self, run_here: Run, place: Path, name: str, *overrides: str) -> Path:
        if not (place / name).exists():
            done = run_here("train", *TINY, f"cache={place / 'cache'}", *overrides, f"run.dir={place / name}")
            assert done.status == 0, done.err
        return place / name

    def test_without_augmentation_it_is_dpo(self, run_here: Run, place: Path):
        dpo = self.run(run_here, place, "dpo", *self.DPO)
        expected = load_file(dpo / "model" / "model.safetensors")
        for name, off in (
            ("factors", ("algorithm.intra=0", "algorithm.inter=0")),
            ("rows", ("algorithm.augmented=0",)),
        ):
            mapl = self.run(
                run_here, place, name, "algorithm=mapl", "algorithm.weights={helpful: 2, concise: 1}", *off
            )  # fmt: skip
            found = load_file(mapl / "model" / "model.safetensors")
            assert all(torch.equal(found[key], value) for key, value in expected.items())
            assert results(mapl)[1] == results(dpo)[1]

    @pytest.mark.thorough
    def test_a_killed_run_goes_on_as_if_it_had_not_been(self, run_here: Run, place: Path):
        """Also one that fits a preference model with instructions, which does not judge."""
        settings = ("algorithm=mapl", "algorithm.preference_model={intra: 1, inter: 1}", f"cache={place / 'cache'}")
        whole = self.run(run_here, place, "whole", *settings)
        accuracy = read_json(whole / "stages" / "preference_model" / "accuracy.json")
        assert set(accuracy) == {"before", "after"}
        assert all(len(values) == 3 for each in accuracy.values() for values in each.values())
        assert sum(accuracy["after"]["intra"]) > sum(accuracy["before"]["intra"])
        dpo = self.run(run_here, place, "dpo", *self.DPO)
        judges = [load_file(run / "preference_model" / "preference_model.safetensors") for run in (dpo, whole)]
        assert all(torch.equal(judges[0][key], value) for key, value in judges[1].items())

        *lines, last = read_metrics(whole)
        assert all(0 <= line[key] <= 1 for line in lines for key in ("intra_accuracy", "inter_accuracy"))
        assert {key for key in last if key != "step"} == {"followed/told", "followed/untold", "followed/reference"}

        killed = place / "killed"
        arguments = ("train", *TINY, *settings, f"run.dir={killed}")
        stopped = stop_when(lambda: any(killed.glob("checkpoints/step-*")), SIGKILL, *arguments, cwd=place)
        assert stopped.status == -SIGKILL
        assert run_here(*arguments, "run.resume=true").status == 0
        assert results(killed) == results(whole)

    def test_rows_that_do_not_fit_behind_instructions_are_counted(self, run_here: Run, place: Path):
        settings = ("algorithm=mapl", "algorithm.instructions=6", "cache=null", "steps=4", "model.max_length=54")
        done = run_here("train", *TINY, *settings, f"run.dir={place / 'short'}")
        assert done.status == 0, done.err
        assert "train rows do not fit the context behind instructions; not told any" in done.err

    def test_where_nothing_can_be_asked(self, run_here: Run, here: Path):
        """All responses start alike, so none can be told to start otherwise."""
        made = [
            {"prompt": f"Q {i}?", "responses": ["Yes.", "Yes, of course."], "scores": {n: [i % 2, 0.5] for n in NAMES}}
            for i in range(40)
        ]
        (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        data = ("dataset=pairs", "dataset.path=rows.jsonl", "objectives=helpful_harmless")
        done = run_here("train", *TINY, *data, "algorithm=mapl", "algorithm.kinds=[starts_with]", "run.dir=none")
        assert done.status == 2
        assert "algorithm.kinds: none of 29 train rows can be told instructions: 0 do not fit the context" in done.err
