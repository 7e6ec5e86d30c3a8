"""How good a set of runs is as a front: non-dominated runs, hypervolume, IGD+."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mopo_cli.maths import pareto
from mopo_cli.maths.pareto import FrontMeasure
from mopo_cli.report.groups import Group, exact_front
from mopo_cli.runs.record import sampled_rates


@dataclass(frozen=True, slots=True)
class Quality:
    """Numbers of the runs of one objective set that have ended."""

    front: dict[str, bool]  # by run: whether no other is at least as good in all objectives and better in one
    hypervolume: FrontMeasure  # of the sampled win rates
    exact_hypervolume: float | None
    igd_plus: FrontMeasure | None  # of the sampled win rates, against the exact front
    exact_igd_plus: float | None
    distance: dict[str, float]  # by run: its own IGD+
    against: str  # the front that distances are taken to
    reference: dict[str, float]  # the point that hypervolume is counted from


def quality(group: Group, draws: int, seed: int) -> Quality | None:
    """The numbers of a group; None where fewer than two of its runs have ended, or their data differ."""
    if len(group.ended) < 2 or group.differing:
        return None
    ids, points = [run.id for run in group.ended], group.points()
    sampled = np.array([run.points(exact=False) for run in group.ended])
    origin = np.array([min(run.objectives[name].worst for run in group.ended) for name in group.names])
    best, exact = pareto.nondominated(points), exact_front(group)
    front = points[best] if exact is None else exact
    rates = [sampled_rates(run) for run in group.ended]
    complete = [rate for rate in rates if rate is not None]
    redrawn = pareto.resample(complete, draws, seed) if draws and len(complete) == len(rates) else None
    return Quality(
        front=dict(zip(ids, best.tolist(), strict=True)),
        hypervolume=pareto.measured(lambda p: pareto.hypervolume(p, origin), sampled, redrawn),
        exact_hypervolume=pareto.hypervolume(points, origin) if group.exact else None,
        igd_plus=None if exact is None else pareto.measured(lambda p: pareto.igd_plus(p, exact), sampled, redrawn),
        exact_igd_plus=pareto.igd_plus(points, exact) if exact is not None and group.exact else None,
        distance={name: pareto.igd_plus(point[None], front) for name, point in zip(ids, points, strict=True)},
        against="the exact front" if exact is not None else "the non-dominated set of the runs shown",
        reference=dict(zip(group.names, origin.tolist(), strict=True)),
    )
