"""The three kinds of preference rows."""

from __future__ import annotations

import enum
from typing import Any

from prefloss.data.errors import DataError


class Kind(enum.Enum):
    """What one row of a preference file says; the value is the word that messages use."""

    PAIRED = "paired"
    LABELLED = "labelled"
    RANKED = "ranked"

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row of this kind must have."""
        return _COLUMNS[self]

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns of numbers that some losses read: `weight` of a row, graded feedback, baselines."""
        return _OPTIONAL[self]

    def __str__(self) -> str:
        """As "paired (prompt, chosen, rejected)"."""
        return f"{self.value} ({', '.join(self.columns)})"


_COLUMNS = {
    Kind.PAIRED: ("prompt", "chosen", "rejected"),
    Kind.LABELLED: ("prompt", "completion", "label"),
    Kind.RANKED: ("prompt", "completions", "scores"),
}

_OPTIONAL = {
    Kind.PAIRED: ("weight", "score_chosen", "score_rejected"),
    Kind.LABELLED: ("weight", "scores", "kl", "baseline"),
    Kind.RANKED: ("weight",),
}


def kind_of(place: str, row: dict[str, Any]) -> Kind:
    """The kind that a row's columns say, whether or not its prompt is there.

    Raises:
        DataError: If they fit no kind, or two.
    """
    # The prompt may be inside the messages, so it does not decide.
    filled = {name for name, value in row.items() if value is not None}
    fitting = [kind for kind in Kind if set(kind.columns[1:]) <= filled]
    # A table of mixed rows has every column in every row, null where it does not belong.
    fitting = fitting or [kind for kind in Kind if set(kind.columns[1:]) <= set(row)]
    if len(fitting) == 1:
        return fitting[0]
    has = f"has columns {', '.join(map(repr, row))}" if row else "has no columns"
    if fitting:
        kinds = " and ".join(map(str, fitting))
        raise DataError(f"{place}: {has}, which fit two kinds: {kinds}; expected the columns of one")
    begun = [kind for kind in Kind if set(kind.columns[1:]) & set(row)]
    if len(begun) == 1:
        missing = [name for name in begun[0].columns if name not in row]
        raise DataError(f"{place}: missing {_columns(missing)} of {begun[0]} rows; it {has}")
    raise DataError(f"{place}: {has}; expected {', '.join(map(str, list(Kind)[:-1]))} or {Kind.RANKED}")


def _columns(names: list[str]) -> str:
    return f"column{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
