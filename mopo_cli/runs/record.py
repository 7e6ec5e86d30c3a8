"""What is known of a run: everything is read from its directory, and nothing there is trusted to be whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json, read_lines, torn_line
from mopo_cli.base.secrets import masked
from mopo_cli.base.text import flat, shown
from mopo_cli.base.types import primary_first
from mopo_cli.config.compose import option_name
from mopo_cli.maths.significance import FEWEST
from mopo_cli.runs.constraints import known_oracle, out_of_reach, verdict_of
from mopo_cli.runs.directory import ENDED, RunDirectory, locked

if TYPE_CHECKING:
    from mopo_cli.maths.pareto import Prompts

METHOD = "algorithm"  # the setting that names a run's method
ORACLE = {
    "exact": "win_rate",
    "optimum": "optimum",
    "attainable": "attainable",
    "reference": "reference",
}  # of a Result: by summary.json's key
NO_SETTING = ("run.", "sweep.", "logger.", "experiment.", "debug", "cache", "log_every", "checkpoint_every")


@dataclass(frozen=True, slots=True)
class Result:
    """One objective of a run: what was asked, and what was reached where the run has ended."""

    role: str
    threshold: float | None
    worst: float
    win_rate: float | None = None  # on samples
    ci95: tuple[float, float] | None = None  # None where the prompts are too few for an interval
    estimated: float | None = None  # by the run itself, while it trained
    satisfied: bool | None = None
    verdict: str = ""  # "yes", "no" or "undecided" at 95 %
    asked: bool = True  # whether the threshold is a user's; else the run's own, on its schedule
    heldout: float | None = None  # on held-out prompts, which points of a sweep are chosen by
    judge: str | None = None
    dual: float | None = None
    exact: float | None = None
    optimum: float | None = None  # None also where the thresholds have none
    attainable: float | None = None  # the most of a secondary, alone
    reference: float | None = None  # of the policy that the run started from, exact


class Answer(NamedTuple):
    """One sampled response, with its win rates against the data's responses."""

    prompt: str
    response: str
    scores: Mapping[str, float]
    group: str = ""


class RunFiles:
    """What stands in a run's files beside its results: read once, only where somebody asks; empty where it is torn."""

    def __init__(self, path: Path):
        self.path = path
        self._config: dict[str, Any] = {}

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml, nested, to be shown: without secrets, which runs of old have in it."""
        if not self._config:  # it may be written yet
            try:
                self._config = masked(RunDirectory(self.path).settings())
            except UserError:
                return {}
        return self._config

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.yaml by dotted keys."""
        return dict(flat(self.config, empty=True))

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        lines = read_lines(RunDirectory(self.path).metrics)
        return [line for line in lines if isinstance(line, dict) and _is_number(line.get("step"))]

    @cached_property
    def answers(self) -> list[Answer]:
        """The lines of samples.jsonl."""
        return [
            Answer(
                str(line.get("prompt", "")), str(line.get("response", "")), line["scores"], str(line.get("group") or "")
            )
            for line in read_lines(RunDirectory(self.path).samples)
            if isinstance(line, dict) and isinstance(line.get("scores"), dict)
        ]


@dataclass(frozen=True)
class RunRecord:
    """A run as sweeps, reports, `mopo eval`, `mopo sample` and `mopo export` read it."""

    id: str
    files: RunFiles
    state: str  # as status.json has it; of a sweep's run that has not begun, waiting
    varying: Mapping[str, str] = field(default_factory=dict)  # what a sweep varied
    summary: Mapping[str, Any] = field(default_factory=dict)  # empty where the run has not ended
    problem: str | None = None  # why it has no results
    order: tuple[str, ...] = ()  # of its objectives, where others decide it

    @property
    def path(self) -> Path:
        return self.files.path

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.files.settings

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        return self.files.history

    @property
    def answers(self) -> Sequence[Answer]:
        return self.files.answers if self.finished else []

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def method(self) -> str:
        """The algorithm's name; empty where nothing tells."""
        algorithm = self.summary.get(METHOD) or self.files.config.get(METHOD)
        return option_name(algorithm) if isinstance(algorithm, dict) else str(algorithm or "")

    @property
    def seconds(self) -> float | None:
        """Of the attempt that ended it."""
        return (self.summary.get("train") or {}).get("wall_seconds")

    @cached_property
    def objectives(self) -> dict[str, Result]:
        """By name, the primary first: from the summary where there is one, else what the config asks for."""
        results = _results(self.summary, self.files.config)
        return {name: results[name] for name in self.order or primary_first(results)}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.objectives)

    @property
    def primary(self) -> str | None:
        return next((name for name, result in self.objectives.items() if result.role == "primary"), None)

    @property
    def exact(self) -> bool:
        return self.finished and all(result.exact is not None for result in self.objectives.values())

    @property
    def satisfied(self) -> bool | None:
        """Whether every threshold is kept; None where there is none, or nothing was measured."""
        verdicts = [result.satisfied for result in self.objectives.values() if result.satisfied is not None]
        return all(verdicts) if verdicts else None

    @property
    def verdict(self) -> str:
        """Of all thresholds: "no" where one is missed, "undecided" where one is open; "" where there is none."""
        verdicts = {result.verdict for result in self.objectives.values()} - {""}
        return next((verdict for verdict in ("no", "undecided", "yes") if verdict in verdicts), "")

    @cached_property
    def oracle(self) -> Mapping[str, Any]:
        """Exact numbers of an enumerable world, the optimum's only where there is one; empty where there are none."""
        return known_oracle(self.summary)

    @property
    def out_of_reach(self) -> str:
        """Why the thresholds have no optimum; "" where they have one, or nobody knows."""
        if self.oracle.get("feasible", True):
            return ""
        bounds = {name: r.threshold for name, r in self.objectives.items() if r.threshold is not None}
        return out_of_reach(bounds, self.oracle.get("attainable") or {}, self.oracle.get("shortfall"))

    @property
    def has_thresholds(self) -> bool:
        return any(result.threshold is not None for result in self.objectives.values())

    @property
    def warnings(self) -> list[str]:
        return [str(text) for text in self.summary.get("warnings") or []]

    def points(self, exact: bool) -> np.ndarray:
        """(K,) win rates, exact or on samples."""
        results = self.objectives.values()
        return np.array([result.exact if exact else result.win_rate for result in results], np.float64)

    def reached(self, name: str) -> float | None:
        """The win rate of an objective: exact where it is known, else as evaluated."""
        result = self.objectives.get(name)
        return None if result is None else result.win_rate if result.exact is None else result.exact


# --------------------------------------------------------------------------------------------- reading one
def read_run(path: Path, name: str | None = None, varying: Mapping[str, Any] | None = None) -> RunRecord:
    """A run directory in whatever state it is; UserError where there is no run at all."""
    run = RunDirectory(path)
    if not any(file.exists() for file in (run.config, run.status, run.summary)):
        raise UserError(f"{path}: no run there (it has no config.yaml, status.json or summary.json)")
    summary, problem = _summary(run)
    return RunRecord(
        id=name or path.resolve().name,
        files=RunFiles(path),
        state=str(summary.get("state") or run.known_state()),
        varying={key: shown(value) for key, value in masked(dict(varying or {})).items()},
        summary=summary,
        problem=problem or _error(run),
    )


def read_finished(path: str, key: str = "run") -> RunRecord:
    """A run that has ended, with model and results; UserError (naming `key`) where there is none, or they are torn."""
    run = RunDirectory(Path(path).expanduser())
    if not run.summary.exists() or not run.model.is_dir():
        raise UserError(f"{key}={path}: no finished run there (it has no summary.json and model/)")
    return RunRecord(run.path.resolve().name, RunFiles(run.path), "done", summary=run.results())


def read_point(run: RunDirectory, varying: Mapping[str, str]) -> RunRecord:
    """A run of a sweep as it is now, with results where it has ended; UserError where its files are torn.

    It waits where it has not begun, and is interrupted where its process has gone without a word.
    """
    state, error, summary = "waiting", None, {}
    if run.status.exists():
        status = read_json(run.status)
        state, error = str(status.get("state")), status.get("error")
        if state == "running" and not locked(run):
            state = "interrupted"
    if state in ENDED:
        summary = run.results()
    return RunRecord(run.path.name, RunFiles(run.path), state, varying, summary, error)


def _summary(run: RunDirectory) -> tuple[dict[str, Any], str | None]:
    """What summary.json says, or nothing and why it says nothing."""
    if not run.summary.exists():
        return {}, None
    try:
        values = run.results()
        for result in values["objectives"].values():
            _ = float(result["win_rate"]), _interval(result), result["role"]
        return values, None
    except UserError as error:
        return {}, str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return {}, f"{run.summary}: not the summary of a run ({type(error).__name__}: {error})"


def torn_files(run: RunRecord) -> list[str]:
    """What a run should have left and is missing or damaged, a sentence a file; nothing of a run that has not begun."""
    directory, texts = RunDirectory(run.path), []
    if not any(file.exists() for file in (directory.config, directory.status, directory.summary)):
        return []
    for read in (directory.settings, directory.recorded_state, *([directory.results] if run.state in ENDED else [])):
        try:
            read()
        except UserError as error:
            texts.append(str(error))
    for file in (directory.metrics, directory.samples) if run.state in ENDED else ():
        if not file.is_file():
            texts.append(f"{file}: no such file")
        elif (line := torn_line(file)) is not None or not file.stat().st_size:
            texts.append(f"{file}:{line or 1}: not whole; what is left of it is shown")
    return texts


def _error(run: RunDirectory) -> str | None:
    try:
        status = read_json(run.status)
    except UserError:
        return None
    error = status.get("error") if isinstance(status, dict) else None
    return str(error) if error else None


def _results(summary: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Result]:
    nodes = config.get("objectives")
    nodes = {key: node for key, node in nodes.items() if isinstance(node, dict)} if isinstance(nodes, dict) else {}
    if not summary:
        return {str(name): _goal(node) for name, node in nodes.items()}
    oracle, duals = known_oracle(summary), summary.get("duals") or {}
    heldout = summary.get("heldout_win_rate") or {}
    goals = {name: _goal(nodes.get(name, {})) for name in summary["objectives"]}
    return {
        str(name): replace(
            goals[name],
            role=values["role"],
            threshold=values.get("threshold"),
            win_rate=float(values["win_rate"]),
            ci95=_interval(values),
            estimated=values.get("estimated_win_rate"),
            satisfied=values.get("satisfied"),
            verdict=verdict_of(values),
            asked=name not in nodes or goals[name].threshold is not None,
            heldout=heldout.get(name),
            judge=values.get("judge"),
            dual=duals.get(name),
            **{key: (oracle.get(of) or {}).get(name) for key, of in ORACLE.items()},
        )
        for name, values in summary["objectives"].items()
    }


def _interval(result: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of its win rate; None where it was too few prompts for one."""
    low, high = result["win_rate_ci95"]
    return None if low is None or high is None else (float(low), float(high))


def _goal(node: Mapping[str, Any]) -> Result:
    """What a config asks of an objective."""
    threshold: Any = node.get("threshold")
    return Result(
        str(node.get("role", "secondary")),
        float(threshold) if _is_number(threshold) else None,
        float(node.get("worst") or 0.0),
    )


DATA = (
    "_target_",
    "path",
    "test_path",
    "data_seed",
    "responses",
    "passages",
    "test_fraction",
    "max_rows",
)  # of dataset


def differing_data(runs: Sequence[RunRecord]) -> list[str]:
    """The settings by which runs were measured against different data, so that their win rates are no one scale."""
    known = [run for run in runs if run.settings]
    return [key for key in (f"dataset.{key}" for key in DATA) if len({value_of(run, key) for run in known}) > 1]


def sampled_rates(run: RunRecord) -> tuple[Prompts, np.ndarray] | None:
    """What each prompt of a run's samples is independent of others by (its group, else itself), and the (P, K) mean win
    rates of the responses to each; None of fewer than FEWEST independent ones."""
    by_prompt: dict[str, list[list[float]]] = {}
    units: dict[str, str] = {}
    for answer in run.answers:
        row = [answer.scores.get(name) for name in run.names]
        if all(_is_number(value) for value in row):
            by_prompt.setdefault(answer.prompt, []).append(row)  # type: ignore[arg-type]
            units[answer.prompt] = answer.group or answer.prompt
    if len(set(units.values())) < FEWEST:
        return None
    return tuple(units.values()), np.array([np.mean(rows, axis=0) for rows in by_prompt.values()])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --------------------------------------------------------------------------------------------- many runs
def varying_settings(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """The settings in which the runs differ, with the values each takes in order: a sweep's own, else by comparison."""
    swept = dict.fromkeys(key for run in runs for key in run.varying)
    if swept:
        keys = list(swept)
    else:
        begun = [run for run in runs if run.settings]
        every = dict.fromkeys(key for run in begun for key in run.settings if not key.startswith(NO_SETTING))
        keys = [key for key in every if _varies(key, begun)]
        keys = [METHOD, *keys] if len({run.method for run in begun}) > 1 else keys
    values = {key: sorted({value_of(run, key) for run in runs} - {""}, key=in_order) for key in keys}
    return {key: texts for key, texts in values.items() if texts}


def _varies(key: str, runs: Sequence[RunRecord]) -> bool:
    """Whether a setting differs between runs; one of a method's own counts where runs of that method differ."""
    of_method = key.startswith(f"{METHOD}.")
    names_it = key in (f"{METHOD}.name", f"{METHOD}._target_")
    methods = {run.method for run in runs} if of_method else {""}
    if names_it and len(methods) > 1:
        return False
    groups = [runs] if names_it or not of_method else [[r for r in runs if r.method == method] for method in methods]
    return any(len({shown(run.settings.get(key)) for run in group}) > 1 for group in groups)


def value_of(run: RunRecord, key: str) -> str:
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


def objective_sets(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The runs by the objectives they have and the one that is primary; runs that tell none stand apart."""
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for run in runs:
        groups.setdefault((run.primary, frozenset(run.names)), []).append(run)
    ordered = [[replace(run, order=group[0].names) for run in group] for group in groups.values()]
    return sorted(ordered, key=lambda group: (not group[0].names, -len(group)))
