"""Read a preference file: tell its kind, check every row, drop rows that teach nothing, and count those."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloss.data.errors import DataError, shown
from prefloss.data.examples import read_example
from prefloss.data.files import rows_of
from prefloss.data.row_file import Share, open_rows, row_folder, row_schema, write_rows
from prefloss.data.rows import (
    clean,
    extremes,
    id_columns,
    is_blank,
    kind_of,
    kind_text,
    optional_of,
    with_new_names,
)
from prefloss.feedback import KINDS, SIDES, Pairs, Rankings, columns_of, optional_fields

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# Names of columns that are kept to be named; a file could have another in each row.
_MOST_NAMES = 100


@dataclass(frozen=True)
class Preferences:
    """A preference data set that the trainers can take.

    Attributes:
        rows: One row per judgement, with the columns of its kind and the optional ones; memory-mapped.
        kind: `Pairs`, `Labels` or `Rankings`.
        conversational: Whether texts are lists of messages (role, content) or plain strings.
        name: Of the file, for messages.
        notes: What was dropped or rewritten, one sentence each, with counts.
        optional: Columns of numbers that came along (`prefloss.feedback.optional_fields`).
        unused: Columns of the file that are left out, the first hundred of them.
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


def read(path: str | os.PathLike[str], share: Share | None = None) -> Preferences:
    """Read and check a preference file.

    Takes JSON lines, a JSON array, Parquet, a folder of such files, or a folder written by datasets' `save_to_disk`.
    The columns of the first row say which kind it holds; every other row must be of that kind. An optional column of
    numbers must have one in every row, or in none. Rows without a completion, with two equal sides, or with nothing to
    rank are dropped and counted in `notes`.

    The file is read row by row. The rows that are kept go to a file in the cache folder of datasets
    (HF_DATASETS_CACHE), which is memory-mapped, and removed when the process ends.

    Args:
        path: File or folder.
        share: Of several processes that read the file together: each checks its part, all get all rows.

    Raises:
        DataError: If it cannot be read, or a row is malformed; the message names file, line and column.
    """
    path = _checked_path(path)
    rule, rows, found = _read(path, share or Share(), _Rule)
    notes = tuple(
        f"{number} row{'' if number == 1 else 's'} {event} ({_places(places)})"
        for event, (number, places) in found.events.items()
    )
    if rows is None:
        raise DataError("; ".join((f"{path}: no row is left to train on", *notes)))
    unused = tuple(found.unused)[:_MOST_NAMES]
    return Preferences(rows, rule.kind, rule.conversational, path.name, notes, rule.optional, unused)


def read_token_ids(path: str | os.PathLike[str], share: Share | None = None) -> Dataset | None:
    """Read and check a file of token ids (`prompt_ids`, `chosen_ids` ...); None if its first row holds other columns.

    Args:
        path: File or folder, as for `read`.
        share: As for `read`.

    Raises:
        DataError: If a row is malformed.
    """
    path, share = _checked_path(path), share or Share()

    def are_ids() -> bool:
        _, row = next(rows_of(path), ("", {}))
        return row.get("prompt_ids") is not None

    return _read(path, share, _IdsRule)[1] if all(share.together(are_ids)) else None


@dataclass
class _Part:
    """What a process found in its part of a file.

    Attributes:
        file: Holds the rows that it kept.
        kept: Their number.
        events: What happened to rows -> to how many, and the places of the first.
        unused: Names of columns that nothing reads.
    """

    file: Path | None = None
    kept: int = 0
    events: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)

    def add(self, event: str, places: list[str], number: int = 1) -> None:
        """Count rows to which something happened."""
        before, known = self.events.get(event, (0, []))
        self.events[event] = (before + number, [*known, *places][:4])

    def add_unused(self, names: Iterable[str]) -> None:
        """Note columns that nothing reads."""
        if len(self.unused) < _MOST_NAMES:
            self.unused.update(dict.fromkeys(names))


def _read(
    path: Path, share: Share, kind_of_rule: type[_Rule | _IdsRule]
) -> tuple[Any, Dataset | None, _Part]:
    """The rule that the first row sets, the rows of all processes (None without any), and what was found in them."""
    # One process makes the folder, so that all parts lie in it.
    folder = share.together(lambda: row_folder() if share.rank == 0 else Path())[0]

    def check() -> tuple[Any, _Part]:
        place, row = next(rows_of(path), (None, {}))
        if place is None:
            raise DataError(f"{path}: no rows")
        rule, part = kind_of_rule.of(place, row), _Part()

        def kept() -> Iterator[dict[str, Any]]:
            for place, row in rows_of(path, share.rank, share.size):
                checked = rule.check(place, row, part)
                if checked is not None:
                    part.kept += 1
                    yield checked

        part.file = write_rows(folder, rule.schema, kept())
        return rule, part

    outcomes, whole = share.together(check), _Part()
    for _, part in outcomes:
        whole.add_unused(part.unused)
        for event, (number, places) in part.events.items():
            whole.add(event, places, number)
    files = [part.file for _, part in outcomes if part.file and part.kept]
    # Together, because one process may not see the others' files; the rows themselves stay in each.
    opened: list[Dataset] = []
    share.together(lambda: opened.extend([open_rows(files)] if files else []))
    return outcomes[0][0], opened[0] if opened else None, whole


@dataclass(frozen=True)
class _Rule:
    """What the first row of text says about all rows."""

    place: str
    kind: type
    optional: tuple[str, ...]
    conversational: bool

    @classmethod
    def of(cls, place: str, row: dict[str, Any]) -> _Rule:
        kind = kind_of(place, row)
        row = with_new_names(kind, row)
        conversational = clean(place, row, kind).conversational
        optional = tuple(name for name in _optional(kind) if row.get(name) is not None)
        for name in optional:
            optional_of(place, name, row[name])
        scores = {"score_chosen", "score_rejected"} & set(optional)
        if len(scores) == 1:
            raise DataError(
                f"{place}: got column {scores.pop()!r} alone, expected scores of both sides, or of neither"
            )
        return cls(place, kind, optional, conversational)

    @property
    def schema(self) -> pa.Schema:
        import pyarrow as pa

        messages = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
        return row_schema(self.kind, messages if self.conversational else pa.string(), self.optional)

    def check(self, place: str, row: dict[str, Any], part: _Part) -> dict[str, Any] | None:
        """The row as it is kept, or None if it is dropped; it must be of the same kind, form and columns."""
        self._check_kind(place, row)
        row = with_new_names(self.kind, row)
        checked = clean(place, row, self.kind, self.optional)
        if checked.conversational != self.conversational:
            forms = ("messages", "plain text")
            got, expected = forms if checked.conversational else reversed(forms)
            raise DataError(f"{place}: got {got}, expected {expected} as in {_short(self.place)}")
        for name in checked.unused:
            if row[name] is not None and name in _optional(self.kind):
                raise DataError(
                    f"{place}: column {name!r}: got {shown(row[name])}, and {_short(self.place)} has none; give every "
                    "row a number there, or no row"
                )
        part.add_unused(checked.unused)
        dropped = _useless(checked.row, self.kind)
        blank = "kept, though the prompt is empty" if is_blank(checked.row["prompt"]) and not dropped else ""
        for event in (checked.converted, dropped, blank):
            if event:
                part.add(event, [place])
        return None if dropped else checked.row

    def _check_kind(self, place: str, row: dict[str, Any]) -> None:
        required = columns_of(self.kind)[1:]
        # Tables hold null where a row of another kind has no such column.
        if all(row.get(name) is not None for name in required):
            return
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


@dataclass(frozen=True)
class _IdsRule:
    """What the first row of token ids says about all rows."""

    place: str
    kind: type

    @classmethod
    def of(cls, place: str, row: dict[str, Any]) -> _IdsRule:
        return cls(place, read_example(0, row, None, place=place).kind)

    @property
    def schema(self) -> pa.Schema:
        import pyarrow as pa

        return row_schema(self.kind, pa.list_(pa.int64()), ending="_ids")

    def check(self, place: str, row: dict[str, Any], part: _Part) -> dict[str, Any] | None:
        """The row, which must hold token ids of the same kind."""
        if row.get("prompt_ids") is None:
            raise DataError(f"{place}: missing column 'prompt_ids', which {_short(self.place)} has")
        kind = read_example(0, row, None, place=place).kind
        if kind is not self.kind:
            raise DataError(
                f"{place}: got {kind_text(kind)}, expected {kind_text(self.kind)} as in {_short(self.place)}"
            )
        return {name: row[name] for name in ("prompt_ids", *id_columns(kind))}


def _checked_path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: got {shown(path)}, expected the name of a file or folder")
    return Path(path)


def _optional(kind: type) -> tuple[str, ...]:
    return tuple(field.column for field in optional_fields(kind) if field.column)


def _useless(row: Mapping[str, Any], kind: type) -> str:
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
