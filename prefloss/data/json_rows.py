"""Rows of JSON files, read piece by piece; a mistake in one is named by line and column."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from prefloss.data.errors import DataError, shown

_MARK = b"\xef\xbb\xbf"
_BLOCK = 2**20
# What comes before the first value of an array, before another, and after the last.
_OPENING, _COMMA, _CLOSING = (re.compile(rf"[ \t\r\n]*\{mark}[ \t\r\n]*") for mark in "[,]")


def count_lines(path: Path) -> int:
    """Number of lines."""
    with _opened(path) as file:
        blocks = iter(lambda: file.read(_BLOCK), b"")
        # The last line may lack its end.
        return 1 + sum(block.count(b"\n") for block in blocks)


def lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """One object a line, from these lines of the file, counted from 0."""
    with _opened(path) as file:
        # Only \n ends a line: str.splitlines would also split at U+2028 inside a string.
        for number, raw in itertools.islice(enumerate(file, start=1), start, stop):
            place = f"{path}:{number}"
            line = _text(place, raw.removeprefix(_MARK) if number == 1 else raw)
            if line.strip():
                yield place, _object(place, _value(path, line.rstrip("\r\n"), number))


def count_json(path: Path) -> int:
    """Number of objects of an array, or of lines."""
    return sum(1 for _ in _array(path)) if _is_array(path) else count_lines(path)


def json_file(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """One array of objects, or JSON lines under the name .json, as many exporters write."""
    yield from itertools.islice(_array(path), start, stop) if _is_array(path) else lines(path, start, stop)


def _opened(path: Path) -> IO[bytes]:
    # gzip's file reads as any other.
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(_MARK).lstrip().startswith(b"[")


def _array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text, at, line, before = "", 0, 1, _OPENING
    with path.open(encoding="utf-8-sig", newline="") as file:
        while piece := _next_piece(path, file, len(text) - at):
            text, at = text[at:] + piece, 0
            while gap := before.match(text, at):
                line_of_value = line + text.count("\n", at, gap.end())
                place = f"{path}:{line_of_value}"
                try:
                    value, end = _DECODER.raw_decode(text, gap.end())
                except json.JSONDecodeError:
                    # A mistake, or the piece ends inside the value.
                    break
                except (RecursionError, ValueError) as error:
                    raise DataError(f"{place}: bad JSON: {error}") from error
                yield place, _object(place, value)
                line = line_of_value + text.count("\n", gap.end(), end)
                at, before = end, _COMMA
    if not _CLOSING.fullmatch(text, at):
        # No values, or a mistake, which the whole text places.
        _value(path, path.read_text("utf-8-sig"), 1)


def _next_piece(path: Path, file: IO[str], least: int) -> str:
    try:
        return file.read(max(_BLOCK, least))
    except UnicodeDecodeError:
        # The decoder knows the byte of its buffer only.
        with path.open("rb") as raw:
            for number, line in enumerate(raw, start=1):
                _text(f"{path}:{number}", line)
        raise


def _value(path: Path, text: str, line: int) -> Any:
    """The one value of a text that starts at this line."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :]
        what = (
            f"got more: {shown(rest)}, expected nothing after it" if error.msg == "Extra data" else error.msg
        )
        end = "" if rest else ", and the text ends there"
        place = f"{path}:{line + error.lineno - 1}:{error.colno}"
        raise DataError(f"{place}: bad JSON: {what}{end}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}:{line}: bad JSON: {error}") from error


def _object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        expected = 'an object with named columns, as {"prompt": ...}'
        raise DataError(f"{place}: got {shown(value)}, expected {expected}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; json itself would take the last of two equal keys."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {shown(next(n for n in names if names.count(n) > 1))} is there twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _text(place: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 text: byte 0x{raw[error.start]:02x} at byte {error.start + 1}"
        ) from error
