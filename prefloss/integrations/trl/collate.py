"""Passes weights, scores and other values of each example through TRL's collators."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from prefloss.arguments import function, shown
from prefloss.data.rows import optional_of
from prefloss.feedback import Field, Labels, Pairs, optional_fields

_FIELDS: Mapping[str, Field] = {
    column: field
    for kind in (Pairs, Labels)
    for field in optional_fields(kind)
    for column in (field.column, field.old_column)
    if column
}


class FeedbackCollator:
    """Keeps columns of feedback that a TRL collator would drop.

    For losses that read scores, and for weights of examples. Set `remove_unused_columns=False` in the trainer's
    arguments; otherwise the trainer removes the columns before the collator runs.

    Args:
        collator: The collator that builds the rest of the batch, such as TRL's `DataCollatorForPreference`.

    Example:
        >>> collator = FeedbackCollator(lambda examples: {"rows": len(examples)})
        >>> collator([{"weight": 0.5}, {"weight": 2.0}])
        {'rows': 2, 'weight': tensor([0.5000, 2.0000])}
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = function("collator", collator, "a collator, such as trainer.data_collator")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of the wrapped collator, and a tensor [examples] for each column of feedback.

        Raises:
            ValueError: If some examples lack a column that others have, a value is not a number, or a column is present
                under its old and its new name.
        """
        batch = self.collator(
            [{k: v for k, v in example.items() if k not in _FIELDS} for example in examples]
        )
        for name, field in _FIELDS.items():
            values = [example[name] for example in examples if name in example]
            if not values:
                continue
            if name == field.old_column:
                if field.name in batch:
                    raise ValueError(
                        f"{name}: got it beside {field.column}, its new name, expected one of them"
                    )
                warnings.warn(
                    f"column {name!r} is now called {field.column!r}; the old name goes in the next release",
                    DeprecationWarning,
                    stacklevel=2,
                )
            if len(values) != len(examples):
                raise ValueError(
                    f"{name}: got {shown(values)} for {len(examples)} examples, expected a number for each"
                )
            numbers = [
                optional_of(f"example {i} of the batch", name, value) for i, value in enumerate(values)
            ]
            batch[field.name] = torch.tensor(numbers, dtype=torch.float32)
        return batch
