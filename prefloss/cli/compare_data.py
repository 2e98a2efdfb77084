"""`prefloss compare` on a user's own data: trainings as `prefloss train` does them, then a report on what they show."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import prefloss
from prefloss.cli.command_options import TrainOptions
from prefloss.cli.compare_options import CompareOptions
from prefloss.cli.comparison_folder import opened, versions
from prefloss.cli.console import Clock, Stopped, quiet
from prefloss.cli.run_folder import taken
from prefloss.cli.task import task_of
from prefloss.evidence import data_report
from prefloss.evidence.report import Origin, table

_SEEDS, _SAMPLES = 3, 4


def compare_on_data(options: CompareOptions, console: Console) -> None:
    """Train every loss on every seed, write the report and print what was seen."""
    losses, seeds = _at_strength(options), options.seeds or _SEEDS
    first = _train_options(options, next(iter(losses.values())), 0, options.output).settings()
    same = {name: value for name, value in first.items() if name not in ("--loss", "--seed")}
    settings = {
        "losses": list(map(repr, losses.values())),
        "--model": options.model,
        "--seeds": seeds,
        **same,
    }
    for loss in losses.values():
        # What a loss cannot learn from is said before the first training.
        task_of(_train_options(options, loss, 0, options.output), loss)
    plan = [(text, seed) for seed in range(seeds) for text in losses]
    with opened(options.output, settings) as folder:
        there = {(run["loss"], run["seed"]) for run in folder.finished}
        for done, (text, seed) in enumerate(plan, 1):
            if (text, seed) not in there:
                console.print(Text(f"\nrun {done} of {len(plan)}: {text}, seed {seed}", style="bold"))
                train_options = _train_options(options, losses[text], seed, folder.path)
                folder.add({"loss": text, "seed": seed, **_trained(train_options, losses[text], console)})
                # The weights of all runs could fill the disk.
                shutil.rmtree(folder.path / "training", ignore_errors=True)
        comparison = data_report.DataComparison(losses, folder.finished)
        origin = Origin(
            command=options.command(),
            versions=versions(),
            data_hash=str(same["content of --data"]),
            budget=f"{seeds} seeds of each loss: rows held out, order, samples. All other options are the same.",
            left_out={},
        )
        texts = {"report.html": data_report.page(comparison, origin), "results.csv": table(comparison.rows)}
        folder.publish(console, comparison.verdict, texts)


def _at_strength(options: CompareOptions) -> dict[str, prefloss.Loss]:
    """The losses, at the strength that --betas names where they have one."""
    bound = options.bound_losses()
    if options.strengths is None:
        return bound
    return {text: options.budget.strengths(loss)[0] for text, loss in bound.items()}


def _train_options(options: CompareOptions, loss: prefloss.Loss, seed: int, folder: Path) -> TrainOptions:
    name = re.sub(r"\W+", "_", repr(loss)).strip("_")[:80]
    return TrainOptions(
        loss=repr(loss),
        model=options.model,
        data=options.data,
        output=folder / "training" / f"{name}-{seed}",
        steps=options.steps,
        seed=seed,
        resume=True,
    )


def _trained(options: TrainOptions, loss: prefloss.Loss, console: Console) -> dict[str, Any]:
    """One training: its figures, and what the model says afterwards."""
    clock = Clock()
    with taken(options.output, "training") as folder:
        folder.admit(options.settings(), resume=True, overwrite=False)
        task = task_of(options, loss)
        from prefloss.cli.training_run import run

        try:
            with quiet(console):
                result = run(options, loss, task, folder, console, clock)
        except Stopped as stop:
            raise Stopped(
                "what is finished is kept; the same command goes on", stop.exit_code - 128
            ) from stop
    after = result.after
    return {
        "beta": loss.beta,
        **{name: getattr(after, name) for name in data_report.FIGURES},
        "held_out": result.held_out,
        "setting": result.setting,
        "prompts": list(result.prompts[:_SAMPLES]),
        "samples": list(after.samples[:_SAMPLES]),
        "seconds": round(clock.seconds.get("training", 0.0), 2),
    }
