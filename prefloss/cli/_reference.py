"""`prefloss reference`: score a data set once, into a table that any training reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from prefloss import data as pdata
from prefloss.cli._errors import CliError
from prefloss.data.files import rows_of
from prefloss.data.rows import KIND_WORDS

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ReferenceSettings:
    """The options of `prefloss reference`."""

    model: str
    data: tuple[Path, ...]
    output: Path
    tokenizer: str | None = None
    adapter: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    batch_size: int = 8
    max_length: int | None = None
    overwrite: bool = False
    cpu: bool = False

    def check(self) -> None:
        """Refuse what no run could do.

        Raises:
            CliError: If an option is out of range, or there is nothing to write to.
        """
        if self.dtype not in DTYPES:
            raise CliError(f"--dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.output.is_dir():
            raise CliError(f"--output: {self.output} is a folder; expected a file, as table.parquet")
        if self.output.suffix != ".parquet":
            raise CliError(f"--output: expected a name that ends in .parquet, got {self.output}")


@dataclass(frozen=True)
class ReferenceData:
    """What is scored.

    Attributes:
        sets: Data sets by name.
        messages: Name of a set whose texts are messages, or None.
        facts: What to tell the user.
        warnings: The same for what was dropped or rewritten.
    """

    sets: dict[str, Any]
    messages: str | None
    facts: tuple[str, ...]
    warnings: tuple[str, ...]


def reference(settings: ReferenceSettings) -> None:
    """Score the data, write the table, say what is in it.

    Raises:
        CliError: If the run cannot start or go on as asked.
    """
    settings.check()
    rank = int(os.environ.get("RANK", "0"))
    # One process speaks for all.
    console = Console(highlight=False, quiet=rank != 0)
    data = _read(settings.data)
    with _processes():
        # Loads transformers, which takes seconds.
        from prefloss.cli._quiet import quiet
        from prefloss.cli._reference_run import run

        with quiet() as heard:
            run(settings, data, console)
    for message in heard:
        console.print(Text(message, style="yellow"))


def _read(paths: tuple[Path, ...]) -> ReferenceData:
    data: dict[str, Any] = {}
    facts, warnings, messages = [], [], None
    try:
        for path in paths:
            name, found = (path.name if path.name not in data else str(path)), _token_ids(path)
            if found is None:
                read = pdata.read(path)
                found, form = read.rows, "messages" if read.conversational else "plain text"
                facts.append(f"{name}: {len(found)} {KIND_WORDS[read.kind]} rows, {form}")
                warnings += read.notes
                messages = name if read.conversational else messages
            else:
                facts.append(f"{name}: {len(found)} rows of token ids")
            data[name] = found
    except (pdata.DataError, OSError) as error:
        raise CliError(str(error)) from error
    return ReferenceData(data, messages, tuple(facts), tuple(warnings))


def _token_ids(path: Path) -> Any:
    """The rows of a file that holds token ids, or None."""
    first = next(rows_of(path), None)
    if first is None or first[1].get("prompt_ids") is None:
        return None
    from datasets import Dataset

    return Dataset.from_list([row for _, row in rows_of(path)])


@contextmanager
def _processes() -> Iterator[None]:
    """The group of processes that torchrun or accelerate launch started, if one did."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    # They meet at the end only, however long the slowest takes.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def start_anew(output: Path, parts: Path) -> None:
    """Remove a table, and what a killed run left beside it."""
    output.unlink(missing_ok=True)
    shutil.rmtree(parts, ignore_errors=True)


@contextmanager
def progress(console: Console, total: int) -> Iterator[Any]:
    """A bar that is told how many rows of the data were done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as shown:
        task = shown.add_task("scoring", total=total)
        yield lambda rows: shown.advance(task, rows)
