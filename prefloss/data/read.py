"""Read a preference file: detect its kind, check every row, drop what cannot teach anything, say so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloss.data.errors import DataError
from prefloss.data.rows import Clean, clean, is_blank, is_number, kind_of, kind_text, with_new_names
from prefloss.data.sources import rows_of
from prefloss.feedback import KINDS, Labels, Pairs, columns_of, optional_fields

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Preferences:
    """A preference data set that the trainers can take.

    Attributes:
        rows: One row per judgement, with the columns of its kind and the optional ones.
        kind: `Pairs`, `Labels` or `Rankings`.
        optional: Columns of numbers that came along (`prefloss.feedback.optional_fields`).
        unused: Columns of the file that are left out.
        conversational: Whether texts are lists of messages (role, content) or plain strings.
        name: Of the file, for messages.
        notes: What was dropped or rewritten, one sentence each, with counts.
    """

    rows: Dataset
    kind: type
    conversational: bool
    name: str
    notes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

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
    head: _Head | None = None
    conversational = False
    unused: dict[str, None] = {}
    for place, head, checked in _checked(path):
        conversational = checked.conversational
        unused |= dict.fromkeys(checked.unused)
        if checked.converted:
            notes.add(checked.converted, place)
        reason = _useless(checked.row, head.kind)
        if reason:
            notes.add(f"dropped, {reason}", place)
        else:
            kept.append(checked.row)
            if is_blank(checked.row["prompt"]):
                notes.add("kept, though the prompt is empty", place)
    if head is None:
        raise DataError(f"{path}: no rows")
    if not kept:
        raise DataError(f"{path}: no row is left to train on{notes.reasons()}")
    return Preferences(
        Dataset.from_list(kept),
        head.kind,
        conversational,
        path.name,
        notes=notes.sentences(),
        optional=head.optional,
        unused=tuple(unused),
    )


@dataclass(frozen=True)
class _Head:
    """What the first row says about all rows."""

    place: str
    kind: type
    optional: tuple[str, ...]

    @classmethod
    def of(cls, place: str, row: dict[str, Any]) -> _Head:
        kind = kind_of(place, row)
        row = with_new_names(kind, row)
        optional = tuple(f.column for f in optional_fields(kind) if f.column and is_number(row.get(f.column)))
        scores = {"score_chosen", "score_rejected"} & set(optional)
        if len(scores) == 1:
            raise DataError(
                f"{place}: got column {scores.pop()!r} alone; expected scores of both sides, or of neither"
            )
        return cls(place, kind, optional)


def _checked(path: Path) -> Iterator[tuple[str, _Head, Clean]]:
    """Every row, checked, all of one kind and form."""
    head: _Head | None = None
    form: tuple[str, bool] | None = None
    for place, row in rows_of(path):
        head = head or _Head.of(place, row)
        _check_kind(place, row, head)
        row = with_new_names(head.kind, row)
        checked = clean(place, row, head.kind, head.optional)
        form = form or (place, checked.conversational)
        if checked.conversational != form[1]:
            words = {True: "messages", False: "plain text"}
            raise DataError(
                f"{place}: expected {words[form[1]]} as in {_short(form[0])}, got {words[checked.conversational]}"
            )
        yield place, head, checked


def _check_kind(place: str, row: dict[str, Any], head: _Head) -> None:
    kind = head.kind
    missing = [name for name in columns_of(kind)[1:] if name not in row or _padding(row, name)]
    if not missing:
        return
    other = next((k for k in KINDS if all(row.get(name) is not None for name in columns_of(k)[1:])), None)
    if other is not None and other is not kind:
        raise DataError(
            f"{place}: expected a row of kind {kind_text(kind)} as in {_short(head.place)}, got {kind_text(other)}"
        )
    absent = [name for name in missing if name not in row]
    if absent:
        has = ", ".join(map(repr, row))
        raise DataError(
            f"{place}: missing column {absent[0]!r} of {kind_text(kind)} rows; it has columns {has}"
        )


def _padding(row: dict[str, Any], name: str) -> bool:
    """Whether a value is the null that tables hold where a row of another kind has no such column."""
    return row[name] is None


def _useless(row: dict[str, Any], kind: type) -> str:
    """Why a row teaches nothing, or "" if it does."""
    if kind is Labels:
        return "empty 'completion'" if is_blank(row["completion"]) else ""
    if kind is Pairs:
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
