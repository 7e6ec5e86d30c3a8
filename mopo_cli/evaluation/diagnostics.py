"""Signs that a run is not what its user thinks, as sentences that name the numbers and the setting to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mopo_cli.base.types import Objective

MIN_EFFECTIVE = 50.0  # effective samples below which a log-expectation is mostly noise
DISAGREEMENT = 0.03  # between the run's own estimate and the evaluation, beyond the evaluation's own noise
NO_MOVEMENT = 1e-3  # nats of KL
COLLAPSE = 0.1  # of the first entropy
AGGRESSIVE = 5.0  # a multiplier above this weighs its constraint far more than the primary objective
IDLE = 1e-3  # a multiplier below this does nothing
LAG = 0.1  # of b_j behind R_j
SURRENDER = 0.02  # that the schedule took off b_j
ASTRAY = 0.1  # share of samples that the data never show
CHANCE = 0.55  # accuracy of a preference model that hardly beats a coin


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the signs are read from. J-long sequences follow the secondaries."""

    objectives: Sequence[Objective]
    tau: float
    beta: float
    t0: float
    steps: int
    batch_size: int
    prompts: int  # of one measurement on samples
    duals: Sequence[Sequence[float]]  # one entry a logged step
    thresholds: Sequence[float | None]
    n_eff: Sequence[float]  # one entry a logged step
    estimator: str | None  # None: of a method that follows no win rates, and holds no constraint
    kl: float
    entropy: Sequence[float]  # one entry a measurement
    off_support: float  # share of the last measurement's samples that lie outside the data's support
    attainable: Sequence[float]  # empty where it is not known
    infeasible: Sequence[str]
    estimated: Mapping[str, float]
    evaluated: Mapping[str, float]
    noise: Mapping[str, float]  # half the width of the evaluation's 95 % interval
    heldout_accuracy: Mapping[str, float]

    @property
    def secondaries(self) -> list[str]:
        return [objective.name for objective in self.objectives[1:]]

    @property
    def bounds(self) -> dict[str, float]:
        return {name: b for name, b in zip(self.secondaries, self.thresholds, strict=True) if b is not None}

    @property
    def scheduled(self) -> list[str]:
        return [objective.name for objective in self.objectives[1:] if objective.threshold is None]

    @property
    def refreshed(self) -> bool:
        return self.t0 < self.steps


def warnings(facts: RunFacts) -> list[str]:
    """Every sign that this run shows, in the order a user should act on them; those of no harm begin with "note"."""
    signs = (
        _infeasible,
        _missed,
        _no_movement,
        _run_away,
        _collapse,
        _astray,
        _small_sample,
        _never_refreshed,
        _schedule_astray,
        _optimistic,
        _blind_judge,
        _no_conflict,
    )
    if facts.estimator is None:
        signs = (_missed, _no_movement, _blind_judge)
    return [message for sign in signs for message in sign(facts)]


def unattainable(
    objectives: Sequence[Objective], thresholds: Sequence[float], attainable: Sequence[float]
) -> list[str]:
    """Before training: thresholds above what the reference's own samples reach at best."""
    return [
        f"objectives.{o.name}.threshold={b:g} looks out of reach: the best of the reference's samples for each prompt "
        f"win {best:.2f} on average"
        for o, b, best in zip(objectives[1:], thresholds, attainable, strict=False)
        if b > best
    ]


def _infeasible(facts: RunFacts) -> list[str]:
    best = dict(zip(facts.secondaries, facts.attainable, strict=False))
    wanted = facts.bounds
    return [
        f"infeasible: the multiplier of {name} grew to its bound while its win rate stayed below {wanted[name]:.3f}; "
        + _what_is_attainable(wanted[name], best.get(name))
        for name in facts.infeasible
    ]


def _what_is_attainable(wanted: float, best: float | None) -> str:
    if best is None:
        return "lower this threshold or another one"
    if best <= wanted:
        return f"about {best:.2f} is attainable: lower this threshold"
    return (
        f"about {best:.2f} is attainable for it alone: lower another threshold, or train better (steps, a larger model)"
    )


def _missed(facts: RunFacts) -> list[str]:
    return [
        f"{name}: the win rate {facts.evaluated[name]:.3f} ± {facts.noise[name]:.3f} is below the threshold {b:.3f}"
        for name, b in facts.bounds.items()
        if name not in facts.infeasible and facts.evaluated[name] + facts.noise[name] < b
    ]


def _no_movement(facts: RunFacts) -> list[str]:
    if abs(facts.kl) >= NO_MOVEMENT:
        return []
    return [
        f"the policy did not move (KL to the reference {facts.kl:.1e} nats): tau={facts.tau:g} is too large, "
        f"or steps={facts.steps} too few"
    ]


def _run_away(facts: RunFacts) -> list[str]:
    """KL(pi || pi_ref) <= (E_pi s - E_ref s) / tau at the optimum, and s_lambda averages half its range under mu."""
    prices = facts.duals[-1] if facts.duals else ()
    most = (1.0 + sum(prices)) / (2.0 * facts.tau)
    if facts.refreshed or facts.kl <= most:
        return []
    return [
        f"KL to the reference {facts.kl:.1f} nats is more than any optimum of (P) has at tau={facts.tau:g} (at most "
        f"{most:.1f}): training was unstable; lower optimiser.learning_rate, or take more prompts a step (batch_size)"
    ]


def _collapse(facts: RunFacts) -> list[str]:
    if len(facts.entropy) < 2 or facts.entropy[-1] > COLLAPSE * facts.entropy[0]:
        return []
    last = facts.duals[-1] if facts.duals else ()
    pressed = [name for name, dual in zip(facts.secondaries, last, strict=False) if dual > AGGRESSIVE]
    cause = f"the threshold of {', '.join(pressed)} is too aggressive" if pressed else f"tau={facts.tau:g} is too small"
    return [f"entropy collapse: {facts.entropy[0]:.2f} to {facts.entropy[-1]:.2f} nats a response; {cause}"]


def _astray(facts: RunFacts) -> list[str]:
    if facts.off_support <= ASTRAY:
        return []
    return [
        f"{facts.off_support:.0%} of the policy's samples are less likely under the reference than nearly all of the "
        f"data's responses; nobody has judged such text, so they are left out of the estimates: train the reference "
        f"longer (sft.steps), or raise tau={facts.tau:g}"
    ]


def _small_sample(facts: RunFacts) -> list[str]:
    known = [n for n in facts.n_eff if n is not None and math.isfinite(n)]
    if not known or median(known) >= MIN_EFFECTIVE:
        return []
    n = median(known)
    factor = MIN_EFFECTIVE / max(n, 1.0)
    advice = {
        "offline": f"batch_size={math.ceil(facts.batch_size * factor)} or more would do",
        "heldout": f"hold out {math.ceil(factor)} times the pairs, or use algorithm.estimator=onpolicy",
        "onpolicy": f"onpolicy.prompts={math.ceil(facts.prompts * factor)} or more would do",
    }[str(facts.estimator)]
    return [
        f"the {facts.estimator} estimate of R_j rests on {n:.0f} effective samples, so lambda and chi are noisy: "
        + advice
    ]


def _never_refreshed(facts: RunFacts) -> list[str]:
    if facts.refreshed:
        return []
    messages = []
    if math.isfinite(facts.t0):
        messages.append(f"t0={facts.t0:g} is not below steps={facts.steps}: the reference is never refreshed")
    if facts.scheduled:
        messages.append(
            f"note: {', '.join(facts.scheduled)}: no threshold and no refresh, so b stays at beta / 2 = "
            f"{facts.beta * 0.5:.3f}, about as good as the data's responses"
        )
    return messages


def _schedule_astray(facts: RunFacts) -> list[str]:
    """After refreshes: a b_j that lags its win rate, or one that followed it down."""
    messages = []
    for name, b in facts.bounds.items():
        if name not in facts.scheduled or not facts.refreshed:
            continue
        if facts.estimated[name] - b > LAG:
            messages.append(
                f"{name}: b={b:.3f} does not follow the win rate {facts.estimated[name]:.3f}: beta={facts.beta:g} is "
                f"too small, or t0={facts.t0:g} too long, for {facts.steps} steps"
            )
        if b < 0.5 * facts.beta - SURRENDER:
            messages.append(
                f"{name}: the schedule lowered b from {0.5 * facts.beta:.3f} to {b:.3f}, as the win rate fell: set "
                f"objectives.{name}.threshold to hold it, or raise beta={facts.beta:g} or t0={facts.t0:g}"
            )
    return messages


def _no_conflict(facts: RunFacts) -> list[str]:
    idle = [name for j, name in enumerate(facts.secondaries) if facts.duals and all(d[j] < IDLE for d in facts.duals)]
    return [f"note: lambda of {name} was 0 throughout: this constraint does not bind here" for name in idle]


def _optimistic(facts: RunFacts) -> list[str]:
    return [
        f"{name}: the run's own estimate {estimate:.3f} and the evaluation {facts.evaluated[name]:.3f} disagree; "
        "trust the evaluation"
        for name, estimate in facts.estimated.items()
        if abs(estimate - facts.evaluated[name]) > max(DISAGREEMENT, facts.noise[name])
    ]


def _blind_judge(facts: RunFacts) -> list[str]:
    return [
        f"{name}: the preference model orders held-out pairs right in {value:.0%} of cases, hardly better than a coin; "
        "its estimates mean little"
        for name, value in facts.heldout_accuracy.items()
        if value < CHANCE
    ]
