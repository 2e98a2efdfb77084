"""`prefloss score`: reward every completion of a file, write the rewards, and print what they are worth."""

from __future__ import annotations

import contextlib

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import prefloss
from prefloss.cli.command_options import ScoreOptions
from prefloss.cli.console import CliError, print_facts, quiet
from prefloss.cli.processes import together
from prefloss.cli.scoring.record import record_of
from prefloss.cli.scoring.rows import check_rows
from prefloss.cli.scoring.words import print_summary
from prefloss.training import claimed, distributed


def write_scores(options: ScoreOptions, console: Console) -> None:
    """Score the data, write the output, print the summary; a `CliError` if that cannot be done as asked."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet(console))
        with together():
            resumes = stack.enter_context(claimed(options.output, anew=options.overwrite))
            run = _run(options, console)
        with together():
            done = run.admit()
        if done is not None:
            console.print(
                Text(f"{options.output} is finished; nothing is left to score."), soft_wrap=True
            )
        elif resumes:
            print_facts(console, "resume", (f"what an earlier run scored is kept, in {run.parts.folder}",))
        summary = _scored(run, console) if done is None else done["summary"]
        print_summary(console, summary)
        for path, content in run.files():
            console.print(Text.assemble((str(path), "bold"), (f"   {content}", "dim")), soft_wrap=True)


def _run(options: ScoreOptions, console: Console) -> Run:
    """Check the data and load the model, and print what they are."""
    rows = check_rows(options.data, distributed.share(), chat=options.chat)
    print_facts(console, "data", (f"{options.data.name}: {rows.count:,} rows: {rows.kind.words}",))
    # transformers takes seconds to load, so options and data are checked before.
    from prefloss.cli.scoring.models import loss_of, setup_of
    from prefloss.cli.scoring.run import Run

    record = record_of(options.model)
    loss, warnings = loss_of(options, record)
    setup = setup_of(options, record, loss, rows.kind)
    ...
