"""Settings that check themselves: what the value of a field may be stands beside the field.

    @dataclass(frozen=True)
    class Settings:
        rounds: Annotated[int, at_least(0)] = 3
        merge: Annotated[str, one_of("weights", "outputs")] = "weights"
        step: Annotated[int | None, at_least(1)] = None

`compose.typed` checks every record that it makes. A record that is built in another way calls
`checked(self, "algorithm.")` in its __post_init__. UserError names the key, what was found and what is allowed:
"algorithm.rounds=-1: must be 0 or more".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mopo_cli.base.errors import UserError

T = TypeVar("T")
LARGEST = 2**63 - 1  # of the whole numbers that arrays and tensors hold
PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True, slots=True)
class Must:
    """A bound on the value of a setting: what it must be, in words, and whether it is. Null is not asked."""

    be: str
    holds: Callable[[Any], bool]


def above(low: float, be: str | None = None) -> Must:
    return Must(be or f"above {low:g}", lambda value: low < value < math.inf)


def at_least(low: float, be: str | None = None) -> Must:
    return Must(be or f"{low:g} or more", lambda value: low <= value < math.inf)


def one_of(*options: str | None, be: str | None = None) -> Must:
    return Must(be or " or ".join(option or "null" for option in options), lambda value: value in options)


def between(low: float, high: float, closed: str = "", be: str | None = None) -> Must:
    """A number between two; `closed` says which of them it may be: "[", "]", "[]" or neither."""
    left, right = "[" if "[" in closed else "(", "]" if "]" in closed else ")"

    def holds(value: float) -> bool:
        return low < value < high or (value == low and left == "[") or (value == high and right == "]")

    return Must(be or f"in {left}{low:g}, {high:g}{right}", holds)


def each(bound: Must, be: str | None = None) -> Must:
    """A list whose every element keeps to the bound."""
    return Must(be or f"{bound.be} each", lambda values: all(bound.holds(value) for value in values))


def checked(settings: T, key: str = "") -> T:
    """The settings (a dataclass), when each field, and each of those in records inside, is what it must be.

    key: what stands in front of a field's name in messages, with its dot. Plain types are checked, too, as not all
    records come from OmegaConf. A record may have check_together(key), which raises UserError where its fields do not
    go together.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        _check_value(value, hints[field.name], f"{key}{field.name}")
        inside = {"": value} if is_dataclass(value) else value if isinstance(value, dict) else {}
        for name, record in inside.items():
            if is_dataclass(record):
                checked(record, f"{key}{field.name}.{f'{name}.' if name else ''}")
    if check := getattr(settings, "check_together", None):
        check(key)
    return settings


def _check_value(value: Any, hint: Any, key: str) -> None:
    kind, *bounds = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None and NoneType in kinds:
        return
    plain = [kind for kind in kinds if kind in PLAIN]
    words = [bound.be for bound in bounds]
    if len(plain) == len(kinds) - (NoneType in kinds) and not any(_is(value, kind) for kind in plain):
        words = [PLAIN[plain[0]], *(text.removeprefix(f"{PLAIN[plain[0]]}, ") for text in words)]
    elif stray := [text for kind in kinds if (text := _stray(value, kind))]:
        words = stray
    elif all(_holds(bound, value) for bound in bounds):
        return
    if NoneType in kinds and not words[-1].endswith("null"):
        words.append("or null")
    raise UserError(f"{key}={value}: must be {', '.join(words)}")


def _stray(value: Any, kind: Any) -> str:
    """What every element of a list must be, where one is something else: OmegaConf takes a list in a list of words."""
    if get_origin(kind) is not list or not isinstance(value, list):
        return ""
    element = get_args(kind)[0]
    allowed = get_args(element) if get_origin(element) in (Union, UnionType) else (element,)
    plain = [each for each in allowed if each in PLAIN]
    if len(plain) + (NoneType in allowed) < len(allowed):
        return ""
    fits = all((item is None and NoneType in allowed) or any(_is(item, each) for each in plain) for item in value)
    return "" if fits else f"a list, {PLAIN[plain[0]]} each"


def _holds(bound: Must, value: Any) -> bool:
    try:
        return bound.holds(value)
    except TypeError:  # of another kind than the bound is for
        return False


def _is(value: Any, kind: type) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    return number if kind is float else isinstance(value, kind)


def normalised_weights(
    names: Sequence[str], weights: Mapping[str, float] | None, key: str = "algorithm.weights"
) -> tuple[float, ...]:
    """(K,) weights of the objectives that sum to one; all on the primary where none are given.

    Raises UserError where they name other objectives, are negative or not finite, or all zero.
    """
    if weights is None:
        return tuple(float(k == 0) for k in range(len(names)))
    if not isinstance(weights, Mapping):
        raise UserError(f"{key}={weights}: must be a weight for each objective, as {{{names[0]}: 0.7, ...}}, or null")
    text = "{" + ", ".join(f"{name}: {value}" for name, value in weights.items()) + "}"
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise UserError(f"{key}={text}: {unknown[0]} is no objective; the set has {', '.join(names)}")
    for name, value in weights.items():
        if not _is(value, float) or not 0 <= value < math.inf:
            raise UserError(f"{key}.{name}={value}: must be a number, 0 or more")
    total = sum(weights.values())
    if total <= 0:
        raise UserError(f"{key}={text}: all are zero; at least one must be above 0")
    return tuple(float(weights.get(name, 0.0)) / total for name in names)
