"""What evaluation writes and shows: evaluation.json, scores.jsonl, samples.jsonl, tables and a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from mopo_cli.base.console import say, show, warn
from mopo_cli.base.files import write_atomic, write_json
from mopo_cli.evaluation.compare import Compared
from mopo_cli.evaluation.records import Evaluation, Exact, Measured, ScoredSample
from mopo_cli.maths.significance import LEVEL, WORSE, Comparison
from mopo_cli.runs.constraints import OWN_MARK, OWN_NOTE, asked_of, out_of_reach
from mopo_cli.runs.directory import RunDirectory

MOSTLY = 0.5  # share of samples that did not end, above which they are no responses
SHOWN = 12  # pairs of runs whose comparison is printed; evaluation.json has all of them


# --------------------------------------------------------------------------------------------- files
def write(directory: Path, run: RunDirectory | None, compared: Compared) -> None:
    """Everything into `directory`: of one run its own, where its samples are renewed as well."""
    from mopo_cli.evaluation.figures import draw_evaluation  # here, since a training needs no charts before its end

    directory.mkdir(parents=True, exist_ok=True)
    evaluations = compared.evaluations
    write_lines(directory / "scores.jsonl", [asdict(sample) for e in evaluations for sample in e.samples])
    normalisation = {name: asdict(scale) for name, scale in compared.scales.items()}
    draw_evaluation(evaluations, normalisation, directory / "figures")
    if run is None:
        record = {
            "evaluations": [e.numbers() for e in evaluations],
            "unfinished": [asdict(entrant) for entrant in compared.unfinished],
            "comparisons": [asdict(comparison) for comparison in compared.comparisons],
        }
    else:
        record = evaluations[0].numbers()
        write_samples(run, evaluations[0].samples)
    write_json(directory / "evaluation.json", {**record, "normalisation": normalisation})


def write_samples(run: RunDirectory, samples: Sequence[ScoredSample]) -> None:
    write_lines(run.samples, [sample.line() for sample in samples])


def write_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


# --------------------------------------------------------------------------------------------- one entrant
def show_evaluation(evaluation: Evaluation, columns: Sequence[str]) -> None:
    """The table of one entrant's objectives and scorers, with these columns."""
    table, set_by_itself = _table(columns, ("objective", "role")), _set_by_itself(evaluation)
    for name, measured in evaluation.measured.items():
        cells = _cells(name, measured, evaluation.oracle, own=name in set_by_itself)
        table.add_row(*(cells[column] for column in columns))
    show(table)
    _explain_doubt(evaluation.measured.values())
    if set_by_itself:
        say(OWN_NOTE)
    if (oracle := evaluation.oracle) and not oracle.feasible:
        bounds = {n: m.threshold for n, m in evaluation.objectives.items() if m.threshold is not None}
        say(f"no optimum: {out_of_reach(bounds, oracle.attainable, oracle.shortfall)}")
    say(evaluation.asked + _conditional_on(evaluation))


def _conditional_on(evaluation: Evaluation) -> str:
    """What exact numbers are conditional on; nothing where there are none."""
    mass = evaluation.support_mass
    return "" if mass is None else f"; exact: of the world's responses, {mass:.1%} of what the policy says"


def _set_by_itself(evaluation: Evaluation) -> set[str]:
    """Objectives whose threshold is the run's own, as no user has asked for one."""
    config = RunDirectory(Path(evaluation.path)).config
    asked = asked_of(RunDirectory(Path(evaluation.path)).settings()) if config.is_file() else {}
    measured = evaluation.objectives.items()
    return {name for name, m in measured if m.threshold is not None and name in asked and asked[name] is None}


def _optimum(oracle: Exact | None, bounded: bool = True) -> list[str]:
    """The columns of exact numbers: where thresholds are out of reach, what is attainable takes the optimum's place."""
    return ["exact", *["optimum" if oracle.feasible else "attainable"] * bounded] if oracle else []


def _cells(name: str, measured: Measured, oracle: Exact | None, own: bool) -> dict[str, str]:
    return {
        "objective": escape(name),
        "role": measured.role,
        "threshold": _number(measured.threshold) + OWN_MARK * own,
        "win rate": _interval(measured.win_rate, measured.win_rate_ci95),
        "satisfied": _satisfied(measured),
        "against reference": _interval(measured.reference_win_rate, measured.reference_win_rate_ci95),
        "score": "" if math.isnan(measured.normalised_score) else f"{measured.normalised_score:+.2f}",
        "judge": escape(measured.judge),
        "exact": _number(oracle.win_rate.get(name)) if oracle else "",
        "optimum": _number((oracle.optimum or {}).get(name)) if oracle else "",
        "attainable": _number(oracle.attainable.get(name)) if oracle else "",
    }


def show_results(evaluation: Evaluation, run: RunDirectory) -> None:
    """The final table of a run and where everything is. Where no threshold was asked it has no columns about them."""
    oracle, objectives = evaluation.oracle, evaluation.objectives.values()
    bounded = len(objectives) == 1 or any(measured.threshold is not None for measured in objectives)
    columns = ["objective", "role", *["threshold"] * bounded, "win rate", *["satisfied"] * bounded]
    columns += _optimum(oracle, bounded)
    say("")
    show_evaluation(evaluation, columns)
    known = oracle is not None and oracle.optimum_kl is not None and bounded
    _say_kl(evaluation, f", optimum {oracle.optimum_kl:.3f}" if known else "")  # type: ignore[union-attr]
    say("")
    say(f"run directory  {run.path}")
    say(f"summary        {run.summary}")
    say(f"model          {run.model}")
    for path in sorted(run.figures.glob("*.png")):
        say(f"figure         {path}")
    if run.report.exists():
        say(f"report         {run.report}")


def _show_one(evaluation: Evaluation) -> None:
    words, before = evaluation.wording, evaluation.reference_wording
    compared = any(not math.isnan(measured.reference_win_rate) for measured in evaluation.measured.values())
    columns = ["objective", "role", "threshold", "win rate", "satisfied", *["against reference"] * compared]
    columns += ["score", "judge", *_optimum(evaluation.oracle)]
    show_evaluation(evaluation, columns)
    text = f"{evaluation.responses} responses of {words.words:.1f} words; distinct words "
    text += f"{words.distinct_1:.3f}, pairs of words {words.distinct_2:.3f}"
    if before:
        text += f" (reference: {before.words:.1f} words, {before.distinct_1:.3f}, {before.distinct_2:.3f})"
    say(text)
    _say_kl(evaluation)
    if told := unended(evaluation.cut_off):
        warn(told)
    elif evaluation.cut_off:
        say(f"{evaluation.cut_off:.1%} of the samples had not ended at sampling.max_new_tokens")


def unended(share: float | None) -> str | None:
    """What it means that most samples did not end; None where they did."""
    if share is None or share <= MOSTLY:
        return None
    return (
        f"{share:.0%} of the samples were cut off before they ended: what was measured are beginnings of responses. "
        "Give them more room (sampling.max_new_tokens, model.max_length), or see that the model's end of turn is known "
        "(generation_config.json, the chat template)"
    )


def _say_kl(evaluation: Evaluation, optimum: str = "") -> None:
    if evaluation.kl is not None:
        exact = f" (exact {evaluation.oracle.kl:.3f}{optimum})" if evaluation.oracle else ""
        say(f"KL to the reference {evaluation.kl:.3f} nats{exact}")


# --------------------------------------------------------------------------------------------- many entrants
def show_compared(compared: Compared, directory: Path) -> None:
    """One table of objectives for one entrant, one of entrants for many; then dominance and where everything is."""
    evaluations, scales = compared.evaluations, compared.scales
    say("")
    if len(evaluations) == 1:
        _show_one(evaluations[0])
    else:
        _show_many(evaluations)
        _show_comparisons(compared.comparisons)
    for text in dict.fromkeys(doubt for e in evaluations for doubt in e.doubts):
        warn(text)
    for entrant in compared.unfinished:
        warn(f"left out: {entrant.path} ({entrant.reason})")
    if scales and len(evaluations) == 1:
        fitted = dict.fromkeys(scale.fitted_on for scale in scales.values())
        say(f"scores are in standard deviations from the mean of {'; '.join(fitted)}")
    say(f"\nevaluation     {directory / 'evaluation.json'}")
    say(f"scores         {directory / 'scores.jsonl'}")
    say(f"figure         {directory / 'figures' / 'evaluation.png'}")


def _show_many(evaluations: Sequence[Evaluation]) -> None:
    names = list(evaluations[0].measured)
    table = _table(["", *map(escape, names), "KL", "words"], ("",))
    for e in evaluations:
        cells = [_rate_or_score(e.measured[name]) for name in names]
        table.add_row(escape(e.name), *cells, _number(e.kl), f"{e.wording.words:.1f}")
    show(table)
    objectives = [e.objectives for e in evaluations]
    thresholds = {name: {of[name].threshold for of in objectives} - {None} for name in objectives[0]}
    listed = [f"{name} {' / '.join(map(_number, sorted(b)))}" for name, b in thresholds.items() if b]  # type: ignore[type-var]
    exact = any(measured.exact_win_rate is not None for of in objectives for measured in of.values())
    text = "exact win rates of the objectives" if exact else "win rates against the data's responses, 95 % intervals"
    text += f", on {evaluations[0].asked}"
    say(text + (f"; yes, no: whether the threshold is kept ({', '.join(listed)})" if listed else ""))
    _explain_doubt([measured for of in objectives for measured in of.values()])


def _rate_or_score(measured: Measured) -> str:
    if math.isnan(measured.win_rate):
        return _interval(measured.score, measured.score_ci95)
    exact = measured.exact_win_rate
    rate = _interval(measured.win_rate, measured.win_rate_ci95) if exact is None else _number(exact)
    return f"{rate} {_satisfied(measured)}".rstrip()


def _show_comparisons(comparisons: Sequence[Comparison]) -> None:
    decided = [c for c in comparisons if c.dominates]
    level = f"(better under one objective, under none worse by {WORSE:g}; paired by prompt, p < {LEVEL:g} after Holm's"
    level += f" adjustment for {len(comparisons)} pairs)"
    if not decided:
        say(f"no run dominates another {level}")
        return
    say(f"dominance {level}")
    for c in decided[:SHOWN]:
        worse, sign = (c.second, 1) if c.dominates == c.first else (c.first, -1)
        gaps = [f"{name} {sign * gap:+.3f} (p {_p(c.p[name])})" for name, gap in c.difference.items()]
        say(f"  {c.dominates} dominates {worse}: {', '.join(gaps)}")
    if len(decided) > SHOWN:
        say(f"  and {len(decided) - SHOWN} more in evaluation.json")


# --------------------------------------------------------------------------------------------- cells
def _table(columns: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(value: float, interval: tuple[float, float]) -> str:
    half = (interval[1] - interval[0]) / 2
    return "" if math.isnan(value) else f"{value:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def _satisfied(measured: Measured) -> str:
    """Whether the threshold is kept; with a question mark where that is undecided."""
    if measured.satisfied is None:
        return ""
    doubt = "?" if measured.satisfied_with_confidence == "undecided" else ""
    return f"[green]yes{doubt}[/]" if measured.satisfied else f"[red]no{doubt}[/]"


def _explain_doubt(rows: Iterable[Measured]) -> None:
    undecided = [measured for measured in rows if measured.satisfied_with_confidence == "undecided"]
    if any(not math.isnan(measured.margin) for measured in undecided):
        say("?: undecided, the 95 % interval holds the threshold; more test prompts would tell")
    elif undecided:
        say("?: undecided, too few test prompts for an interval")


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
