"""What `mopo eval` writes and shows: evaluation.json, scores.jsonl, samples.jsonl, tables and a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from mopo_cli.base.console import say, show, warn
from mopo_cli.base.files import write_atomic, write_json
from mopo_cli.evaluation.entrants import Unfinished
from mopo_cli.evaluation.figures import draw_evaluation
from mopo_cli.evaluation.records import Evaluation, Exact, Sample, kept
from mopo_cli.judging.scorers import Scale
from mopo_cli.maths.significance import LEVEL, Comparison
from mopo_cli.runs.directory import RunDirectory

if TYPE_CHECKING:
    from mopo_cli.evaluation.records import Evaluated, Measured


SHOWN = 12  # pairs of runs whose comparison is printed; evaluation.json has all of them


def write(
    directory: Path,
    run: RunDirectory | None,
    evaluated: Sequence[Evaluated],
    unfinished: Sequence[Unfinished],
    scales: dict[str, Scale],
    comparisons: Sequence[Comparison],
    lines: Sequence[dict[str, Any]],
) -> None:
    """Everything into `directory`: of one run its own, where its samples are renewed as well."""
    directory.mkdir(parents=True, exist_ok=True)
    shown = [{key: value for key, value in line.items() if key != "place"} for line in lines]
    write_atomic(directory / "scores.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in shown))
    normalisation = {name: asdict(scale) for name, scale in scales.items()}
    draw_evaluation(evaluated, normalisation, directory / "figures")
    if run is None:
        record = {
            "evaluations": [asdict(one) for one in evaluated],
            "unfinished": [asdict(one) for one in unfinished],
            "comparisons": [asdict(one) for one in comparisons],
            "normalisation": normalisation,
        }
    else:
        record = asdict(evaluated[0]) | {"normalisation": normalisation}
        samples = [{"prompt": x["prompt"], "response": x["response"], "scores": x["win_rate"]} for x in lines]
        write_atomic(run.samples, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples))
    write_json(directory / "evaluation.json", record)


# --------------------------------------------------------------------------------------------- console
def show_all(
    evaluated: Sequence[Evaluated],
    unfinished: Sequence[Unfinished],
    scales: dict[str, Scale],
    comparisons: Sequence[Comparison],
    directory: Path,
) -> None:
    """One table of objectives for one entrant, one of entrants for many; then dominance and where everything is."""
    say("")
    if len(evaluated) == 1:
        _show_one(evaluated[0])
    else:
        _show_many(evaluated)
        _show_comparisons(evaluated, comparisons)
    for one in unfinished:
        warn(f"left out: {one.path} ({one.reason})")
    if scales and len(evaluated) == 1:
        fitted = dict.fromkeys(scale.fitted_on for scale in scales.values())
        say(f"scores are in standard deviations from the mean of {'; '.join(fitted)}")
    say(f"\nevaluation     {directory / 'evaluation.json'}")
    say(f"scores         {directory / 'scores.jsonl'}")
    say(f"figure         {directory / 'figures' / 'evaluation.png'}")


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _show_one(one: Evaluated) -> None:
    rows = {**one.objectives, **one.scorers}
    exact = one.oracle is not None
    compared = any(not math.isnan(r.reference_win_rate) for r in rows.values())
    columns = ["objective", "role", "threshold", "win rate", "satisfied"]
    columns += ["against reference"] * compared + ["score", "judge"] + ["exact", "optimum"] * exact
    table = _table(*columns, left=2)
    for name, r in rows.items():
        cells = [escape(name), r.role, "" if r.threshold is None else f"{r.threshold:.3f}"]
        cells += [_interval(r.win_rate, r.win_rate_ci95), kept(r)]
        cells += [_interval(r.reference_win_rate, r.reference_win_rate_ci95)] * compared
        cells += ["" if math.isnan(r.normalised_score) else f"{r.normalised_score:+.2f}", escape(r.judge)]
        if one.oracle is not None:
            found = [of.get(name) for of in (one.oracle.win_rate, one.oracle.optimum)]
            cells += ["" if value is None else f"{value:.3f}" for value in found]
        table.add_row(*cells)
    show(table)
    _explain_doubt(rows.values())
    words = one.wording
    text = f"{one.prompts} prompts, {one.responses} responses of {words.words:.1f} words; distinct words "
    text += f"{words.distinct_1:.3f}, pairs of words {words.distinct_2:.3f}"
    if one.reference_wording:
        before = one.reference_wording
        text += f" (reference: {before.words:.1f} words, {before.distinct_1:.3f}, {before.distinct_2:.3f})"
    say(text)
    if one.kl is not None:
        say(f"KL to the reference {one.kl:.3f} nats" + (f" (exact {one.oracle.kl:.3f})" if one.oracle else ""))
    if one.cut_off:
        say(f"{one.cut_off:.1%} of the samples had not ended at sampling.max_new_tokens")


def _show_many(evaluated: Sequence[Evaluated]) -> None:
    first = {**evaluated[0].objectives, **evaluated[0].scorers}
    table = _table("", *(escape(name) for name in first), "KL", "words")
    for one in evaluated:
        rows = {**one.objectives, **one.scorers}
        cells = [_cell(rows[name]) for name in first]
        kl = "" if one.kl is None else f"{one.kl:.3f}"
        table.add_row(escape(one.name), *cells, kl, f"{one.wording.words:.1f}")
    show(table)
    asked = {
        name: sorted({value for one in evaluated if (value := one.objectives[name].threshold) is not None})
        for name in evaluated[0].objectives
    }
    told = [f"{name} {' / '.join(f'{value:.3f}' for value in values)}" for name, values in asked.items() if values]
    exact = any(r.exact_win_rate is not None for one in evaluated for r in one.objectives.values())
    text = "exact win rates of the objectives" if exact else "win rates against the data's responses, 95 % intervals"
    say(text + (f"; yes, no: whether the threshold is kept ({', '.join(told)})" if told else ""))
    _explain_doubt([r for one in evaluated for r in one.objectives.values()])


def _cell(r: Measured) -> str:
    if math.isnan(r.win_rate):
        return "" if math.isnan(r.score) else _interval(r.score, r.score_ci95)
    rate = _interval(r.win_rate, r.win_rate_ci95) if r.exact_win_rate is None else f"{r.exact_win_rate:.3f}"
    return f"{rate} {kept(r)}".rstrip()


def _interval(value: float, interval: tuple[float, float]) -> str:
    return "" if math.isnan(value) else f"{value:.3f} ± {(interval[1] - interval[0]) / 2:.3f}"


def _explain_doubt(rows: Any) -> None:
    if any(r.satisfied_with_confidence == "undecided" for r in rows):
        say("?: the 95 % interval holds the threshold; more evaluation.prompts decide it")


def _show_comparisons(evaluated: Sequence[Evaluated], comparisons: Sequence[Comparison]) -> None:
    found = [c for c in comparisons if c.dominates]
    level = f"(paired by prompt; p < {LEVEL:g} after Holm's adjustment for {len(comparisons)} pairs)"
    if not found:
        say(f"no run dominates another {level}")
        return
    say(f"dominance {level}")
    for c in found[:SHOWN]:
        worse = c.second if c.dominates == c.first else c.first
        sign = 1 if c.dominates == c.first else -1
        gaps = [f"{name} {sign * gap:+.3f} (p {_p(c.p[name])})" for name, gap in c.difference.items()]
        say(f"  {c.dominates} dominates {worse}: {', '.join(gaps)}")
    if len(found) > SHOWN:
        say(f"  and {len(found) - SHOWN} more in evaluation.json")


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def write_samples(run: RunDirectory, samples: Sequence[Sample]) -> None:
    write_atomic(run.samples, "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples))


def show_results(evaluation: Evaluation, exact: Exact | None, run: RunDirectory) -> None:
    """The final table and where everything is. A run of which no threshold was asked has no columns about them."""
    asked = len(evaluation.objectives) == 1 or any(r.threshold is not None for r in evaluation.objectives.values())
    columns = ["objective", "role", *(["threshold"] if asked else []), "win rate", *(["satisfied"] if asked else [])]
    columns += ["exact", *(["optimum"] if asked else [])] if exact else []
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("objective", "role") else "right", no_wrap=True)
    for name, r in evaluation.objectives.items():
        half = (r.win_rate_ci95[1] - r.win_rate_ci95[0]) / 2
        cells = {
            "objective": name,
            "role": r.role,
            "threshold": "" if r.threshold is None else f"{r.threshold:.3f}",
            "win rate": f"{r.win_rate:.3f} ± {half:.3f}",
            "satisfied": kept(r),
            "exact": f"{exact.win_rate[name]:.3f}" if exact else "",
            "optimum": f"{exact.optimum[name]:.3f}" if exact else "",
        }
        table.add_row(*(cells[column] for column in columns))
    say("")
    show(table)
    if any(r.satisfied_with_confidence == "undecided" for r in evaluation.objectives.values()):
        say("?: the 95 % interval holds the threshold; more evaluation.prompts decide it")
    kl = f"KL to the reference {evaluation.kl:.3f} nats"
    best = f", optimum {exact.optimum_kl:.3f}" if exact and asked else ""
    say(kl + (f" (exact {exact.kl:.3f}{best})\n" if exact else "\n"))
    say(f"run directory  {run.path}")
    say(f"summary        {run.summary}")
    say(f"model          {run.model}")
    for path in sorted(run.figures.glob("*.png")):
        say(f"figure         {path}")
    if run.report.exists():
        say(f"report         {run.report}")
