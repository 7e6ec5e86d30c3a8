"""Values as text: settings by dotted keys and as one types them, messages on one line, numbers that JSON has."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any


def flat(
    values: Mapping[Any, Any], joint: str = ".", prefix: str = "", empty: bool = False
) -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} as ("a.b", 1); a mapping that holds nothing is left out, unless `empty`."""
    for key, value in values.items():
        if isinstance(value, dict) and (value or not empty):
            yield from flat(value, joint, f"{prefix}{key}{joint}", empty)
        else:
            yield f"{prefix}{key}", value


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prompts_told(prompts: int, independent: int) -> str:
    """How many test prompts there are, and how many of them count as independent."""
    return f"{prompts} test prompts" + (f", {independent} of them independent" if independent < prompts else "")


def is_unicode(text: str) -> bool:
    """Whether the string is text: half a surrogate pair, which JSON and a command line can hold, is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(value: object) -> str:
    """A message (or an error's) without line ends and runs of blanks; nothing for None."""
    return "" if value is None else " ".join(str(value).split())


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, else what kind of error it is."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown(value: Any) -> str:
    """A setting as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value or math.isnan(value) else str(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def two_lines(error: BaseException) -> str:
    """The first two lines of a message, as the first is often only a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"
