"""One row of a file: its kind, and its columns checked and made as the trainers take them.

What checks a value raises a `DataError` that starts with the place and the column.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefloss.data.errors import DataError, shown
from prefloss.data.tokens import Text
from prefloss.feedback import KINDS, SIDES, Labels, Pairs, Rankings, columns_of, optional_fields

KIND_WORDS: Mapping[type, str] = {Pairs: "paired", Labels: "labelled", Rankings: "ranked"}
"""What messages call a row of each kind of feedback."""

# Beyond it, float32, in which losses compute, has infinity.
_LARGEST = 3.4e38


def id_columns(kind: type) -> tuple[str, ...]:
    """Required columns of a row of token ids, beside the ids of the prompt.

    Example:
        >>> id_columns(Labels)
        ('completion_ids', 'label')
    """
    return tuple(f"{name}_ids" if name in SIDES[kind] else name for name in columns_of(kind)[1:])


KNOWN = frozenset(
    name
    for kind in KINDS
    for field in optional_fields(kind)
    for name in ("prompt_ids", *columns_of(kind), *id_columns(kind), field.column, field.old_column)
    if name
)
"""Names of the columns that any row may have; others are not read."""


def kind_text(kind: type) -> str:
    """A kind of rows with its columns, as "paired (prompt, chosen, rejected)"."""
    return f"{KIND_WORDS[kind]} ({', '.join(columns_of(kind))})"


def kind_of(place: str, row: Mapping[str, Any]) -> type:
    """`Pairs`, `Labels` or `Rankings`, by the columns of a row; the prompt may be absent.

    Raises:
        DataError: If they fit no kind, or two.
    """
    # The prompt may be inside the messages, so it does not decide.
    required = {kind: set(columns_of(kind)[1:]) for kind in KINDS}
    filled = {name for name, value in row.items() if value is not None}
    # A table of mixed rows has every column in every row, null where it does not belong.
    fitting = [kind for kind in KINDS if required[kind] <= filled] or [
        kind for kind in KINDS if required[kind] <= set(row)
    ]
    if len(fitting) == 1:
        return fitting[0]
    columns = f"columns {', '.join(map(repr, row))}" if row else "no columns"
    if fitting:
        kinds = " and ".join(map(kind_text, fitting))
        raise DataError(f"{place}: got {columns}, which fit two kinds, expected the columns of one: {kinds}")
    begun = [kind for kind in KINDS if required[kind] & set(row)]
    if len(begun) == 1:
        missing = [name for name in columns_of(begun[0]) if name not in row]
        names = f"column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}"
        raise DataError(f"{place}: missing {names} of {kind_text(begun[0])} rows; it has {columns}")
    *most, last = map(kind_text, KINDS)
    raise DataError(f"{place}: got {columns}, expected {', '.join(most)} or {last}")


def with_new_names(kind: type, row: dict[str, Any]) -> dict[str, Any]:
    """The row with every column under its present name; former names work with a DeprecationWarning."""
    for field in optional_fields(kind):
        old, new = field.old_column, field.column
        if old is None or new is None or row.get(old) is None or row.get(new) is not None:
            continue
        warnings.warn(
            f"column {old!r} of {KIND_WORDS[kind]} rows is now called {new!r}; the old name goes in the next release",
            DeprecationWarning,
            stacklevel=3,
        )
        row = {name: value for name, value in row.items() if name != old} | {new: row[old]}
    return row


@dataclass(frozen=True)
class Clean:
    """A checked row.

    Attributes:
        row: The columns of its kind, and the optional ones that were asked for.
        conversational: Whether its texts are messages.
        converted: What was rewritten to get there, in words, or "".
        unused: Names of its other columns.
    """

    row: dict[str, Any]
    conversational: bool
    converted: str = ""
    unused: tuple[str, ...] = ()


def clean(place: str, row: dict[str, Any], kind: type, optional: tuple[str, ...] = ()) -> Clean:
    """Check the columns of one row of this kind, and the optional columns, of numbers, that it must have."""
    sides = [_text(place, where, side) for where, side in sides_of(place, row, kind)]
    prompt, sides, converted = _with_prompt(place, row, kind, sides)
    checked: dict[str, Any] = {"prompt": prompt}
    if kind is Rankings:
        checked |= {"completions": sides, "scores": scores_of(place, row["scores"], len(sides))}
    else:
        checked |= zip(SIDES[kind], sides, strict=True)
    if kind is Labels:
        checked["label"] = label_of(place, row["label"])
    for name in optional:
        checked[name] = optional_of(place, name, row.get(name), " as in the rows before")
    unused = tuple(name for name in row if name not in checked)
    return Clean(checked, not isinstance(prompt, str), converted, unused)


def is_blank(text: Text) -> bool:
    """Whether a text, or every message of it, holds nothing but white space."""
    parts = [text] if isinstance(text, str) else [message["content"] for message in text]
    return not any(part.strip() for part in parts)


def number_of(
    place: str, where: str, value: Any, expected: str = "a finite number", least: float = -math.inf
) -> float:
    """A number that float32 holds, at least `least`."""
    # Compared, because an integer of 400 digits has no float.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and max(least, -_LARGEST) <= value <= _LARGEST:
        return float(value)
    if is_number and math.inf > abs(value) > _LARGEST:
        expected += f" of at most {_LARGEST:g}"
    raise DataError(f"{place}: {where}: got {shown(value)}, expected {expected}")


def optional_of(place: str, name: str, value: Any, as_where: str = "") -> float:
    """The value of an optional column; a weight is not below 0."""
    least, expected = (0, "a finite number >= 0") if name == "weight" else (-math.inf, "a finite number")
    return number_of(place, f"column {name!r}", value, expected + as_where, least)


def label_of(place: str, value: Any) -> bool:
    """A label: true or false, or 1 or 0."""
    # 1.0 == 1 in Python, and a float column is what a missing label leaves behind, so ask for the type.
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise DataError(f"{place}: column 'label': got {shown(value)}, expected true or false (or 1 or 0)")


def scores_of(place: str, value: Any, count: int) -> list[float]:
    """The scores of `count` completions."""
    if not isinstance(value, list):
        raise DataError(f"{place}: column 'scores': got {shown(value)}, expected a list of numbers")
    scores = [number_of(place, f"column 'scores'[{i}]", score) for i, score in enumerate(value)]
    if len(scores) != count:
        raise DataError(
            f"{place}: column 'scores': got {len(scores)} scores, expected one for each of {count} completions"
        )
    return scores


def sides_of(place: str, row: Mapping[str, Any], kind: type, ending: str = "") -> list[tuple[str, Any]]:
    """The completions of a row, each with its column; those of token ids have the ending "_ids"."""
    if kind is not Rankings:
        return [(f"column '{name}{ending}'", row[f"{name}{ending}"]) for name in SIDES[kind]]
    column, sides = f"column 'completions{ending}'", row[f"completions{ending}"]
    if not isinstance(sides, list | tuple):
        expected = "a list of lists of ids" if ending else "a list of completions"
        raise DataError(f"{place}: {column}: got {shown(sides)}, expected {expected}")
    return [(f"{column}[{i}]", side) for i, side in enumerate(sides)]


def extremes(row: Mapping[str, Any]) -> list[tuple[float, Text]]:
    """Score and text of the best and of the worst completion of a ranked row, empty ones aside; [] if one is left."""
    scored = [(s, c) for s, c in zip(row["scores"], row["completions"], strict=True) if not is_blank(c)]
    if len(scored) < 2:
        return []
    return [max(scored, key=lambda x: x[0]), min(scored, key=lambda x: x[0])]


def _with_prompt(
    place: str, row: dict[str, Any], kind: type, sides: list[Text]
) -> tuple[Text, list[Text], str]:
    """Prompt and sides, all plain or all messages, and what was rewritten."""
    whole = [side for side in sides if not isinstance(side, str) and side and side[0]["role"] != "assistant"]
    if "prompt" in row and not (whole and isinstance(row["prompt"], str)):
        prompt = _text(place, "column 'prompt'", row["prompt"])
        if len({isinstance(text, str) for text in (prompt, *sides)}) == 1:
            return prompt, sides, ""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        sides = [[{"role": "assistant", "content": s}] if isinstance(s, str) else s for s in sides]
        return prompt, sides, "rewritten: plain text became messages, as other texts of the row are"
    if sides and len(whole) == len(sides):
        # The sides are whole conversations, as in many published sets: what they share is the prompt.
        shared = _shared(whole, kind)
        if shared:
            note = "rewritten: the messages that both sides start with became the prompt"
            return whole[0][:shared], [side[shared:] for side in whole], note
    has = ", ".join(map(repr, row))
    raise DataError(f"{place}: missing column 'prompt' of {kind_text(kind)} rows; it has columns {has}")


def _shared(sides: list[list[dict[str, str]]], kind: type) -> int:
    """How many messages the conversations start with before a side's own answer."""
    if kind is Labels or len(sides) == 1:
        return max((i for i, m in enumerate(sides[0]) if m["role"] != "assistant"), default=-1) + 1
    shared = 0
    for messages in zip(*sides, strict=False):
        if any(message != messages[0] for message in messages):
            break
        shared += 1
    # Identical conversations share everything; their last message is still the completion.
    return min(shared, min(map(len, sides)) - 1)


def _text(place: str, where: str, value: Any) -> Text:
    if not isinstance(value, list):
        return _string(place, where, value, "a string or a list of messages")
    return [_message(place, f"{where}[{i}]", message) for i, message in enumerate(value)]


def _message(place: str, where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: {where}: got {shown(value)}, expected a message, as {{role, content}}")
    for name in ("role", "content"):
        if name not in value:
            has = ", ".join(map(repr, value))
            raise DataError(f"{place}: {where}: missing {name!r} of a message; it has {has}")
    if value.get("tool_calls"):
        raise DataError(f"{place}: {where}: got a message with tool_calls, expected role and content")
    return {name: _string(place, f"{where}.{name}", value[name]) for name in ("role", "content")}


def _string(place: str, where: str, value: Any, expected: str = "a string") -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {where}: got {shown(value)}, expected {expected}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {where}: got half of a surrogate pair at character {error.start + 1}, expected text"
        ) from error
    return value
