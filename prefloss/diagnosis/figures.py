"""Sums and counts of a batch that a diagnosis reads from its log-ratios."""

from __future__ import annotations

import torch

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.metrics import Stat

LENGTH = tuple(f"length/{name}" for name in ("x", "y", "xx", "yy", "xy"))
"""Moments of the difference in length x, tokens, and the margin y, nats."""

UPVOTES, DOWNVOTES = "h/upvotes", "h/downvotes"
"""Log-ratios of labelled completions, nats."""

PARTS = frozenset((*LENGTH, UPVOTES, DOWNVOTES))
"""Figures that others are computed from; they are not logged themselves."""

NAMES = PARTS | {"falling_pairs", "saturated", "zero_gradient", "batch_without_gradient", "kl_per_token"}
"""Every figure that `Diagnosis.figures` may give."""


def ratio_figures(feedback: Feedback, fall: float) -> dict[str, Stat]:
    """Figures from log-ratios; empty without a reference.

    Args:
        feedback: The batch; rankings are read as best against worst.
        fall: How far a chosen completion must be below the reference to count as fallen, nats.
    """
    if isinstance(feedback, Rankings):
        feedback = feedback.to_pairs("best_worst")
    parts = feedback.parts[:2] if isinstance(feedback, Pairs) else (feedback.completions,)
    if any(part.reference is None for part in parts):
        return {}
    stats = _falling(feedback, fall)
    tokens = [part.tokens for part in parts if part.tokens is not None]
    if len(tokens) < len(parts):
        return stats
    valid = feedback.valid
    drop = torch.stack([torch.where(valid, -part.h.detach(), 0.0).sum() for part in parts]).sum()
    count = torch.stack([torch.where(valid, number, 0).sum() for number in tokens]).sum()
    stats["kl_per_token"] = Stat(drop, count)
    if isinstance(feedback, Pairs):
        x, y = (tokens[0] - tokens[1]).to(drop.dtype), feedback.margin().detach()
    else:
        x, y = tokens[0].to(drop.dtype), feedback.completions.h.detach()
    moments = (x, y, x * x, y * y, x * y)
    return stats | {name: Stat.over(values, valid) for name, values in zip(LENGTH, moments, strict=True)}


def _falling(feedback: Pairs | Labels, fall: float) -> dict[str, Stat]:
    if isinstance(feedback, Pairs):
        fell = (feedback.chosen.h < -fall) & (feedback.margin() > 0)
        return {"falling_pairs": Stat.over(fell, feedback.valid)}
    # A label has no other side: its margin is that of all upvotes over all downvotes. Their sums add up over batches
    # and processes, so the margin is taken where all of them are known (`Diagnosis.shown`).
    h, valid, upvoted = feedback.completions.h, feedback.valid, feedback.desirable
    return {
        "falling_pairs": Stat.over(h < -fall, valid & upvoted),
        UPVOTES: Stat.over(h, valid & upvoted),
        DOWNVOTES: Stat.over(h, valid & ~upvoted),
    }
