"""Intervals, verdicts and dominance: against hand-made answers and scipy's own tests."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mopo_cli.maths.significance import bootstrap_ci, distinct, dominance, holm, sign_flip_p, verdict


class TestInterval:
    def test_holds_the_mean_and_narrows_with_more_prompts(self):
        values = np.random.default_rng(0).random(400)
        low, high = bootstrap_ci(values, 200, seed=1)
        assert low < values.mean() < high
        few_low, few_high = bootstrap_ci(values[:25], 200, seed=1)
        assert few_high - few_low > 2 * (high - low)

    def test_is_that_of_a_normal_mean(self):
        values = np.random.default_rng(0).normal(size=1000)
        low, high = bootstrap_ci(values, 2000, seed=1)
        half = 1.96 * values.std() / np.sqrt(len(values))
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)

    @pytest.mark.parametrize(("values", "draws"), [([0.7], 100), ([0.2, 0.4], 0)])
    def test_of_too_little_is_the_mean_itself(self, values: list[float], draws: int):
        assert bootstrap_ci(np.array(values), draws, seed=0) == (np.mean(values), np.mean(values))


@pytest.mark.parametrize(
    ("interval", "threshold", "told"),
    [
        ((0.56, 0.60), 0.55, "yes"),
        ((0.55, 0.60), 0.55, "yes"),
        ((0.50, 0.54), 0.55, "no"),
        ((0.50, 0.55), 0.55, "undecided"),
        ((0.50, 0.60), 0.55, "undecided"),
        ((0.50, 0.60), None, None),
    ],
)
def test_a_threshold_is_kept_only_where_the_whole_interval_keeps_it(interval, threshold, told):
    assert verdict(interval, threshold) == told


class TestSignFlips:
    def test_all_flips_of_few_prompts(self):
        # Of the 2^4 signs, only all plus and all minus give a sum as far from 0: p is 1/8.
        p = sign_flip_p(np.array([[1.0, 2.0, 3.0, 4.0]]), 40000, seed=0)[0]
        assert p == pytest.approx(1 / 8, abs=0.01)

    def test_agrees_with_the_paired_t_test_on_many_prompts(self):
        rng = np.random.default_rng(0)
        gaps = rng.normal(size=(3, 300)) + np.array([[0.0], [0.1], [0.15]])
        expected = np.array(stats.ttest_1samp(gaps, 0.0, axis=1))[1]
        assert sign_flip_p(gaps, 40000, seed=1) == pytest.approx(expected, abs=0.01)

    def test_no_difference_at_all(self):
        assert sign_flip_p(np.zeros((2, 50)), 500, seed=0).tolist() == [1.0, 1.0]

    def test_false_alarms_are_as_rare_as_promised(self):
        gaps = np.random.default_rng(3).normal(size=(400, 40))
        assert 0.02 < np.mean(sign_flip_p(gaps, 2000, seed=0) < 0.05) < 0.09


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.5, 0.9])).tolist() == [1.0, 1.0]
    assert holm(np.array([0.02])).tolist() == [0.02]


class TestDominance:
    names = ("helpful", "harmless")

    def compared(self, *gaps: float, noise: float = 0.02, prompts: int = 200):
        rng = np.random.default_rng(0)
        base = rng.random((prompts, 2))
        better = base + rng.normal(scale=noise, size=base.shape) + np.array(gaps)
        return dominance({"a": better, "b": base}, self.names, 2000, seed=0)[0]

    def test_better_everywhere(self):
        found = self.compared(0.05, 0.05)
        assert found.dominates == "a"
        assert found.difference["helpful"] == pytest.approx(0.05, abs=0.01)
        assert found.p["helpful"] < 0.05

    def test_the_other_way_round(self):
        assert self.compared(-0.05, -0.05).dominates == "b"

    def test_a_trade_is_no_dominance(self):
        found = self.compared(0.05, -0.05)
        assert found.dominates is None
        assert max(found.p.values()) < 0.05  # both are different all the same

    def test_better_by_chance_is_no_dominance(self):
        found = self.compared(0.001, 0.001, noise=0.2)
        assert found.dominates is None
        assert min(found.p.values()) > 0.05

    def test_equal_runs(self):
        same = np.random.default_rng(0).random((50, 2))
        found = dominance({"a": same, "b": same.copy()}, self.names, 500, seed=0)[0]
        assert found.dominates is None
        assert set(found.p.values()) == {1.0}

    def test_every_pair_of_many_runs_is_adjusted_together(self):
        rng = np.random.default_rng(0)
        base = rng.random((100, 2))
        runs = {f"r{i}": base + 0.01 * rng.normal(size=base.shape) + 0.05 * i for i in range(6)}
        found = dominance(runs, self.names, 1000, seed=0)
        assert len(found) == 15
        assert all(c.dominates == c.second for c in found)  # the later one is the better one

    def test_one_run_alone(self):
        assert dominance({"a": np.zeros((5, 2))}, self.names, 100, seed=0) == []


def test_distinct_ngrams():
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "c d"], 2) == 1.0
    assert distinct(["", "a"], 2) == 0.0
