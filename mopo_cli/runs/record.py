"""What a report knows of a run: everything is read from its directory, and nothing there is trusted to be whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json, read_lines
from mopo_cli.base.text import flat, shown
from mopo_cli.config.compose import option_name
from mopo_cli.runs.directory import RunDirectory

if TYPE_CHECKING:
    from mopo_cli.maths.pareto import Prompts

METHOD = "algorithm"  # the setting that names a run's method
NO_SETTING = ("run.", "sweep.", "logger.", "experiment.", "debug", "cache", "log_every", "checkpoint_every")


@dataclass(frozen=True, slots=True)
class Result:
    """One objective of a run: what was asked, and what was reached where the run has ended."""

    role: str
    threshold: float | None
    worst: float
    win_rate: float | None = None  # on samples
    ci95: tuple[float, float] | None = None
    estimated: float | None = None  # by the run itself, while it trained
    satisfied: bool | None = None
    judge: str | None = None
    dual: float | None = None
    exact: float | None = None
    optimum: float | None = None
    reference: float | None = None  # of the policy that the run started from, exact


class Answer(NamedTuple):
    """One sampled response, with its win rates against the data's responses."""

    prompt: str
    response: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """A run directory as the report shows it. `objectives` has the primary first."""

    id: str
    path: Path
    state: str
    settings: Mapping[str, Any]  # dotted keys
    varying: Mapping[str, str]  # what a sweep varied
    objectives: Mapping[str, Result]
    history: Sequence[Mapping[str, Any]]
    answers: Sequence[Answer]
    summary: Mapping[str, Any]  # empty where the run has not ended
    problem: str | None  # why it has no results
    method: str = ""  # the algorithm's name; empty where nothing tells

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.objectives)

    @property
    def exact(self) -> bool:
        return self.finished and all(result.exact is not None for result in self.objectives.values())

    @property
    def satisfied(self) -> bool | None:
        """Whether every threshold is kept; None where none was asked, or nothing was measured."""
        verdicts = [r.satisfied for r in self.objectives.values() if r.satisfied is not None]
        return all(verdicts) if verdicts else None

    @property
    def primary(self) -> str | None:
        return next((name for name, r in self.objectives.items() if r.role == "primary"), None)

    @property
    def warnings(self) -> list[str]:
        return [str(text) for text in self.summary.get("warnings") or []]

    def points(self, exact: bool) -> np.ndarray:
        """(K,) win rates, exact or on samples."""
        return np.array([r.exact if exact else r.win_rate for r in self.objectives.values()], np.float64)


def read_run(path: Path, name: str | None = None, varying: Mapping[str, Any] | None = None) -> ReportedRun:
    """A run directory in whatever state it is; UserError where there is no run at all."""
    run = RunDirectory(path)
    if not any(file.exists() for file in (run.config, run.status, run.summary)):
        raise UserError(f"{path}: no run there (it has no config.yaml, status.json or summary.json)")
    settings = _settings(run)
    summary, problem = _summary(run)
    state = _state(run)
    return ReportedRun(
        id=name or path.resolve().name,
        path=path,
        state=str(summary.get("state") or state) if summary else state,
        settings=dict(flat(settings, empty=True)),
        varying={key: shown(value) for key, value in (varying or {}).items()},
        objectives=_objectives(settings, summary),
        history=[line for line in read_lines(run.metrics) if isinstance(line, dict) and _is_number(line.get("step"))],
        answers=_answers(run) if summary else [],
        summary=summary,
        problem=problem or _error(run),
        method=str(summary.get(METHOD) or _method(settings)),
    )


def _method(settings: Mapping[str, Any]) -> str:
    algorithm = settings.get(METHOD)
    return option_name(algorithm) if isinstance(algorithm, dict) else ""


def _settings(run: RunDirectory) -> dict[str, Any]:
    """config.yaml, by the C parser (hundreds of runs are read at once); empty where it is not whole."""
    import yaml

    try:
        with open(run.config, encoding="utf-8") as file:
            values = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _summary(run: RunDirectory) -> tuple[dict[str, Any], str | None]:
    """What summary.json says, or nothing and why it says nothing."""
    if not run.summary.exists():
        return {}, None
    try:
        values = run.results()
        for result in values["objectives"].values():
            _ = float(result["win_rate"]), [float(x) for x in result["win_rate_ci95"]], result["role"]
        return values, None
    except UserError as error:
        return {}, str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return {}, f"{run.summary}: not the summary of a run ({type(error).__name__}: {error})"


def _state(run: RunDirectory) -> str:
    try:
        return run.state() or "unknown"
    except UserError:
        return "unknown"


def _error(run: RunDirectory) -> str | None:
    try:
        record = read_json(run.status)
    except UserError:
        return None
    error = record.get("error") if isinstance(record, dict) else None
    return str(error) if error else None


def _objectives(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Result]:
    """By name, the primary first: from the summary where there is one, else what the config asks for."""
    asked = settings.get("objectives")
    asked = {k: v for k, v in asked.items() if isinstance(v, dict)} if isinstance(asked, dict) else {}
    found: dict[str, Result] = {}
    if summary:
        oracle, duals = summary.get("oracle") or {}, summary.get("duals") or {}
        for name, o in summary["objectives"].items():
            found[str(name)] = Result(
                role=o["role"],
                threshold=o.get("threshold"),
                worst=float(asked.get(name, {}).get("worst") or 0.0),
                win_rate=float(o["win_rate"]),
                ci95=(float(o["win_rate_ci95"][0]), float(o["win_rate_ci95"][1])),
                estimated=o.get("estimated_win_rate"),
                satisfied=o.get("satisfied"),
                judge=o.get("judge"),
                dual=duals.get(name),
                exact=(oracle.get("win_rate") or {}).get(name),
                optimum=(oracle.get("optimum") or {}).get(name),
                reference=(oracle.get("reference") or {}).get(name),
            )
    else:
        for name, o in asked.items():
            threshold: Any = o.get("threshold")
            found[str(name)] = Result(
                str(o.get("role", "secondary")),
                float(threshold) if _is_number(threshold) else None,
                float(o.get("worst") or 0.0),
            )
    return dict(sorted(found.items(), key=lambda item: item[1].role != "primary"))


def _answers(run: RunDirectory) -> list[Answer]:
    answers = []
    for line in read_lines(run.samples):
        if isinstance(line, dict) and isinstance(line.get("scores"), dict):
            answers.append(Answer(str(line.get("prompt", "")), str(line.get("response", "")), line["scores"]))
    return answers


def sampled_rates(run: ReportedRun) -> tuple[Prompts, np.ndarray] | None:
    """The prompts of a run's samples and the (P, K) mean win rates of its responses to each; None without samples."""
    by_prompt: dict[str, list[list[float]]] = {}
    for answer in run.answers:
        row = [answer.scores.get(name) for name in run.names]
        if all(_is_number(value) for value in row):
            by_prompt.setdefault(answer.prompt, []).append(row)  # type: ignore[arg-type]
    if len(by_prompt) < 2:
        return None
    return tuple(by_prompt), np.array([np.mean(rows, axis=0) for rows in by_prompt.values()])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --------------------------------------------------------------------------------------------- many runs
def varying_settings(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """The settings in which the runs differ, with the values each takes in order: a sweep's own, else by comparison."""
    swept = dict.fromkeys(key for run in runs for key in run.varying)
    if swept:
        keys = list(swept)
    else:
        known = [run for run in runs if run.settings]
        every = dict.fromkeys(key for run in known for key in run.settings if not key.startswith(NO_SETTING))
        keys = [key for key in every if _varies(key, known)]
        keys = [METHOD, *keys] if len({run.method for run in known}) > 1 else keys
    values = {key: sorted({value_of(run, key) for run in runs} - {""}, key=in_order) for key in keys}
    return {key: found for key, found in values.items() if found}


def _varies(key: str, runs: Sequence[ReportedRun]) -> bool:
    """Whether a setting differs between runs; one of a method's own counts where runs of that method differ."""
    own = key.startswith(f"{METHOD}.") and key not in (f"{METHOD}.name", f"{METHOD}._target_")
    methods = {run.method for run in runs} if key.startswith(f"{METHOD}.") else {""}
    groups = [[run for run in runs if run.method == method] if own else runs for method in methods]
    named = len(methods) > 1 and key.startswith(f"{METHOD}.") and not own
    return not named and any(len({shown(run.settings.get(key)) for run in group}) > 1 for group in groups)


def value_of(run: ReportedRun, key: str) -> str:
    """A setting of a run as text; empty where it has none."""
    if key in run.varying:
        return run.varying[key]
    if key == METHOD:
        return run.method
    return shown(run.settings[key]) if key in run.settings else ""


def in_order(text: str) -> tuple[float, str]:
    """Numbers by size, then text."""
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def objective_sets(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """The runs by the objectives they have and the one that is primary; runs that tell none stand apart."""
    groups: dict[tuple[Any, ...], list[ReportedRun]] = {}
    for run in runs:
        groups.setdefault((run.primary, frozenset(run.names)), []).append(run)
    ordered = [[_as(run, group[0].names) for run in group] for group in groups.values()]
    return sorted(ordered, key=lambda group: (not group[0].names, -len(group)))


def _as(run: ReportedRun, names: Sequence[str]) -> ReportedRun:
    return replace(run, objectives={name: run.objectives[name] for name in names})


def numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """The columns of results.csv that come from a run's summary."""
    row: dict[str, Any] = {}
    for name, objective in summary["objectives"].items():
        row[f"win_rate/{name}"] = objective["win_rate"]
        row[f"estimated/{name}"] = objective["estimated_win_rate"]
        row[f"threshold/{name}"] = objective["threshold"]
        row[f"satisfied/{name}"] = objective["satisfied"]
    row |= {f"dual/{name}": value for name, value in summary["duals"].items()}
    oracle = summary.get("oracle")
    if oracle:
        row |= {f"exact/{name}": value for name, value in oracle["win_rate"].items()}
        row |= {f"optimum/{name}": value for name, value in oracle["optimum"].items()}
        row["gap"] = oracle["gap"]
    row["kl"] = summary["kl"]
    return row | {"warnings": len(summary["warnings"])}
