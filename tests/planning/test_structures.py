"""Preference structures, fronts and volumes, against values worked out by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mopo_cli.base.errors import UserError
from mopo_cli.config import compose
from mopo_cli.config.schema import SyntheticConfig
from mopo_cli.maths.oracle import solve
from mopo_cli.maths.pareto import directions, distance_to_front, dominated_volume, front
from mopo_cli.planning.structures import Structure, read_structure

FAIR = {"counts": [1, 1], "preferences": [[[0.5, 0.8], [0.2, 0.5]], [[0.5, 0.4], [0.6, 0.5]]]}


@pytest.fixture(scope="module")
def canonical() -> dict[str, Structure]:
    settings = compose.typed(compose.compose("synthetic", []), SyntheticConfig)
    return {name: read_structure(name, node) for name, node in settings.structures.items()}


class TestReading:
    def test_win_rates_are_means_against_mu(self):
        found = read_structure("coin", {**FAIR, "counts": [1, 3]})
        np.testing.assert_allclose(found.mu, [0.25, 0.75])
        # 0.25 * 0.5 + 0.75 * 0.8 and so on
        np.testing.assert_allclose(found.win_rates, [[0.725, 0.425], [0.425, 0.525]])

    @pytest.mark.parametrize(
        ("matrix", "said"),
        [
            ([[0.5, 0.8], [0.2]], "not square: 2 rows, of 1, 2 numbers"),
            ([[0.5, 0.8, 0.1], [0.2, 0.5, 0.1]], "not square"),
            ([[0.5, 1.8], [-0.8, 0.5]], r"\[0\]\[1\] = 1.8: must be in \[0, 1\]"),
            ([[0.5, float("nan")], [0.2, 0.5]], r"\[0\]\[1\] = nan"),
            ([[0.5, 0.8], [0.3, 0.5]], r"\[0\]\[1\] \+ \[1\]\[0\] = 0.8 \+ 0.3: must be 1"),
            ([[0.6, 0.8], [0.2, 0.5]], r"\[0\]\[0\] \+ \[0\]\[0\] = 0.6 \+ 0.6: must be 1, so 1/2 on the diagonal"),
            ([["a", 0.8], [0.2, 0.5]], "must hold numbers"),
            (0.5, "must be a list of rows"),
        ],
    )
    def test_a_matrix_that_is_none(self, matrix, said):
        with pytest.raises(UserError, match=said) as error:
            read_structure("mine", {"counts": [1, 1], "preferences": [FAIR["preferences"][0], matrix]})
        assert str(error.value).startswith("structures.mine.preferences[1]")

    @pytest.mark.parametrize(
        ("node", "said"),
        [
            ({"counts": [1, 1]}, "must have `counts` and `preferences`"),
            ({**FAIR, "counts": [1]}, "must be 2 numbers"),
            ({**FAIR, "counts": [1, 0]}, "must be above 0"),
            ({**FAIR, "preferences": FAIR["preferences"][:1]}, "two matrices or more"),
            ({**FAIR, "preferences": [FAIR["preferences"][0], [[0.5]]]}, r"matrices of \[1, 2\] actions"),
        ],
    )
    def test_a_structure_that_is_none(self, node, said):
        with pytest.raises(UserError, match=said):
            read_structure("mine", node)


class TestCanonical:
    def test_each_has_three_objectives_on_five_actions(self, canonical):
        assert list(canonical) == ["total_order", "partial_order", "antichain", "incomparable", "inconsistent"]
        assert {s.preferences.shape for s in canonical.values()} == {(3, 5, 5)}

    def test_the_front_of_a_total_order_is_its_best_action(self, canonical):
        win_rates = canonical["total_order"].win_rates
        # gaps (1, .75, .5, .25, 0) and mu (.1, .2, .4, .2, .1): a wins 1/2 + (1 - .5) / 2 = .75
        np.testing.assert_allclose(win_rates[0], [0.75, 0.78, 0.72])
        found = front(win_rates[None], directions(3, 20)[1:])
        np.testing.assert_allclose(found, np.tile([0.75, 0.78, 0.72], (len(found), 1)))

    def test_every_action_of_the_antichain_is_on_the_front(self, canonical):
        win_rates = canonical["antichain"].win_rates[:, :2]
        by_hand = [[0.75, 0.18], [0.625, 0.38], [0.5, 0.53], [0.375, 0.63], [0.25, 0.68]]
        np.testing.assert_allclose(win_rates, by_hand)
        found = np.unique(front(win_rates[None], directions(2, 200)).round(9), axis=0)
        np.testing.assert_allclose(found, by_hand[::-1])

    def test_an_inconsistent_objective_goes_in_a_circle(self, canonical):
        first = canonical["inconsistent"].preferences[0]
        assert first[0, 1] > 0.5
        assert first[1, 2] > 0.5
        assert first[2, 0] > 0.5

    def test_what_is_incomparable_is_undecided(self, canonical):
        first, second, _ = canonical["incomparable"].preferences
        np.testing.assert_array_equal(first[:2, 2:], 0.5)
        np.testing.assert_array_equal(second[:2, 2:], 0.5)


class TestFront:
    def test_distance_by_hand(self, canonical):
        win_rates = canonical["antichain"].win_rates[None, :, :2]
        # between (.625, .38) and (.5, .53): R2 = .53 - 1.2 (R1 - .5), met by (.5 + t, .5 + t) at t = .03 / 2.2
        assert distance_to_front(np.array([0.5, 0.5]), win_rates) == pytest.approx(0.03 / 2.2, abs=1e-8)
        for point in win_rates[0]:
            assert distance_to_front(point, win_rates) == pytest.approx(0.0, abs=1e-8)
        assert distance_to_front(np.array([0.9, 0.9]), win_rates) == 0.0

    def test_directions_cover_the_simplex(self):
        found = directions(3, 4)
        assert len(found) == 15  # (4 + 2 choose 2)
        np.testing.assert_allclose(found.sum(1), 1.0)
        assert len(np.unique(found.round(9), axis=0)) == 15

    @pytest.mark.parametrize("objectives", [2, 3, 4])
    def test_volume_of_a_box_and_of_a_simplex(self, objectives):
        reference = np.full(objectives, 0.1)
        box = np.array([[0.6, 0.3, 0.5, 0.2][:objectives]])
        assert dominated_volume(box, reference) == pytest.approx(np.prod(box - 0.1), rel=1e-6)
        simplex = 0.1 + np.eye(objectives)
        assert dominated_volume(simplex, reference) == pytest.approx(1 / np.prod(range(1, objectives + 1)), rel=1e-6)

    def test_a_dominated_point_adds_nothing_and_one_below_the_reference_has_no_volume(self):
        reference = np.zeros(2)
        points = np.array([[1.0, 0.2], [0.2, 1.0]])
        assert dominated_volume(points, reference) == pytest.approx(0.2 + 0.2 * 0.8 + 0.8 * 0.8 / 2)
        more = np.concatenate([points, [[0.5, 0.5], [0.1, 0.1]]])
        assert dominated_volume(more, reference) == pytest.approx(dominated_volume(points, reference))
        assert dominated_volume(np.array([[0.3, -0.2]]), reference) == 0.0

    def test_tracing_b_recovers_the_front_as_tau_falls(self, canonical):
        for name in ("partial_order", "antichain", "incomparable", "inconsistent"):
            win_rates = canonical[name].win_rates[None, :, :2]
            log_mu = np.log(canonical[name].mu)[None]
            exact = front(win_rates, directions(2, 200))
            span = np.linspace(exact[:, 1].min(), exact[:, 1].max() - 1e-6, 40)
            traced = np.stack([solve(win_rates, log_mu, 1e-3, np.array([b])).win_rates for b in span])
            floor = win_rates[0].min(0)
            assert dominated_volume(traced, floor) >= 0.98 * dominated_volume(exact, floor), name

    def test_tracing_two_thresholds_recovers_the_front_of_three_objectives(self, canonical):
        for name in ("partial_order", "antichain", "incomparable", "inconsistent"):
            win_rates, log_mu = canonical[name].win_rates[None], np.log(canonical[name].mu)[None]
            exact = front(win_rates, directions(3, 60))
            spans = [np.linspace(exact[:, k].min(), exact[:, k].max() - 1e-6, 9) for k in (1, 2)]
            found = [solve(win_rates, log_mu, 1e-3, np.array(b)) for b in product(*spans)]
            traced = np.stack([optimum.win_rates for optimum in found if optimum.feasible])
            floor = win_rates[0].min(0)
            assert dominated_volume(traced, floor) >= 0.98 * dominated_volume(exact, floor), name
