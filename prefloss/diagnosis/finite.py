"""Stop at a loss that is not finite and name the example; torch only, for every trainer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prefloss.feedback import SIDES, Feedback
from prefloss.registry import Loss


def check_finite(loss: Loss, terms: Mapping[str, Tensor], feedback: Feedback) -> None:
    """Stop at a loss that is NaN or infinite, naming the example and its log-probs.

    Args:
        loss: The loss.
        terms: Loss of each example by term, [n].
        feedback: What it was computed from.

    Raises:
        FloatingPointError: If some value is not finite.
    """
    # Usually one device synchronisation, whatever the number of terms.
    if not terms or bool(torch.stack([torch.isfinite(values).all() for values in terms.values()]).all()):
        return
    for term, values in terms.items():
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        if bad:
            raise FloatingPointError(
                f"{loss!r}: {term} of example {bad[0]} of this batch is {values[bad[0]].item()} ({len(bad)} of "
                f"{values.numel()} are not finite); its log-probs in nats are {log_probs(feedback, bad[0])}"
            )


def log_probs(feedback: Feedback, example: int) -> str:
    """The log-probs of each completion of an example, for messages."""
    return "; ".join(
        f"{side}: policy {_shown(part.policy, example)}, reference {_shown(part.reference, example)}"
        for side, part in zip(SIDES[type(feedback)], feedback.parts, strict=False)
    )


def _shown(values: Tensor | None, example: int) -> str:
    if values is None:
        return "none"
    return ", ".join(f"{value:g}" for value in values[example].reshape(-1).tolist())
