"""One example of a data set -> token ids of its completions and what was said of them, or an error that names it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prefloss.data.errors import DataError, shown
from prefloss.data.rows import clean, is_blank, kind_of, with_new_names
from prefloss.data.tokens import Encoded, encode
from prefloss.feedback import KINDS, SIDES, Labels, Pairs, Rankings, columns_of, optional_fields

_IDS = {
    kind: tuple(f"{name}_ids" if name in SIDES[kind] else name for name in columns_of(kind)[1:])
    for kind in KINDS
}
_REFERENCES = {
    Pairs: ("ref_chosen_logps", "ref_rejected_logps"),
    Labels: ("ref_logps",),
    Rankings: ("ref_logps",),
}
_OPTIONAL = {
    kind: [*(field.column for field in optional_fields(kind) if field.column), *_REFERENCES[kind]]
    for kind in KINDS
}
# KTOTrainer adds the last one for itself.
_READ = {
    kind: {"prompt_ids", *columns_of(kind), *_IDS[kind], *_OPTIONAL[kind], "KL_completion_ids"}
    for kind in KINDS
}


@dataclass(frozen=True)
class Example:
    """A checked example.

    Attributes:
        place: What error messages call it.
        kind: `Pairs`, `Labels` or `Rankings`.
        rows: Token ids of prompt and completion, for each completion.
        values: Optional feedback by its name in the batch.
        label: Whether a labelled completion was upvoted.
        scores: One per completion of a ranking.
        reference: Reference log-probs of the completions, nats, if they came with the example.
        unread: Columns that nothing reads.
    """

    place: str
    kind: type
    rows: list[Encoded]
    values: dict[str, float]
    label: bool = False
    scores: tuple[float, ...] = ()
    reference: tuple[float, ...] | None = None
    unread: tuple[str, ...] = ()


def read_example(index: int, example: Mapping[str, Any], tokenizer: Any, place: str | None = None) -> Example:
    """Check and tokenise an example.

    Args:
        index: Its place in the batch.
        example: Its columns.
        tokenizer: For text and messages; None if the data holds token ids.
        place: What error messages call it, if it is not in a batch.

    Raises:
        ValueError: If a column is missing or holds something else than it should.
        TypeError: If there is text and no tokenizer.
    """
    place = place or f"example {index} of the batch"
    row = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in example.items()}
    kind = next(
        (kind for kind, names in _IDS.items() if all(row.get(name) is not None for name in names)), None
    )
    if kind is None:
        kind = _text_kind(place, row)
        row = with_new_names(kind, row)
        cleaned = clean(place, row, kind).row
        rows = _encoded(place, kind, cleaned, tokenizer)
    else:
        row = with_new_names(kind, row)
        rows = _ids(place, kind, row)
        cleaned = _said(place, kind, row, len(rows))
    return Example(
        place,
        kind,
        rows,
        values=_numbers(place, kind, row),
        label=cleaned.get("label", False),
        scores=tuple(cleaned.get("scores", ())),
        reference=_reference(place, kind, row, len(rows)),
        unread=tuple(name for name in row if row[name] is not None and name not in _READ[kind]),
    )


def unread_text(kind: type, names: Iterable[str]) -> str:
    """Columns that nothing reads, and what may be meant, as "'weights' (did you mean 'weight'?), 'id'"."""
    close = {name: difflib.get_close_matches(name, _OPTIONAL[kind], 1, cutoff=0.8) for name in names}
    return ", ".join(
        f"{name!r} (did you mean {like[0]!r}?)" if like else repr(name) for name, like in close.items()
    )


def _text_kind(place: str, row: dict[str, Any]) -> type:
    if not set(row) - {"label", "label_ids", "labels"}:
        left = f"only {', '.join(map(repr, row))}" if row else "no columns"
        raise DataError(
            f"{place}: has {left}; the trainer took the others out because remove_unused_columns is True; set "
            "TrainingArguments(remove_unused_columns=False)"
        )
    for kind, names in _IDS.items():
        begun = [name for name in names if name.endswith("_ids") and row.get(name) is not None]
        if begun and row.get(SIDES[kind][0]) is None:
            missing = next(name for name in names if row.get(name) is None)
            has = ", ".join(map(repr, row))
            raise DataError(f"{place}: missing column {missing!r} beside {begun[0]!r}; it has {has}")
    return kind_of(place, row)


def _encoded(place: str, kind: type, row: dict[str, Any], tokenizer: Any) -> list[Encoded]:
    if tokenizer is None:
        raise TypeError(
            f"{place}: got text, but tokenizer is None; give PreferenceCollator(tokenizer) or token ids"
        )
    names, texts = _texts(kind, row)
    made = []
    for name, text in zip(names, texts, strict=True):
        if is_blank(text):
            raise DataError(f"{place}: column {name}: got an empty completion, expected some text")
        prompt, completion = encode(tokenizer, row["prompt"], text)
        if not completion:
            raise DataError(
                f"{place}: column {name}: got no token beyond the prompt's, expected at least one"
            )
        made.append((prompt, completion))
    return made


def _texts(kind: type, row: dict[str, Any]) -> tuple[list[str], list[Any]]:
    if kind is not Rankings:
        return [repr(name) for name in SIDES[kind]], [row[name] for name in SIDES[kind]]
    texts = row["completions"]
    return [f"'completions'[{i}]" for i in range(len(texts))], texts


def _ids(place: str, kind: type, row: dict[str, Any]) -> list[Encoded]:
    if row.get("prompt_ids") is None:
        raise DataError(f"{place}: missing column 'prompt_ids'; it has {', '.join(map(repr, row))}")
    prompt = _id_list(place, "'prompt_ids'", row["prompt_ids"])
    if kind is Rankings:
        many = row["completions_ids"]
        if not isinstance(many, list | tuple):
            raise DataError(
                f"{place}: column 'completions_ids': expected a list of lists of ids, got {shown(many)}"
            )
        sides = [(f"'completions_ids'[{i}]", value) for i, value in enumerate(many)]
    else:
        sides = [(f"'{name}_ids'", row[f"{name}_ids"]) for name in SIDES[kind]]
    made = []
    for name, value in sides:
        completion = _id_list(place, name, value)
        if not completion:
            raise DataError(
                f"{place}: column {name}: got an empty completion, expected at least one token id"
            )
        made.append((prompt, completion))
    return made


def _id_list(place: str, name: str, value: Any) -> list[int]:
    value = value.tolist() if hasattr(value, "tolist") else value
    listed = isinstance(value, list | tuple)
    if not listed or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in value):
        raise DataError(f"{place}: column {name}: expected a list of token ids >= 0, got {shown(value)}")
    return list(value)


def _said(place: str, kind: type, row: dict[str, Any], count: int) -> dict[str, Any]:
    """Label and scores beside token ids, checked as beside text: empty texts stand in for the ids."""
    if kind is Labels:
        return clean(place, {"prompt": "", "completion": "", "label": row["label"]}, kind).row
    if kind is Rankings:
        return clean(place, {"prompt": "", "completions": [""] * count, "scores": row["scores"]}, kind).row
    return {}


def _numbers(place: str, kind: type, row: dict[str, Any]) -> dict[str, float]:
    return {
        field.name: _number(place, f"column {field.column!r}", row[field.column])
        for field in optional_fields(kind)
        if field.column and row.get(field.column) is not None
    }


def _reference(place: str, kind: type, row: dict[str, Any], count: int) -> tuple[float, ...] | None:
    names = _REFERENCES[kind]
    there = [name for name in names if row.get(name) is not None]
    if not there:
        return None
    if len(there) < len(names):
        missing = next(name for name in names if name not in there)
        raise DataError(f"{place}: missing column {missing!r} beside {there[0]!r}")
    if kind is not Rankings:
        return tuple(_log_prob(place, f"column {name!r}", row[name]) for name in names)
    values = row[names[0]]
    if not isinstance(values, list | tuple) or len(values) != count:
        raise DataError(
            f"{place}: column {names[0]!r}: expected a log-prob for each of {count} completions, got {shown(values)}"
        )
    return tuple(_log_prob(place, f"column {names[0]!r}[{i}]", value) for i, value in enumerate(values))


def _number(place: str, where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{place}: {where}: expected a finite number, got {shown(value)}")
    return float(value)


def _log_prob(place: str, where: str, value: Any) -> float:
    found = _number(place, where, value)
    # Rounding may lift a certain completion a little above 0.
    if found > 1e-2:
        raise DataError(f"{place}: {where}: expected a log-prob in nats, at most 0, got {shown(value)}")
    return found
