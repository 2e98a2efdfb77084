"""The typer application: commands and their help texts; each command's options are a dataclass."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

import prefloss
from prefloss.cli.command_options import ReferenceOptions, TrainOptions
from prefloss.cli.console import CliError, Clock, errors_as_text, quiet
from prefloss.cli.task import task_of

app = typer.Typer(
    name="prefloss",
    help="Preference losses by name: look them up, and train with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(options: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """A decorator: the function becomes a command whose options are the fields of a dataclass."""

    def decorate(run: Callable[[Any], None]) -> Callable[..., None]:
        @functools.wraps(run)
        def command(**values: Any) -> None:
            with errors_as_text():
                run(options(**values))

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
) -> None:
    """List the registered losses, or show one in full."""
    from prefloss.cli.losses import show_losses

    with errors_as_text():
        show_losses(name)


@_command(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a language model with a preference loss; with no options, a complete small example.

    The example builds a small model and a generated preference world, trains on what a noisy judge says,
    and marks the result against the judge's true reward: about a minute on two CPU cores, offline.
    """
    clock = Clock()
    options.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CliError(
            "prefloss train runs in one process; for several, use PreferenceLossCallback in a script of your own "
            "with TRL's trainers"
        )
    loss = options.bound_loss()
    folder = options.output_folder(loss.name)
    console = Console(highlight=False)
    with clock.part("data"):
        task = task_of(options, loss)
    # TRL and transformers take seconds to load, so options and data are checked before.
    with clock.part("imports"):
        from prefloss.cli import report
        from prefloss.cli.training_run import run
    try:
        with quiet(console):
            result = run(options, loss, task, folder, console, clock)
    except BaseException:
        # An empty folder would make the next run choose another number.
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    with clock.part("report"):
        report.write_metrics(result, folder / "metrics.json")
        report.write_picture(result, folder / "curves.png")
    report.print_report(console, result)
    files = (
        (folder, "model and tokenizer, in transformers' format"),
        (folder / "curves.png", "the curves"),
        (folder / "metrics.json", "every number"),
    )
    for path, content in files:
        console.print(Text.assemble((str(path), "bold"), (f"   {content}", "dim")), soft_wrap=True)
    console.print(Text(str(clock), style="dim"))


@_command(ReferenceOptions)
def reference(options: ReferenceOptions) -> None:
    """Compute the reference's log-probs of a data set once, for any number of trainings.

    Stopped at any moment, the same command goes on where it was. Under `torchrun` or `accelerate launch` the
    processes share the work. Data that are in the table already are not scored again.
    """
    from prefloss.cli.reference_table import write_reference

    write_reference(options)
