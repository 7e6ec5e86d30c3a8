"""Signs that a run is not what its user thinks, as sentences that name the numbers and the setting to change."""

from __future__ import annotations

import math
from statistics import median

from mopo_cli.evaluation.records import LIKELY
from mopo_cli.evaluation.show import unended
from mopo_cli.pipeline.outcome import Outcome
from mopo_cli.runs.constraints import out_of_reach

MIN_EFFECTIVE = 50.0  # effective samples below which a log-expectation is mostly noise
DISAGREEMENT = 0.03  # between the run's own estimate and the evaluation, beyond the evaluation's own noise
NO_MOVEMENT = 1e-3  # nats of KL
COLLAPSE = 0.1  # of the first entropy
AGGRESSIVE = 5.0  # a multiplier above this weighs its constraint far more than the primary objective
LAG = 0.1  # of b_j behind R_j
SURRENDER = 0.02  # that the schedule took off b_j
ASTRAY = 0.1  # share of samples that the data never show
CHANCE = 0.55  # accuracy of a preference model that hardly beats a coin


def warnings(run: Outcome) -> list[str]:
    """Every sign that this run shows, in the order a user should act on them; those of no harm begin with "note"."""
    signs = (
        _infeasible,
        _missed,
        _no_optimum,
        _no_movement,
        _run_away,
        _collapse,
        _astray,
        _cut_off,
        _small_sample,
        _never_refreshed,
        _schedule_astray,
        _optimistic,
        _blind_judge,
        _no_conflict,
    )
    if run.aligned.estimator is None:
        signs = (_missed, _no_optimum, _no_movement, _cut_off, _blind_judge)
    return [*(message for sign in signs for message in sign(run)), *run.evaluation.doubts]


def _infeasible(run: Outcome) -> list[str]:
    bounds = {name: run.bounds[name] for name in run.aligned.infeasible}
    return [
        f"infeasible: the multiplier of {name} grew to its bound while the lower bound of its win rate stayed below "
        f"{b:.3f}; " + _what_is_attainable(b, run.attainable.get(name))
        for name, b in bounds.items()
    ]


def _what_is_attainable(bound: float, best: float | None) -> str:
    if best is None:
        return "lower this threshold or another one"
    if best <= bound:
        return f"about {best:.2f} is attainable: lower this threshold"
    return (
        f"about {best:.2f} is attainable for it alone: lower another threshold, or train better (steps, a larger model)"
    )


def _missed(run: Outcome) -> list[str]:
    return [
        f"{c.name}: the {c.found} is below the threshold {c.threshold:.3f}" + _unheld(run, c.name)
        for c in run.constraints
        if c.name not in run.aligned.infeasible and c.verdict == "no"
    ]


def _unheld(run: Outcome, name: str) -> str:
    """Of a missed threshold: that its multiplier did nothing about it."""
    estimate = run.aligned.estimated.get(name)
    if name not in run.idle or estimate is None:
        return ""
    return f"; its multiplier stayed at 0 (the run's own estimate: {estimate:.3f}), so nothing held it"


def _no_optimum(run: Outcome) -> list[str]:
    oracle = run.evaluation.oracle
    if oracle is None or oracle.feasible or run.aligned.infeasible:
        return []
    return ["no policy keeps these thresholds: " + out_of_reach(run.bounds, oracle.attainable, oracle.shortfall)]


def _no_movement(run: Outcome) -> list[str]:
    if abs(run.kl) >= NO_MOVEMENT:
        return []
    return [
        f"the policy did not move (KL to the reference {run.kl:.1e} nats): tau={run.config.tau:g} is too large, "
        f"or steps={run.config.steps} too few"
    ]


def _run_away(run: Outcome) -> list[str]:
    """KL(pi || pi_ref) <= (E_pi s - E_ref s) / tau at the optimum, and s_lambda averages half its range under mu."""
    tau = run.config.tau
    most = (1.0 + sum(run.last_duals)) / (2.0 * tau)
    if run.refreshed or run.kl <= most:
        return []
    return [
        f"KL to the reference {run.kl:.1f} nats is more than any optimum of (P) has at tau={tau:g} (at most "
        f"{most:.1f}): training was unstable; lower optimiser.learning_rate, or take more prompts a step (batch_size)"
    ]


def _collapse(run: Outcome) -> list[str]:
    entropy, tau = run.aligned.entropy, run.config.tau
    if len(entropy) < 2 or entropy[-1] > COLLAPSE * entropy[0]:
        return []
    pressed = [name for name, dual in zip(run.secondaries, run.last_duals, strict=False) if dual > AGGRESSIVE]
    cause = f"the threshold of {', '.join(pressed)} is too aggressive" if pressed else f"tau={tau:g} is too small"
    return [f"entropy collapse: {entropy[0]:.2f} to {entropy[-1]:.2f} nats a response; {cause}"]


def _astray(run: Outcome) -> list[str]:
    share = run.aligned.off_support
    if share <= ASTRAY:
        return []
    return [
        f"{share:.0%} of the policy's samples are less likely under the reference than nearly all of the "
        f"data's responses; nobody has judged such text, so they are left out of the estimates: train the reference "
        f"longer (sft.steps), or raise tau={run.config.tau:g}"
    ]


def _cut_off(run: Outcome) -> list[str]:
    told = unended(run.evaluation.cut_off)
    return [told] if told else []


def _small_sample(run: Outcome) -> list[str]:
    logged = [line["n_eff"] for line in run.history if "n_eff" in line]
    finite = [n for n in logged if n is not None and math.isfinite(n)]
    if not finite or median(finite) >= MIN_EFFECTIVE:
        return []
    n = median(finite)
    advice = _what_would_do(run, MIN_EFFECTIVE / max(n, 1.0))
    return [
        f"the {run.aligned.estimator} estimate of R_j rests on {n:.0f} effective samples, so lambda and chi are noisy: "
        + advice
    ]


def _what_would_do(run: Outcome, factor: float) -> str:
    """A sample so many times as large, as far as the data have one."""
    train, heldout = run.rows["train"], run.rows["heldout"]
    if run.aligned.estimator == "offline":
        wanted = math.ceil(run.config.batch_size * factor)
        enough = f"batch_size={wanted} or more would do"
        return enough if wanted <= train else f"{enough}, and there are {train} training rows: give more"
    if run.aligned.estimator == "heldout":
        other = "or use algorithm.estimator=onpolicy"
        if heldout * factor < train:
            return f"hold out {math.ceil(factor)} times the pairs (dataset.heldout_fraction), {other}"
        return f"{math.ceil(factor)} times the held-out pairs would do, and the data are too few: give more, {other}"
    wanted = math.ceil(run.measured_prompts * factor)
    if wanted <= heldout:
        return f"onpolicy.prompts={wanted} or more would do"
    return (
        f"{wanted} held-out rows or more would do, and there are {heldout}: give more rows, or raise "
        "dataset.heldout_fraction"
    )


def _never_refreshed(run: Outcome) -> list[str]:
    if run.refreshed:
        return []
    t0, steps, messages = run.config.t0, run.config.steps, []
    if math.isfinite(t0):
        messages.append(f"t0={t0:g} is not below steps={steps}: the reference is never refreshed")
    if run.scheduled:
        messages.append(
            f"note: {', '.join(run.scheduled)}: no threshold and no refresh, so b stays at beta / 2 = "
            f"{run.config.beta * 0.5:.3f}, about as good as the data's responses"
        )
    return messages


def _schedule_astray(run: Outcome) -> list[str]:
    """After refreshes: a b_j that lags its win rate, or one that followed it down."""
    beta, t0, messages = run.config.beta, run.config.t0, []
    for name, b in run.bounds.items():
        if name not in run.scheduled or not run.refreshed:
            continue
        estimate = run.aligned.estimated[name]
        if estimate - b > LAG:
            messages.append(
                f"{name}: b={b:.3f} does not follow the win rate {estimate:.3f}: beta={beta:g} is "
                f"too small, or t0={t0:g} too long, for {run.config.steps} steps"
            )
        if b < 0.5 * beta - SURRENDER:
            messages.append(
                f"{name}: the schedule lowered b from {0.5 * beta:.3f} to {b:.3f}, as the win rate fell: set "
                f"objectives.{name}.threshold to hold it, or raise beta={beta:g} or t0={t0:g}"
            )
    return messages


def _no_conflict(run: Outcome) -> list[str]:
    verdicts = {constraint.name: constraint.verdict for constraint in run.constraints}
    said = {"undecided": "by the run's own estimate this constraint does not bind; the evaluation leaves it open"}
    return [
        f"note: lambda of {name} was 0 throughout: "
        + said.get(verdicts.get(name, ""), "this constraint does not bind here")
        for name in run.idle
        if verdicts.get(name) != "no"
    ]


def _optimistic(run: Outcome) -> list[str]:
    found, mass = {}, run.evaluation.support_mass
    for name, measured in run.evaluation.objectives.items():
        exact = measured.exact_win_rate if mass is None or mass >= LIKELY else None
        found[name] = (measured.win_rate, measured.margin, "") if exact is None else (exact, 0.0, "exact ")
    return [
        f"{name}: the run's own estimate {estimate:.3f} and the {exact}evaluation {value:.3f} disagree; "
        "trust the evaluation"
        for name, estimate in run.aligned.estimated.items()
        for value, margin, exact in (found[name],)
        if abs(estimate - value) > DISAGREEMENT and abs(estimate - value) > margin  # never where that is unknown
    ]


def _blind_judge(run: Outcome) -> list[str]:
    return [
        f"{name}: the preference model orders held-out pairs right in {value:.0%} of cases, hardly better than a coin; "
        "its estimates mean little"
        for name, value in run.heldout_accuracy.items()
        if value < CHANCE
    ]
