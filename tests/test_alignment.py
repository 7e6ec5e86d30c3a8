"""The guard against samples that the preference model cannot judge."""

from __future__ import annotations

import math

import numpy as np
import torch

from mopo_cli.judging import empirical, support_floor
from mopo_cli.oracle import attainable, solve


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
