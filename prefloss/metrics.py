"""What training looks like from the log-ratios: implied rewards, margins, accuracy. Detached, shared by all trainers.

Every figure is a sum and a count, so that ranks and micro-batches of different sizes add up to the true mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios


class Stat(NamedTuple):
    """A sum over `count` examples; both scalars, without gradient."""

    sum: Tensor
    count: Tensor

    @property
    def mean(self) -> float:
        """Their quotient; NaN if nothing was counted."""
        return float(self.sum) / float(self.count) if float(self.count) else float("nan")

    def __add__(self, other: object) -> Stat:
        """Of both sets of examples together."""
        if not isinstance(other, Stat):
            return NotImplemented
        return Stat(self.sum + other.sum, self.count + other.count)


def implicit_rewards(ratios: LogRatios, beta: float) -> Tensor:
    """Reward that the policy implies for each completion, beta * h, [...], without gradient."""
    return beta * ratios.h.detach()


def metrics(feedback: Feedback, beta: float = 1.0) -> Mapping[str, Stat]:
    """Figures worth logging, under the names that TRL's users know. Empty completions are left out.

    Args:
        feedback: Pairs, Labels, or Rankings (read as best against worst).
        beta: KL strength of the loss; 1 gives rewards in nats.

    Returns:
        For pairs: `rewards/chosen`, `rewards/rejected`, `rewards/margins` (nats times beta), `rewards/accuracies`,
        `logps/chosen`, `logps/rejected` (nats), `logratios/chosen`, `logratios/rejected` (nats),
        `chosen_falling` (share of pairs whose chosen completion became less likely than under the reference)
        and `empty` (share of examples left out). For labels, upvotes are `chosen` and there is no pairwise figure.
        Reward figures are absent without a reference.

    Example:
        >>> metrics(Pairs.of([1.5, -1.0], [0.0, 0.0]), beta=0.1)["rewards/accuracies"].mean
        0.5
    """
    if isinstance(feedback, Rankings):
        feedback = feedback.to_pairs("best_worst")
    return _pair_metrics(feedback, beta) if isinstance(feedback, Pairs) else _label_metrics(feedback, beta)


def _pair_metrics(pairs: Pairs, beta: float) -> dict[str, Stat]:
    keep = pairs.valid
    found = {**_side("chosen", pairs.chosen, keep, beta), **_side("rejected", pairs.rejected, keep, beta)}
    if pairs.chosen.reference is not None and pairs.rejected.reference is not None:
        margin = beta * pairs.margin().detach()
        found["rewards/margins"] = _stat(margin, keep)
        found["rewards/accuracies"] = _stat(margin > 0, keep)
        found["chosen_falling"] = _stat(pairs.chosen.h.detach() < 0, keep)
    return {**found, "empty": _stat(~keep, torch.ones_like(keep))}


def _label_metrics(labels: Labels, beta: float) -> dict[str, Stat]:
    keep, upvoted = labels.valid, labels.desirable
    found = {
        **_side("chosen", labels.completions, keep & upvoted, beta),
        **_side("rejected", labels.completions, keep & ~upvoted, beta),
    }
    if labels.completions.reference is not None:
        found["chosen_falling"] = _stat(labels.completions.h.detach() < 0, keep & upvoted)
    return {**found, "empty": _stat(~keep, torch.ones_like(keep))}


def _side(name: str, ratios: LogRatios, keep: Tensor, beta: float) -> dict[str, Stat]:
    found = {f"logps/{name}": _stat(ratios.policy.detach(), keep)}
    if ratios.reference is not None:
        found[f"rewards/{name}"] = _stat(implicit_rewards(ratios, beta), keep)
        found[f"logratios/{name}"] = _stat(ratios.h.detach(), keep)
    return found


def _stat(values: Tensor, keep: Tensor) -> Stat:
    values = values if values.is_floating_point() else values.float()
    return Stat(torch.where(keep, values, 0.0).sum(), keep.sum())
