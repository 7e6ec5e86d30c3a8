"""The points of a sweep: products and zips of overrides in Hydra's grammar, their ids, and their composed configs."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from mopo_cli.base.errors import UserError
from mopo_cli.base.secrets import masked
from mopo_cli.base.text import flat, one_line
from mopo_cli.config import compose, schema
from mopo_cli.config.overrides import in_grammar
from mopo_cli.runs.directory import RunDirectory

if TYPE_CHECKING:
    from mopo_cli.runs.record import RunRecord


MAPPING = re.compile(r"(?<==)\{((?:[\w.-]+:[\w.-]+,?)+)\}$")  # of plain names and values
TAG = 64  # characters of a tag that W&B takes
NOT_IDENTITY = ("run", "sweep", "logger", "debug", "cache", "log_every", "checkpoint_every")  # the run is the same one


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a sweep: its overrides, and an id derived from those that vary."""

    id: str
    overrides: tuple[str, ...]
    varying: dict[str, str]


@dataclass(frozen=True, slots=True)
class Trial:
    """A point with its composed config and its place."""

    point: Point
    composed: DictConfig
    run: RunDirectory


# --------------------------------------------------------------------------------------------- from overrides
def expand(overrides: Sequence[str], zipped: Sequence[str] = ()) -> list[Point]:
    """The product of all swept overrides, in Hydra's grammar: a=1,2  a=range(1,4)  a=choice(x,y).

    The values of `zipped` keys go together instead: the first of each, then the second of each.
    """
    return union([overrides], zipped)


def union(grids: Sequence[Sequence[str]], zipped: Sequence[str] = ()) -> list[Point]:
    """The points of several such products, one product after another."""
    points: dict[str, Point] = {}
    for overrides in grids:
        parsed = parse(overrides)
        for parts in itertools.product(*_axes(parsed, zipped)):
            chosen = {number: text for part in parts for number, text in part.items()}
            point = point_of(parsed, [chosen[number] for number in range(len(parsed))])
            if point.id in points:
                text = " ".join(f"{key}={value}" for key, value in point.varying.items())
                raise UserError(f"the sweep has the same point twice: {text}")
            points[point.id] = point
    return list(points.values())


def _axes(parsed: Sequence[Override], zipped: Sequence[str]) -> list[list[dict[int, str]]]:
    """What the product is taken over: at each place of an axis, the override (by its number) and its text."""
    keys = [override.get_key_element().lstrip("+") for override in parsed]
    together = [n for n, key in enumerate(keys) if key in zipped]
    choices = [_choices(override) for override in parsed]
    _check_zip(zipped, {keys[n]: len(choices[n]) for n in together if parsed[n].is_sweep_override()})
    axes = []
    for number, texts in enumerate(choices):
        if number not in together:
            axes.append([{number: text} for text in texts])
        elif number == together[0]:
            rows = zip(*(choices[n] for n in together), strict=True)
            axes.append([dict(zip(together, row, strict=True)) for row in rows])
    return axes


def _check_zip(zipped: Sequence[str], lengths: dict[str, int]) -> None:
    shown = f"sweep.zip=[{','.join(zipped)}]"
    missing = [key for key in zipped if key not in lengths]
    if missing:
        raise UserError(f"{shown}: {missing[0]} is not swept; give it several values ({missing[0]}=a,b)")
    if len(zipped) == 1:
        raise UserError(f"{shown}: needs two keys or more, whose values go together")
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {count}" for key, count in lengths.items())
        raise UserError(f"{shown}: every key needs as many values as the others; found {counts}")


def point_of(parsed: Sequence[Override], texts: Sequence[str]) -> Point:
    """The point at which each override reads like this."""
    varying = [text for text, override in zip(texts, parsed, strict=True) if override.is_sweep_override()]
    return Point(point_id(varying), tuple(texts), dict(text.split("=", 1) for text in varying))


def parse(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for override in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([override])
        except HydraException as error:
            raise UserError(f"cannot read the override {override!r}: expected key=value[,value...]") from error
    return parsed


def first_choice(override: Override) -> str:
    """The override itself, or the first that a swept one stands for."""
    if override.is_sweep_override() and isinstance(override.value(), IntervalSweep):
        return f"{override.get_key_element()}={override.value().start}"  # type: ignore[union-attr]
    return _choices(override)[0]


def _choices(override: Override) -> list[str]:
    """Every override that a swept one stands for, ready to be read by Hydra again; the override itself otherwise."""
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if isinstance(override.value(), IntervalSweep):
        raise UserError(f"cannot sweep over {override.input_line!r}: an interval needs sweeper=optuna")
    try:
        values = list(override.sweep_string_iterator())
    except (HydraException, ValueError, TypeError) as error:
        raise UserError(f"cannot sweep over {override.input_line!r}: {one_line(error)}") from error
    if not values:
        raise UserError(f"cannot sweep over {override.input_line!r}: it stands for no value")
    return [f"{override.get_key_element()}={value}" for value in values]


# --------------------------------------------------------------------------------------------- from presets
def preset_grids(composed: DictConfig, overrides: Sequence[str]) -> list[list[str]]:
    """The products of which a sweep is made, as overrides each: the command line's, with the preset's (experiment=).

    sweep.grid is a mapping of keys to values, or a list of such mappings, whose products are joined. What the command
    line gives for a grid's key takes the place of the grid's values; of several grids, a value belongs to those that
    list it, or to all that name the key where none lists it, and a grid that is left without a value drops out.
    """
    grids = _grids(composed.sweep.get("grid"))
    if len(grids) < 2:
        keys = {key_of(override) for override in overrides}
        grid = grids[0] if grids else {}
        return [[*overrides, *(f"{key}={','.join(grid[key])}" for key in grid if key not in keys)]]
    named = {key for grid in grids for key in grid}
    replaced = {key_of(override): _texts(override) for override in overrides if key_of(override) in named}
    listed = {key: {_plain(text) for grid in grids for text in grid.get(key, ())} for key in replaced}
    free = [override for override in overrides if key_of(override) not in named]
    taken = [{key: _taken(replaced[key], texts, listed[key]) if key in replaced else texts
              for key, texts in grid.items()} for grid in grids]  # fmt: skip
    taken = [grid for grid in taken if all(grid.values())]
    return [[*free, *(_override(key, grid[key], _fixed(key, taken)) for key in grid)] for grid in taken]


def _grids(node: Any) -> list[dict[str, list[str]]]:
    """The values of each grid as texts that Hydra reads; UserError where sweep.grid is no grid."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node)
    several = isinstance(node, list)
    grids = {f"sweep.grid[{i}]": grid for i, grid in enumerate(node)} if several else {"sweep.grid": node or {}}
    for name, grid in grids.items():
        if not isinstance(grid, dict) or (several and not grid):
            raise UserError(f"{name}={grid}: must be a mapping of keys to lists of values, or a list of such mappings")
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{name}.{key}={values}: must be a list of values")
    return [{str(key): [written(v) for v in values] for key, values in grid.items()} for grid in grids.values()]


def written(value: Any) -> str:
    """A value of a config as Hydra's overrides have it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if value is None:
        return "null"
    return in_grammar(value) if isinstance(value, str) else str(value).lower()


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _texts(override: str) -> list[str]:
    """The values that an override of the command line stands for."""
    return [text.partition("=")[2] for choice in parse([override]) for text in _choices(choice)]


def _taken(values: Sequence[str], texts: Sequence[str], listed: set[object]) -> list[str]:
    """Which of these values a grid takes that lists `texts`; `listed` are those of all grids."""
    mine = {_plain(text) for text in texts}
    return [text for text in values if _plain(text) in mine or _plain(text) not in listed]


def _plain(text: str) -> object:
    """A value as something to compare: 0.10 is 0.1, and spaces and quotes do not matter."""
    try:
        return float(text)
    except ValueError:
        return re.sub(r"[\s'\"]", "", text)


def _fixed(key: str, grids: Sequence[dict[str, list[str]]]) -> bool:
    """Whether a key has the same one value in all grids."""
    return len({tuple(grid.get(key, ())) for grid in grids}) == len(grids[0].get(key, ())) == 1


def _override(key: str, texts: Sequence[str], fixed: bool) -> str:
    """A key with its values. One value is a choice, too, where other grids have another: it tells the points apart."""
    alone = len(texts) == 1 and not fixed and texts[0] != "null"  # which is no choice in Hydra's grammar
    return f"{key}=choice({texts[0]})" if alone else f"{key}={','.join(texts)}"


def check_different(trials: Sequence[Trial]) -> None:
    """UserError where two points are the same run under two ids, as two grids may have it."""
    seen: dict[str, str] = {}
    for trial in trials:
        first = seen.setdefault(identity(settings_of(trial)), trial.point.id)
        if first != trial.point.id:
            raise UserError(f"the sweep has the same point twice: {first} and {trial.point.id}")


def point_id(varying: Sequence[str]) -> str:
    """A directory name from what varies: readable, with a hash where it lost a character or would grow too long."""
    text = ",".join(MAPPING.sub(_flat_text, override.lstrip("+")) for override in varying) or "default"
    name = re.sub(r"[^\w.,=+-]", "_", masked(text))
    whole = name == text and len(name) <= 100
    return name if whole else f"{name[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _flat_text(mapping: re.Match[str]) -> str:
    """{helpful:0.7,harmless:0.3} as helpful=0.7+harmless=0.3, which may be a file's name."""
    return mapping.group(1).replace(":", "=").replace(",", "+")


# --------------------------------------------------------------------------------------------- to configs and places
def compose_point(point: Point, directory: Path, user_config_dir: str | None) -> Trial:
    """The point's train config, with its directory, its group and tags for W&B, and its overrides under `sweep`."""
    composed = compose.compose("train", list(point.overrides), user_config_dir)
    with open_dict(composed):
        composed.sweep = {"name": directory.name, "point": point.id, "overrides": dict(point.varying)}
        composed.logger.group = composed.logger.group or directory.name
        composed.logger.tags = [*composed.logger.tags, *(masked(f"{k}={v}")[:TAG] for k, v in point.varying.items())]
    trial = _placed(Trial(point, composed, RunDirectory(directory)), directory)
    compose.typed(composed, schema.TrainConfig)
    return trial


def _placed(trial: Trial, directory: Path) -> Trial:
    place = directory / "runs" / trial.point.id
    trial.composed.run.name, trial.composed.run.dir = trial.point.id, str(place)
    return replace(trial, run=RunDirectory(place))


def known_runs(trials: Sequence[Trial], directory: Path) -> list[Trial]:
    """The trials, each in the directory that an earlier sweep gave the same point: there its id may read otherwise.

    tau=0.1 of a sweep over tau is the point tau=0.1,beta=0.99 of a later one over both, where 0.99 was beta's default.
    """
    missing = [trial for trial in trials if not trial.run.config.exists()]
    if not missing or not (directory / "runs").is_dir():
        return list(trials)
    taken = {trial.point.id for trial in trials}
    there = {}
    for path in sorted((directory / "runs").iterdir()):
        if path.name not in taken and RunDirectory(path).config.exists():
            there[identity(RunDirectory(path).settings())] = path.name
    placed = []
    for trial in trials:
        name = None if trial.run.config.exists() else there.pop(identity(settings_of(trial)), None)
        placed.append(_placed(replace(trial, point=replace(trial.point, id=name)), directory) if name else trial)
    return placed


def settings_of(trial: Trial) -> dict[str, Any]:
    return OmegaConf.to_container(trial.composed, resolve=True)  # type: ignore[return-value]


def identity(settings: dict[str, Any]) -> str:
    """A hash of everything that a run's results depend on; 1 and 1.0 are the same."""
    decisive = {key: value for key, value in flat(masked(settings)) if key.partition(".")[0] not in NOT_IDENTITY}
    read = {k: float(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in decisive.items()}
    return hashlib.sha256(repr(sorted(read.items(), key=lambda item: item[0])).encode()).hexdigest()


# --------------------------------------------------------------------------------------------- where points come from
class Points(Protocol):
    """The points of a sweep, one after another; those that depend on results of others come as these are told."""

    total: int
    fixed: bool  # whether those that are known are all

    def known(self) -> list[Point]:
        """Points to check before anything starts."""
        ...

    def next(self) -> Point | None:
        """The next point to run; None where there is none, or none yet."""
        ...

    def tell(self, point: Point, record: RunRecord) -> None:
        """What has become of a point."""
        ...


@dataclass
class Grid:
    """Every point of one product or several."""

    name: str = "grid"

    fixed = True

    def check(self) -> None:
        pass

    def open(self, grids: Sequence[Sequence[str]], zipped: Sequence[str], earlier: Sequence[dict[str, str]]) -> Points:
        self.points = union(grids, zipped)
        self.total, self.proposed = len(self.points), iter(self.points)
        return self

    def known(self) -> list[Point]:
        return self.points

    def next(self) -> Point | None:
        return next(self.proposed, None)

    def tell(self, point: Point, record: RunRecord) -> None:
        pass
