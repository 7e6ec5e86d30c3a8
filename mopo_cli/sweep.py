"""`mopo sweep -m tau=0.1,0.5`: a run at every point of a grid, one after another, and their numbers in results.csv."""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from mopo_cli import config as configs
from mopo_cli.console import say
from mopo_cli.errors import UserError
from mopo_cli.processes import alone
from mopo_cli.runs import RunDirectory, read_lines, write_atomic, write_json

if TYPE_CHECKING:
    from mopo_cli.figures import Swept

OWN_KEYS = ("sweep.name", "sweep.dir", "sweep.resume")
ENDED = ("done", "infeasible")


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the grid: its overrides, and an id derived from those that vary."""

    id: str
    overrides: tuple[str, ...]
    varying: dict[str, str]


@dataclass(frozen=True, slots=True)
class Trial:
    """A point with its composed config and its place."""

    point: Point
    composed: DictConfig
    run: RunDirectory


def command(overrides: Sequence[str], user_config_dir: str | None, show_config: bool) -> int:
    """Run every point; exit status 1 when one failed."""
    own = [o for o in overrides if o.lstrip("+").partition("=")[0] in OWN_KEYS]
    asked = [o for o in overrides if o not in own]
    first = expand(asked)[0].overrides
    _check_own_directories(first)
    configs.check_experiment("sweep", first, user_config_dir)
    composed = configs.compose("sweep", [*own, *first], user_config_dir)
    points = expand([*asked, *preset_grid(composed, asked)])
    settings: configs.SweepConfig = configs.typed(composed.sweep, configs.SweepConfig)
    directory = Path(settings.dir).expanduser()
    trials = [compose_point(point, directory, user_config_dir) for point in points]
    if show_config:
        print(configs.to_yaml(trials[0].composed), end="")
        return 0
    check(trials, directory, settings.resume)
    try:
        return run_all(trials, directory, settings.resume)
    except KeyboardInterrupt:
        kept = [o for o in overrides if o not in own]
        again = shlex.join(["mopo", "sweep", "-m", *kept, f"sweep.dir={directory}", "sweep.resume=true"])
        say(f"interrupted; go on with: {again}")
        raise


def preset_grid(composed: DictConfig, asked: Sequence[str]) -> list[str]:
    """The grid of a preset (experiment=) as overrides, but for the keys that the command line sets itself."""
    named = {o.lstrip("+").partition("=")[0] for o in asked}
    grid = composed.sweep.get("grid") or {}
    return [f"{key}={','.join(map(_grammar, values))}" for key, values in grid.items() if key not in named]


def _grammar(value: Any) -> str:
    return _quoted(value) if isinstance(value, str) else str(value)


def _check_own_directories(overrides: Sequence[str]) -> None:
    fixed = next((o for o in overrides if o.startswith(("run.dir=", "run.name=", "run.resume="))), None)
    if fixed:
        raise UserError(
            f"{fixed}: each point of a sweep has a directory of its own; use sweep.dir=, sweep.name= or sweep.resume="
        )


def check(trials: Sequence[Trial], directory: Path, resume: bool) -> None:
    """UserError where a point cannot start: all are looked at before any does."""
    from mopo_cli import train
    from mopo_cli.runs import check_same_settings, claim
    from mopo_cli.session import settings_of

    if not alone():
        raise UserError("mopo sweep: runs its points in one process; launch `mopo train` for several")
    for trial in trials:
        train.check(configs.typed(trial.composed, configs.TrainConfig))
    if directory.exists() and not directory.is_dir():
        raise UserError(f"sweep.dir={directory}: this is a file, not a directory")
    used = directory.is_dir() and any(directory.iterdir())
    if used and not resume:
        raise UserError(
            f"sweep.dir={directory}: already in use; choose another sweep.dir or sweep.name, or go on with it by "
            "sweep.resume=true"
        )
    if resume and not used:
        raise UserError(f"sweep.resume=true, but sweep.dir={directory} holds no sweep to go on with")
    for trial in trials:
        if not resume:
            claim(trial.run.path, resume=False)
        elif trial.run.config.exists():
            check_same_settings(trial.run, settings_of(trial.composed))
            if trial.run.state() not in ENDED:
                claim(trial.run.path, resume=True)


def run_all(trials: Sequence[Trial], directory: Path, resume: bool) -> int:
    say(f"{len(trials)} runs in {directory}")
    records = []
    for number, trial in enumerate(trials, start=1):
        say(f"\n[{number}/{len(trials)}] {' '.join(trial.point.overrides) or 'defaults'}")
        records.append(run_point(trial, resume))
        write_results(directory, records)
    failed = [record["id"] for record in records if record["state"] == "failed"]
    say(f"\nresults        {directory / 'results.csv'}")
    for path in draw(trials, directory):
        say(f"figure         {path}")
    if failed:
        say(f"failed         {', '.join(failed)}")
    return 1 if failed else 0


# --------------------------------------------------------------------------------------------- the grid


def expand(overrides: Sequence[str]) -> list[Point]:
    """The product of all swept overrides, in Hydra's grammar: a=1,2  a=range(1,4)  a=choice(x,y)."""
    choices = [(_choices(override), override.is_sweep_override()) for override in _parsed(overrides)]
    points: dict[str, Point] = {}
    for combination in itertools.product(*(values for values, _ in choices)):
        varying = [o for o, (_, varies) in zip(combination, choices, strict=True) if varies]
        point = Point(point_id(varying), tuple(combination), dict(o.split("=", 1) for o in varying))
        if point.id in points:
            raise UserError(f"the sweep has the same point twice: {' '.join(varying)}")
        points[point.id] = point
    return list(points.values())


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for override in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([override])
        except HydraException as error:
            raise UserError(f"cannot read the override {override!r}: expected key=value[,value...]") from error
    return parsed


def _choices(override: Override) -> list[str]:
    """Every override that a swept one stands for, ready to be read by Hydra again; the override itself otherwise."""
    if not override.is_sweep_override():
        return [override.input_line or ""]
    try:
        values = list(override.sweep_string_iterator())
    except (HydraException, ValueError, TypeError) as error:
        raise UserError(f"cannot sweep over {override.input_line!r}: {' '.join(str(error).split())}") from error
    if not values:
        raise UserError(f"cannot sweep over {override.input_line!r}: it stands for no value")
    return [f"{override.get_key_element()}={value}" for value in values]


def point_id(varying: Sequence[str]) -> str:
    """A directory name from what varies: readable, with a hash where it lost a character or would grow too long."""
    text = ",".join(override.lstrip("+") for override in varying) or "default"
    name = re.sub(r"[^\w.,=+-]", "_", text)
    whole = name == text and len(name) <= 100
    return name if whole else f"{name[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def compose_point(point: Point, directory: Path, user_config_dir: str | None) -> Trial:
    place = directory / "runs" / point.id
    named = [f"run.name={_quoted(point.id)}", f"run.dir={_quoted(str(place))}"]
    if not any(o.startswith("logger.group=") for o in point.overrides):
        named.append(f"logger.group={_quoted(directory.name)}")
    composed = configs.compose("train", [*point.overrides, *named], user_config_dir)
    configs.check_train(configs.typed(composed, configs.TrainConfig))
    return Trial(point, composed, RunDirectory(place))


def _quoted(text: str) -> str:
    """A string in Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


# --------------------------------------------------------------------------------------------- one point


def run_point(trial: Trial, resume: bool) -> dict[str, Any]:
    """Train one point, or go on with it; a failure is recorded and leaves the others alone."""
    from mopo_cli import train
    from mopo_cli.processes import build_accelerator

    point, run, composed = trial.point, trial.run, trial.composed
    record: dict[str, Any] = {"id": point.id, "overrides": point.varying, "state": "failed", "error": None}
    started = resume and run.config.exists() and run.state()
    if started in ENDED:
        say(f"{started} already")
        return record | {"state": started} | numbers(run.results())
    composed.run.resume = bool(started)
    config: configs.TrainConfig = configs.typed(composed, configs.TrainConfig)
    try:
        record["state"] = train.train(config, composed, run, build_accelerator()).state
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
        if not run.status.exists():  # its data or model could not be loaded, so it never began
            run.path.mkdir(parents=True, exist_ok=True)
            run.set_state("failed", error=record["error"])
        say(f"failed: {record['error']}")
        if config.debug:
            raise
    finally:
        gc.collect()
    return record | (numbers(run.results()) if record["state"] in ENDED else {})


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
    row["kl"], row["seconds"] = summary["kl"], summary["train"]["wall_seconds"]
    return row | {"warnings": len(summary["warnings"])}


def draw(trials: Sequence[Trial], directory: Path) -> list[Path]:
    """Figures of the runs that ended."""
    from mopo_cli.figures import draw_sweep

    ended = [swept(trial) for trial in trials if trial.run.summary.exists()]
    alike = [run for run in ended if list(run.win_rate) == list(ended[0].win_rate)]  # other objectives, other axes
    return draw_sweep(alike, directory / "figures") if alike else []


def swept(trial: Trial) -> Swept:
    """What a figure needs to know of a finished run."""
    from mopo_cli.figures import Swept

    summary = trial.run.results()
    objectives, oracle = summary["objectives"], summary.get("oracle")
    names = sorted(objectives, key=lambda name: objectives[name]["role"] != "primary")
    exact = oracle["win_rate"] if oracle else None
    return Swept(
        trial.point.varying,
        trial.run.state() or "done",
        {name: (exact or {}).get(name, objectives[name]["win_rate"]) for name in names},
        {} if exact else {name: tuple(objectives[name]["win_rate_ci95"]) for name in names},
        {n: objectives[n]["threshold"] for n in names if objectives[n]["threshold"] is not None},
        oracle["optimum"] if oracle else None,
        summary["kl"],
        read_lines(trial.run.metrics),
    )


def write_results(directory: Path, records: Sequence[dict[str, Any]]) -> None:
    """results.csv and sweep.json, whole after each run."""
    rows = [{"id": r["id"], **r["overrides"], **_without(r, "id", "overrides")} for r in records]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "results.csv", text.getvalue())
    write_json(directory / "sweep.json", {"runs": list(records)})


def _without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}
