"""`prefloss compare` in the worlds: all sweeps on all cores, kept as they finish, then the report."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import prefloss
from prefloss.cli.compare_options import CompareOptions
from prefloss.cli.console import CliError, first_line
from prefloss.cli.run_folder import RunFolder, taken, unwritable
from prefloss.data.atomic import written_whole
from prefloss.evidence import report
from prefloss.evidence.comparison import compared
from prefloss.evidence.sweeps import FACTORS, Budget, data_hash, not_fed, run_sweep

RUNS, PAGE, TABLE = "runs.jsonl", "report.html", "results.csv"
# Seconds between two lines of progress where there is no terminal.
_QUIET = 10.0

Sweep = tuple[str, str]


def compare_in_worlds(options: CompareOptions, console: Console) -> None:
    """Run what is missing, write the report and print the verdict."""
    losses, worlds, budget = options.bound_losses(), options.worlds, options.budget
    plan = [(text, world) for text in losses for world in worlds]
    with taken(options.output, "compare") as folder:
        admit(
            folder,
            {
                "losses": [repr(loss) for loss in losses.values()],
                "--world": list(worlds),
                "--seeds": budget.seeds,
                "budget": json.loads(json.dumps(asdict(budget))),
            },
        )
        found = finished(folder.path / RUNS)
        missing = [sweep for sweep in plan if sweep not in {(one["loss"], one["world"]) for one in found}]
        if found:
            console.print(f"{len(plan) - len(missing)} of {len(plan)} sweeps are there already", style="dim")
        try:
            with (folder.path / RUNS).open("a", encoding="utf-8") as file:
                for one in _shown(console, _each(missing, budget), len(missing), budget):
                    found.append(one)
                    file.write(json.dumps(one) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            comparison = compared(found, list(losses), worlds)
            texts = {
                TABLE: report.table(report.rows_of(comparison)),
                PAGE: report.page(comparison, _origin(options)),
            }
            for name, text in texts.items():
                with written_whole(folder.path / name) as path:
                    path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise unwritable(folder.path, error) from error
        console.print()
        for sentence in comparison.verdict:
            console.print(Text(sentence))
        for name, content in ((PAGE, "the report"), (TABLE, "one row a run")):
            console.print(
                Text.assemble((str(folder.path / name), "bold"), (f"   {content}", "dim")), soft_wrap=True
            )


def admit(folder: RunFolder, settings: dict[str, Any]) -> None:
    """Record the settings in a new folder; a `CliError` if the folder holds something else."""
    settings = {"command": "prefloss compare", "prefloss": prefloss.__version__, **settings}
    names = {path.name for path in folder.path.iterdir() if not path.name.startswith(".")}
    if names and (folder.record is None or folder.record["settings"].get("command") != settings["command"]):
        raise CliError(
            f"--output: {folder.path} holds something else than a comparison; choose another folder"
        )
    folder.admit(settings, resume=True, overwrite=False)
    folder.begin({})


def finished(path: Path) -> list[dict[str, Any]]:
    """The sweeps in a file of one JSON object a line; a last line that a kill cut short is removed."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    try:
        found = [json.loads(line) for line in whole]
    except ValueError as error:
        raise CliError(
            f"--output: {path} cannot be read: {first_line(error)}; choose another folder"
        ) from error
    if len(whole) < len(lines):
        with written_whole(path) as new:
            new.write_text("".join(whole), encoding="utf-8")
    return found


def _each(plan: Sequence[Sweep], budget: Budget) -> Iterator[dict[str, Any]]:
    """Run the sweeps, one process a core, and give each as it finishes."""
    cores = min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(plan)
    )
    if cores <= 1:
        for sweep in plan:
            yield _run(*sweep, budget)
        return
    # Forked processes would share torch's threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(cores, mp_context=context, initializer=_begin_process)
    try:
        for future in as_completed([pool.submit(_run, *sweep, budget) for sweep in plan]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _run(text: str, world: str, budget: Budget) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_sweep(text, world, budget)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CliError(f"{text} in the world {world}: {first_line(error)}") from error
    finally:
        torch.set_num_threads(threads)


def _begin_process() -> None:
    """Leave Ctrl-C to the first process, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = multiprocessing.parent_process()

    def wait() -> None:
        if first is not None:
            first.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _shown(
    console: Console, sweeps: Iterator[dict[str, Any]], total: int, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Pass the sweeps on and show how far it is: a bar on a terminal, a line now and then elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("sweeps,"))
    left = (TimeRemainingColumn(), TextColumn("left"))
    began = spoken = time.monotonic()
    with Progress(*columns, *left, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{budget.seeds} seeds each", total=total)
        for done, one in enumerate(sweeps, 1):
            yield one
            progress.update(
                bar, completed=done, description=f"{budget.seeds} seeds of {one['loss']} in {one['world']}"
            )
            now = time.monotonic()
            if not console.is_terminal and (now - spoken > _QUIET or done == total):
                spoken, rest = now, (now - began) / done * (total - done)
                console.print(
                    Text(f"{done} of {total} sweeps ({budget.seeds} seeds each), {rest:.0f} s left")
                )


def _origin(options: CompareOptions) -> report.Origin:
    budget = options.budget
    tried = f"{len(FACTORS)} KL strengths, from 1/16 to 16 times its own"
    if budget.betas is not None:
        tried = f"the KL strengths {', '.join(f'{beta:g}' for beta in budget.betas)}"
    return report.Origin(
        command=options.command(),
        versions=versions(),
        data_hash=data_hash(options.worlds, budget.seeds),
        budget=(
            f"Every loss gets the same: {budget.seeds} seeds of data and batches, {budget.steps} steps of Adam at "
            f"{budget.learning_rate:g} on {budget.batch} pairs or {2 * budget.batch} votes, {tried}. For each seed, "
            "held-out pairs of the same judge choose the strength: the one with the highest win rate against the "
            "reference, estimated from these pairs alone. The true reward chooses nothing. A loss without a strength "
            "has one try."
        ),
        left_out=not_fed(prefloss.specs) if options.every else {},
    )


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "prefloss": prefloss.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "Python": platform.python_version(),
    }
