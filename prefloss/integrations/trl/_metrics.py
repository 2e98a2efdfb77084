"""What prefloss adds to a trainer's logs, under `prefloss/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prefloss.diagnosis import NAMES, Diagnosis
from prefloss.metrics import Stat


def log_diagnostics(trainer: Any, found: Mapping[str, Stat], diagnosis: Diagnosis | None) -> None:
    """Log the figures that TRL does not log itself, as means over the examples of all ranks.

    Args:
        trainer: The trainer.
        found: Sums and counts of the batch on this rank.
        diagnosis: Takes its own ones of them, and has its own memory; or None.
    """
    own = {name: stat for name, stat in found.items() if not name.startswith(("rewards/", "logps/"))}
    mine = torch.stack([torch.stack([stat.sum.float(), stat.count.float()]) for stat in own.values()])
    summed = trainer.accelerator.reduce(mine, reduction="sum")
    sums = {name: (total, count) for name, (total, count) in zip(own, summed.tolist(), strict=True)}
    # In their order, so that logs look alike from run to run.
    for name, (total, count) in sums.items():
        if count and name not in NAMES:
            _logged(trainer)[f"prefloss/{name}"].append(total / count)
    if diagnosis is not None and trainer.model.training:
        diagnosis.add({name: stat for name, stat in sums.items() if name in NAMES})
        for name, value in diagnosis.shown().items():
            # One value, over the batches that the diagnosis remembers.
            _logged(trainer)[f"prefloss/{name}"] = [value]


def log_terms(trainer: Any, means: Mapping[str, Tensor], counts: Tensor) -> None:
    """Log each term of a sum of losses, before its weight, as the mean over the examples of all ranks.

    Args:
        trainer: The trainer.
        means: Mean of each term on this rank.
        counts: Examples that each counts, [terms].
    """
    if len(means) < 2:
        return
    mine = torch.stack([mean.detach().float() for mean in means.values()])
    summed = trainer.accelerator.reduce(torch.stack([mine * counts, counts.float()]), reduction="sum")
    for name, total, count in zip(means, *summed.tolist(), strict=True):
        if count:
            _logged(trainer)[f"prefloss/loss/{name}"].append(total / count)


def _logged(trainer: Any) -> dict[str, list[float]]:
    return trainer._metrics["train" if trainer.model.training else "eval"]
