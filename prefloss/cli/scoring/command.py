"""`prefloss score`: reward every completion of a file, write the rewards, and print what they are worth."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import prefloss
from prefloss.cli.command_options import ScoreOptions
from prefloss.cli.console import CliError, print_facts, quiet
from prefloss.cli.processes import together
from prefloss.cli.scoring.record import record_of
from prefloss.cli.scoring.rows import check_rows
from prefloss.cli.scoring.run import Run
from prefloss.cli.scoring.words import print_summary
from prefloss.training import claimed, distributed

if TYPE_CHECKING:
    from prefloss.cli.scoring.models import Setup


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
            console.print(Text(f"{options.output} is finished; nothing is left to score."), soft_wrap=True)
        elif resumes:
            print_facts(console, "resume", (f"what an earlier run scored is kept, in {run.parts.folder}",))
        summary = _scored(run, console) if done is None else done["summary"]
        print_summary(console, summary)
        for path, content in run.files():
            console.print(Text.assemble((str(path), "bold"), (f"   {content}", "dim")), soft_wrap=True)


def _run(options: ScoreOptions, console: Console) -> Run:
    """Check the data, load the model, and print what they are."""
    rows = check_rows(options.data, distributed.share(), chat=options.chat)
    print_facts(
        console, "data", (f"{options.data.name}: {rows.count:,} rows: {rows.kind.words}",), rows.notes
    )
    # transformers takes seconds to load, so options and data are checked before.
    from prefloss.cli.scoring.models import loss_of, setup_of

    record = record_of(options.model)
    loss, warnings = loss_of(options, record)
    setup = setup_of(options, record, loss, rows.kind)
    million, where = setup.model.num_parameters() / 1e6, next(setup.model.parameters()).device
    where = f"{distributed.size()} processes" if distributed.size() > 1 else where
    facts = (
        f"{options.model}: {million:.1f} million parameters, {setup.dtype}, on {where}",
        "no reference" if setup.reference is None else f"against {setup.reference_name}",
    )
    print_facts(console, "model", facts, (*warnings, *setup.warnings))
    print_facts(console, "reward", (f"{loss!r}: {loss.reward!r}",))
    if setup.tokenizer.chat_template and not rows.kind.conversational and record.folder is None:
        print_facts(console, "", ("plain text is scored as it is; --chat puts it into the chat template",))
    return Run(options, rows, setup, _scorer(options, setup))


def _scorer(options: ScoreOptions, setup: Setup) -> prefloss.Scorer:
    try:
        return prefloss.Scorer(
            setup.model,
            setup.tokenizer,
            reference=setup.reference,
            loss=setup.loss,
            max_length=options.max_length,
            allow_truncation=options.allow_truncation,
            batch_tokens=options.batch_tokens,
        )
    except (ValueError, TypeError) as error:
        # It names its arguments, loss and reference, as the options are called.
        raise CliError(f"--{error}") from error


def _scored(run: Run, console: Console) -> dict[str, Any]:
    bars = (
        TextColumn("scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
    )
    with Progress(*bars, console=console, transient=True, disable=console.quiet) as progress:
        bar = progress.add_task("", total=run.rows.count)
        return run.score(lambda rows: progress.update(bar, completed=rows))
