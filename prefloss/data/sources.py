"""Files to rows: each row with the place that an error message would name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefloss.data.errors import DataError, shown

Row = tuple[str, dict[str, Any]]
"""Where a row is ("pairs.jsonl:17") and what it holds."""

FORMATS = "JSON lines (.jsonl, .ndjson), .json, .parquet, or a folder written by datasets' save_to_disk"


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
        raise DataError(f"{path}: cannot tell the format from the ending {path.suffix!r}; expected {FORMATS}")
    return readers[path.suffix.lower()](path)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        # Only \n ends a line: str.splitlines would also split at U+2028 inside a string.
        for number, raw in enumerate(file, start=1):
            line = _text(f"{path}:{number}", raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
            if line.strip():
                yield f"{path}:{number}", _object(path, number, line.rstrip("\r\n"))


def _json(path: Path) -> Iterator[Row]:
    """One array of objects, or JSON lines under the name .json, as many exporters write."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from _json_lines(path)
        return
    text = _text(str(path), path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    decoder = json.JSONDecoder()
    start = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while start < len(text) and text[start] != "]":
        line, counted = line + text.count("\n", counted, start), start
        value, end = _decode(path, line, text, start, decoder)
        yield f"{path}:{line}", _as_object(f"{path}:{line}", value)
        start = _skip_space(text, end)
        if start < len(text) and text[start] == ",":
            start = _skip_space(text, start + 1)
        elif start < len(text) and text[start] != "]":
            raise DataError(f"{path}:{_position(text, start)}: bad JSON: expected ',' or ']' between objects")
    if start >= len(text):
        raise DataError(f"{path}:{_position(text, start)}: bad JSON: the array has no closing ']'")
    rest = _skip_space(text, start + 1)
    if rest < len(text):
        raise DataError(f"{path}:{_position(text, rest)}: bad JSON: expected nothing after the array")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _saved(path: Path) -> Iterator[Row]:
    import datasets

    if (path / "dataset_dict.json").exists():
        index = path / "dataset_dict.json"
        splits = _object(index, 1, index.read_text("utf-8")).get("splits", [])
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


def _object(path: Path, line: int, text: str) -> dict[str, Any]:
    start = _skip_space(text, 0)
    value, end = _decode(path, line, text, start, json.JSONDecoder())
    rest = _skip_space(text, end)
    if rest < len(text):
        raise DataError(
            f"{path}:{line}:{rest + 1}: bad JSON: expected one object in a line, got more: {shown(text[rest:])}"
        )
    return _as_object(f"{path}:{line}", value)


def _decode(path: Path, line: int, text: str, start: int, decoder: json.JSONDecoder) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        # The decoder counts lines within what it was given, which may start inside the file.
        row = line + text.count("\n", start, error.pos)
        column = error.pos - text.rfind("\n", 0, error.pos)
        raise DataError(f"{path}:{row}:{column}: bad JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}:{line}: bad JSON: {error}") from error


def _as_object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f'{place}: expected an object with named columns, as {{"prompt": ...}}, got {shown(value)}'
        )
    return value


def _position(text: str, index: int) -> str:
    """Line and column of a character, as "3:17"."""
    return f"{text.count(chr(10), 0, index) + 1}:{index - text.rfind(chr(10), 0, index)}"


def _skip_space(text: str, index: int) -> int:
    while index < len(text) and text[index] in " \t\r\n":
        index += 1
    return index
