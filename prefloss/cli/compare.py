"""`prefloss compare` in the worlds: all sweeps on all cores, kept as they finish, then the report."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import prefloss
from prefloss.cli.compare_options import CompareOptions
from prefloss.cli.comparison_folder import opened, versions
from prefloss.cli.console import CliError, first_line
from prefloss.cli.processes import cores
from prefloss.evidence import report
from prefloss.evidence.comparison import compared
from prefloss.evidence.sweeps import FACTORS, Budget, data_hash, not_fed, run_sweep

# Seconds between two lines of progress where there is no terminal.
_QUIET = 10.0

Sweep = tuple[str, str]


def compare_in_worlds(options: CompareOptions, console: Console) -> None:
    """Run what is missing, write the report and print the verdict."""
    losses, worlds, budget = options.bound_losses(), options.worlds, options.budget
    plan = [(text, world) for world in worlds for text in losses]
    settings = {"losses": list(map(repr, losses.values())), "--world": worlds, **_as_options(budget)}
    with opened(options.output, settings) as folder:
        there = {(sweep["loss"], sweep["world"]) for sweep in folder.finished}
        missing = [sweep for sweep in plan if sweep not in there]
        if there:
            console.print(f"{len(plan) - len(missing)} of {len(plan)} sweeps are there already", style="dim")
        # Closed at once after an error: the other processes end with it.
        with contextlib.closing(_each(missing, budget)) as sweeps:
            for sweep in _shown(console, sweeps, len(missing), budget):
                folder.add(sweep)
        comparison = compared(folder.finished, list(losses), worlds)
        texts = {
            "report.html": report.page(comparison, _origin(options)),
            "results.csv": report.table(report.rows_of(comparison)),
            "losses.csv": report.table(report.summary(comparison)),
        }
        folder.publish(console, comparison.verdict, texts)


def _as_options(budget: Budget) -> dict[str, Any]:
    return {f"--{name.replace('_', '-')}": value for name, value in asdict(budget).items()}


def _each(plan: Sequence[Sweep], budget: Budget) -> Generator[dict[str, Any], None, None]:
    """Run the sweeps, one process a core, and give each as it finishes."""
    workers = min(cores(), len(plan))
    if workers <= 1:
        for sweep in plan:
            yield _run(*sweep, budget)
        return
    # Forked processes would share torch's threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_process)
    try:
        for future in as_completed([pool.submit(_run, *sweep, budget) for sweep in plan]):
            yield future.result()
    except BrokenProcessPool as error:
        raise CliError(
            "a process was ended from outside; the same command goes on with what is there"
        ) from error
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


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
    console: Console, sweeps: Iterable[dict[str, Any]], total: int, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Pass the sweeps on and show how far it is: a bar on a terminal, a line now and then elsewhere."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("sweeps,"),
    )
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
