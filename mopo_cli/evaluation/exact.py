"""Exact win rates, where the data set's world can be listed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import logsumexp

from mopo_cli.base.types import PreferenceData
from mopo_cli.data.assistant import World
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.table import TokenRow
from mopo_cli.evaluation.records import Exact, Models
from mopo_cli.maths import oracle, pareto
from mopo_cli.models.policy import Policy
from mopo_cli.training.cache import kept_logps


def exact_evaluation(
    models: Models,
    data: PreferenceData,
    thresholds: dict[str, float],
    tau: float,
    prompts: int | None = None,
) -> Exact | None:
    """Exact win rates of the policy and the exact optimum of (P) with the first reference, where the world is known.

    Policy and reference are taken conditional on the world's responses; `support_mass` says how little that leaves out.
    """
    if not isinstance(data.world, World):
        return None
    rows, win_rates = _listed(data, data.world, models.policy.encoder, prompts)
    conditioned = models.policy.encoder.conditioned(models.condition)
    policy_rows = _listed(data, data.world, conditioned, prompts)[0] if models.condition else rows
    log_policy, mass = _conditional(models.policy.logps(policy_rows))
    with models.policy.swapped(models.initial):
        log_reference, _ = _conditional(kept_logps(None, models.cache, models.policy, rows))
    names = data.names
    bounds = np.array([thresholds.get(name, -math.inf) for name in names[1:]])
    best = oracle.solve(win_rates, log_reference, tau, bounds)
    reached = oracle.policy_win_rates(log_policy, win_rates)
    met = best if best.feasible else None
    return Exact(
        win_rate=_named(names, reached),
        optimum=met and _named(names, met.win_rates),
        gap=met and float(met.win_rates[0] - reached[0]),
        kl=oracle.mean_kl(log_policy, log_reference),
        optimum_kl=met and met.kl,
        optimum_duals=met and _named(names[1:], met.duals),
        duality_gap=met and met.duality_gap,
        feasible=best.feasible,
        attainable=_named(names[1:], best.attainable),
        reference=_named(names, oracle.policy_win_rates(log_reference, win_rates)),
        support_mass=mass,
        front=[_named(names, point) for point in exact_front(win_rates)],
        shortfall=best.shortfall,
    )


def exact_front(win_rates: np.ndarray) -> np.ndarray:
    """(m, K) vertices of the front that any policy of the world reaches, for win_rates (N, A, K)."""
    objectives = win_rates.shape[2]
    resolution = {1: 1, 2: 40, 3: 12}.get(objectives, 6)
    points = pareto.front(win_rates, pareto.directions(objectives, resolution))
    return np.unique(points[pareto.nondominated(points)].round(6), axis=0)


def _listed(
    data: PreferenceData, world: World, encoder: Encoder, prompts: int | None
) -> tuple[list[TokenRow], np.ndarray]:
    """Rows of every response of the world to the test prompts, and their exact (N, A, K) win rates."""
    # spread over the test prompts: neighbours share a topic, and the first ones alone are no fair sample
    count = min(prompts or len(data.test), len(data.test))
    places: list[int] = np.linspace(0, len(data.test) - 1, count, dtype=int).tolist()
    texts = [str(data.test[i].prompt) for i in places]
    columns = [world.objectives.index(o.source) for o in data.objectives]
    exact = np.stack([world.win_rates(prompt)[:, columns] for prompt in texts])
    return [encoder.row(prompt, world.responses(prompt)) for prompt in texts], exact


def exact_win_rates(
    policy: Policy, encoder: Encoder, data: PreferenceData, prompts: int | None = None
) -> dict[str, float]:
    """Exact win rates of a policy, conditional on the world's responses; none where the world cannot be listed."""
    if not isinstance(data.world, World):
        return {}
    rows, exact = _listed(data, data.world, encoder, prompts)
    log_policy, _ = _conditional(policy.logps(rows))
    return _named(data.names, oracle.policy_win_rates(log_policy, exact))


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, (float(v) for v in values), strict=True))


def _conditional(logps: Sequence[torch.Tensor]) -> tuple[np.ndarray, float]:
    values = torch.stack(list(logps)).double().numpy()
    total = logsumexp(values, axis=1, keepdims=True)
    return values - total, float(np.exp(total).mean())
