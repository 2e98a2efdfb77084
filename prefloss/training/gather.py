"""The feedback of all processes on each of them, for losses that look across their batch."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from prefloss.training import distributed

Record = TypeVar("Record")


def gathered(feedback: Record) -> Record:
    """The examples of all processes, in the order of their ranks; the gradient flows to this process's own.

    Every process must call this. Where tensors differ in width, the narrower ones are filled up with 0, which masks
    read as absent.

    Args:
        feedback: `Pairs`, `Labels` or `Rankings`, with the same fields on every process.
    """
    if distributed.size() == 1:
        return feedback
    mine = _tensors(feedback)
    shapes = _all_shapes(mine)
    parts = _all_values(mine, shapes)
    whole = []
    for index, own in enumerate(mine):
        sizes = [of_rank[index] for of_rank in shapes]
        width = [max(size[axis] for size in sizes) for axis in range(1, own.dim())]
        pieces = [
            own if rank == distributed.rank() else parts[rank][index] for rank in range(distributed.size())
        ]
        whole.append(torch.cat([_widened(piece.to(own.dtype), width) for piece in pieces]))
    return _rebuilt(feedback, iter(whole))


def _tensors(record: Any) -> list[Tensor]:
    """All tensors of a record, depth first, those of one value given a first dimension."""
    found = []
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            found += _tensors(value)
        elif isinstance(value, Tensor):
            found.append(value.reshape(1) if value.dim() == 0 else value)
    return found


def _rebuilt(record: Any, values: Any) -> Any:
    changed = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            changed[field.name] = _rebuilt(value, values)
        elif isinstance(value, Tensor):
            new = next(values)
            # A value of the whole batch: the mean of the processes' own.
            changed[field.name] = new.mean() if value.dim() == 0 else new
    return replace(record, **changed)


def _all_shapes(mine: list[Tensor]) -> list[list[list[int]]]:
    """Shape of each tensor on each rank."""
    flat = torch.tensor([size for value in mine for size in value.shape], device=mine[0].device)
    rows = [torch.empty_like(flat) for _ in range(distributed.size())]
    dist.all_gather(rows, flat)
    found = []
    for row in rows:
        sizes = iter(row.tolist())
        found.append([[next(sizes) for _ in value.shape] for value in mine])
    return found


def _all_values(mine: list[Tensor], shapes: list[list[list[int]]]) -> list[list[Tensor]]:
    """The tensors of each rank, in one message: float64 holds all of them exactly."""
    counts = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
    room = max(map(sum, counts))
    message = torch.cat([value.detach().double().flatten() for value in mine])
    message = F.pad(message, (0, room - len(message)))
    messages = [torch.empty_like(message) for _ in range(distributed.size())]
    dist.all_gather(messages, message)
    return [
        [part.view(shape) for part, shape in zip(row[: sum(sizes)].split(sizes), of_rank, strict=True)]
        for row, sizes, of_rank in zip(messages, counts, shapes, strict=True)
    ]


def _widened(value: Tensor, width: list[int]) -> Tensor:
    missing = [size - have for size, have in zip(width, value.shape[1:], strict=True)]
    if not any(missing):
        return value
    # F.pad takes the last dimension first.
    return F.pad(value, [side for more in reversed(missing) for side in (0, more)])
