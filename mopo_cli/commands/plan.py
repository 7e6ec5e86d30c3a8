"""`mopo plan`: what is attainable, said in tables before anything is aligned."""

from __future__ import annotations

import time
from dataclasses import asdict

from accelerate.utils import set_seed
from omegaconf import DictConfig
from rich.table import Table

from mopo_cli.algorithms.contract import algorithm_of
from mopo_cli.algorithms.mopo import Mopo
from mopo_cli.base.console import say, show, table
from mopo_cli.base.errors import UserError
from mopo_cli.base.files import write_atomic, write_json
from mopo_cli.base.processes import build_accelerator
from mopo_cli.config import compose
from mopo_cli.config.compose import algorithm_name
from mopo_cli.config.schema import PlanConfig
from mopo_cli.pipeline.train import check
from mopo_cli.planning.attainable import GIVEN_UP, WANTED, Plan, make_plan
from mopo_cli.planning.evidence import check_prompts, gather
from mopo_cli.runs.constraints import out_of_reach
from mopo_cli.runs.directory import claim
from mopo_cli.runs.session import quiet_libraries
from mopo_cli.training.inputs import prepare_inputs


# --------------------------------------------------------------------------------------------- the command
def command(composed: DictConfig) -> int:
    """Predict, print, and write plan.json and a figure."""
    config: PlanConfig = compose.typed(composed, PlanConfig)
    check(config)
    run = claim(config.run.dir, resume=False)
    started = time.perf_counter()
    quiet_libraries()
    set_seed(config.seed)
    algorithm = algorithm_of(config)
    if not isinstance(algorithm, Mopo):
        raise UserError(f"algorithm={algorithm_name(config)}: mopo plan predicts for algorithm=mopo; leave it out")
    inputs = prepare_inputs(config)
    check_prompts(inputs)
    evidence, accuracy = gather(config, build_accelerator(), inputs)
    plan = make_plan(config, algorithm, inputs, evidence, accuracy, started)
    from mopo_cli.planning.figures import draw_plan

    run.path.mkdir(parents=True, exist_ok=True)
    write_atomic(run.config, compose.to_yaml(composed))
    figure = draw_plan(plan, run.figures / "plan.png")
    write_json(run.path / "plan.json", asdict(plan))
    show_plan(plan)
    say(f"plan           {run.path / 'plan.json'}")
    say(f"figure         {figure}")
    return 0


def show_plan(plan: Plan) -> None:
    """Tables for a person: what the objective set asks, what a secondary costs, and what to set."""
    say("")
    show(objective_table(plan))
    if plan.suggestions:
        primary = next(name for name, objective in plan.objectives.items() if objective.role == "primary")
        say(f"\nas much {primary} as possible with one secondary at least so high, the others left free\n")
        show(suggestion_table(plan, primary))
    say("")
    for text in advice(plan):
        say(text)
    say("")


def objective_table(plan: Plan) -> Table:
    """A line per objective."""
    with_exact = any(objective.exact is not None for objective in plan.objectives.values())
    columns = ["threshold", "reference", "predicted", "attainable", "price λ", "verdict"]
    lines = table(["objective", "role"], columns + ["exact"] * with_exact)
    colours = {"binds": "green", "attainable": "green", "never binds": "yellow"}
    for name, objective in plan.objectives.items():
        lines.add_row(
            name,
            objective.role,
            _number(objective.threshold) + "*" * objective.scheduled,
            _number(objective.reference),
            "" if objective.win_rate is None else f"{objective.win_rate:.3f} ± {objective.ci95:.3f}",
            _number(objective.attainable),
            _number(objective.dual, 2),
            objective.verdict and f"[{colours.get(objective.verdict, 'red')}]{objective.verdict}[/]",
            *[_number(objective.exact)] * with_exact,
        )
    return lines


def suggestion_table(plan: Plan, primary: str) -> Table:
    """A line per round threshold of each secondary."""
    with_exact = any(line.exact is not None for line in plan.suggestions)
    columns = ["at least", primary, "price λ", "KL, nats", *["exact"] * with_exact, "set"]
    lines = table(["secondary"], columns)
    last = ""
    for line in plan.suggestions:
        if last and line.secondary != last:
            lines.add_section()
        lines.add_row(
            "" if line.secondary == last else line.secondary,
            _number(line.at_least, 2),
            f"{line.primary:.3f} ± {line.ci95:.3f}",
            _number(line.dual, 2),
            _number(line.kl, 2),
            *[_number(line.exact) or "–"] * with_exact,
            f"[dim]{line.override}[/]",
        )
        last = line.secondary
    return lines


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def advice(plan: Plan) -> list[str]:
    """One line for each thing that a user should know or set."""
    lines = _reach(plan)
    for name, a in plan.objectives.items():
        if a.verdict == "never binds":
            lines.append(f"{name}: {a.threshold:.3f} never binds: {a.win_rate:.3f} is reached without asking for it")
    s = plan.settings
    if plan.feasible:
        loss = ", ".join(f"{name} {a.pessimism:.3f}" for name, a in plan.objectives.items() if a.role == "secondary")
        lines.append(
            f"epsilon     {s.epsilon:.2g} on {s.n_eff:.0f} prompts: constraints are met with that much to spare: {loss}"
        )
    lines.append(_schedule(plan))
    if plan.feasible:
        need = ", ".join(f"{name} {a.pairs_needed}" for name, a in plan.objectives.items())
        lines.append(
            f"pairs       for ±{WANTED:g} from labels at this optimum: {need}; held out are {plan.labelled_pairs}"
        )
        need = ", ".join(f"{name} {a.prompts_needed}" for name, a in plan.objectives.items())
        lines.append(
            f"prompts     for ±{WANTED:g} from samples of the policy (onpolicy.prompts): {need}; held out are "
            f"{plan.heldout_prompts}"
        )
    for front in plan.pairs:
        if front.distance is not None:
            lines.append(f"{front.primary} over {front.secondary}: {front.distance:.3f} from the exact front at most")
    return lines


def _reach(plan: Plan) -> list[str]:
    """Which thresholds are out of reach, and what is attainable instead."""
    if plan.feasible:
        return []
    beyond = {name: a for name, a in plan.objectives.items() if a.verdict == "infeasible"}
    lines = [
        f"{name}: {a.threshold:.3f} is out of reach; at most {a.attainable:.3f} is attainable, alone"
        for name, a in beyond.items()
    ]
    together = {n: a for n, a in plan.objectives.items() if a.verdict == "infeasible together"}
    if together:
        bounds = {name: a.threshold for name, a in together.items() if a.threshold is not None}
        shortfall = None if beyond else plan.shortfall
        lines.append(out_of_reach(bounds, {name: a.attainable for name, a in together.items()}, shortfall))
    return [*lines, "so there is no optimum to predict: lower a threshold"]


def _schedule(plan: Plan) -> str:
    """Whose the thresholds are, and what becomes of those that are nobody's."""
    s, scheduled = plan.settings, [name for name, a in plan.objectives.items() if a.scheduled]
    if not scheduled:
        return "t0          inf: every threshold is your own, and a lagged reference would only move the optimum"
    if s.refreshes:
        return (
            f"* on the schedule; beta={s.beta:g} t0={s.t0:g} gives up at most {GIVEN_UP:.0%} over the run, and each "
            "refresh more than its noise"
        )
    return (
        f"* where the schedule starts, and stays: one refresh is worth its noise after t0={s.t0:g} steps, and steps="
        f"{s.steps}; for another, set objectives.{scheduled[0]}.threshold"
    )
