"""Intervals of a front's numbers."""

from __future__ import annotations

import numpy as np
import pytest

from mopo_cli.maths.pareto import FrontMeasure, measured


def test_the_interval_is_the_percentiles_reflected_at_the_value():
    """Of redrawn values 0.20, 0.21, ... 0.60 the 2.5 % and 97.5 % quantiles are 0.21 and 0.59; the value is 0.3."""
    redrawn = np.linspace(0.2, 0.6, 41)[:, None, None]
    found = measured(lambda points: float(points.sum()), np.array([[0.3]]), redrawn)
    assert found.value == pytest.approx(0.3)
    assert found.ci95 == pytest.approx((2 * 0.3 - 0.59, 2 * 0.3 - 0.21))
    assert measured(lambda points: 0.5, np.array([[0.3]]), None) == FrontMeasure(0.5)
