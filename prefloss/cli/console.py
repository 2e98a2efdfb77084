"""What a command prints: facts, errors, progress, and nothing of other packages."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist
import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from prefloss.data import DataError

if TYPE_CHECKING:
    from prefloss.demo.measure import Measurement

_BLOCKS = "▁▂▃▄▅▆▇█"

# Field of a measurement -> its name in the table, its name in a line, its format.
_QUANTITIES: dict[str, tuple[str, str, str]] = {
    "reward": ("true reward", "reward", "{:+.2f}"),
    "kl": ("KL to the reference, nats", "KL", "{:.2f}"),
    "accuracy": ("implicit-reward accuracy", "accuracy", "{:.1%}"),
    "chosen": ("log-prob of chosen, change in nats", "chosen", "{:+.2f}"),
    "rejected": ("log-prob of rejected, change in nats", "rejected", "{:+.2f}"),
}

# Messages of TRL that prefloss prints itself, with counts.
_OURS = ("The tokenized prompt is not a prefix", "You have different amounts of desirable")


class CliError(Exception):
    """A run that cannot start or go on as asked; the message says why and what would work."""

    label, exit_code = "Error", 2


class Stopped(CliError):
    """A run that a signal stopped; the message says what is kept and how to go on."""

    label = "Stopped"

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        # As shells count: 130 after Ctrl-C, 143 after SIGTERM.
        self.exit_code = 128 + signal_number


def first_line(error: Exception) -> str:
    """The first line of another package's error message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever a damaged file makes another package raise into a `CliError`: "<what> cannot be loaded"."""
    try:
        yield
    except CliError:
        raise
    # Readers of JSON, safetensors and pickles, and what they lead to, have no error in common.
    except Exception as error:
        raise CliError(f"{what} cannot be loaded: {first_line(error)}") from error


@contextmanager
def errors_as_text() -> Iterator[None]:
    """Print an error of the user's input as one paragraph without traceback, and exit with its code.

    Before they meet, and when they are stopped, all processes of torchrun come here: then only the first one prints.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        _print_error("Stopped", "at once, by Ctrl-C; what was completed before is kept")
        raise typer.Exit(130) from error
    except (CliError, DataError) as error:
        known = error if isinstance(error, CliError) else CliError(str(error))
        shared = isinstance(error, Stopped) or not dist.is_initialized()
        if not shared or os.environ.get("RANK", "0") == "0":
            _print_error(known.label, str(known))
        raise typer.Exit(known.exit_code) from error


def _print_error(label: str, message: str) -> None:
    console = Console(stderr=True, file=sys.stderr, highlight=False)
    # soft_wrap: file names stay whole, and a narrow terminal wraps by itself.
    console.print(Text.assemble((f"{label}: ", "bold red"), message), soft_wrap=True)


def print_facts(console: Console, name: str, facts: Sequence[str], warnings: Sequence[str] = ()) -> None:
    """Print sentences under one name, the warnings in yellow."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="cyan", width=8, no_wrap=True)
    grid.add_column()
    lines = [*map(Text, facts), *(Text(warning, style="yellow") for warning in warnings)]
    grid.add_row(name, Text("\n").join(lines))
    console.print(grid)


class Clock:
    """Wall time by part of a run, from its creation on; time inside nested parts counts for the inner one."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for this part; parts of one name add up."""
        since, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            nested = sum(self.seconds.values()) - before
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since - nested

    def __str__(self) -> str:
        """As "46 s in all: imports 6, training 40"."""
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items() if seconds >= 0.5)
        return f"{time.perf_counter() - self._began:.0f} s in all: {parts}"


@contextmanager
def quiet(console: Console) -> Iterator[None]:
    """Silence datasets, transformers and TRL; their warnings are printed, each once, when the block ends."""
    import datasets
    from transformers.utils import logging as hf_logging

    # Written to and read in order, each message once.
    messages: dict[str, None] = {}

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if not any(ours in text for ours in _OURS):
                messages[f"{record.name.partition('.')[0]}: {text}"] = None

    collector = Collector(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "accelerate", "peft")]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    bars = not datasets.are_progress_bars_disabled(), hf_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()
    for logger in loggers:
        logger.handlers, logger.propagate = [collector], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            hf_logging.enable_progress_bar()
    # Python warnings of prefloss are for the user; those of other packages are for their developers.
    messages |= {str(warning.message): None for warning in caught if "prefloss" in warning.filename}
    for message in messages:
        console.print(Text(message, style="yellow"))


class Screen:
    """Progress of a run, as a context manager: bars and curves on a terminal, one line per measurement elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._measured: list[Measurement] = []
        self._began = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", style="dim"),
            console=console,
        )
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8)

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def stage(self, name: str, total: int) -> Callable[[int, str], None]:
        """A bar for the next part of the run; call what it returns with the step and a short text."""
        if not self.console.is_terminal:
            self.console.print(Text(f"{name}: {total} steps"))
        bar = self._progress.add_task(name, total=total, text="")

        def update(step: int, text: str = "") -> None:
            self._progress.update(bar, completed=step, text=text)

        return update

    def remember(self, measurements: Sequence[Measurement]) -> None:
        """Draw the curves on from the measurements of an earlier process."""
        self._measured = list(measurements)

    def measured(self, measurement: Measurement) -> None:
        """Show a measurement."""
        self._measured.append(measurement)
        if self.console.is_terminal:
            return
        values = (
            f"{name} {form.format(getattr(measurement, key))}"
            for key, (_, name, form) in _QUANTITIES.items()
            if getattr(measurement, key) is not None
        )
        elapsed = time.perf_counter() - self._began
        self.console.print(Text(f"{elapsed:4.0f} s, step {measurement.step:>4}: " + ", ".join(values)))

    def _render(self) -> RenderableType:
        return Group(self._progress, self._curves()) if self._measured else self._progress

    def _curves(self) -> Table:
        table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
        table.add_column("", style="cyan", no_wrap=True)
        table.add_column("start", justify="right")
        table.add_column("now", justify="right", style="bold")
        table.add_column(f"every measurement up to step {self._measured[-1].step}", style="green")
        for key, (name, _, form) in _QUANTITIES.items():
            values = [v for v in (getattr(m, key) for m in self._measured) if v is not None]
            if values:
                table.add_row(name, form.format(values[0]), form.format(values[-1]), sparkline(values))
        return table


def sparkline(values: list[float]) -> str:
    """Values as a row of blocks, the lowest at the bottom.

    Example:
        >>> sparkline([0.0, 1.0, 2.0])
        '▁▅█'
    """
    low, high = min(values), max(values)
    span = high - low or 1.0
    return "".join(_BLOCKS[round((v - low) / span * (len(_BLOCKS) - 1))] for v in values)
