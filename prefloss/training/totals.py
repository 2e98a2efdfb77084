"""Sums and counts over many batches, and the names under which their means are logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prefloss.metrics import Stat

_TERM = "loss/"
_ROUTER = "aux_loss"


class Totals:
    """Figures summed since they were last taken; nothing is copied off the device until then."""

    def __init__(self) -> None:
        self._stats: dict[str, Stat] = {}

    def add(self, found: Mapping[str, Stat]) -> None:
        """Add a batch's."""
        for name, stat in found.items():
            self._stats[name] = self._stats[name] + stat if name in self._stats else stat

    def take(self, all_sum: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """Sums and counts over all batches and ranks since the last call.

        Args:
            all_sum: Sums a tensor over the ranks. Every rank must call this, with the same figures.
        """
        stats, self._stats = self._stats, {}
        if not stats:
            return {}
        names = sorted(stats)
        mine = torch.stack(
            [torch.stack([stats[name].sum.double(), stats[name].count.double()]) for name in names]
        )
        return {
            name: (total, count) for name, (total, count) in zip(names, all_sum(mine).tolist(), strict=True)
        }


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Means of sums and counts, without those that counted nothing."""
    return {name: total / count for name, (total, count) in sums.items() if count}


def losses(means: Mapping[str, Tensor], counts: Tensor, aux_loss: Tensor | None) -> dict[str, Stat]:
    """Each term of a loss as a figure, and the router's.

    Args:
        means: Mean of each term, scalars.
        counts: Examples that each counts, [terms].
        aux_loss: Router loss of the batch, a scalar, or None.
    """
    found = {
        _TERM + name: Stat(mean.detach() * count, count)
        for (name, mean), count in zip(means.items(), counts, strict=True)
    }
    if aux_loss is not None:
        found[_ROUTER] = Stat(aux_loss.detach(), torch.ones_like(aux_loss))
    return found


def total_loss(means: Mapping[str, float], weights: Mapping[str, float], router: float) -> float | None:
    """The loss that the means of its terms make, or None if no example counted.

    Args:
        means: As `Totals.take` gives them.
        weights: Weight of each term by name.
        router: Weight of the router loss.
    """
    terms = [weight * means[_TERM + name] for name, weight in weights.items() if _TERM + name in means]
    return sum(terms) + router * means.get(_ROUTER, 0.0) if terms else None


def named(means: Mapping[str, float]) -> dict[str, float]:
    """The figures under the names that TRL logs; what TRL has not stands under `prefloss/`."""
    found = dict(means)
    sides = [found.get(f"rewards/{side}") for side in ("chosen", "rejected")]
    if "rewards/margins" not in found and sides[0] is not None and sides[1] is not None:
        # Of single votes only the means can be compared, as TRL's KTO does.
        found["rewards/margins"] = sides[0] - sides[1]
    terms = [name for name in found if name.startswith(_TERM)]
    if len(terms) == 1:
        del found[terms[0]]
    plain = ("rewards/", "logps/", _ROUTER)
    return {name if name.startswith(plain) else f"prefloss/{name}": value for name, value in found.items()}
