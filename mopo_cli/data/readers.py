"""Rows of a file, of a directory in the hub's layout, or of a data set on the hub, one at a time.

Each row comes with where it was found ("pairs.jsonl:12"), for messages. Files and directories never need a network; a
hub data set is downloaded into the hub's cache first, and read as the directory that it is there.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopo_cli.base.console import count_rows
from mopo_cli.base.errors import RowError, Shown, UserError
from mopo_cli.base.text import first_line, is_unicode
from mopo_cli.data.subsample import Reservoir

if TYPE_CHECKING:
    from datasets import DatasetBuilder
    from pyarrow import DataType, RecordBatch, Schema


Rows = Iterator[tuple[str, dict[str, Any]]]
RowsOrErrors = Iterator[tuple[str, dict[str, Any] | RowError]]
DROPPABLE = "dataset.invalid=drop leaves such rows out"
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
PARQUET_ROWS = 1024  # read at once
BUFFER = 1 << 20  # bytes of a Parquet column that are read at once
COUNTED = 1024  # rows between two words on how many have been read
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # half a surrogate pair, escaped
_PAIR = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_rows(
    path: str,
    split: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    sample: Reservoir[Any] | None = None,
) -> Rows:
    """Open `path` and return an iterator over (where, row).

    path: a .jsonl, .json (a list of objects, or JSON Lines) or .parquet file, the first two also as .gz; a directory in
    the hub's layout; or a hub id. split, name (of a config) and revision choose within a directory or a hub data set
    and mean nothing for a file; data_dir is a directory, or one file, inside `path`. Rows that `sample` does not want
    may be left out, where their prompts are read faster than they are.

    Raises UserError at once where the source cannot be opened, and during iteration where a row cannot be read.
    """
    return _raised(read_rows_or_errors(path, split, name, data_dir, revision, sample))


def read_rows_or_errors(
    path: str,
    split: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    sample: Reservoir[Any] | None = None,
) -> RowsOrErrors:
    """read_rows that goes on after a line that is no row, which comes as the error that says why."""
    if not is_local(path):
        return _data_set_rows(path, split, name, data_dir, revision, sample)
    target = _local_target(path, data_dir)
    if target.is_dir():
        return _data_set_rows(path, split, name, data_dir, None, sample)
    return _file_rows(target, sample)


def read_whole_rows(*source: Any, **more: Any) -> Rows:
    """read_rows, whose errors tell how to go on without the row."""
    return _raised(read_rows_or_errors(*source, **more), f". {DROPPABLE}")


def _raised(rows: RowsOrErrors, advice: str = "") -> Rows:
    for where, row in rows:
        if isinstance(row, RowError):
            raise UserError(f"{row}{advice}")
        yield where, row


def split_names(
    path: str, name: str | None = None, data_dir: str | None = None, revision: str | None = None
) -> tuple[str, ...]:
    """The splits of a directory or a hub data set; () for a single file, which has none. Raises as read_rows."""
    if is_local(path) and not _local_target(path, data_dir).is_dir():
        return ()
    return tuple(str(split) for split in _open_builder(path, name, data_dir, revision).config.data_files or ())


def is_local(path: str) -> bool:
    """Whether `path` is meant as a file or directory here (it may be missing), rather than as a hub id."""
    looks_local = path.startswith(("/", ".", "~")) or path.endswith(SUFFIXES)
    return looks_local or Path(path).exists() or not _HUB_ID.fullmatch(path)


def _local_target(path: str, data_dir: str | None) -> Path:
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{path}: no such file or directory; allowed: {', '.join(SUFFIXES)}, a directory, or a hub id")
    target = root / data_dir if data_dir else root
    if not target.exists():
        found = ", ".join(sorted(entry.name for entry in root.iterdir())) if root.is_dir() else "a file"
        raise UserError(f"{path}: holds no {data_dir!r}; found: {found or 'nothing'}")
    return target


# Files
def _file_rows(path: Path, sample: Reservoir[Any] | None = None) -> RowsOrErrors:
    if path.name.endswith(".parquet"):
        return _parquet_rows(path, sample)
    if path.name.endswith((".json", ".json.gz")) and _starts_a_list(path):
        return _counted(_json_list_rows(path))
    if path.name.endswith(SUFFIXES):
        return _counted(_json_lines_rows(path))
    raise UserError(f"{path}: cannot read this kind of file; allowed: {', '.join(SUFFIXES)}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a plain or gzipped file; UserError where it cannot be read to its end."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: the gzip file is damaged or cut short after line {number} ({error}); copy or download it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _starts_a_list(path: Path) -> bool:
    first = next((text for _, line in _lines(path) if (text := line.removeprefix(b"\xef\xbb\xbf").strip())), b"")
    return first.startswith(b"[")


def _json_lines_rows(path: Path) -> RowsOrErrors:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, _object(_parse(line.rstrip(), path, number), where, _may_hold_halves(line))
            except RowError as error:
                yield where, error


def _json_list_rows(path: Path) -> RowsOrErrors:
    text = b"".join(line for _, line in _lines(path))
    doubtful = _may_hold_halves(text)
    for index, row in enumerate(_parse(text, path, 1)):
        where = f"{path}[{index}]"
        try:
            yield where, _object(row, where, doubtful)
        except RowError as error:
            yield where, error


def _parse(text: bytes, path: Path, line: int) -> Any:
    where = f"{path}:{line}"
    try:
        return json.loads(text.decode("utf-8-sig"))  # -sig: some editors start a file with a byte order mark
    except json.JSONDecodeError as error:
        found = Shown(f" at column {error.colno} ({error.msg})")
        expected = "; expected one JSON object a line, or in a .json file one list of objects"
        raise RowError(f"{path}:{line + error.lineno - 1}", "not JSON", found, expected) from error
    except UnicodeDecodeError as error:
        raise RowError(where, "not UTF-8 at byte ", Shown(f"{error.start + 1} ({error.reason})")) from error
    except (RecursionError, ValueError) as error:  # brackets in brackets, or a number of thousands of digits
        raise RowError(where, "no JSON that can be read (", Shown(first_line(error)), ")") from error


def _may_hold_halves(text: bytes) -> bool:
    """Whether some string of this JSON may hold half a surrogate pair, which is no text."""
    if not _HALF.search(text):
        return False
    return b"\\\\" in text or len(_HALF.findall(text)) != 2 * len(_PAIR.findall(text))


def _object(row: Any, where: str, doubtful: bool) -> dict[str, Any]:
    """The row as an object; all its strings are text, which is looked after where it is `doubtful`."""
    if not isinstance(row, dict):
        raise RowError(where, "expected a JSON object, found ", Shown(json.dumps(row)[:60]))
    if doubtful and not is_unicode(json.dumps(row, ensure_ascii=False)):
        bad = [key for key in row if not is_unicode(json.dumps([key, row[key]], ensure_ascii=False))]
        why = " holds half a surrogate pair (an escape \\ud800 to \\udfff without its other half), which is no text"
        raise RowError(where, Shown(ascii(bad[0])), why)
    return row


def _parquet_rows(path: Path, sample: Reservoir[Any] | None = None) -> Rows:
    import pyarrow as pa  # slow to import, and only this format needs it here
    import pyarrow.parquet as pq

    number = 0
    try:
        # Page by page: a row group may be the whole file, and reading ahead or by threads costs more than it saves.
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            plain = sample is not None and _has_plain_prompts(file.schema_arrow)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, use_threads=False):
                places: Sequence[int] = range(len(batch))
                if sample is not None and plain:
                    prompts = batch.column("prompt").cast(pa.large_binary()).to_numpy(zero_copy_only=False)
                    places = sample.wanted(prompts)
                chosen = batch if len(places) == len(batch) else batch.take(pa.array(places, pa.int32()))
                for place, row in zip(places, _dicts(chosen), strict=True):
                    yield f"{path}:{number + place + 1}", row
                number += len(batch)
                count_rows(len(batch))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file, after row {number} ({first_line(error)})") from error


def _dicts(batch: RecordBatch) -> list[dict[str, Any]]:
    """batch.to_pylist(), several times as fast on texts."""
    columns = [
        column.to_numpy(zero_copy_only=False).tolist() if _is_text(column.type) else column.to_pylist()
        for column in batch.columns
    ]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _has_plain_prompts(schema: Schema) -> bool:
    """Whether each row's prompt is its column `prompt` (rows.prompt_of_row), where that is not null."""
    texts = {"prompt", *({"chosen", "rejected"} & set(schema.names))}
    return all(schema.names.count(name) == 1 and _is_text(schema.field(name).type) for name in texts)


def _is_text(kind: DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _counted(rows: RowsOrErrors) -> RowsOrErrors:
    """The same rows, with word to whoever waits for them."""
    for number, row in enumerate(rows, start=1):
        yield row
        if not number % COUNTED:
            count_rows(COUNTED)


# Directories in the hub's layout, and the hub
def _data_set_rows(
    path: str,
    split: str | None,
    name: str | None,
    data_dir: str | None,
    revision: str | None,
    sample: Reservoir[Any] | None,
) -> RowsOrErrors:
    builder = _open_builder(path, name, data_dir, revision)
    files = {str(found): [str(file) for file in listed] for found, listed in (builder.config.data_files or {}).items()}
    if split is None and len(files) == 1:
        split = next(iter(files))
    label = f"{path}/{data_dir}" if data_dir else path
    if split not in files:
        raise UserError(f"{label}: has no split {split!r}; found: {', '.join(files)}")
    if all(file.endswith(SUFFIXES) for file in files[split]):
        # Not through `datasets`, which forces the types of the first rows on all the others, and forgets the lines.
        return chain.from_iterable(_file_rows(Path(file), sample) for file in files[split])
    return _counted(_streamed_rows(builder.as_streaming_dataset(split), f"{label} ({split})"))


def _streamed_rows(rows: Iterable[Any], label: str) -> Rows:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{label}:{number}", dict(row)
    except (EOFError, zlib.error, OSError, ValueError, TypeError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{label}: cannot be read after row {number} ({first_line(error)})") from error


def _open_builder(path: str, name: str | None, data_dir: str | None, revision: str | None) -> DatasetBuilder:
    """The `datasets` builder that knows which files make up which split, for a directory or a hub id."""
    import datasets  # takes a second to import, and a plain file does not need it
    from datasets.exceptions import DatasetsError

    directory = Path(path).expanduser() if is_local(path) else _snapshot(path, data_dir, revision)
    try:
        return datasets.load_dataset_builder(str(directory), name, data_dir=data_dir)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        inside = f"{path}/{data_dir}" if data_dir else path
        raise UserError(
            f"{inside}: not a data set in the hub's layout ({first_line(error)}); expected for instance train.jsonl "
            "and test.jsonl, or data/train-*.parquet"
        ) from error


def _snapshot(path: str, data_dir: str | None, revision: str | None) -> Path:
    """The hub data set's files in the local cache, downloaded if need be.

    Not `load_dataset` on the id: without a network that retries for half a minute, and then misses its own cache
    wherever data_dir was given.
    """
    from huggingface_hub import snapshot_download

    files = [f"{data_dir}/*", "README.md"] if data_dir else None
    try:
        return Path(
            snapshot_download(path, repo_type="dataset", revision=revision, allow_patterns=files, etag_timeout=10)
        )
    except Exception as error:  # the HTTP client's own exceptions differ between versions
        flags = f"--repo-type dataset{f' --revision {revision}' if revision else ''}"
        raise UserError(
            f"{path}: is no file or directory here, and cannot be loaded from the Hugging Face hub "
            f"({first_line(error)}). To work offline, run `hf download {path} {flags} --local-dir DIR` on a machine "
            "with a network and pass dataset.path=DIR, or set HF_HUB_OFFLINE=1 with a cache that holds it"
        ) from error
