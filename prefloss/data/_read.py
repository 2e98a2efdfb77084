"""Read a preference file: detect its kind, check every row, drop what cannot teach anything, say so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloss.data._errors import DataError
from prefloss.data._rows import Clean, clean, is_blank
from prefloss.data._sources import rows_of
from prefloss.data.kinds import Kind, kind_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Preferences:
    """A preference data set that the trainers can take.

    Attributes:
        rows: One row per judgement, with the columns of its kind and no others.
        kind: What a row says.
        conversational: Whether texts are lists of messages (role, content) or plain strings.
        name: Of the file, for messages.
        notes: What was dropped or rewritten, one sentence each, with counts.
    """

    rows: Dataset
    kind: Kind
    conversational: bool
    name: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


def read(path: str | os.PathLike[str]) -> Preferences:
    """Read and check a preference file.

    Takes JSON lines, a JSON array, Parquet, or a folder written by datasets' `save_to_disk`. The columns
    of the first row say which kind it holds; every other row must be of that kind. Rows without a
    completion, with two equal sides, or with nothing to rank are dropped and counted in `notes`.

    Args:
        path: File or folder.

    Raises:
        DataError: If it cannot be read, or a row is malformed; the message names file, line and column.
    """
    from datasets import Dataset

    path = Path(path)
    notes = _Notes()
    kept: list[dict[str, Any]] = []
    kind, conversational = Kind.PAIRED, False
    for place, kind, checked in _checked(path):
        conversational = checked.conversational
        if checked.converted:
            notes.add(checked.converted, place)
        reason = _useless(checked.row, kind)
        if reason:
            notes.add(f"dropped, {reason}", place)
        else:
            kept.append(checked.row)
            if is_blank(checked.row["prompt"]):
                notes.add("kept, though the prompt is empty", place)
    if not kept:
        raise DataError(f"{path}: no row is left to train on{notes.reasons()}")
    return Preferences(Dataset.from_list(kept), kind, conversational, path.name, notes.sentences())


def _checked(path: Path) -> Iterator[tuple[str, Kind, Clean]]:
    """Every row, checked, all of one kind and form."""
    first: tuple[str, Kind] | None = None
    form: tuple[str, bool] | None = None
    for place, row in rows_of(path):
        if first is None:
            first = place, kind_of(place, row)
        kind = _same_kind(place, row, *first)
        checked = clean(place, row, kind)
        form = form or (place, checked.conversational)
        if checked.conversational != form[1]:
            words = {True: "messages", False: "plain text"}
            raise DataError(
                f"{place}: expected {words[form[1]]} as in {_short(form[0])}, got {words[checked.conversational]}"
            )
        yield place, kind, checked
    if first is None:
        raise DataError(f"{path}: no rows")


def _same_kind(place: str, row: dict[str, Any], first_place: str, kind: Kind) -> Kind:
    missing = [name for name in kind.columns[1:] if name not in row or _padding(row, name)]
    if not missing:
        return kind
    other = next((k for k in Kind if all(row.get(name) is not None for name in k.columns[1:])), None)
    if other is not None and other is not kind:
        raise DataError(f"{place}: expected a row of kind {kind} as in {_short(first_place)}, got {other}")
    absent = [name for name in missing if name not in row]
    if absent:
        has = ", ".join(map(repr, row))
        raise DataError(f"{place}: missing column {absent[0]!r} of {kind} rows; it has columns {has}")
    return kind


def _padding(row: dict[str, Any], name: str) -> bool:
    """Whether a value is the null that tables hold where a row of another kind has no such column."""
    return row[name] is None


def _useless(row: dict[str, Any], kind: Kind) -> str:
    """Why a row teaches nothing, or "" if it does."""
    if kind is Kind.LABELLED:
        return "empty 'completion'" if is_blank(row["completion"]) else ""
    if kind is Kind.PAIRED:
        blank = [name for name in ("chosen", "rejected") if is_blank(row[name])]
        if blank:
            return f"empty {' and '.join(map(repr, blank))}"
        return "'chosen' and 'rejected' are the same" if row["chosen"] == row["rejected"] else ""
    scored = [(s, c) for s, c in zip(row["scores"], row["completions"], strict=True) if not is_blank(c)]
    if len(scored) < 2:
        return "fewer than two completions that are not empty"
    best, worst = max(scored, key=lambda x: x[0]), min(scored, key=lambda x: x[0])
    if best[0] == worst[0]:
        return "all completions have the same score"
    return "the best and the worst completion are the same" if best[1] == worst[1] else ""


def _short(place: str) -> str:
    """The place without the file, which the message has named already."""
    return f"line {place.rsplit(':', 1)[1]}" if ": row" not in place else place.rsplit(": ", 1)[1]


class _Notes:
    """Counts of what was done to rows, and the first places where it was."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, what: str, place: str) -> None:
        self._places.setdefault(what, []).append(place)

    def sentences(self) -> tuple[str, ...]:
        return tuple(f"{_rows(len(p))} {what} ({_first(p)})" for what, p in self._places.items())

    def reasons(self) -> str:
        return "".join(f"; {sentence}" for sentence in self.sentences())


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _first(places: list[str], most: int = 3) -> str:
    word, first = _short(places[0]).split(" ")
    if len(places) == 1:
        return f"{word} {first}"
    numbers = ", ".join(_short(place).split(" ")[1] for place in places[:most])
    return f"{word}s {numbers}" + (", ..." if len(places) > most else "")
