"""One example of a data set -> token ids of its completions and what was said of them, or an error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefloss.data.errors import DataError, shown
from prefloss.data.kinds import Kind, kind_of
from prefloss.data.rows import clean, is_blank
from prefloss.data.tokens import Encoded, encode

_IDS = {
    Kind.PAIRED: ("chosen_ids", "rejected_ids"),
    Kind.LABELLED: ("completion_ids", "label"),
    Kind.RANKED: ("completions_ids", "scores"),
}
_SIDES = {
    Kind.PAIRED: ("chosen", "rejected"),
    Kind.LABELLED: ("completion",),
    Kind.RANKED: ("completions",),
}
# Optional columns of numbers, and what the batch calls them.
_NUMBERS = {
    Kind.PAIRED: {"score_chosen": "score_chosen", "score_rejected": "score_rejected", "weight": "weight"},
    Kind.LABELLED: {"score": "scores", "weight": "weight", "kl": "kl", "baseline": "baseline"},
    Kind.RANKED: {"weight": "weight"},
}
_REFERENCES = {
    Kind.PAIRED: ("ref_chosen_logps", "ref_rejected_logps"),
    Kind.LABELLED: ("ref_logps",),
    Kind.RANKED: ("ref_logps",),
}


@dataclass(frozen=True)
class Example:
    """A checked example.

    Attributes:
        place: What error messages call it.
        kind: Pairs, labels or rankings.
        rows: Token ids of prompt and completion, for each completion.
        values: Optional feedback by its name in the batch.
        label: Whether a labelled completion was upvoted.
        scores: One per completion of a ranking.
        reference: Reference log-probs of the completions, nats, if they came with the example.
    """

    place: str
    kind: Kind
    rows: list[Encoded]
    values: dict[str, float]
    label: bool = False
    scores: tuple[float, ...] = ()
    reference: tuple[float, ...] | None = None


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
        cleaned = clean(place, row, kind).row
        rows = _encoded(place, kind, cleaned, tokenizer)
    else:
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
    )


def _text_kind(place: str, row: dict[str, Any]) -> Kind:
    if not set(row) - {"label", "label_ids", "labels"}:
        left = f"only {', '.join(map(repr, row))}" if row else "no columns"
        raise DataError(
            f"{place}: has {left}; the trainer took the others out because remove_unused_columns is True; set "
            "TrainingArguments(remove_unused_columns=False)"
        )
    for kind, names in _IDS.items():
        begun = [name for name in names if name.endswith("_ids") and row.get(name) is not None]
        if begun and row.get(_SIDES[kind][0]) is None:
            missing = next(name for name in names if row.get(name) is None)
            has = ", ".join(map(repr, row))
            raise DataError(f"{place}: missing column {missing!r} beside {begun[0]!r}; it has {has}")
    return kind_of(place, row)


def _encoded(place: str, kind: Kind, row: dict[str, Any], tokenizer: Any) -> list[Encoded]:
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


def _texts(kind: Kind, row: dict[str, Any]) -> tuple[list[str], list[Any]]:
    if kind is not Kind.RANKED:
        return [repr(name) for name in _SIDES[kind]], [row[name] for name in _SIDES[kind]]
    texts = row["completions"]
    return [f"'completions'[{i}]" for i in range(len(texts))], texts


def _ids(place: str, kind: Kind, row: dict[str, Any]) -> list[Encoded]:
    if row.get("prompt_ids") is None:
        raise DataError(f"{place}: missing column 'prompt_ids'; it has {', '.join(map(repr, row))}")
    prompt = _id_list(place, "'prompt_ids'", row["prompt_ids"])
    if kind is Kind.RANKED:
        many = row["completions_ids"]
        if not isinstance(many, list | tuple):
            raise DataError(
                f"{place}: column 'completions_ids': expected a list of lists of ids, got {shown(many)}"
            )
        sides = [(f"'completions_ids'[{i}]", value) for i, value in enumerate(many)]
    else:
        sides = [(f"'{name}_ids'", row[f"{name}_ids"]) for name in _SIDES[kind]]
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


def _said(place: str, kind: Kind, row: dict[str, Any], count: int) -> dict[str, Any]:
    """Label and scores beside token ids, checked as beside text: empty texts stand in for the ids."""
    if kind is Kind.LABELLED:
        return clean(place, {"prompt": "", "completion": "", "label": row["label"]}, kind).row
    if kind is Kind.RANKED:
        return clean(place, {"prompt": "", "completions": [""] * count, "scores": row["scores"]}, kind).row
    return {}


def _numbers(place: str, kind: Kind, row: dict[str, Any]) -> dict[str, float]:
    return {
        item: _number(place, f"column {name!r}", row[name])
        for name, item in _NUMBERS[kind].items()
        if row.get(name) is not None
    }


def _reference(place: str, kind: Kind, row: dict[str, Any], count: int) -> tuple[float, ...] | None:
    names = _REFERENCES[kind]
    there = [name for name in names if row.get(name) is not None]
    if not there:
        return None
    if len(there) < len(names):
        missing = next(name for name in names if name not in there)
        raise DataError(f"{place}: missing column {missing!r} beside {there[0]!r}")
    if kind is not Kind.RANKED:
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
