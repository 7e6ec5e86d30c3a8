"""Records of evaluations that nobody ran."""

from __future__ import annotations

from collections.abc import Mapping

from mopo_cli.evaluation.records import Evaluation, Exact, Measured, Wording


def evaluation(objectives: Mapping[str, Measured], kl: float, oracle: Exact | None = None) -> Evaluation:
    """One run's, of these win rates."""
    return Evaluation(
        "run",
        "run",
        "run",
        dict(objectives),
        {},
        kl,
        0.0,
        Wording(10.0, 0.5, 0.5),
        None,
        oracle,
        64,
        64,
        oracle.support_mass if oracle else None,
        128,
        0,
        1.0,
        [],
        {},
    )
