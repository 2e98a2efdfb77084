"""The processes that train together, whoever started them: torchrun, accelerate or Lightning."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def size() -> int:
    """How many there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(values: Tensor) -> Tensor:
    """The sum over all of them. Every process must call this, in the same order."""
    if size() == 1:
        return values
    summed = values.detach().clone()
    dist.all_reduce(summed)
    return summed
