"""`prefloss reproduce`: the experiments, one of them, or all of them on all cores."""

from __future__ import annotations

import difflib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefloss.cli.command_options import ReproduceOptions
from prefloss.cli.console import CliError, first_line, print_facts
from prefloss.cli.processes import cores
from prefloss.evidence import Experiment, Verdict
from prefloss.evidence.experiments import experiments
from prefloss.evidence.reproduction import Results, reproduce

_COLOURS = {
    Verdict.HOLDS.value: "green",
    Verdict.HOLDS_WITH_A_CHANGE.value: "yellow",
    Verdict.DOES_NOT_APPEAR.value: "red",
}


def run(options: ReproduceOptions, console: Console) -> None:
    """Do what the options ask for.

    Raises:
        CliError: If there is no such experiment, the folder cannot be written, or an experiment of `--all` failed.
    """
    known = experiments()
    if options.name is None and not options.all:
        console.print(_listing(known.values()))
        return
    if options.name is not None and options.name not in known:
        close = difflib.get_close_matches(options.name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`prefloss reproduce` lists them."
        raise CliError(f"NAME: got {options.name!r}, expected the name of an experiment; {hint}")
    folder = _folder(options)
    if options.name is not None:
        _one(known[options.name], options, folder, console)
    else:
        _all(list(known.values()), options, folder, console)


def _folder(options: ReproduceOptions) -> Path:
    folder = options.output or Path("prefloss-runs", "evidence")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"--output: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise CliError(f"--output: {folder} cannot be written to")
    return folder


def _seeds(experiment: Experiment, options: ReproduceOptions) -> range:
    count = experiment.seeds if options.seeds is None else options.seeds
    return range(options.first_seed, options.first_seed + count)


def _one(experiment: Experiment, options: ReproduceOptions, folder: Path, console: Console) -> None:
    seeds, folder = _seeds(experiment, options), folder / experiment.name
    facts = {"claim": experiment.claim, "source": experiment.source, "set-up": experiment.setup}
    console.print(Text.assemble((experiment.name, "bold cyan"), f": {experiment.title}"))
    for name, fact in facts.items():
        print_facts(console, name, [fact])
    with console.status(f"{len(seeds)} seeds"):
        results = reproduce(experiment, seeds, folder)
    print_facts(console, "found", [results["summary"]])
    console.print(_figures(results))
    console.print(Text.assemble("verdict  ", _verdict(results)))
    if results["change"]:
        print_facts(console, "change", [results["change"]])
    console.print(
        Text(f"{folder}: results.json, results.csv, picture.png; {results['seconds']:.0f} s", style="dim"),
        soft_wrap=True,
    )


def _all(found: Sequence[Experiment], options: ReproduceOptions, folder: Path, console: Console) -> None:
    """Run every experiment in a process of its own pool; one that fails is reported beside the others."""
    outcomes: dict[str, Results | Exception] = {}
    for experiment, outcome in _outcomes(found, options, folder):
        outcomes[experiment.name] = outcome
        if isinstance(outcome, Exception):
            # A fault of the experiment, not of the user; with the lines of the other process.
            print("".join(traceback.format_exception(outcome)), file=sys.stderr)
        word = Text("failed", style="red") if isinstance(outcome, Exception) else _verdict(outcome)
        console.print(Text.assemble(f"{len(outcomes):>2}/{len(found)} {experiment.name}: ", word))
    console.print(_table([(experiment, outcomes[experiment.name]) for experiment in found]))
    failed = [name for name, outcome in outcomes.items() if isinstance(outcome, Exception)]
    console.print(Text(f"{folder}: a folder each", style="dim"), soft_wrap=True)
    if failed:
        raise CliError(f"{len(failed)} of {len(found)} experiments failed: {', '.join(failed)}")


def _outcomes(
    found: Sequence[Experiment], options: ReproduceOptions, folder: Path
) -> Iterator[tuple[Experiment, Results | Exception]]:
    """Results of each experiment, or its error, as they come."""
    # Forked processes would inherit torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cores(), len(found)), context, initializer=_one_thread) as pool:
        pending: dict[Future[Results], Experiment] = {
            pool.submit(
                reproduce, experiment, _seeds(experiment, options), folder / experiment.name
            ): experiment
            for experiment in found
        }
        try:
            for future in as_completed(pending):
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield pending[future], error or future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread() -> None:
    """The experiments themselves take the cores."""
    torch.set_num_threads(1)


def _listing(found: Iterable[Experiment]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for experiment in found:
        table.add_row(experiment.name, experiment.title)
    return table


def _figures(results: Results) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("measured", ratio=1)
    for name in ("value", "95 % interval", "expected"):
        table.add_column(name, justify="right", no_wrap=True)
    for figure in results["figures"]:
        expected = "" if figure["expected"] is None else _number(figure["expected"])
        table.add_row(figure["name"], _number(figure["value"]), _interval(figure["interval"]), expected)
    return table


def _table(outcomes: Sequence[tuple[Experiment, Results | Exception]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", style="cyan", no_wrap=True)
    table.add_column("verdict")
    table.add_column("measured", ratio=1)
    table.add_column("s", justify="right")
    for experiment, outcome in outcomes:
        if isinstance(outcome, Exception):
            table.add_row(
                experiment.name,
                Text("failed", style="red"),
                Text(f"{type(outcome).__name__}: {first_line(outcome)}"),
                "",
            )
            continue
        value = f"{_number(outcome['measured'])} {_interval(outcome['interval'])}".strip()
        measured = Text.assemble((value, "bold"), f" {outcome['quantity']}")
        table.add_row(experiment.name, _verdict(outcome), measured, f"{outcome['seconds']:.0f}")
    return table


def _verdict(results: Results) -> Text:
    return Text(results["verdict"], style=_COLOURS[results["verdict"]])


def _number(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.3g}"


def _interval(ends: Sequence[float | None] | None) -> str:
    return "exact" if ends is None else f"{_number(ends[0])} to {_number(ends[1])}"
