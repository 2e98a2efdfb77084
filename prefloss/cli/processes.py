"""The processes that torchrun started for one command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import typer

from prefloss.cli.console import CliError, first_line
from prefloss.training import distributed


@contextmanager
def joined() -> Iterator[None]:
    """The group of processes that torchrun or accelerate launch started, if one did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:
        raise CliError(
            f"WORLD_SIZE: got {os.environ['WORLD_SIZE']}, but the processes cannot meet: {first_line(error)}; start "
            "them with torchrun or accelerate launch"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """All processes leave the block, or none does: a `CliError` of one ends all, and is raised in one of them only."""
    error: CliError | None = None
    try:
        yield
    except CliError as raised:
        error = raised
    failed = [rank for rank, fault in enumerate(distributed.gather(error is not None)) if fault]
    if error is not None and distributed.rank() == failed[0]:
        raise error
    if failed:
        raise typer.Exit(2)
