"""Training metrics from log-ratios: implied rewards, margins, accuracy. Detached, shared by all trainers.

Every metric is a sum and a count, so that ranks and micro-batches of different sizes add up to the true mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from prefloss.arguments import instance, real
from prefloss.feedback import KINDS, Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.registry import LOG_RATIO

# Metrics that TRL logs too keep its names; all others are logged under this prefix.
PREFIX = "prefloss/"
_TRL_NAMES = ("rewards/", "logps/", "aux_loss")


class Stat(NamedTuple):
    """A sum over `count` examples; both scalars, without gradient."""

    sum: Tensor
    count: Tensor

    @classmethod
    def over(cls, values: Tensor, keep: Tensor) -> Stat:
        """Sum and count of the values where `keep` is True, any shape; numbers or booleans."""
        values = values.detach() if values.is_floating_point() else values.float()
        return cls(torch.where(keep, values, 0.0).sum(), keep.sum())

    @property
    def mean(self) -> float:
        """Sum over count; NaN if nothing was counted."""
        return float(self.sum) / float(self.count) if float(self.count) else float("nan")

    def __add__(self, other: object) -> Stat:
        """Both sets of examples together."""
        if not isinstance(other, Stat):
            return NotImplemented
        return Stat(self.sum + other.sum, self.count + other.count)


def implicit_rewards(ratios: LogRatios, beta: float) -> Tensor:
    """Reward that the policy implies for each completion, beta * h, [...], without gradient.

    What trainers log for every loss. A loss may compare something else between completions: `Loss.reward`.
    """
    instance("ratios", ratios, LogRatios, "LogRatios")
    return LOG_RATIO.function(ratios.detach(), beta=real("beta", beta))


def metrics(feedback: Feedback, beta: float = 1.0) -> Mapping[str, Stat]:
    """Metrics worth logging, under the names that TRL's users know. Empty completions are left out.

    Args:
        feedback: Pairs, Labels, or Rankings (read as best against worst).
        beta: KL strength of the loss; 1 gives rewards in nats.

    Returns:
        For pairs: `rewards/chosen`, `rewards/rejected`, `rewards/margins` (nats times beta), `rewards/accuracies`,
        `logps/chosen`, `logps/rejected` (nats), `logratios/chosen`, `logratios/rejected` (nats),
        `chosen_falling` (share of pairs whose chosen completion became less likely than under the reference)
        and `empty` (share of examples left out). For labels, upvotes are `chosen` and there is no pairwise metric.
        Reward metrics are absent without a reference.

    Raises:
        TypeError: If the feedback is none of the three kinds, or beta is no number.
        ValueError: If beta is not finite.

    Example:
        >>> metrics(Pairs.of([1.5, -1.0], [0.0, 0.0]), beta=0.1)["rewards/accuracies"].mean
        0.5
    """
    instance("feedback", feedback, KINDS, "Pairs, Labels or Rankings")
    real("beta", beta)
    if isinstance(feedback, Rankings):
        feedback = feedback.to_pairs("best_worst")
    return _pair_metrics(feedback, beta) if isinstance(feedback, Pairs) else _label_metrics(feedback, beta)


def logged_names(means: Mapping[str, float]) -> dict[str, float]:
    """The means under the names that every trainer logs: TRL's where TRL has the metric, else under `prefloss/`.

    Labels get `rewards/margins` as TRL's KTO does: the difference of the two means.
    """
    named = {name if name.startswith(_TRL_NAMES) else PREFIX + name: mean for name, mean in means.items()}
    chosen, rejected = named.get("rewards/chosen"), named.get("rewards/rejected")
    if chosen is not None and rejected is not None:
        named.setdefault("rewards/margins", chosen - rejected)
    return named


class Totals:
    """Metrics summed since they were last taken; nothing is copied off the device until then."""

    def __init__(self) -> None:
        self._stats: dict[str, Stat] = {}

    def add(self, stats: Mapping[str, Stat]) -> None:
        """Add the metrics of a batch."""
        for name, stat in stats.items():
            self._stats[name] = self._stats[name] + stat if name in self._stats else stat

    def take(self, all_sum: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """Sums and counts over all batches and ranks since the last call.

        Args:
            all_sum: Sums a tensor over the ranks. Every rank must call this, with the same metrics.
        """
        stats, self._stats = self._stats, {}
        if not stats:
            return {}
        names = sorted(stats)
        local = torch.stack([torch.stack([value.double() for value in stats[name]]) for name in names])
        return {
            name: (total, count) for name, (total, count) in zip(names, all_sum(local).tolist(), strict=True)
        }


def _pair_metrics(pairs: Pairs, beta: float) -> dict[str, Stat]:
    keep = pairs.valid
    stats = {**_side("chosen", pairs.chosen, keep, beta), **_side("rejected", pairs.rejected, keep, beta)}
    if pairs.chosen.reference is not None and pairs.rejected.reference is not None:
        margin = beta * pairs.margin()
        stats["rewards/margins"] = Stat.over(margin, keep)
        stats["rewards/accuracies"] = Stat.over(margin > 0, keep)
        stats["chosen_falling"] = Stat.over(pairs.chosen.h < 0, keep)
    return {**stats, "empty": Stat.over(~keep, torch.ones_like(keep))}


def _label_metrics(labels: Labels, beta: float) -> dict[str, Stat]:
    keep, upvoted = labels.valid, labels.desirable
    stats = {
        **_side("chosen", labels.completions, keep & upvoted, beta),
        **_side("rejected", labels.completions, keep & ~upvoted, beta),
    }
    if labels.completions.reference is not None:
        stats["chosen_falling"] = Stat.over(labels.completions.h < 0, keep & upvoted)
    return {**stats, "empty": Stat.over(~keep, torch.ones_like(keep))}


def _side(name: str, ratios: LogRatios, keep: Tensor, beta: float) -> dict[str, Stat]:
    stats = {f"logps/{name}": Stat.over(ratios.policy, keep)}
    if ratios.reference is not None:
        stats[f"rewards/{name}"] = Stat.over(implicit_rewards(ratios, beta), keep)
        stats[f"logratios/{name}"] = Stat.over(ratios.h, keep)
    return stats
