"""What prefloss adds to a trainer's logs, under `prefloss/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prefloss.diagnostics import Stat


def log_diagnostics(trainer: Any, found: Mapping[str, Stat]) -> None:
    """Log the figures that TRL does not log itself, as means over the examples of all ranks."""
    own = {name: stat for name, stat in found.items() if not name.startswith(("rewards/", "logps/"))}
    mine = torch.stack([torch.stack([stat.sum.float(), stat.count.float()]) for stat in own.values()])
    summed = trainer.accelerator.reduce(mine, reduction="sum")
    for name, (total, count) in zip(own, summed.tolist(), strict=True):
        if count:
            _logged(trainer)[f"prefloss/{name}"].append(total / count)


def log_terms(trainer: Any, means: Mapping[str, Tensor]) -> None:
    """Log each term of a sum of losses, before its weight, as the mean of the ranks' means."""
    if len(means) < 2:
        return
    mine = torch.stack([mean.detach().float() for mean in means.values()])
    for name, mean in zip(means, trainer.accelerator.reduce(mine, reduction="mean").tolist(), strict=True):
        _logged(trainer)[f"prefloss/loss/{name}"].append(mean)


def _logged(trainer: Any) -> dict[str, list[float]]:
    return trainer._metrics["train" if trainer.model.training else "eval"]
