"""`prefloss train`, from options to report; what can be refused is refused before anything slow is loaded."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from prefloss.cli import _output, _report
from prefloss.cli._clock import Clock
from prefloss.cli._errors import CliError
from prefloss.cli._file_task import file_task
from prefloss.cli._settings import Settings, find_loss
from prefloss.cli._task import kind_for
from prefloss.cli._world_task import world_task


def train(settings: Settings) -> None:
    """Train, measure, save, report.

    Raises:
        CliError: If the run cannot start as asked.
    """
    clock = Clock()
    settings.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CliError(
            "prefloss train runs in one process; for several, use PreferenceLossCallback in a script of your own "
            "with TRL's trainers"
        )
    loss = find_loss(settings)
    kind = kind_for(loss)
    folder = _output.choose(settings, loss.name)
    console = Console(highlight=False)
    with clock.part("data"):
        if settings.data is None:
            task = world_task(settings, loss, kind)
        else:
            task = file_task(settings, loss, kind, settings.data)
    # Loads transformers and TRL, which takes seconds.
    with clock.part("imports"):
        from prefloss.cli._picture import write_picture
        from prefloss.cli._quiet import quiet
        from prefloss.cli._run import run

    try:
        with quiet() as heard:
            result = run(settings, loss, task, folder, console, clock)
    except BaseException:
        # An empty folder would make the next run choose another number.
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    with clock.part("report"):
        _report.write_metrics(result, folder / "metrics.json")
        write_picture(result, folder / "curves.png")
    _conclude(console, result, heard, folder, clock)


def _conclude(console: Console, result: _report.Result, heard: list[str], folder: Path, clock: Clock) -> None:
    for message in heard:
        console.print(Text(message, style="yellow"))
    console.print()
    console.print(_report.table(result))
    for sentence in _report.verdict(result):
        console.print(sentence)
    said = _report.samples(result)
    if said is not None:
        console.print()
        console.print(said)
    for name, what in (
        ("", "model and tokenizer, in transformers' format"),
        ("curves.png", "the curves"),
        ("metrics.json", "every number"),
    ):
        console.print(Text.assemble((f"{folder / name}", "bold"), ("   " + what, "dim")), soft_wrap=True)
    console.print(Text(f"{clock.total:.0f} s in all: {clock.words}", style="dim"))
