"""The guard against samples that the preference model cannot judge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mopo_cli.base.types import Example, Objective
from mopo_cli.data.table import TokenRow
from mopo_cli.judging import rows
from mopo_cli.judging.rows import JudgedRows, _write_labels, empirical, judge_samples, support_floor
from mopo_cli.maths.estimates import leave_one_out
from mopo_cli.maths.oracle import attainable, solve
from mopo_cli.models.preference import win_probabilities
from mopo_cli.models.sampling import Drawn


def test_the_floor_is_a_quantile_over_all_responses():
    logps = [torch.arange(0.0, 50.0), torch.arange(50.0, 101.0)]  # 0, 1, ..., 100
    assert support_floor(logps, 0.05) == 5.0
    assert support_floor(logps, 0.0) == -math.inf


def test_samples_off_the_support_have_no_part_in_the_offline_dual():
    rates = torch.tensor([[[0.6, 0.3], [0.4, 0.7], [1.0, 1.0]], [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]])
    known = torch.tensor([[True, True, False], [False, False, False]])
    p, log_uniform = empirical(rates, known)
    np.testing.assert_allclose(np.exp(log_uniform), [[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])  # no sample known: all
    np.testing.assert_allclose(attainable(p, log_uniform), [(0.6 + 1.0) / 2, (0.7 + 1.0) / 2], rtol=1e-6)
    found = solve(p[:1], log_uniform[:1], 0.1, np.array([0.5]))
    smaller = solve(p[:1, :2], np.log(np.full((1, 2), 0.5)), 0.1, np.array([0.5]))
    np.testing.assert_allclose(found.duals, smaller.duals)
    np.testing.assert_allclose(found.win_rates, smaller.win_rates)
    assert found.log_policy[0, 2] == -math.inf


class Silent(torch.nn.Module):
    """A preference model that never decides."""

    def logits(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first[..., 0] - second[..., 0]) * 0.0


def test_a_computed_objective_judges_samples_by_its_own_function(monkeypatch: pytest.MonkeyPatch):
    """Shorter wins: against the data's "aa" and "aaaa", "a" wins twice, "aaa" once, and "aa" once and ties once."""
    monkeypatch.setattr(
        rows, "features_of", lambda model, tokens, _: [torch.zeros(len(t.responses), 2, 1) for t in tokens]
    )
    objectives = [Objective("kind", "primary", "kind"), Objective("short", "secondary", "short", scorer=brevity)]
    data = JudgedRows(
        objectives,
        [Example("other", ("x", "y"), (), ()), Example("?", ("aa", "aaaa"), (), ())],
        [TokenRow([1], [[2], [3]]), TokenRow([4], [[5], [6]])],
        [torch.zeros(2, 2, 1)] * 2,
        [torch.full((2, 2), 0.5)] * 2,
        torch.arange(2),
    )
    drawn = [[Drawn(text, [len(text)]) for text in ("a", "aaa", "aa")]]
    tokens, rates = judge_samples(Silent(), data, [1], drawn, None)  # type: ignore[arg-type]
    assert tokens == [TokenRow([4], [[1], [3], [2]])]
    assert rates[0].tolist() == [[0.5, 1.0], [0.5, 0.5], [0.5, 0.75]]


def brevity(prompt: str, response: str, context: str) -> float:
    return -float(len(response))


def test_swapping_the_sides_of_a_pair_changes_nothing():
    objectives = [Objective("a", "primary", "a"), Objective("b", "secondary", "b")]
    pairs, labels = ((0, 1), (0, 2), (1, 2)), ((1.0, 0.0), (0.5, 1.0), (0.0, math.nan))
    swapped = tuple((b, a) for a, b in pairs), tuple(tuple(1.0 - i for i in row) for row in labels)
    found = []
    for sides in ((pairs, labels), swapped):
        example = Example("?", ("x", "y", "z"), *sides)
        p = win_probabilities(Silent(), *[torch.zeros(3, 2, 1)] * 2)  # type: ignore[arg-type]
        _write_labels(p, example, range(len(objectives)))
        found.append(leave_one_out(p[None], torch.ones(1, 3, dtype=torch.bool))[0])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], torch.tensor([[0.75, 0.5], [0.0, 0.75], [0.75, 0.25]]))
