"""Lines that say what a run uses, and what it leaves out."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefloss.cli._errors import CliError
from prefloss.cli._task import Task
from prefloss.data.tokens import encode, encode_prompt


def tell(console: Console, name: str, facts: tuple[str, ...], warnings: tuple[str, ...] = ()) -> None:
    """Print sentences under one name, the warnings in yellow."""
    lines = [(fact, "") for fact in facts] + [(warning, "yellow") for warning in warnings]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="cyan", width=8, no_wrap=True)
    grid.add_column()
    for i, (line, style) in enumerate(lines):
        grid.add_row(name if i == 0 else "", Text(line, style=style))
    console.print(grid)


def tell_dropped(console: Console, given: int, kept: int, max_length: int) -> None:
    """Say how many rows TRL left out for their length.

    Raises:
        CliError: If none is left.
    """
    if kept == 0:
        raise CliError(f"--max-length: all {given} rows have a prompt that alone fills {max_length} tokens")
    if kept < given:
        message = (
            f"{given - kept} of {given} rows left out: their prompt alone fills --max-length {max_length}"
        )
        tell(console, "", (), (message,))


def tell_merged(console: Console, tokenizer: Any, task: Task) -> None:
    """Say how many prompts lose their end: TRL cuts what becomes another token when a completion follows."""
    rows = [*task.better, *task.worse][:200]
    merged = sum(
        len(encode(tokenizer, row["prompt"], row["completion"])[0])
        < len(encode_prompt(tokenizer, row["prompt"]))
        for row in rows
    )
    if merged:
        advice = "check its chat template" if task.conversational else "end prompts with a line break"
        message = (
            f"in {merged} of {len(rows)} rows the end of the prompt becomes another token when the completion "
            f"follows, and TRL leaves it out; {advice}"
        )
        tell(console, "", (), (message,))
