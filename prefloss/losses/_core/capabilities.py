"""What each loss can be used with: one table for the docs, the command line and the checks at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prefloss.feedback import Pairs
from prefloss.losses._core import modifiers

if TYPE_CHECKING:
    from prefloss.losses._core.registry import LossSpec


def capabilities(spec: LossSpec) -> Mapping[str, str]:
    """What a loss takes, needs and admits, in words; "no: ..." gives the reason that the refusal at run time gives.

    Args:
        spec: A registered loss.

    Returns:
        Column -> cell, in the order of the table: feedback, reference, needs, composes, modifiers by name, fused,
        state.

    Example:
        >>> row = capabilities(prefloss.specs["dpo"])
        >>> row["feedback"], row["reference"], row["divergence"], row["state"]
        ('Pairs', 'yes', 'yes', 'no')
    """
    row = {
        "feedback": spec.feedback.__name__,
        "reference": "yes" if spec.needs_reference else "no",
        "needs": ", ".join(sorted(spec.needs)) or "-",
        "composes": "with pair and labelled losses"
        if spec.feedback is Pairs
        else f"with {spec.feedback.__name__}",
        "one example at a time": "yes" if spec.separable else "no: an example's loss depends on its batch",
    }
    for name, modifier in modifiers.MODIFIERS.items():
        refusal = modifiers.refusal(spec, modifier)
        row[name] = "yes" if refusal is None else f"no: {refusal}"
    row["fused"] = _fused(spec)
    row["state"] = "yes" if spec.stateful else "no"
    return row


def _fused(spec: LossSpec) -> str:
    """From which log-probs it can be computed without storing logits."""
    extras = sorted(need for need in spec.needs if need.startswith("per_token."))
    if extras:
        return f"no: {', '.join(extras)} over the vocabulary is not computed by the fused path yet"
    return "yes"
