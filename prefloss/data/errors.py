"""The error of a data file, and how it quotes a value."""

from __future__ import annotations


class DataError(ValueError):
    """A preference file that cannot be read; the message starts with file and line."""


def shown(value: object, width: int = 40) -> str:
    """A value as an error message quotes it: on one line, cut at `width` characters."""
    try:
        text = "null" if value is None else repr(value)
    except ValueError:
        # Python writes no integers of more than some thousand digits.
        text = f"a value of type {type(value).__name__} that is too long to print"
    return text if len(text) <= width else text[: width - 3] + "..."
