"""How a user's preference becomes the text that a conditioned policy is told: a direction, targets, a condition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mopo_cli.base.errors import UserError
from mopo_cli.base.files import read_record, write_json
from mopo_cli.config.checks import normalised_weights

MAPS = ("linear", "l2", "linf")
FILE = "directions.json"  # beside the weights, so that it goes where they go


def spelled(names: Sequence[str], values: Sequence[float], decimals: int) -> str:
    """The condition: each objective with its number, as in "helpful 80 harmless 60"."""
    numbers = [f"{value:.{decimals}f}" for value in values]
    zero = f"{0:.{decimals}f}"
    return " ".join(f"{n} {zero if v == f'-{zero}' else v}" for n, v in zip(names, numbers, strict=True))


def weighed(algorithm: Mapping[str, Any]) -> str:
    """What the weights or the direction in an algorithm's settings ask for, as a reader is told; "" without them."""
    for key, word in (("weights", "weighed"), ("direction", "in the direction")):
        if algorithm.get(key):
            return f"objectives {word} {', '.join(f'{name} {value:g}' for name, value in algorithm[key].items())}"
    return ""


def shares(weights: Sequence[float], map: str) -> list[float]:
    """(K,) how far each target goes from its lowest to its highest value, in [0, 1], for weights that sum to one.

    RiC's three maps (arXiv 2402.10207, as its code has them): linear w_k; l2 w_k / |w|_2; linf 1 for the largest
    weight and min(K w_k, 1) for the others. All agree where one objective has all the weight.
    """
    if map == "linear":
        return list(weights)
    if map == "l2":
        length = math.hypot(*weights)
        return [weight / length for weight in weights]
    top = max(weights)
    return [1.0 if weight == top else min(len(weights) * weight, 1.0) for weight in weights]


@dataclass(frozen=True, slots=True)
class Directions:
    """What a policy understands: a target an objective, between the two that it may be asked for.

    DPA's unit vectors in percent are the map l2 from 0 to 100.
    """

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    map: str
    decimals: int

    def condition(self, direction: Mapping[str, float] | None, key: str = "direction") -> str:
        """The text for a direction {objective: weight}; None weighs all alike. UserError where it names no objective,
        or a weight is negative, or all are zero."""
        weights = normalised_weights(self.names, direction or dict.fromkeys(self.names, 1.0), key)
        targets = [
            low + share * (high - low)
            for low, high, share in zip(self.low, self.high, shares(weights, self.map), strict=True)
        ]
        return spelled(self.names, targets, self.decimals)

    @property
    def span(self) -> str:
        """What it can be asked for, for a reader."""
        ends = zip(self.names, self.low, self.high, strict=True)
        return ", ".join(f"{n} {low:.{self.decimals}f} to {high:.{self.decimals}f}" for n, low, high in ends)

    @property
    def examples(self) -> list[dict[str, float]]:
        """Each objective alone, and all alike."""
        return [*({name: 1.0} for name in self.names), dict.fromkeys(self.names, 1.0)]

    def save(self, model: Path) -> None:
        write_json(model / FILE, asdict(self))


@dataclass(frozen=True, slots=True)
class Levels:
    """What a policy understands that is told thresholds: for each secondary objective, those it was trained for."""

    names: tuple[str, ...]  # of the secondaries
    levels: tuple[tuple[float, ...], ...]  # of each, rising

    def point(self, asked: Mapping[str, float]) -> tuple[float, ...]:
        """Of each objective the least level as high as what is asked, or the highest; the lowest where nothing is."""
        return tuple(
            next((level for level in levels if level >= asked.get(name, 0.0) - 1e-9), levels[-1])
            for name, levels in zip(self.names, self.levels, strict=True)
        )

    def told(self, point: Sequence[float]) -> str:
        """The condition of one of the trained points, in per cent: "harmless 55"."""
        return spelled(self.names, [100.0 * b for b in point], 0)

    def condition(self, direction: Mapping[str, float] | None, key: str = "direction") -> str:
        """The text for thresholds {objective: win rate}; UserError where one names no secondary, or is no win rate."""
        for name, b in (direction or {}).items():
            if name not in self.names:
                raise UserError(f"{key}: {name} has no threshold; this policy is told those of {', '.join(self.names)}")
            if not 0 < b < 1:
                raise UserError(f"{key}: {name}={b:g}: must be a threshold, a win rate in (0, 1)")
            if b > (most := self.levels[self.names.index(name)][-1]) + 1e-9:
                raise UserError(f"{key}: {name}={b:g}: the policy was trained for at most {most:g}")
        return self.told(self.point(direction or {}))

    @property
    def span(self) -> str:
        """What it can be asked for, for a reader."""
        known = zip(self.names, self.levels, strict=True)
        return "thresholds of " + "; ".join(f"{n} {', '.join(f'{b:g}' for b in levels)}" for n, levels in known)

    @property
    def examples(self) -> list[dict[str, float]]:
        """The lowest thresholds, and the highest."""
        return [dict(zip(self.names, (levels[end] for levels in self.levels), strict=True)) for end in (0, -1)]

    def save(self, model: Path) -> None:
        write_json(model / FILE, asdict(self))


def directions_of(model: Path) -> Directions | Levels | None:
    """What the policy in a model directory understands; None for one that takes no direction."""
    if not (model / FILE).is_file():
        return None
    values: dict[str, Any] = read_record(model / FILE)
    try:
        if "levels" in values:
            return Levels(tuple(values["names"]), tuple(map(tuple, values["levels"])))
        names, low, high = (tuple(values[key]) for key in ("names", "low", "high"))
        return Directions(names, low, high, str(values["map"]), int(values["decimals"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{model / FILE}: not what a conditioned policy's training writes") from None


def parsed(text: str) -> dict[str, float]:
    """The direction that "helpful=0.8,concise=0.6" names, also written {helpful: 0.8, concise: 0.6}."""
    found: dict[str, float] = {}
    for part in text.strip(" '\"{}").replace(":", "=").split(","):
        name, equals, value = (piece.strip(" '\"") for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (name and equals) or math.isnan(number) or name in found:
            raise UserError(f'direction={text}: expected a weight an objective, as direction="helpful=0.8,concise=0.6"')
        found[name] = number
    return found
