"""`prefloss train`: from the options to model, numbers and picture in a folder."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from prefloss.cli import report
from prefloss.cli.console import CliError, Clock, quiet
from prefloss.cli.options import TrainOptions
from prefloss.cli.task import task_of


def train(options: TrainOptions) -> None:
    """Train, measure, save, report.

    Raises:
        CliError: If the run cannot start as asked.
    """
    clock = Clock()
    options.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CliError(
            "prefloss train runs in one process; for several, use PreferenceLossCallback in a script of your own "
            "with TRL's trainers"
        )
    loss = options.bound_loss()
    folder = _output_folder(options, loss.name)
    console = Console(highlight=False)
    with clock.part("data"):
        task = task_of(options, loss)
    # TRL and transformers take seconds to load, so options and data are checked before.
    with clock.part("imports"):
        from prefloss.cli.picture import write_picture
        from prefloss.cli.run import run
    try:
        with quiet() as warnings:
            result = run(options, loss, task, folder, console, clock)
    except BaseException:
        # An empty folder would make the next run choose another number.
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    with clock.part("report"):
        report.write_metrics(result, folder / "metrics.json")
        write_picture(result, folder / "curves.png")
    for warning in warnings:
        console.print(Text(warning, style="yellow"))
    report.print_report(console, result)
    files = {
        "": "model and tokenizer, in transformers' format",
        "curves.png": "the curves",
        "metrics.json": "every number",
    }
    for name, what in files.items():
        console.print(Text.assemble((f"{folder / name}", "bold"), (f"   {what}", "dim")), soft_wrap=True)
    console.print(Text(str(clock), style="dim"))


def _output_folder(options: TrainOptions, loss: str) -> Path:
    """The folder that `--output` names, or the first free prefloss-runs/<loss>-<number>; not made yet.

    Raises:
        CliError: If it is a file, or is not empty and `--overwrite` is not given.
    """
    if options.output is None:
        # A sum of losses has a name like "0.8*dpo + 0.2*ipo".
        slug = re.sub(r"[^A-Za-z0-9._]+", "_", loss).strip("_")
        folders = (Path("prefloss-runs") / f"{slug}-{number}" for number in itertools.count(1))
        return next(folder for folder in folders if not folder.exists())
    folder = options.output
    if folder.exists() and not folder.is_dir():
        raise CliError(f"--output: {folder} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not options.overwrite:
        raise CliError(f"--output: {folder} exists and is not empty; choose another, or add --overwrite")
    return folder
