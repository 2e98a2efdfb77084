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
_SPACE = re.compile(r"[ \t\r\n]*")
_BLOCK = 2**20
# Characters before the end of a piece within which a mistake may be only that the piece ends there.
_CUT = 16


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
            line = _text(f"{path}:{number}", raw.removeprefix(_MARK) if number == 1 else raw)
            if line.strip():
                yield f"{path}:{number}", only_object(path, number, line.rstrip("\r\n"))


def count_json(path: Path) -> int:
    """Number of objects of an array, or of lines."""
    return sum(1 for _ in _array(path)) if _is_array(path) else count_lines(path)


def json_file(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """One array of objects, or JSON lines under the name .json, as many exporters write."""
    yield from itertools.islice(_array(path), start, stop) if _is_array(path) else lines(path, start, stop)


def only_object(path: Path, line: int, text: str) -> dict[str, Any]:
    """The object that a line holds, and nothing after it."""
    piece = _Piece(path, text, line)
    piece.skip_space()
    value = piece.object()
    piece.skip_space()
    if piece.at < len(text):
        raise piece.error(f"got more: {shown(text[piece.at :])}, expected one object in a line", piece.at)
    return value


def _opened(path: Path) -> IO[bytes]:
    # gzip's file reads as any other.
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(_MARK).lstrip().startswith(b"[")


def _array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        piece = _Piece(path, "", 1, file)
        try:
            yield from _elements(piece)
        except UnicodeDecodeError:
            # The decoder knows the byte of its buffer only.
            with path.open("rb") as raw:
                for number, line in enumerate(raw, start=1):
                    _text(f"{path}:{number}", line)
            raise


def _elements(piece: _Piece) -> Iterator[tuple[str, dict[str, Any]]]:
    piece.skip_space()
    piece.at += 1
    piece.skip_space()
    while piece.next() not in ("]", ""):
        place = piece.place()
        yield place, piece.object()
        piece.skip_space()
        if piece.next() == ",":
            piece.at += 1
            piece.skip_space()
        elif piece.next() not in ("]", ""):
            raise piece.error(f"got {piece.next()!r}, expected ',' or ']'", piece.at)
    if not piece.next():
        raise piece.error("the array has no closing ']'", piece.at)
    piece.at += 1
    piece.skip_space()
    if piece.next():
        raise piece.error(f"got {piece.next()!r}, expected nothing after the array", piece.at)


class _Piece:
    """A piece of a JSON text, and how far it is read; from a file, it is followed by the next piece."""

    def __init__(self, path: Path, text: str, line: int, file: IO[str] | None = None) -> None:
        self.path, self.text, self.file = path, text, file
        self.at = 0
        # The line of a character, and how many of that line's characters are no longer held.
        self._line, self._counted, self._gone = line, 0, 0

    def more(self) -> bool:
        """Drop what is read, and append more of the file; False at its end."""
        new = self.file.read(max(_BLOCK, len(self.text) - self.at)) if self.file else ""
        if new:
            self._count()
            break_at = self.text.rfind("\n", 0, self.at)
            self._gone = self._gone + self.at if break_at < 0 else self.at - break_at - 1
            self.text, self.at, self._counted = self.text[self.at :] + new, 0, 0
        return bool(new)

    def next(self) -> str:
        """The next character, "" at the end."""
        if self.at == len(self.text):
            self.more()
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> None:
        """Go on to the next character that is not white space."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more():
                return

    def object(self) -> dict[str, Any]:
        """The object that starts here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                break
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - _CUT or error.msg.startswith("Unterminated")
                if not (cut and self.more()):
                    raise self.error(error.msg, error.pos) from error
            except (RecursionError, ValueError) as error:
                raise DataError(f"{self.place()}: bad JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataError(
                f'{self.place()}: got {shown(value)}, expected an object with named columns, as {{"prompt": ...}}'
            )
        self.at = end
        return value

    def place(self) -> str:
        """File and line of the next character."""
        self._count()
        return f"{self.path}:{self._line}"

    def error(self, what: str, index: int) -> DataError:
        """A mistake at a character of the piece, by line and column."""
        line = self._line + self.text.count("\n", self._counted, index)
        break_at = self.text.rfind("\n", 0, index)
        column = index - break_at + (self._gone if break_at < 0 else 0)
        return DataError(f"{self.path}:{line}:{column}: bad JSON: {what}")

    def _count(self) -> None:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; json itself would take the last of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {shown(next(n for n in names if names.count(n) > 1))} is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _text(place: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 text: byte 0x{raw[error.start]:02x} at byte {error.start + 1}"
        ) from error
