"""Files that are whole or absent: text, JSON and directories written beside and renamed, and checksums of these."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mopo_cli.base.errors import UserError
from mopo_cli.base.text import finite

CHECKSUMS = "checksums.json"  # of a sealed directory: SHA-256 of each file, by its path in there
BLOCK = 2**20  # bytes that are hashed at a time


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


def seal(directory: Path) -> None:
    """Leaves the checksums of a directory's files in it, by which `damage` knows it again."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    write_json(directory / CHECKSUMS, {path.relative_to(directory).as_posix(): _sha256(path) for path in files})


def damage(directory: Path) -> str | None:
    """What is wrong with a sealed directory: a file that is gone, or is another than was written; None where nothing
    is. Files that have come since do not matter."""
    try:
        sums = read_record(directory / CHECKSUMS)
    except UserError:
        return f"{CHECKSUMS} is missing or torn"
    for name, wanted in sums.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{CHECKSUMS} names a file that lies elsewhere ({name})"
        if (directory / name).exists() and not (directory / name).is_file():
            return f"{name} is no file"
        try:
            found = _sha256(directory / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != wanted:
            return f"{name} is not what was written (its checksum differs)"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


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


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError where it is missing, unreadable, torn or something else."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object, found {type(values).__name__}; it may have been damaged")
    return values


def _lines_of(path: Path) -> list[str]:
    """The lines of a JSON Lines file: a record may hold other signs that end a line elsewhere."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return lines if lines[-1] else lines[:-1]


def torn_line(path: Path) -> int | None:
    """The number of the first line of a JSON Lines file that holds no record; None where there is none."""
    for number, line in enumerate(_lines_of(path), 1):
        try:
            if not isinstance(json.loads(line), dict):
                return number
        except json.JSONDecodeError:
            return number
    return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file; a last line that was cut off is left out, and what is no record."""
    records = []
    for line in _lines_of(path) if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [record for record in records if isinstance(record, dict)]
