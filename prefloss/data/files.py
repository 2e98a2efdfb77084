"""Files to rows: each row with the place that an error message names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefloss.data.errors import DataError, shown

Row = tuple[str, dict[str, Any]]
"""Where a row is ("pairs.jsonl:17") and what it holds."""

FORMATS = "JSON lines (.jsonl, .ndjson), .json, .parquet, or a folder written by datasets' save_to_disk"
_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file or folder, in order.

    Raises:
        DataError: If there is no such file, its format is unknown, or a row cannot be parsed.
    """
    if path.is_dir():
        return _saved(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {FORMATS}")
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: got the ending {path.suffix!r}, expected {FORMATS}")
    return readers[path.suffix.lower()](path)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        # Only \n ends a line: str.splitlines would also split at U+2028 inside a string.
        for number, raw in enumerate(file, start=1):
            line = _text(f"{path}:{number}", raw.removeprefix(_MARK) if number == 1 else raw)
            if line.strip():
                yield f"{path}:{number}", _only_object(path, number, line.rstrip("\r\n"))


def _json(path: Path) -> Iterator[Row]:
    """One array of objects, or JSON lines under the name .json, as many exporters write."""
    with path.open("rb") as file:
        is_array = file.read(4096).removeprefix(_MARK).lstrip().startswith(b"[")
    if not is_array:
        yield from _json_lines(path)
        return
    text = _text(str(path), path.read_bytes().removeprefix(_MARK))
    at = _next(text, text.index("[") + 1)
    line, counted = 1, 0
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, end = _object(path, line, text, at)
        yield f"{path}:{line}", value
        at = _next(text, end)
        if text[at : at + 1] == ",":
            at = _next(text, at + 1)
        elif text[at : at + 1] not in ("]", ""):
            raise _bad_json(path, text, at, f"got {text[at]!r}, expected ',' or ']'")
    if at >= len(text):
        raise _bad_json(path, text, at, "the array has no closing ']'")
    rest = _next(text, at + 1)
    if rest < len(text):
        raise _bad_json(path, text, rest, f"got {text[rest]!r}, expected nothing after the array")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            for number, row in enumerate((row for batch in batches for row in batch), start=1):
                yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _saved(path: Path) -> Iterator[Row]:
    import datasets

    index = path / "dataset_dict.json"
    if index.exists():
        splits = _only_object(index, 1, index.read_text("utf-8")).get("splits", [])
        if "train" not in splits:
            raise DataError(
                f"{path}: a dataset dictionary without a split named 'train' (it has {', '.join(splits)}); "
                f"name one, as {path / str(splits[0] if splits else '...')}"
            )
        path = path / "train"
    if not (path / "state.json").exists():
        raise DataError(
            f"{path}: a folder that datasets' save_to_disk did not write (no state.json in it); expected {FORMATS}"
        )
    try:
        rows = datasets.Dataset.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: datasets cannot load it: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", dict(row)


def _text(place: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 text: byte 0x{raw[error.start]:02x} at byte {error.start + 1}"
        ) from error


def _only_object(path: Path, line: int, text: str) -> dict[str, Any]:
    """The object that a text holds, and nothing after it."""
    value, end = _object(path, line, text, _next(text, 0))
    rest = _next(text, end)
    if rest < len(text):
        what = f"got more: {shown(text[rest:])}, expected one object in a line"
        raise _bad_json(path, text, rest, what, line)
    return value


def _object(path: Path, line: int, text: str, start: int) -> tuple[dict[str, Any], int]:
    """The object that starts at a character, which is in this line of the file, and where it ends."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        # The decoder counts lines within the text, which may start inside the file.
        raise _bad_json(path, text, error.pos, error.msg, line, start) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}:{line}: bad JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(
            f'{path}:{line}: got {shown(value)}, expected an object with named columns, as {{"prompt": ...}}'
        )
    return value, end


def _bad_json(path: Path, text: str, index: int, what: str, line: int = 1, start: int = 0) -> DataError:
    """The error of a character, by line and column; the character at `start` is in `line` of the file."""
    line += text.count("\n", start, index)
    return DataError(f"{path}:{line}:{index - text.rfind(chr(10), 0, index)}: bad JSON: {what}")


def _next(text: str, index: int) -> int:
    """The first character from here on that is not white space."""
    return _SPACE.match(text, index).end()  # type: ignore[union-attr]
