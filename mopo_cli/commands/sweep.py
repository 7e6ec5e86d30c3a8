"""`mopo sweep`: a run at every point, from the config to the exit status."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mopo_cli.base.errors import UserError
from mopo_cli.base.secrets import masked_command
from mopo_cli.config import compose, schema, trust
from mopo_cli.config.overrides import in_grammar
from mopo_cli.runs.directory import RunDirectory, open_run
from mopo_cli.sweeps.board import show_plan
from mopo_cli.sweeps.engine import Sweep, check, record_of
from mopo_cli.sweeps.eta import expected
from mopo_cli.sweeps.points import (
    check_different,
    compose_point,
    first_choice,
    key_of,
    known_runs,
    parse,
    preset_grids,
    settings_of,
)
from mopo_cli.sweeps.pools import start_server
from mopo_cli.sweeps.results import earlier_runs, ended_runs

OWN = ("sweep", "launcher", "sweeper")
GIVEN_ANEW = ("sweep.name", "sweep.dir", "sweep.retry", "sweep.dry_run")  # left out of the command that goes on


def command(overrides: Sequence[str], user_config_dir: str | None, show_config: bool) -> int:
    """Run every point; exit status 1 when one failed."""
    of_sweep = [o for o in overrides if key_of(o).partition(".")[0] in OWN]
    of_points = [o for o in overrides if o not in of_sweep]
    first = [first_choice(override) for override in parse(of_points)]
    _check_own_directories(first)
    compose.check_experiment("sweep", first, user_config_dir)
    preset = [override for override in first if key_of(override) == "experiment"]
    composed = compose.compose("sweep", [*of_sweep, *preset], user_config_dir)  # the points are composed each by itself
    settings: schema.SweepConfig = compose.typed(composed.sweep, schema.SweepConfig, "sweep.")
    trust.find_own_modules(compose.plain(composed))
    if not show_config and not settings.dry_run:
        start_server()  # it imports what runs need while their configs are composed
    launcher, sweeper = _built(composed.launcher, "launcher"), _built(composed.sweeper, "sweeper")
    directory = Path(settings.dir).expanduser()
    sweeper.check()
    earlier = earlier_runs(directory)
    grids = preset_grids(composed, of_points)
    points = sweeper.open(grids, settings.zip, [overrides for _, overrides in earlier])
    composed_trials = [compose_point(point, directory, user_config_dir) for point in points.known()]
    if len(grids) > 1:
        check_different(composed_trials)
    if show_config:
        print(compose.to_yaml(composed_trials[0].composed), end="")
        return 0
    launcher.check()
    trials = known_runs(composed_trials, directory)
    check(trials, directory, settings)
    ended = ended_runs(directory)
    seconds = expected({trial.point.id: settings_of(trial) for trial in trials}, ended)
    if settings.dry_run:
        records = [record_of(trial) for trial in trials]
        show_plan(directory, records, points.total, settings.retry, seconds, len(ended))
        return 0
    again = ["mopo", "sweep", *_config_dir(user_config_dir), *(o for o in overrides if key_of(o) not in GIVEN_ANEW)]
    lock = open_run(RunDirectory(directory))  # a second `mopo sweep` here is refused until this process has gone
    try:
        by_point = dict(zip((trial.point.id for trial in composed_trials), trials, strict=True))
        sweep = Sweep(directory, settings.retry, points, by_point, user_config_dir)
        again.append(f"sweep.dir={in_grammar(str(directory))}")
        return sweep.run(launcher, earlier, list(seconds.values()), masked_command(again))
    finally:
        lock.close()


def _config_dir(path: str | None) -> list[str]:
    return ["--config-dir", path] if path else []


def _built(composed: DictConfig, group: str) -> Any:
    """The record that a launcher's or sweeper's config names by _target_; UserError where it does not fit."""
    values = {str(key): value for key, value in composed.items()}
    settings = compose.class_of(values, group)
    del values["_target_"]
    try:
        return compose.typed(OmegaConf.create(values), settings)
    except UserError as error:
        raise UserError(f"{group}.{error}") from None


def _check_own_directories(overrides: Sequence[str]) -> None:
    fixed = next((o for o in overrides if o.startswith(("run.dir=", "run.name=", "run.resume="))), None)
    if fixed:
        raise UserError(f"{fixed}: each point of a sweep has a directory of its own; use sweep.dir= or sweep.name=")
