"""Checks before a step: what the loss needs is there, and nothing comes that the loss would ignore."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from prefloss.feedback import FIELDS, Field, fields_of, optional_fields
from prefloss.registry import Loss
from prefloss.training.batch import REFERENCE, PreferenceBatch
from prefloss.training.reference import CHOICES, Reference

# What forward passes and a collator give besides the optional columns of the data.
_COMPUTED = frozenset(("tokens", "per_token"))
_VALUES = frozenset(field.name for field in FIELDS if field.column)


def current_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options under their present names; a former name still works for one release, with a warning."""
    if "pairs" not in options:
        return options
    warnings.warn(
        "pairs= is now rankings_as=; the old name goes in the next release", DeprecationWarning, stacklevel=4
    )
    return {
        **{name: value for name, value in options.items() if name != "pairs"},
        "rankings_as": options["pairs"],
    }


def check_computable(loss: Loss) -> None:
    """Refuse a loss that needs something that neither a forward pass nor a data set gives.

    Raises:
        ValueError: If a term of the loss needs such an input.
    """
    for _, term in loss.terms:
        columns = {field.need for field in optional_fields(term.spec.feedback)}
        for need in sorted(term.needs - columns - _COMPUTED):
            raise ValueError(
                f"{term.name}: needs {need}, which PreferenceObjective does not compute; use a loop of your own"
            )


def check_reference(loss: Loss, reference: Reference) -> None:
    """Refuse a reference that does not give what the loss reads.

    Raises:
        ValueError: If there is none, or it holds sums only and the loss reads tokens.
    """
    if loss.spec.needs_reference and reference.kind == "none":
        raise ValueError(
            f"reference: got {reference!r} with {loss.name}, which reads log-ratios; expected {CHOICES}"
        )
    if reference.kind in ("cached", "table") and any(name.startswith("per_token") for name in loss.needs):
        raise ValueError(
            f"reference: got {reference!r} with {loss.name}, which reads the log-prob of each token; it holds only "
            "their sums; expected a reference that is computed"
        )


def check_batch(loss: Loss, batch: PreferenceBatch, reference: Reference) -> None:
    """Refuse values that the loss does not read, and a batch without values that it needs.

    Raises:
        ValueError: If the batch holds an unread value, or lacks a needed one.
    """
    check_fields(loss, batch.kind, batch.keys())
    if batch.mismatched is not None:
        if not loss.reads_mismatched:
            raise ValueError(
                f"mismatched: got mismatched completions with {loss!r}, which does not read them; expected "
                "PreferenceCollator(mismatched=False)"
            )
        if reference.kind in ("cached", "table", "none"):
            raise ValueError(
                f"mismatched: got {reference!r}, which gives no log-probs of mismatched completions; expected a "
                "reference that is computed, or PreferenceCollator(..., mismatched=False) and "
                "kl_baseline='running_mean'"
            )
    if REFERENCE in batch and reference.kind != "cached":
        raise ValueError(
            "columns ref_*logps: got reference log-probs with the data, but the reference is computed; choose "
            "reference=Reference.cached(), or remove the columns"
        )


def check_fields(loss: Loss, kind: type, present: Collection[str], how: str = "") -> None:
    """Refuse optional fields that the loss does not read, and missing ones that it needs.

    Args:
        loss: The loss to train with.
        kind: `Pairs`, `Labels` or `Rankings`: what the data is.
        present: Names of the batch's values.
        how: How to supply a missing column in this trainer; follows the message.

    Raises:
        ValueError: Naming the column.
    """
    by_name = {field.name: field for field in fields_of(kind)}
    for name in sorted(_VALUES.intersection(present)):
        field = by_name.get(name)
        if field is None or not reads(loss, field):
            column = name if field is None else field.column
            raise ValueError(
                f"column {column!r}: {loss.name} does not read it; remove it from the data, or choose a loss that "
                "reads it"
            )
    for need in sorted(loss.needs & {field.need for field in FIELDS if field.column and field.need}):
        # The scores of rankings are required, so no loss of rankings lists them as a need.
        fields = [field for field in fields_of(kind) if need in (field.need, field.name)]
        columns = " and ".join(str(field.column) for field in fields) or need
        if not fields or any(field.name not in present for field in fields):
            raise ValueError(f"{loss.name}: got data without {need}, expected the column {columns}{how}")


def reads(loss: Loss, field: Field) -> bool:
    """Whether a loss uses a field of the feedback."""
    return field.need is None or field.need in loss.needs | loss.spec.reads
