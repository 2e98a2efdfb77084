"""One example of a data set: token ids of its completions and the feedback on them, or an error that names it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prefloss.arguments import instance
from prefloss.data.errors import DataError, shown
from prefloss.data.rows import (
    clean,
    id_columns,
    is_blank,
    kind_of,
    label_of,
    number_of,
    optional_of,
    scores_of,
    sides_of,
    with_new_names,
)
from prefloss.data.tokens import Encoded, encode
from prefloss.feedback import KINDS, SIDES, Labels, Pairs, Rankings, columns_of, optional_fields

_REFERENCES = {
    kind: ("ref_chosen_logps", "ref_rejected_logps") if kind is Pairs else ("ref_logps",) for kind in KINDS
}
# Required columns of an example of token ids, beside the ids of the prompt.
_IDS = {kind: id_columns(kind) for kind in KINDS}
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


def read_example(
    index: int,
    example: Mapping[str, Any],
    tokenizer: Any,
    place: str | None = None,
    *,
    allow_empty: bool = False,
) -> Example:
    """Check and tokenise an example.

    Args:
        index: Its place in the batch.
        example: Its columns.
        tokenizer: For text and messages; None if the data holds token ids.
        place: What error messages call it, if it is not in a batch.
        allow_empty: Take a completion without text or tokens; its row has no completion tokens.

    Raises:
        ValueError: If a column is missing or holds something else than it should.
        TypeError: If it is no mapping, or there is text and no tokenizer.
    """
    place = place or f"example {index} of the batch"
    instance(place, example, Mapping, "a row: column -> value")
    row = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in example.items()}
    kind = next((kind for kind in KINDS if all(row.get(name) is not None for name in _IDS[kind])), None)
    ending = "" if kind is None else "_ids"
    kind = kind or _kind_of_text(place, row)
    row = with_new_names(kind, row)
    rows = _token_ids(place, kind, row) if ending else _encoded(place, kind, row, tokenizer)
    if not rows:
        raise DataError(f"{place}: column 'completions': got an empty list, expected at least one completion")
    for (where, _), (_, completion) in zip(sides_of(place, row, kind, ending), rows, strict=True):
        if not (completion or allow_empty):
            raise DataError(
                f"{place}: {where}: got an empty completion, expected at least one token beyond the prompt's"
            )
    return Example(
        place,
        kind,
        rows,
        values={
            field.name: optional_of(place, field.column, row[field.column])
            for field in optional_fields(kind)
            if field.column and row.get(field.column) is not None
        },
        label=kind is Labels and label_of(place, row["label"]),
        scores=tuple(scores_of(place, row["scores"], len(rows))) if kind is Rankings else (),
        reference=_reference(place, kind, row, len(rows)),
        unread=tuple(str(name) for name in row if row[name] is not None and name not in _READ[kind]),
    )


def unread_text(kind: type, names: Iterable[str]) -> str:
    """Columns that nothing reads, and what may be meant, as "'weights' (did you mean 'weight'?), 'id'"."""
    close = {name: difflib.get_close_matches(name, _OPTIONAL[kind], 1, cutoff=0.8) for name in names}
    return ", ".join(
        f"{name!r} (did you mean {like[0]!r}?)" if like else repr(name) for name, like in close.items()
    )


def _kind_of_text(place: str, row: dict[str, Any]) -> type:
    """The kind of an example that is not token ids, or what is missing of those."""
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
    """Token ids of a row of text or messages."""
    checked = clean(place, row, kind).row
    if tokenizer is None:
        raise TypeError(
            f"{place}: got text, but tokenizer is None; give PreferenceCollator(tokenizer) or token ids"
        )
    rows = []
    for _, text in sides_of(place, checked, kind):
        # Not the end token alone: a completion of white space says nothing.
        prompt, completion = encode(tokenizer, checked["prompt"], text)
        rows.append((prompt, [] if is_blank(text) else completion))
    return rows


def _token_ids(place: str, kind: type, row: dict[str, Any]) -> list[Encoded]:
    if row.get("prompt_ids") is None:
        raise DataError(f"{place}: missing column 'prompt_ids'; it has {', '.join(map(repr, row))}")
    prompt = _id_list(place, "column 'prompt_ids'", row["prompt_ids"])
    return [(prompt, _id_list(place, where, value)) for where, value in sides_of(place, row, kind, "_ids")]


def _id_list(place: str, where: str, value: Any) -> list[int]:
    value = value.tolist() if hasattr(value, "tolist") else value
    # bool is another type than int.
    are_integers = isinstance(value, list | tuple) and set(map(type, value)) <= {int}
    if not are_integers or min(value, default=0) < 0 or max(value, default=0) >= 2**31:
        raise DataError(
            f"{place}: {where}: got {shown(value)}, expected a list of token ids >= 0 and < 2**31"
        )
    return list(value)


def _reference(place: str, kind: type, row: dict[str, Any], count: int) -> tuple[float, ...] | None:
    """Reference log-probs of the completions, if the row has them."""
    names = _REFERENCES[kind]
    missing = [name for name in names if row.get(name) is None]
    if len(missing) == len(names):
        return None
    if missing:
        beside = next(name for name in names if name not in missing)
        raise DataError(f"{place}: missing column {missing[0]!r} beside {beside!r}")
    values, columns = [row[name] for name in names], [f"column {name!r}" for name in names]
    if kind is Rankings:
        (values,) = values
        if not isinstance(values, list | tuple) or len(values) != count:
            raise DataError(
                f"{place}: column 'ref_logps': got {shown(values)}, expected a log-prob for each of {count} completions"
            )
        columns = [f"column 'ref_logps'[{i}]" for i in range(count)]
    logps = []
    for column, value in zip(columns, values, strict=True):
        logps.append(number_of(place, column, value))
        # Rounding may lift a certain completion a little above 0.
        if logps[-1] > 1e-2:
            raise DataError(f"{place}: {column}: got {shown(value)}, expected a log-prob in nats, at most 0")
    return tuple(logps)
