"""The typer application: options and help texts; the work is in `_train`, `_reference` and `_losses`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import prefloss
from prefloss.cli import _losses
from prefloss.cli._errors import shown_without_traceback
from prefloss.cli._settings import Settings

app = typer.Typer(
    name="prefloss",
    help="Preference losses by name: look them up, and train with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
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
    with shown_without_traceback():
        _losses.show(name)


@app.command()
def train(
    loss: Annotated[str, typer.Option(help="Name of a loss; `prefloss losses` lists them.")] = "dpo",
    param: Annotated[
        list[str] | None,
        typer.Option(help="A hyperparameter of the loss, as tau=0.1; may be repeated.", metavar="NAME=VALUE"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id. Without it, a small built-in model.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Preference data: .jsonl, .json, .parquet or a save_to_disk folder. Without it, the "
            "generated world, whose true reward is known."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for model, metrics and picture. Without it, prefloss-runs/<loss>-<number>."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into --output though it is not empty.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps. (default: 400, or as --epochs says)")
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the data, if --steps is not given. (default: 1; built-in model: 3)"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Highest learning rate. (default: 1e-6, with --lora 1e-5; built-in model: 2e-4)"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows per forward pass. (default: 16; with --data 8)")
    ] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes per optimizer step.")] = 1,
    max_length: Annotated[
        int, typer.Option(min=2, help="Longest prompt + completion, tokens; the rest is cut.")
    ] = 512,
    eval_fraction: Annotated[float, typer.Option(help="Share of the prompts of --data to hold out.")] = 0.1,
    samples: Annotated[
        int | None,
        typer.Option(
            min=0, help="Completions to sample for KL and true reward. (default: 256; with --data 64)"
        ),
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train a LoRA adapter on the linear layers (needs peft).")
    ] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a fifth slower.")
    ] = False,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16", help="Compute in bfloat16, weights in float32. (default: on GPUs that can)"
        ),
    ] = None,
    warm_start: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Supervised steps that teach a model with random weights to speak. (default: 600; with --data 200)",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Stay on the CPU though there is an accelerator.")
    ] = False,
) -> None:
    """Train a language model with a preference loss; with no options, a complete small example.

    The example builds a small model and a generated preference world, trains on what a noisy judge says,
    and marks the result against the judge's true reward: about a minute on two CPU cores, offline.
    """
    settings = Settings(
        loss=loss,
        params=tuple(param or ()),
        model=model,
        data=data,
        output=output,
        overwrite=overwrite,
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulate=accumulate,
        max_length=max_length,
        eval_fraction=eval_fraction,
        samples=samples,
        lora_rank=lora_rank if lora else None,
        gradient_checkpointing=gradient_checkpointing,
        bf16=bf16,
        warm_start=warm_start,
        seed=seed,
        cpu=cpu,
    )
    with shown_without_traceback():
        from prefloss.cli import _train

        _train.train(settings)


@app.command()
def reference(
    model: Annotated[str, typer.Option(help="Model folder or hub id: the reference.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Preference data, text or token ids: .jsonl, .json, .parquet or a save_to_disk folder. Repeatable."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Table to write, or to add to; ends in .parquet.")],
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id, if not the model's own.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="PEFT adapter to switch on. Without it, the model as it is.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (as they are saved), float32, bfloat16 or float16.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Completions per forward pass.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Longest prompt + completion, tokens; the rest is cut. (default: no cut)"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew, though --output or parts of it are there.")
    ] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Stay on the CPU though there is an accelerator.")
    ] = False,
) -> None:
    """Compute the reference's log-probs of a data set once, for any number of trainings.

    Stopped at any moment, the same command goes on where it was. Under `torchrun` or `accelerate launch` the
    processes share the work. Data that are in the table already are not scored again.
    """
    from prefloss.cli import _reference

    settings = _reference.ReferenceSettings(
        model=model,
        data=tuple(data),
        output=output,
        tokenizer=tokenizer,
        adapter=adapter,
        revision=revision,
        dtype=dtype,
        batch_size=batch_size,
        max_length=max_length,
        overwrite=overwrite,
        cpu=cpu,
    )
    with shown_without_traceback():
        _reference.reference(settings)
