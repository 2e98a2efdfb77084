"""The processes that train together, started by torchrun, accelerate or Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from prefloss.data.row_file import Share

Record = TypeVar("Record")


def size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(value: Any) -> list[Any]:
    """One picklable value of each process, by rank. Every process must call this."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def share() -> Share:
    """The part of this process of a file that all processes read."""
    return Share(rank(), size(), gather)


def barrier() -> None:
    """Wait for all processes."""
    if size() > 1:
        dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """Sum over the processes, without gradient. Every process must call this, in the same order."""
    if size() == 1:
        return values
    summed = values.detach().clone()
    dist.all_reduce(summed)
    return summed


def gather_feedback(feedback: Record) -> Record:
    """The examples of all processes by rank; gradients flow to this process's own examples.

    Every process must call this. Tensors of different widths are padded with 0, which masks mark as absent.

    Args:
        feedback: `Pairs`, `Labels` or `Rankings`, with the same fields on every process.
    """
    if size() == 1:
        return feedback
    local = _tensors(feedback)
    shapes = _all_shapes(local)
    parts = _all_values(local, shapes)
    joined = []
    for index, own in enumerate(local):
        sizes = [shapes_of_rank[index] for shapes_of_rank in shapes]
        width = [max(size[axis] for size in sizes) for axis in range(1, own.dim())]
        pieces = [own if number == rank() else parts[number][index] for number in range(size())]
        joined.append(torch.cat([_padded(piece.to(own.dtype), width) for piece in pieces]))
    return _rebuilt(feedback, iter(joined))


def _tensors(record: Any) -> list[Tensor]:
    """All tensors of a record, depth first; scalars get a first dimension."""
    tensors = []
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            tensors += _tensors(value)
        elif isinstance(value, Tensor):
            tensors.append(value.reshape(1) if value.dim() == 0 else value)
    return tensors


def _rebuilt(record: Any, values: Iterator[Tensor]) -> Any:
    changed = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            changed[field.name] = _rebuilt(value, values)
        elif isinstance(value, Tensor):
            new = next(values)
            # A scalar describes the whole batch: take the mean over the processes.
            changed[field.name] = new.mean() if value.dim() == 0 else new
    return replace(record, **changed)


def _all_shapes(local: list[Tensor]) -> list[list[list[int]]]:
    """Shape of each tensor on each rank."""
    flat = torch.tensor([size for value in local for size in value.shape], device=local[0].device)
    rows = [torch.empty_like(flat) for _ in range(size())]
    dist.all_gather(rows, flat)
    shapes = []
    for row in rows:
        sizes = iter(row.tolist())
        shapes.append([[next(sizes) for _ in value.shape] for value in local])
    return shapes


def _all_values(local: list[Tensor], shapes: list[list[list[int]]]) -> list[list[Tensor]]:
    """The tensors of each rank, in one message: float64 holds every dtype in use exactly."""
    counts = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
    longest = max(map(sum, counts))
    message = torch.cat([value.detach().double().flatten() for value in local])
    message = F.pad(message, (0, longest - len(message)))
    messages = [torch.empty_like(message) for _ in range(size())]
    dist.all_gather(messages, message)
    return [
        [part.view(shape) for part, shape in zip(row[: sum(sizes)].split(sizes), of_rank, strict=True)]
        for row, sizes, of_rank in zip(messages, counts, shapes, strict=True)
    ]


def _padded(value: Tensor, width: list[int]) -> Tensor:
    missing = [size - present for size, present in zip(width, value.shape[1:], strict=True)]
    if not any(missing):
        return value
    # F.pad takes the last dimension first.
    return F.pad(value, [side for more in reversed(missing) for side in (0, more)])
