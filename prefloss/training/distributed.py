"""The processes that train together, whoever started them: torchrun, accelerate or Lightning."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def size() -> int:
    """How many there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(value: Any) -> list[Any]:
    """What each of them gives here, in their order. Every process must call this."""
    found = [value] * size()
    if size() > 1:
        dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Go on when all of them are here."""
    if size() > 1:
        dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """The sum over all of them. Every process must call this, in the same order."""
    if size() == 1:
        return values
    summed = values.detach().clone()
    dist.all_reduce(summed)
    return summed
