"""Files that are whole or absent: text, JSON and directories written beside and renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mopo_cli.base.errors import UserError
from mopo_cli.base.text import finite


def write_atomic(path: Path, text: str) -> None:
    """Write beside the file, flush to disk, rename: a reader sees the old text or the new one, never a torn one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "x", encoding="utf-8") as file:  # not through a link that waits under this name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """An empty directory beside `directory` to write into, which takes its place in the end: it is whole or absent."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


def write_json(path: Path, value: Any) -> None:
    """Strict JSON: NaN and infinity, which it does not have, become null."""
    write_atomic(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The file's value; UserError where it is missing, unreadable or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not whole JSON (line {error.lineno}); the run may have been cut off") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file; a last line that was cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
