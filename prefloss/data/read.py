"""Read a preference file: tell its kind, check every row, drop rows that teach nothing, and count those."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloss.data.errors import DataError
from prefloss.data.files import rows_of
from prefloss.data.rows import Clean, clean, extremes, is_blank, is_number, kind_of, kind_text, with_new_names
from prefloss.feedback import KINDS, SIDES, Pairs, Rankings, columns_of, optional_fields

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Preferences:
    """A preference data set that the trainers can take.

    Attributes:
        rows: One row per judgement, with the columns of its kind and the optional ones.
        kind: `Pairs`, `Labels` or `Rankings`.
        conversational: Whether texts are lists of messages (role, content) or plain strings.
        name: Of the file, for messages.
        notes: What was dropped or rewritten, one sentence each, with counts.
        optional: Columns of numbers that came along (`prefloss.feedback.optional_fields`).
        unused: Columns of the file that are left out.
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
    first: _First | None = None
    kept: list[dict[str, Any]] = []
    unused: dict[str, None] = {}
    places: dict[str, list[str]] = {}
    for place, row in rows_of(path):
        first = first or _First.of(place, row)
        checked = first.check(place, row)
        unused |= dict.fromkeys(checked.unused)
        dropped = _useless(checked.row, first.kind)
        if not dropped:
            kept.append(checked.row)
        blank = "kept, though the prompt is empty" if is_blank(checked.row["prompt"]) and not dropped else ""
        for event in (checked.converted, dropped, blank):
            if event:
                places.setdefault(event, []).append(place)
    notes = tuple(
        f"{len(p)} row{'' if len(p) == 1 else 's'} {event} ({_places(p)})" for event, p in places.items()
    )
    if first is None:
        raise DataError(f"{path}: no rows")
    if not kept:
        raise DataError("; ".join((f"{path}: no row is left to train on", *notes)))
    rows = Dataset.from_list(kept)
    return Preferences(
        rows, first.kind, first.conversational, path.name, notes, first.optional, tuple(unused)
    )


@dataclass(frozen=True)
class _First:
    """What the first row says about all rows."""

    place: str
    kind: type
    optional: tuple[str, ...]
    conversational: bool

    @classmethod
    def of(cls, place: str, row: dict[str, Any]) -> _First:
        kind = kind_of(place, row)
        row = with_new_names(kind, row)
        optional = tuple(f.column for f in optional_fields(kind) if f.column and is_number(row.get(f.column)))
        scores = {"score_chosen", "score_rejected"} & set(optional)
        if len(scores) == 1:
            raise DataError(
                f"{place}: got column {scores.pop()!r} alone, expected scores of both sides, or of neither"
            )
        return cls(place, kind, optional, clean(place, row, kind).conversational)

    def check(self, place: str, row: dict[str, Any]) -> Clean:
        """A row, which must be of the same kind and form and have the same optional columns."""
        required = columns_of(self.kind)[1:]
        # Tables hold null where a row of another kind has no such column.
        if any(row.get(name) is None for name in required):
            other = next((k for k in KINDS if all(row.get(n) is not None for n in columns_of(k)[1:])), None)
            if other is not None:
                raise DataError(
                    f"{place}: got {kind_text(other)}, expected a row of kind {kind_text(self.kind)} as in "
                    f"{_short(self.place)}"
                )
            absent = [name for name in required if name not in row]
            if absent:
                has = ", ".join(map(repr, row))
                raise DataError(
                    f"{place}: missing column {absent[0]!r} of {kind_text(self.kind)} rows; it has columns {has}"
                )
        checked = clean(place, with_new_names(self.kind, row), self.kind, self.optional)
        if checked.conversational != self.conversational:
            forms = ("messages", "plain text")
            got, expected = forms if checked.conversational else reversed(forms)
            raise DataError(f"{place}: got {got}, expected {expected} as in {_short(self.place)}")
        return checked


def _useless(row: dict[str, Any], kind: type) -> str:
    """Why a row teaches nothing, or "" if it does."""
    if kind is not Rankings:
        blank = [repr(name) for name in SIDES[kind] if is_blank(row[name])]
        if blank:
            return f"dropped, empty {' and '.join(blank)}"
        same = kind is Pairs and row["chosen"] == row["rejected"]
        return "dropped, 'chosen' and 'rejected' are the same" if same else ""
    ends = extremes(row)
    if not ends:
        return "dropped, fewer than two completions that are not empty"
    best, worst = ends
    if best[0] == worst[0]:
        return "dropped, all completions have the same score"
    return "dropped, the best and the worst completion are the same" if best[1] == worst[1] else ""


def _short(place: str) -> str:
    """The place without the file, which the message has named already."""
    return f"line {place.rsplit(':', 1)[1]}" if ": row" not in place else place.rsplit(": ", 1)[1]


def _places(places: list[str], most: int = 3) -> str:
    """The first of some places, as "lines 3, 4, 5, ..."."""
    word = _short(places[0]).split(" ")[0]
    numbers = ", ".join(_short(place).split(" ")[1] for place in places[:most])
    return f"{word}{'s' if len(places) > 1 else ''} {numbers}" + (", ..." if len(places) > most else "")
