"""The typer application: commands and their help texts; each command's options are a dataclass.

A command imports what it runs when it runs, so that `prefloss losses` and `--help` answer at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

import prefloss
from prefloss.cli.command_options import ReferenceOptions, ReproduceOptions, ScoreOptions, TrainOptions
from prefloss.cli.compare_options import CompareOptions
from prefloss.cli.console import CliError, Clock, errors_as_text, quiet
from prefloss.cli.processes import joined, together

app = typer.Typer(
    name="prefloss",
    help="Preference losses by name: look them up, and train with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


# At the end of `prefloss reference` and `prefloss score`, processes wait for the slowest.
_SCORING = timedelta(days=30)


def _command(
    options: type, longest_wait: timedelta | None = None
) -> Callable[[Callable[[Any, Console], None]], Callable[..., None]]:
    """A decorator: the function becomes a command whose options are the fields of a dataclass."""

    def decorate(run: Callable[[Any, Console], None]) -> Callable[..., None]:
        @functools.wraps(run)
        def command(**values: Any) -> None:
            from prefloss.training import distributed

            with errors_as_text():
                given = options(**values)
                given.check()
                with joined(longest_wait), errors_as_text():
                    # One process prints for all.
                    run(given, Console(highlight=False, quiet=distributed.rank() != 0))

        # typer reads the options from the signature.
        command.__signature__ = inspect.signature(options, eval_str=True)  # type: ignore[attr-defined]
        return app.command()(command)

    return decorate


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"prefloss {prefloss.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def losses(
    name: Annotated[str | None, typer.Argument(help="Show one loss: formula, parameters, sources.")] = None,
    purpose: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="WORDS",
            help="At most three losses for what you have and what hurts, as votes,noisy; a wrong word lists all.",
        ),
    ] = None,
) -> None:
    """List the registered losses, show one in full, or name those for your data."""
    from prefloss.cli.losses import show_losses

    with errors_as_text():
        show_losses(name, purpose)


@app.command()
def probe(
    trainer: Annotated[str, typer.Argument(help="Of which package: trl, llamafactory, swift ...")],
    names: Annotated[
        list[str] | None, typer.Argument(help="Loss names; all that it accepts by default.")
    ] = None,
) -> None:
    """Check that the installed trainer trains the loss that its configuration names.

    For each loss name, the trainer takes one step on known log-probs. The table says which loss that step computed, in
    value and gradient. The exit code is 1 if it is another one than the name means.
    """
    from prefloss.cli.probe import probe_trainer

    with errors_as_text():
        probe_trainer(trainer, names)


@_command(TrainOptions)
def train(options: TrainOptions, console: Console) -> None:
    """Train a language model with a preference loss; with no options, a complete small example.

    The example builds a small model and a generated preference world, trains on what a noisy judge says,
    and marks the result against the judge's true reward: about a minute on two CPU cores, offline.

    After Ctrl-C or a kill, the same command with --resume goes on from the last checkpoint. Under `torchrun` the
    processes train as one.
    """
    from prefloss.cli.run_folder import taken
    from prefloss.cli.task import task_of
    from prefloss.training import distributed

    clock, loss = Clock(), options.bound_loss()
    with taken(options.output, options.folder_name(loss.name)) as folder:
        with together():
            folder.admit(options.settings(), resume=options.resume, overwrite=options.overwrite)
        if options.resume and folder.finished:
            words = f"The run in {folder.path} is finished; there is nothing to go on with."
            console.print(Text(words), soft_wrap=True)
            return
        with clock.part("data"), together():
            task = task_of(options, loss, distributed.share())
        # TRL and transformers take seconds to load, so options and data are checked before.
        with clock.part("imports"):
            from prefloss.cli import report
            from prefloss.cli.training_run import run
        with quiet(console):
            result = run(options, loss, task, folder, console, clock)
        report.print_report(console, result)
        files = (
            (folder.path, "model and tokenizer, in transformers' format"),
            (folder.path / "curves.png", "the curves"),
            (folder.path / "metrics.json", "every number"),
        )
        for path, content in files:
            console.print(Text.assemble((str(path), "bold"), (f"   {content}", "dim")), soft_wrap=True)
        console.print(Text(str(clock), style="dim"))


@_command(ReferenceOptions, _SCORING)
def reference(options: ReferenceOptions, console: Console) -> None:
    """Compute the reference's log-probs of a data set once, for any number of trainings.

    After Ctrl-C or a kill, the same command goes on where it stopped. Under `torchrun` or `accelerate launch` the
    processes share the work. Completions that are in the table already are not scored again.
    """
    from prefloss.cli.reference_table import write_reference

    write_reference(options, console)


@_command(ScoreOptions, _SCORING)
def score(options: ScoreOptions, console: Console) -> None:
    """Give every completion of a file the reward that its training implies: the model as a reward model.

    After Ctrl-C or a kill, the same command goes on where it stopped. Under `torchrun` the processes share the work.
    It ends with what the rewards are worth: accuracy, margins, calibration, and how much they follow length.
    """
    from prefloss.cli.scoring.command import write_scores

    write_scores(options, console)


@_command(ReproduceOptions)
def reproduce(options: ReproduceOptions, console: Console) -> None:
    """Try what papers claim in small worlds whose truth is known; without a name, list the experiments.

    Each experiment prints the claim, what was measured with its 95 % interval over seeds, and a verdict, and writes
    results.json, results.csv (one row a run) and picture.png.
    """
    from prefloss.cli.reproduce import run

    run(options, console)


@_command(CompareOptions)
def compare(options: CompareOptions, console: Console) -> None:
    """Compare losses with the uncertainty stated: in small worlds whose true reward is known, or on your own data.

    Writes report.html and results.csv. After Ctrl-C or a kill, the same command goes on where it stopped.
    """
    from prefloss.training import distributed

    if distributed.size() > 1:
        raise CliError("compare runs as one process and uses all cores itself; start it without torchrun")
    if options.data is None:
        from prefloss.cli.compare import compare_in_worlds as compare_losses
    else:
        from prefloss.cli.compare_data import compare_on_data as compare_losses
    compare_losses(options, console)
