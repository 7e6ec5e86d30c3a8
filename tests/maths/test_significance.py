"""Intervals, verdicts and dominance: against hand-made answers and scipy's own tests."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mopo_cli.maths.significance import (
    FEWEST,
    UNKNOWN,
    WORSE,
    distinct,
    dominance,
    holm,
    mean_ci,
    sign_flip_p,
    verdict,
    win_rate_ci,
)


def wilson(wins: int, n: int) -> tuple[float, float]:
    """Wilson's interval with Student's quantile, from its defining equation: |m - p| = t sqrt(p (1 - p) / n)."""
    t, m = stats.t.ppf(0.975, n - 1), wins / n
    low, high = sorted(np.roots(np.array([1 + t**2 / n, -(2 * m + t**2 / n), m**2])))
    return max(0.0, float(low)), min(1.0, float(high))


UNEQUAL = np.repeat(np.arange(30), np.tile([7, 1, 2, 1, 8, 2], 5))  # prompts in 30 groups


class TestInterval:
    @pytest.mark.parametrize(("wins", "n"), [(30, 30), (29, 30), (45, 60), (0, 40), (75, 150)])
    def test_of_wins_and_losses_is_wilsons(self, wins: int, n: int):
        values = np.repeat([1.0, 0.0], [wins, n - wins])
        assert win_rate_ci(values, np.arange(n)) == pytest.approx(wilson(wins, n), abs=1e-9)

    def test_of_many_graded_values_is_that_of_a_normal_mean(self):
        values = np.random.default_rng(0).beta(4, 4, 4000)
        half = 1.96 * values.std() / np.sqrt(len(values))
        wanted = pytest.approx((values.mean() - half, values.mean() + half), abs=0.02 * half)
        assert win_rate_ci(values, np.arange(4000)) == wanted
        assert mean_ci(values, np.arange(4000)) == wanted

    @pytest.mark.parametrize("interval", [win_rate_ci, mean_ci])
    def test_below_thirty_independent_prompts_there_is_none(self, interval):
        values = np.random.default_rng(0).random(200)
        assert np.isnan(interval(values[:1], np.arange(1))).all()
        assert np.isnan(interval(values[:29], np.arange(29))).all()
        assert np.isnan(interval(values, np.arange(200) % 29)).all()
        assert np.isfinite(interval(values, np.arange(200) % FEWEST)).all()
        assert verdict(UNKNOWN, 0.1) == "undecided"

    def test_prompts_of_a_group_that_say_the_same_count_once(self):
        values, groups = np.random.default_rng(0).random(40), np.arange(40)
        once, thrice = win_rate_ci(values, groups), win_rate_ci(np.repeat(values, 3), np.repeat(groups, 3))
        assert thrice == pytest.approx(once)
        assert mean_ci(np.repeat(values, 3), np.repeat(groups, 3)) == pytest.approx(mean_ci(values, groups))

    @pytest.mark.parametrize("rate", [0.5, 0.8, 0.98])
    @pytest.mark.parametrize("values", ["wins", "ties", "graded"])
    @pytest.mark.parametrize("units", [np.arange(30), np.arange(150), UNEQUAL], ids=["30", "150", "groups"])
    def test_holds_the_truth_as_often_as_it_says(self, rate: float, values: str, units: np.ndarray):
        """95 %, within two errors of 250 draws; a bootstrap held 57 to 85 % of such samples."""
        rng = np.random.default_rng([int(100 * rate), len(values), len(units)])
        shape = (250, len(units))
        draw = {
            "wins": lambda size: (rng.random(size) < rate).astype(float),
            "ties": lambda size: rng.binomial(2, rate, size) / 2,
            "graded": lambda size: rng.beta(2 * rate, 2 * (1 - rate), size),
        }[values]
        own, shared = draw(shape), draw((250, int(units.max()) + 1))[:, units]  # half of a group's prompts say the same
        drawn = np.where(rng.random(shape) < 0.7, shared, own)
        ends = np.array([win_rate_ci(row, units) for row in drawn])
        assert np.mean((ends[:, 0] <= rate) & (rate <= ends[:, 1])) >= 0.95 - 0.028


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
        # Of the 2^4 signs, only all plus give a sum as far above 0: p is 1/16.
        above, below = sign_flip_p(np.array([[1.0, 2.0, 3.0, 4.0]]), 40000, seed=0)
        assert above[0] == pytest.approx(1 / 16, abs=0.01)
        assert below[0] == 1.0

    def test_agrees_with_the_paired_t_test_on_many_prompts(self):
        rng = np.random.default_rng(0)
        gaps = rng.normal(size=(3, 300)) + np.array([[0.0], [0.1], [0.15]])
        expected = np.asarray(stats.ttest_1samp(gaps, 0.0, axis=1, alternative="greater")[1])
        above, below = sign_flip_p(gaps, 40000, seed=1)
        assert above == pytest.approx(expected, abs=0.01)
        assert below == pytest.approx(1 - expected, abs=0.01)

    def test_no_difference_at_all(self):
        assert np.array(sign_flip_p(np.zeros((2, 50)), 500, seed=0)).tolist() == [[1.0, 1.0], [1.0, 1.0]]

    def test_false_alarms_are_as_rare_as_promised(self):
        gaps = np.random.default_rng(3).normal(size=(400, 40))
        for p in sign_flip_p(gaps, 2000, seed=0):
            assert 0.02 < np.mean(p < 0.05) < 0.09


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
        return dominance({"a": better, "b": base}, self.names, 2000, 0, np.arange(prompts))[0]

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
        found = dominance({"a": same, "b": same.copy()}, self.names, 500, 0, np.arange(50))[0]
        assert found.dominates is None
        assert set(found.p.values()) == {1.0}

    def test_every_pair_of_many_runs_is_adjusted_together(self):
        rng = np.random.default_rng(0)
        base = rng.random((100, 2))
        runs = {f"r{i}": base + 0.01 * rng.normal(size=base.shape) + 0.05 * i for i in range(6)}
        found = dominance(runs, self.names, 1000, 0, np.arange(100))
        assert len(found) == 15
        assert all(c.dominates == c.second for c in found)  # the later one is the better one

    def test_one_run_alone(self):
        assert dominance({"a": np.zeros((5, 2))}, self.names, 100, 0, np.arange(5)) == []

    def test_no_worse_on_average_is_not_enough(self):
        """Nothing tells whether the second objective is worse by WORSE or not: no claim, though its mean is better."""
        rng = np.random.default_rng(0)
        base = rng.random((60, 2))
        unsure = rng.normal(scale=0.2, size=60)
        gaps = np.stack([0.1 + 0.02 * rng.normal(size=60), unsure - unsure.mean() + 0.005], axis=1)
        found = dominance({"a": base + gaps, "b": base}, self.names, 2000, 0, np.arange(60))[0]
        assert found.difference["harmless"] == pytest.approx(0.005)
        assert found.p["helpful"] < 0.05
        assert found.dominates is None

    @pytest.mark.parametrize("noise", [0.05, 0.2])
    def test_a_run_that_is_worse_in_one_hardly_ever_dominates(self, noise: float):
        """Better by 0.1 in one, worse by the margin in the other: at most 5 % false claims (18 % before)."""
        rng = np.random.default_rng(0)
        false = 0
        for seed in range(300):
            gaps = np.array([0.1, -WORSE]) + rng.normal(scale=noise, size=(60, 2))
            false += dominance({"a": gaps, "b": 0 * gaps}, self.names, 400, seed, np.arange(60))[0].dominates == "a"
        assert false <= 0.05 * 300 + 8  # two errors

    def test_prompts_of_a_group_are_one(self):
        rng = np.random.default_rng(0)
        gaps = np.repeat(rng.normal(scale=0.1, size=(40, 2)) + 0.01, 10, axis=0)
        apart = dominance({"a": gaps, "b": 0 * gaps}, self.names, 2000, 0, np.arange(400))[0]
        together = dominance({"a": gaps, "b": 0 * gaps}, self.names, 2000, 0, np.arange(400) // 10)[0]
        assert apart.dominates == "a"  # four hundred times the same luck
        assert together.dominates is None
        assert together.p["helpful"] > 10 * apart.p["helpful"]

    def test_of_few_prompts_nothing_is_claimed(self):
        gaps = np.full((29, 2), 0.1)
        assert dominance({"a": gaps, "b": 0 * gaps}, self.names, 2000, 0, np.arange(29))[0].dominates is None


def test_distinct_ngrams():
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "c d"], 2) == 1.0
    assert distinct(["", "a"], 2) == 0.0
