"""The error of a data file, and how it quotes a value."""

from __future__ import annotations


class DataError(ValueError):
    """A preference file that cannot be read; the message starts with file and line."""


def shown(value: object, width: int = 40) -> str:
    """A value as an error message quotes it: on one line, cut at `width` characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
