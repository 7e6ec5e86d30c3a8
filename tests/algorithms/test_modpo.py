"""MODPO: values by hand, the identities that tie it to DPO and to the optimum, its settings and whole runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import TINY, Finished, cache_of, read_json, read_metrics
from test_dpo import draw, f64, minimise, sigmoid, slope
from torch import Tensor

from mopo_cli.algorithms.pairwise.batches import PairLogps
from mopo_cli.algorithms.pairwise.dpo import Dpo, pair_loss
from mopo_cli.algorithms.pairwise.modpo import LOSSES, Modpo, modpo_loss, spread
from mopo_cli.base.errors import UserError
from mopo_cli.planning.policy import TabularPolicy

Run = Callable[..., Finished]
NAMES = ("helpful", "harmless", "concise")


class TestByHand:
    def test_value_and_gradient(self):
        z = (0.3 * 2.0 - 0.1) / 0.4
        for sign, label in ((1.0, 1.0), (-1.0, 0.0)):
            h, y, margin = f64([sign * 2.0]), f64([label]), f64([sign * 0.1])
            torch.testing.assert_close(modpo_loss(h, y, margin, 0.4, 0.3), f64([-math.log(sigmoid(z))]))
            torch.testing.assert_close(modpo_loss(h, y, margin, 0.4, 0.3, "hinge"), f64([max(0.0, 1 - z)]))
            found = slope(lambda x, y=y, margin=margin: modpo_loss(x, y, margin, 0.4, 0.3), h)
            torch.testing.assert_close(found, f64([sign * -(0.3 / 0.4) * sigmoid(-z)]))

    def test_at_the_reference_it_asks_for_the_margin(self):
        margin = draw(0, 5)
        found = modpo_loss(torch.zeros_like(margin), torch.ones_like(margin), margin, 0.4, 0.3)
        torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(-margin / 0.4))

    def test_the_spread_of_rewards(self):
        rewards = {3: f64([[1.0, 0.0], [3.0, 0.0], [0.0, 3.0]]), 8: f64([[0.0, 1.0], [2.0, 1.0]])}
        torch.testing.assert_close(spread(rewards), f64([(4 + 1 + 9 + 4) / 4, (0 + 9 + 9 + 0) / 4]).sqrt())


def pairs_with(policy: Tensor, labels: Tensor, rewards: Tensor | None) -> PairLogps:
    return PairLogps(policy, torch.zeros_like(policy), torch.ones_like(policy), labels, torch.ones(3), rewards)


class TestIdentities:
    labels = torch.sigmoid(draw(5, 12, 3))

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("pairs", [None, "concise"])
    def test_all_weight_on_one_objective_is_dpo(self, loss: str, pairs: str | None):
        name = pairs or "helpful"
        ours, theirs = (
            Modpo(NAMES, 0.3, weights={name: 2.0}, pairs=pairs, loss=loss),
            Dpo(NAMES, 0.3, loss, {name: 1.0}),
        )
        weights = f64(theirs.shares)

        def dpo(policy: Tensor) -> Tensor:
            pairs = PairLogps(policy, torch.zeros_like(policy), torch.ones_like(policy), self.labels, weights)
            return theirs.losses(pairs)

        def modpo(policy: Tensor) -> Tensor:
            return ours.losses(pairs_with(policy, self.labels, None))

        policy = draw(0, 12, 2)
        torch.testing.assert_close(modpo(policy), dpo(policy))
        torch.testing.assert_close(slope(modpo, policy), slope(dpo, policy))

    def test_a_reward_that_depends_on_the_prompt_alone_changes_nothing(self):
        method, policy, rewards = Modpo(NAMES, 0.3), draw(0, 12, 2), draw(1, 12, 2, 2)
        shifted = rewards + draw(2, 12, 1, 2)
        losses = [method.losses(pairs_with(policy, self.labels, r)) for r in (rewards, shifted)]
        torch.testing.assert_close(*losses)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_equal_rewards_are_dpo_with_beta_over_the_weight(self, loss: str):
        h, label = draw(0, 12), self.labels[:, 0]
        found = modpo_loss(h, label, torch.zeros_like(h), 0.4, 0.3, loss)
        torch.testing.assert_close(found, pair_loss(h, label, 0.3 / 0.4, loss))

    @pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (0.7, 0.3, 0.0), (0.0, 0.6, 0.4)])
    def test_exact_rewards_give_the_optimum_of_the_weighted_sum(self, weights: tuple[float, ...]):
        """pi_ref exp(sum_k w_k r_k / tau) / Z on a table, the labels of one objective being Bradley-Terry."""
        tau, actions = 0.5, 5
        rewards = draw(0, 4, actions, 3)
        reference = torch.log_softmax(draw(1, 4, actions), -1)
        method = Modpo(NAMES, tau, weights=dict(zip(NAMES, weights, strict=True)))
        first, second = torch.triu_indices(actions, actions, 1)
        labels = torch.sigmoid(rewards[:, first] - rewards[:, second]).flatten(0, 1)
        sides = torch.stack([rewards[:, first], rewards[:, second]], 2).flatten(0, 1)[..., method.others]
        policy = TabularPolicy(reference)

        def total() -> Tensor:
            now, before = (torch.stack([v[:, first], v[:, second]], -1).flatten(0, 1) for v in (policy(), reference))
            pairs = PairLogps(now, before, torch.ones_like(now), labels, torch.ones(3), sides)
            return method.losses(pairs).mean()

        minimise(policy, total)
        wanted = torch.softmax(reference + rewards @ f64(weights) / tau, -1)
        torch.testing.assert_close(policy().exp().detach(), wanted, rtol=0, atol=1e-6)


class TestSettings:
    def test_whose_pairs(self):
        assert NAMES[Modpo(NAMES, 0.1).trained] == "helpful"
        assert NAMES[Modpo(NAMES, 0.1, weights={"harmless": 1, "concise": 2}).trained] == "concise"
        assert NAMES[Modpo(NAMES, 0.1, pairs="harmless").trained] == "harmless"
        assert Modpo(NAMES, 0.1).shares == pytest.approx((1 / 3,) * 3)
        assert [NAMES[k] for k in Modpo(NAMES, 0.1, weights={"helpful": 1, "concise": 2}).others] == ["concise"]

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"weights": {"kind": 1}}, "algorithm.weights={kind: 1}: kind is no objective; the set has "),
            ({"pairs": "kind"}, "algorithm.pairs=kind: is no objective; the set has helpful, harmless, concise"),
            ({"pairs": "concise", "weights": {"helpful": 1}}, "algorithm.pairs=concise: its weight is 0, and the "),
            ({"margin": "length"}, "algorithm.margin=length: must be preference_model or implicit"),
            ({"loss": "ipo"}, "algorithm.loss=ipo: must be sigmoid or hinge"),
            ({"normalise": 2}, "algorithm.normalise=2: must be true or false"),
            ({"preference_form": "general"}, "preference_model.form=general compares responses "),
        ],
    )  # fmt: skip
    def test_bad_settings(self, bad: dict[str, Any], message: str):
        with pytest.raises(UserError) as told:
            Modpo(NAMES, 0.1, **bad)
        assert message in str(told.value)

    def test_a_general_preference_model_is_refused_only_where_it_is_asked(self):
        assert Modpo(NAMES, 0.1, "general", margin="implicit").others == [1, 2]
        assert Modpo(NAMES, 0.1, "general", weights={"helpful": 1}).others == []


@pytest.mark.slow
class TestRuns:
    def test_margins_of_the_preference_model(self, smoke: Path, here: Path, run_here: Run):
        settings = (f"cache={cache_of(smoke)}", "algorithm=modpo", "algorithm.normalise=true")
        done = run_here("train", *TINY, *settings, "run.dir=run")
        assert done.status == 0, done.err
        summary = read_json(here / "run" / "summary.json")
        assert (summary["algorithm"], summary["train"]["steps"]) == ("modpo", 40)

    def test_implicit_margins_are_trained_once_for_all_weightings(self, smoke: Path, here: Path, run_here: Run):
        shutil.copytree(cache_of(smoke), here / "outputs" / "cache")
        for run, weights, trained in (
            ("a", "{helpful: 0.5, harmless: 0.5}", 0),
            ("b", "{helpful: 0.9, harmless: 0.1}", 40),
        ):
            settings = (
                "algorithm=modpo",
                "algorithm.margin=implicit",
                f"algorithm.weights={weights}",
                f"run.dir={run}",
            )
            done = run_here("train", *TINY, *settings)
            assert done.status == 0, done.err
            work = read_json(here / run / "summary.json")["train"]
            assert (work["steps"], work["reused_steps"]) == (80, trained)
        assert [line["step"] for line in read_metrics(here / "a")] == list(range(5, 81, 5))
        assert [line["step"] for line in read_metrics(here / "b")] == list(range(45, 81, 5))
        assert (here / "b" / "stages" / "dpo-harmless" / "model").is_dir()

    def test_a_general_preference_model_is_refused_before_anything_is_fitted(self, here: Path, run_here: Run):
        done = run_here("train", *TINY, "algorithm=modpo", "preference_model.form=general", "run.dir=run")
        assert done.status == 2
        assert "set preference_model.form=bradley_terry, or algorithm.margin=implicit" in done.err
        assert not (here / "run").exists()
