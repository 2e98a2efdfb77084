"""Progress on screen: bars and curves that move on a terminal, one line per measurement elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

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


class Screen:
    """What is shown while a run goes on; use as a context manager.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.moves = console.is_terminal
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
        self._live = Live(self._render(), console=console, refresh_per_second=8)

    def __enter__(self) -> Screen:
        if self.moves:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.moves:
            self._live.update(self._render(), refresh=True)
            self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """Print a line above what moves."""
        self.console.print(Text(text, style=style))

    def stage(self, name: str, total: int) -> Callable[[int, str], None]:
        """A bar for the next part of the run; call what it returns with the step and a short text."""
        if not self.moves:
            self.say(f"{name}: {total} steps")
        bar = self._progress.add_task(name, total=total, text="")
        self._refresh()

        def update(step: int, text: str = "") -> None:
            self._progress.update(bar, completed=step, text=text)

        return update

    def measured(self, found: Measurement) -> None:
        """Show a measurement."""
        self._measured.append(found)
        if self.moves:
            self._refresh()
            return
        values = (
            f"{name} {shown.format(getattr(found, key))}"
            for key, (_, name, shown) in _QUANTITIES.items()
            if getattr(found, key) is not None
        )
        elapsed = time.perf_counter() - self._began
        self.say(f"{elapsed:4.0f} s, step {found.step:>4}: " + ", ".join(values))

    def _refresh(self) -> None:
        if self.moves:
            self._live.update(self._render())

    def _render(self) -> RenderableType:
        return Group(self._progress, self._curves()) if self._measured else Group(self._progress)

    def _curves(self) -> Table:
        table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
        table.add_column("", style="cyan", no_wrap=True)
        table.add_column("start", justify="right")
        table.add_column("now", justify="right", style="bold")
        table.add_column(f"every measurement up to step {self._measured[-1].step}", style="green")
        for key, (name, _, shown) in _QUANTITIES.items():
            values = [v for v in (getattr(m, key) for m in self._measured) if v is not None]
            if values:
                table.add_row(name, shown.format(values[0]), shown.format(values[-1]), sparkline(values))
        return table


def sparkline(values: list[float]) -> str:
    """Values as a row of blocks, the lowest at the bottom.

    Example:
        >>> sparkline([0.0, 1.0, 2.0])
        '▁▅█'
    """
    low, high = min(values), max(values)
    if high == low:
        return _BLOCKS[0] * len(values)
    return "".join(_BLOCKS[round((v - low) / (high - low) * (len(_BLOCKS) - 1))] for v in values)
