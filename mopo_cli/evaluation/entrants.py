"""What `mopo eval` evaluates: finished runs, plain models and files of responses; what is unfinished is told apart."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_record
from mopo_cli.base.types import Text
from mopo_cli.config import compose, trust
from mopo_cli.config.schema import EvalConfig, TrainConfig
from mopo_cli.data.prepare import as_text
from mopo_cli.data.readers import read_rows
from mopo_cli.runs.directory import RunDirectory, check_links
from mopo_cli.runs.find import expanded, is_sweep, newest_run
from mopo_cli.runs.record import read_finished

MODEL_FILES = ("config.json", "adapter_config.json")
SHARED_SUMMARY = "mopo_summary.json"  # a run's summary.json in the folder that `mopo export` writes


@dataclass(frozen=True, slots=True)
class Answered:
    """One row of a file of responses; `reference` are responses of somebody else to compare with."""

    prompt: Text
    responses: tuple[str, ...]
    reference: tuple[str, ...]
    context: str = ""


@dataclass
class Entrant:
    """One run, model or file of responses."""

    name: str
    path: str
    kind: str  # "run", "model" or "responses"
    trained: TrainConfig | None = None  # of a run
    summary: dict[str, Any] = field(default_factory=dict)  # of a run
    rows: dict[str, Answered] = field(default_factory=dict)  # of a file, by prompt as text

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(Path(self.path))

    @property
    def model(self) -> Path:
        """Where its weights are, of a run or model."""
        return self.run.model if self.kind == "run" else Path(self.path)

    @property
    def condition(self) -> str:
        """What stands in front of each prompt when a run's policy is asked, also where it was exported to."""
        shared = self.model / SHARED_SUMMARY
        summary = read_record(shared) if self.kind == "model" and shared.is_file() else self.summary
        return str(summary.get("condition") or "")


@dataclass(frozen=True, slots=True)
class Unfinished:
    path: str
    reason: str


def find_entrants(config: EvalConfig) -> tuple[list[Entrant], list[Unfinished]]:
    """Everything that is to be evaluated, named apart, and the runs that have no results to evaluate.

    One run or model that was named outright must be there and whole: UserError. Of many, what is not is left out.
    """
    patterns, files = _listed(config.run), _listed(config.responses)
    if not patterns and not files:
        patterns = [config.model.path] if config.model.path else [str(newest_run())]
    paths = [path for pattern in patterns for path in _expanded(pattern, "run")]
    files = [path for pattern in files for path in _expanded(pattern, "responses")]
    entrants, unfinished = [], []
    alone = len(paths) == 1
    for path in dict.fromkeys(paths):
        try:
            entrants.append(_entrant(path, config))
        except UserError as error:
            if alone:
                raise
            unfinished.append(Unfinished(path, _reason(path, str(error))))
    entrants += [Entrant(Path(path).name, path, "responses", rows=read_answers(path)) for path in dict.fromkeys(files)]
    if not entrants:
        reasons = "; ".join(f"{run.path} ({run.reason})" for run in unfinished)
        raise UserError(f"run={config.run}: no finished run among {len(unfinished)}: {reasons}")
    return _named_apart(entrants), unfinished


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _expanded(pattern: str, key: str) -> list[str]:
    """The directories or files that a pattern stands for; what is no pattern stands for itself, there or not."""
    if not glob.has_magic(pattern) and not is_sweep(Path(pattern).expanduser()):
        return [str(Path(pattern).expanduser())]
    paths = [str(path) for path in expanded(pattern) if key == "responses" or path.is_dir()]
    if not paths:
        raise UserError(f"{key}={pattern}: nothing there")
    return paths


def _entrant(path: str, config: EvalConfig) -> Entrant:
    run = RunDirectory(Path(path))
    if run.summary.exists() and run.model.is_dir():
        return finished_run(path, allow_code=config.allow_code)
    if any((run.path / name).is_file() for name in MODEL_FILES) or path == config.model.path:
        return Entrant(run.path.name, path, "model")
    return finished_run(path, allow_code=config.allow_code)


def finished_run(path: str, key: str = "run", allow_code: bool = False) -> Entrant:
    """A finished run with its config and results; UserError where there is none, or its files are torn.

    Its config comes from a file: it may name mopo's own code only (config/trust.py), unless `allow_code`.
    """
    run = RunDirectory(Path(path).expanduser())
    check_links(run.path)
    record = read_finished(path, key)
    settings = run.settings()
    trust.check_trusted(settings, run.config, allow_code)
    try:
        trained = compose.typed(OmegaConf.create(settings), TrainConfig)
    except UserError as error:
        text = str(error)
        raise UserError(text if str(run.config) in text else f"{run.config}: {text}") from error
    return Entrant(record.id, str(record.path), "run", trained, dict(record.summary))


def _reason(path: str, otherwise: str) -> str:
    """Why a run of many is left out: its state where it has no results, else what is wrong with them."""
    run = RunDirectory(Path(path))
    if run.summary.exists():
        return otherwise
    try:
        state = run.state()
        step = read_record(run.status).get("step") if state else None
    except UserError as error:
        return str(error)
    if state is None:
        return "no run and no model"
    return f"{state}, step {step}" if step is not None else state


def _named_apart(entrants: list[Entrant]) -> list[Entrant]:
    """Entrants of the same name are named by their whole path."""
    names = [entrant.name for entrant in entrants]
    for entrant in entrants:
        if names.count(entrant.name) > 1:
            entrant.name = entrant.path
    return entrants


def check_alike(entrants: Sequence[Entrant]) -> None:
    """UserError where runs have different objectives: their numbers would not be about the same thing."""
    sets: dict[tuple[str, ...], list[str]] = {}
    for entrant in entrants:
        if entrant.trained is not None:
            sets.setdefault(tuple(sorted(entrant.trained.objectives)), []).append(entrant.name)
    if len(sets) > 1:
        texts = "; ".join(f"{', '.join(names)} in {_some(runs)}" for names, runs in sets.items())
        raise UserError(f"run: runs with different objectives cannot be compared: {texts}. Evaluate them apart")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# --------------------------------------------------------------------------------------------- files of responses
def read_answers(path: str) -> dict[str, Answered]:
    """The rows of a file of responses by prompt, all responses to one prompt together; UserError at a bad row."""
    if not Path(path).is_file():
        raise UserError(f"responses={path}: no such file")
    rows: dict[str, Answered] = {}
    for where, values in read_rows(path):
        row = _answered(values, where)
        earlier = rows.get(as_text(row.prompt))
        if earlier is not None:
            row = replace(
                earlier, responses=earlier.responses + row.responses, reference=earlier.reference + row.reference
            )
        rows[as_text(row.prompt)] = row
    if not rows:
        raise UserError(f"responses={path}: holds no rows")
    return rows


def _answered(row: dict[str, Any], where: str) -> Answered:
    prompt = row.get("prompt")
    conversation = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )
    if not (isinstance(prompt, str) or (conversation and prompt)):
        keys = ", ".join(row) or "nothing"
        raise UserError(f"{where}: prompt must be a string or a list of messages; the row has {keys}")
    responses = _texts(row.get("responses", row.get("response")), where, "response (or responses)")
    if not responses:
        raise UserError(f"{where}: response (or responses) is missing; the row has {', '.join(row)}")
    return Answered(prompt, responses, _texts(row.get("reference"), where, "reference"), str(row.get("context") or ""))


def _texts(value: Any, where: str, key: str) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {key} must be a string or a list of strings, found {str(value)[:60]!r}")
    return tuple(texts)
