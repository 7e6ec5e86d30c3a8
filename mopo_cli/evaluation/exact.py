"""Exact win rates, where the data set's world can be listed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import logsumexp

from mopo_cli.base.types import Example, PreferenceData
from mopo_cli.data.assistant import World
from mopo_cli.data.encoder import Encoder
from mopo_cli.data.prepare import unit_numbers
from mopo_cli.data.table import TokenRow
from mopo_cli.evaluation.records import Exact, ExactRates, Models
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
    asked = _asked(data, prompts)
    rows, win_rates = _listed(data, data.world, models.policy.encoder, asked)
    conditioned = models.policy.encoder.conditioned(models.condition)
    policy_rows = _listed(data, data.world, conditioned, asked)[0] if models.condition else rows
    log_policy, mass = _conditional(models.policy.logps(policy_rows))
    with models.policy.swapped(models.initial):
        log_reference, _ = _conditional(kept_logps(None, models.cache, models.policy, rows))
    rates = _rates(names := data.names, log_policy, win_rates, mass, asked)
    bounds = np.array([thresholds.get(name, -math.inf) for name in names[1:]])
    best = oracle.solve(win_rates, log_reference, tau, bounds)
    reached = oracle.policy_win_rates(log_policy, win_rates)
    met = best if best.feasible else None
    return Exact(
        win_rate=rates.win_rate,
        optimum=met and _named(names, met.win_rates),
        gap=met and float(met.win_rates[0] - reached[0]),
        kl=oracle.mean_kl(log_policy, log_reference),
        optimum_kl=met and met.kl,
        optimum_duals=met and _named(names[1:], met.duals),
        duality_gap=met and met.duality_gap,
        feasible=best.feasible,
        attainable=_named(names[1:], best.attainable),
        reference=_named(names, oracle.policy_win_rates(log_reference, win_rates)),
        support_mass=rates.support_mass,
        bounds=rates.bounds,
        prompts=rates.prompts,
        independent_prompts=rates.independent_prompts,
        front=[_named(names, point) for point in exact_front(win_rates)],
        shortfall=best.shortfall,
    )


def exact_front(win_rates: np.ndarray) -> np.ndarray:
    """(m, K) vertices of the front that any policy of the world reaches, for win_rates (N, A, K)."""
    objectives = win_rates.shape[2]
    resolution = {1: 1, 2: 40, 3: 12}.get(objectives, 6)
    points = pareto.front(win_rates, pareto.directions(objectives, resolution))
    return np.unique(points[pareto.nondominated(points)].round(6), axis=0)


def _asked(data: PreferenceData, prompts: int | None) -> list[Example]:
    """At most so many test prompts, spread over them all: neighbours share a topic."""
    count = min(prompts or len(data.test), len(data.test))
    return [data.test[i] for i in np.linspace(0, len(data.test) - 1, count, dtype=int).tolist()]


def _listed(
    data: PreferenceData, world: World, encoder: Encoder, asked: Sequence[Example]
) -> tuple[list[TokenRow], np.ndarray]:
    """Rows of every response of the world to these prompts, and their exact (N, A, K) win rates."""
    texts = [str(example.prompt) for example in asked]
    columns = [world.objectives.index(o.source) for o in data.objectives]
    exact = np.stack([world.win_rates(prompt)[:, columns] for prompt in texts])
    return [encoder.row(prompt, world.responses(prompt)) for prompt in texts], exact


def exact_win_rates(
    policy: Policy, encoder: Encoder, data: PreferenceData, prompts: int | None = None
) -> ExactRates | None:
    """Exact win rates of a policy, conditional on the world's responses; None where the world cannot be listed."""
    if not isinstance(data.world, World):
        return None
    asked = _asked(data, prompts)
    rows, exact = _listed(data, data.world, encoder, asked)
    log_policy, mass = _conditional(policy.logps(rows))
    return _rates(data.names, log_policy, exact, mass, asked)


def _rates(
    names: Sequence[str], log_policy: np.ndarray, win_rates: np.ndarray, mass: np.ndarray, asked: Sequence[Example]
) -> ExactRates:
    """From conditional log-probs (N, A), win rates (N, A, K) and the probabilities (N,) of the condition."""
    won = np.einsum("na,nak->nk", np.exp(log_policy), win_rates)
    least, rest = (mass[:, None] * won).mean(0), float(1.0 - mass.mean())
    return ExactRates(
        win_rate=_named(names, won.mean(0)),
        bounds={name: (float(low), float(low) + rest) for name, low in zip(names, least, strict=True)},
        support_mass=float(mass.mean()),
        prompts=len(asked),
        independent_prompts=len(np.unique(unit_numbers(asked))),
    )


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, (float(v) for v in values), strict=True))


def _conditional(logps: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs (N, A) among the responses that are listed, and the probability (N,) of all of these."""
    values = torch.stack(list(logps)).double().numpy()
    total = np.asarray(logsumexp(values, axis=1, keepdims=True))
    return values - total, np.minimum(np.exp(total[:, 0]), 1.0)
