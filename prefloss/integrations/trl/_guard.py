"""Refusals while training: batch items that no loss reads, missing scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prefloss.feedback import Pairs, optional_fields
from prefloss.integrations.trl._collate import ITEMS
from prefloss.losses import Loss

_HOW = (
    "set remove_unused_columns=False and trainer.data_collator = FeedbackCollator(trainer.data_collator), or take the "
    "column out"
)


def check_items(loss: Loss, kind: type, items: Mapping[str, Any]) -> None:
    """Refuse feedback that the loss does not read, and a batch without the scores that it needs.

    Args:
        loss: The loss to train with.
        kind: `Pairs` or `Labels`, what the trainer gives.
        items: The feedback that came with the batch.

    Raises:
        ValueError: If an item is not read, or scores are missing.
    """
    names = {field.name for field in optional_fields(kind)}
    for name in items:
        reads = ITEMS[name]
        if name not in names or (reads is not None and reads not in loss.needs | loss.spec.reads):
            raise ValueError(
                f"batch item {name!r}: {loss.name} does not read it here; take the column out of the data, or choose "
                "a loss that reads it"
            )
    if "scores" in loss.needs and not items.keys() & {"score_chosen", "scores"}:
        columns = "score_chosen and score_rejected" if kind is Pairs else "score"
        raise ValueError(f"{loss.name}: got a batch without scores, expected {columns}: {_HOW}")


def check_columns(loss: Loss, kind: type, columns: Iterable[str], items: Mapping[str, Any]) -> None:
    """Refuse a data set with feedback that the loss would read and that TRL drops on the way.

    Args:
        loss: The loss to train with.
        kind: `Pairs` or `Labels`, what the trainer gives.
        columns: Columns of the trainer's data set.
        items: The feedback that came with the batch.

    Raises:
        ValueError: If such a column did not arrive.
    """
    held = set(columns)
    for field in optional_fields(kind):
        name = field.old_column if field.old_column in held else field.column
        if name not in held or field.name in items:
            continue
        if field.need is None or field.need in loss.needs | loss.spec.reads:
            raise ValueError(
                f"column {name!r}: the data has it and {loss.name} reads it, but TRL drops it: {_HOW}"
            )
