"""What `mopo eval` evaluates: finished runs, plain models and files of responses; what is unfinished is told apart."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_json
from mopo_cli.base.types import Text
from mopo_cli.config import compose
from mopo_cli.config.schema import EvalConfig, TrainConfig
from mopo_cli.data.prepare import as_text
from mopo_cli.data.readers import read_rows
from mopo_cli.runs.directory import RunDirectory

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
        told = read_json(shared) if self.kind == "model" and shared.is_file() else self.summary
        return str(told.get("condition") or "")


@dataclass(frozen=True, slots=True)
class Unfinished:
    path: str
    reason: str


def newest_run(root: Path = Path("outputs/train")) -> Path:
    """The run that was finished last under `root`; UserError where there is none."""
    finished = sorted(root.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise UserError(f"run: no finished run under {root}/; give one by run=DIR, or train one with `mopo train`")
    return finished[-1].parent


def find_entrants(config: EvalConfig) -> tuple[list[Entrant], list[Unfinished]]:
    """Everything that is to be evaluated, named apart, and the runs that have no results to evaluate.

    One run or model that was named outright must be there and whole: UserError. Of many, what is not is left out.
    """
    asked, files = _listed(config.run), _listed(config.responses)
    if not asked and not files:
        asked = [config.model.path] if config.model.path else [str(newest_run())]
    paths = [path for pattern in asked for path in _expanded(pattern, "run")]
    files = [path for pattern in files for path in _expanded(pattern, "responses")]
    found, unfinished = [], []
    alone = len(paths) == 1
    for path in dict.fromkeys(paths):
        try:
            found.append(_entrant(path, config))
        except UserError as error:
            if alone:
                raise
            unfinished.append(Unfinished(path, _reason(path, str(error))))
    found += [Entrant(Path(path).name, path, "responses", rows=read_answers(path)) for path in dict.fromkeys(files)]
    if not found:
        told = "; ".join(f"{one.path} ({one.reason})" for one in unfinished)
        raise UserError(f"run={config.run}: no finished run among {len(unfinished)}: {told}")
    return _named_apart(found), unfinished


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def _expanded(pattern: str, key: str) -> list[str]:
    """The directories or files that a pattern stands for; the runs of a sweep's directory."""
    path = Path(pattern).expanduser()
    if (path / "runs").is_dir() and not (path / "summary.json").exists():
        return sorted(str(one) for one in (path / "runs").iterdir() if one.is_dir())
    if path.exists() or not glob.has_magic(pattern):
        return [str(path)]
    found = sorted(one for one in glob.glob(str(path)) if key == "responses" or Path(one).is_dir())
    if not found:
        raise UserError(f"{key}={pattern}: nothing there")
    return found


def _entrant(path: str, config: EvalConfig) -> Entrant:
    run = RunDirectory(Path(path))
    if run.summary.exists() and run.model.is_dir():
        return finished_run(path)
    if any((run.path / name).is_file() for name in MODEL_FILES) or path == config.model.path:
        return Entrant(run.path.name, path, "model")
    raise UserError(f"run={path}: no finished run there (it has no summary.json and model/)")


def finished_run(path: str, key: str = "run") -> Entrant:
    """A finished run with its config and results; UserError where there is none, or its files are torn."""
    run = RunDirectory(Path(path).expanduser())
    if not run.summary.exists() or not run.model.is_dir():
        raise UserError(f"{key}={path}: no finished run there (it has no summary.json and model/)")
    summary = run.results()
    trained = compose.typed(OmegaConf.create(run.settings()), TrainConfig)
    return Entrant(run.path.resolve().name, str(run.path), "run", trained, summary)


def _reason(path: str, otherwise: str) -> str:
    """Why a run of many is left out: its state where it has no results, else what is wrong with them."""
    run = RunDirectory(Path(path))
    if run.summary.exists():
        return otherwise
    try:
        state = run.state()
        step = read_json(run.status).get("step") if state else None
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
        told = "; ".join(f"{', '.join(names)} in {_some(runs)}" for names, runs in sets.items())
        raise UserError(f"run: runs with different objectives cannot be compared: {told}. Evaluate them apart")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# --------------------------------------------------------------------------------------------- files of responses
def read_answers(path: str) -> dict[str, Answered]:
    """The rows of a file of responses by prompt, all responses to one prompt together; UserError at a bad row."""
    if not Path(path).is_file():
        raise UserError(f"responses={path}: no such file")
    found: dict[str, Answered] = {}
    for where, row in read_rows(path):
        one = _answered(row, where)
        key = as_text(one.prompt)
        if key in found:
            before = found[key]
            one = Answered(
                before.prompt, before.responses + one.responses, before.reference + one.reference, before.context
            )
        found[key] = one
    if not found:
        raise UserError(f"responses={path}: holds no rows")
    return found


def _answered(row: dict[str, Any], where: str) -> Answered:
    prompt = row.get("prompt")
    conversation = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )
    if not (isinstance(prompt, str) or (conversation and prompt)):
        found = ", ".join(row) or "nothing"
        raise UserError(f"{where}: prompt must be a string or a list of messages; the row has {found}")
    given = row.get("responses", row.get("response"))
    responses = _texts(given, where, "response (or responses)")
    if not responses:
        raise UserError(f"{where}: response (or responses) is missing; the row has {', '.join(row)}")
    return Answered(prompt, responses, _texts(row.get("reference"), where, "reference"), str(row.get("context") or ""))


def _texts(value: Any, where: str, key: str) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {key} must be a string or a list of strings, found {str(value)[:60]!r}")
    return tuple(texts)
