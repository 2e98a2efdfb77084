"""Files to rows: each row with the place that an error message names."""

from __future__ import annotations

import functools
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from prefloss.data import json_rows, table_rows
from prefloss.data.errors import DataError, shown

Row = tuple[str, dict[str, Any]]
"""Where a row is ("pairs.jsonl:17") and what it holds."""

FORMATS = (
    "JSON lines (.jsonl, .ndjson, .jsonl.gz), .json, .parquet, a folder of such files, or a folder written by "
    "datasets' save_to_disk"
)

# Counts the rows (or lines) of a file, and reads those from `start` to `stop`.
_Reader = tuple[Callable[[Path], int], Callable[[Path, int, int | None], Iterator[Row]]]
_READERS: dict[str, _Reader] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonl.gz"), (json_rows.count_lines, json_rows.lines)),
    ".json": (json_rows.count_json, json_rows.json_file),
    ".parquet": (table_rows.count_parquet, table_rows.parquet),
}
_SAVED: _Reader = (table_rows.count_saved, table_rows.saved)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.")


def rows_of(path: Path, rank: int = 0, size: int = 1, also: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a file or folder, in order; for one of several processes its part of them.

    The parts are contiguous, about equal, and together all rows. What lies in other parts is skipped, not parsed.

    Args:
        path: File or folder.
        rank: Number of the part.
        size: Number of parts.
        also: Columns of tables to read beside `prefloss.data.rows.KNOWN`; JSON is read whole.

    Raises:
        DataError: If there is no such file, its format is unknown, or a row cannot be parsed.
    """
    files = [(file, _reading(reader, also)) for file, reader in _files(path)]
    if size == 1:
        for file, (_, read) in files:
            yield from _named(file, read(file, 0, None))
        return
    counts = [next(_named(file, map(count, [file]))) for file, (count, _) in files]
    start, stop = sum(counts) * rank // size, sum(counts) * (rank + 1) // size
    for (file, (_, read)), count in zip(files, counts, strict=True):
        if start < count and stop > 0:
            yield from _named(file, read(file, max(start, 0), min(stop, count)))
        start, stop = start - count, stop - count


def _reading(reader: _Reader, also: Collection[str]) -> _Reader:
    """The reader, of these columns too."""
    count, read = reader
    for of_table in (table_rows.parquet, table_rows.saved):
        if read is of_table:
            return count, functools.partial(of_table, also=also)
    return reader


def _named(path: Path, rows: Iterator[Any]) -> Iterator[Any]:
    """The rows; an error of the system as one that names the file."""
    try:
        yield from rows
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _files(path: Path) -> list[tuple[Path, _Reader]]:
    """The files to read, each with its reader."""
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(str(path), 80)}: cannot be read: {error}") from error
    if not exists:
        raise DataError(f"{path}: no such file or folder; expected {FORMATS}")
    if is_folder:
        saved = table_rows.saved_folder(path)
        return [(saved, _SAVED)] if saved else [(file, _READERS[_ending(file)]) for file in _shards(path)]
    if not _ending(path):
        raise DataError(f"{path}: got the ending {path.suffix!r}, expected {FORMATS}")
    if not path.is_file():
        raise DataError(f"{path}: got a pipe or device, expected {FORMATS}")
    return [(path, _READERS[_ending(path)])]


def _ending(path: Path) -> str:
    """The ending that says how to read a file, "" if it has none of those."""
    return next((ending for ending in _READERS if path.name.lower().endswith(ending)), "")


def _shards(folder: Path) -> list[Path]:
    """The files of a folder that holds one data set in several files of one format, by name."""
    files = sorted(folder / name for name in os.listdir(folder) if not name.startswith((".", "_")))
    if not any(map(_ending, files)):
        raise DataError(
            f"{folder}: a folder that datasets' save_to_disk did not write (no state.json in it), and without data "
            f"files; expected {FORMATS}"
        )
    others = [file.name for file in files if _ending(file) != _ending(files[0])]
    if others or not _ending(files[0]):
        names = ", ".join(map(repr, others[:3]))
        raise DataError(f"{folder}: got {names} beside {files[0].name!r}, expected files of one format only")
    names = [match.groups() for match in (_SHARD.match(file.name) for file in files) if match]
    sets = sorted({name for name, _, _ in names})
    if len(sets) > 1:
        raise DataError(f"{folder}: holds several data sets ({', '.join(sets)}), expected one; name its file")
    if names:
        name, _, count = names[0]
        absent = {f"{number:05}" for number in range(int(count))} - {number for _, number, _ in names}
        if absent:
            raise DataError(
                f"{folder}: lacks the file {name}-{min(absent)}-of-{count}, and {len(absent) - 1} more"
            )
    return files
