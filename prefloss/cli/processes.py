"""The processes that torchrun or accelerate launch started for one command: they meet, and they end together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import typer

from prefloss.cli.console import CliError, first_line
from prefloss.data import DataError

# How long processes wait for each other to start.
MEETING = timedelta(minutes=5)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def joined(longest_wait: timedelta | None = None) -> Iterator[None]:
    """The group of processes, if there are several.

    Args:
        longest_wait: How long one may wait for another in the block; None for torch's default.

    Raises:
        CliError: If they do not all start, or another one ends early.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1" or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=MEETING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=longest_wait)
    except (RuntimeError, ValueError) as error:
        raise CliError(
            f"WORLD_SIZE: got {size}, but the processes cannot meet: {first_line(error)}; start all of them within "
            f"{MEETING.seconds // 60} minutes, with torchrun or accelerate launch"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):
            raise
        raise CliError("another process ended before this one; its own message says why") from error
    finally:
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """All processes leave the block, or none does: an error of one ends all, and is raised in one of them only."""
    from prefloss.training import distributed

    error: Exception | None = None
    try:
        yield
    except (CliError, DataError) as raised:
        error = raised
    failed = [rank for rank, fault in enumerate(distributed.gather(error is not None)) if fault]
    if error is not None and distributed.rank() == failed[0]:
        raise error
    if failed:
        raise typer.Exit(2)
