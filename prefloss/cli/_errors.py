"""Errors that are the user's to mend: one paragraph, no traceback, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text


class CliError(Exception):
    """A run that cannot start or go on as asked; the message says why and what would work."""


@contextmanager
def shown_without_traceback() -> Iterator[None]:
    """Print a `CliError` raised inside, and exit with code 2."""
    try:
        yield
    except CliError as error:
        console = Console(stderr=True, file=sys.stderr, highlight=False)
        # soft_wrap: file names stay whole, and a narrow terminal wraps by itself.
        console.print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from error
