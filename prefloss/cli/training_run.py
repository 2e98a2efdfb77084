"""One training run: model, warm start, trainer, measurements. Loads transformers and TRL."""

from __future__ import annotations

import contextlib
import platform
from dataclasses import replace
from typing import Any

import torch
import transformers
import trl
from rich.console import Console

import prefloss
from prefloss.cli.checkpoints import Keeper, Schedule, StopRequest
from prefloss.cli.command_options import TrainOptions
from prefloss.cli.console import CliError, Clock, Screen, print_facts
from prefloss.cli.processes import together
from prefloss.cli.report import Result, write_metrics, write_picture
from prefloss.cli.run_folder import RunFolder, unwritable
from prefloss.cli.stages import Run, encoded, faults_named, train, warm_up, writing
from prefloss.cli.task import Task
from prefloss.cli.trainer import build, configuration, plan_text, start_of
from prefloss.cli.watcher import Watcher
from prefloss.data.rows import KIND_WORDS
from prefloss.data.tokens import encode_prompt
from prefloss.demo.measure import Measurement, Meter
from prefloss.diagnosis import resists_falling
from prefloss.training import distributed
from prefloss.training.head import text_config


def run(
    options: TrainOptions, loss: prefloss.Loss, task: Task, folder: RunFolder, console: Console, clock: Clock
) -> Result:
    """Load the model, warm it up, train it, save it; a `CliError` if model, data and loss do not go together."""
    print_facts(console, "loss", (repr(loss),))
    print_facts(console, "data", task.facts, task.warnings)
    with together():
        start = start_of(options, task)
    print_facts(console, "model", start.facts)
    go_on = options.to_go_on(folder.path)
    options = _within_positions(options, start.model, console)
    with together():
        try:
            config = configuration(options, start, task, loss, folder.unfinished)
            folder.begin(start.settings)
        except OSError as error:
            raise unwritable(folder.path, error) from error
    stop, schedule = StopRequest(), Schedule(options.save_steps, options.save_minutes or 1.0)
    with Screen(console) as screen, stop.heard(), contextlib.ExitStack() as at_end:
        at_end.callback(torch.set_num_threads, torch.get_num_threads())
        if options.model is None:
            # The built-in model has too little work for two threads.
            torch.set_num_threads(1)
        parts = Run(options, loss, task, start, config, folder, screen, clock, schedule, stop, go_on)
        _check_a_row_fits(parts)
        with faults_named(parts):
            warm_loss = warm_up(parts)
            console.print()
            print_facts(console, "training", (plan_text(config, options.max_tokens),))
            return _preferences(parts, warm_loss)


def _preferences(run: Run, warm_loss: float | None) -> Result:
    """Train with the preference loss, measuring on the way, and save the model, the numbers and the picture."""
    task, start, clock, folder = run.task, run.start, run.clock, run.folder

    def measure(step: int) -> Measurement:
        with clock.part("measuring"):
            return meter(step)

    watcher = Watcher(run.screen, run.loss.name, measure)
    keeper = Keeper(folder, run.options.keep, run.schedule, run.stop, watcher)
    with clock.part("training"):
        trainer = build(task, start, run.config, run.loss, run.options, (watcher, keeper))
        _print_cut_rows(run, len(trainer.train_dataset))
        meter = _meter(run, trainer)
        train(run, trainer, watcher, keeper)
    with clock.part("saving"), writing(run):
        output = folder.unfinished / "output"
        if distributed.rank() == 0:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(output)
            start.tokenizer.save_pretrained(output)
    result = _result(run, trainer, watcher, warm_loss)
    with clock.part("report"), writing(run):
        if distributed.rank() == 0:
            write_metrics(result, output / "metrics.json")
            write_picture(result, output / "curves.png")
            folder.prune(run.options.keep)
            folder.finish(output.name)
    return result


def _result(run: Run, trainer: Any, watcher: Watcher, warm_loss: float | None) -> Result:
    task = run.task
    model = "built-in Llama" if run.options.model is None else run.options.model
    data = "the generated world" if run.options.data is None else run.options.data.name
    setting = (
        f"{model} on {data}, {type(trainer).__name__}, {trainer.state.global_step} steps, "
        f"learning rate {run.config.learning_rate:g}, seed {run.options.seed}"
    )
    return Result(
        loss=repr(run.loss),
        measurements=watcher.measurements,
        losses=watcher.losses,
        ceiling=task.ceiling,
        paired=task.paired,
        held_out=task.held_out,
        holds_chosen=resists_falling(run.loss),
        setting=setting,
        warm_loss=warm_loss,
        prompts=[prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in task.prompts],
        seconds=run.clock.seconds,
        about=_about(run, trainer),
    )


def _meter(run: Run, trainer: Any) -> Meter:
    options, task, tokenizer = run.options, run.task, run.start.tokenizer
    return Meter(
        policy=trainer.model,
        reference=trainer.ref_model,
        tokenizer=tokenizer,
        better=encoded(tokenizer, task.better),
        worse=encoded(tokenizer, task.worse),
        paired=task.paired,
        prompts=[encode_prompt(tokenizer, prompt)[-options.max_length :] for prompt in task.prompts],
        reward=task.reward,
        max_new_tokens=32 if task.reward is not None else 64,
        max_length=options.max_length,
        batch_size=256 if options.data is None else 2 * run.config.per_device_train_batch_size,
        seed=options.seed,
        beta=run.loss.beta,
        autocast=lambda: torch.autocast(trainer.model.device.type, torch.bfloat16, enabled=run.config.bf16),
    )


def _within_positions(options: TrainOptions, model: Any, console: Console) -> TrainOptions:
    """The options with no sequence longer than the model has positions for."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    if most is None or options.max_length <= most:
        return options
    print_facts(
        console, "", (), (f"--max-length {options.max_length} cut to the {most} positions of the model",)
    )
    return replace(options, max_length=most)


def _check_a_row_fits(run: Run) -> None:
    """Refuse a length that no prompt is shorter than, before the warm-up: TRL would leave all rows out."""
    most = run.options.max_length
    prompts = (row["prompt"] for row in run.task.train)
    if not any(len(encode_prompt(run.start.tokenizer, prompt)) < most for prompt in prompts):
        raise _no_row_fits(run)


def _no_row_fits(run: Run) -> CliError:
    count, most = len(run.task.train), run.options.max_length
    return CliError(f"--max-length: all {count} rows have a prompt that alone fills {most} tokens")


def _print_cut_rows(run: Run, kept: int) -> None:
    """Print how many rows TRL left out for their length, and how many prompts lose their end."""
    task, tokenizer, console = run.task, run.start.tokenizer, run.screen.console
    count, max_length = len(task.train), run.options.max_length
    if kept == 0:
        raise _no_row_fits(run)
    if kept < count:
        left = f"{count - kept} of {count} rows left out"
        print_facts(console, "", (), (f"{left}: their prompt alone fills --max-length {max_length}",))
    rows = [*task.better, *task.worse][:200]
    # TRL cuts off the end of a prompt that becomes another token when a completion follows.
    merged = sum(
        len(prompt) < len(encode_prompt(tokenizer, row["prompt"]))
        for row, (prompt, _) in zip(rows, encoded(tokenizer, rows), strict=True)
    )
    if merged:
        advice = "check its chat template" if task.conversational else "end prompts with a line break"
        warning = (
            f"in {merged} of {len(rows)} rows the end of the prompt becomes another token when the completion "
            f"follows, and TRL leaves it out; {advice}"
        )
        print_facts(console, "", (), (warning,))


def _about(run: Run, trainer: Any) -> dict[str, Any]:
    """Everything needed to repeat the run."""
    options, task, config = run.options, run.task, run.config
    plain = (str, int, float, bool, type(None))
    return {
        "loss_name": run.loss.name,
        "loss_parameters": {
            name: value if isinstance(value, plain) else repr(value)
            for name, value in run.loss.params.items()
        },
        "data": "generated world" if options.data is None else str(options.data),
        "data_kind": KIND_WORDS[run.loss.spec.feedback],
        "training_rows": len(trainer.train_dataset),
        "facts": [*task.facts, *run.start.facts, plan_text(config, options.max_tokens)],
        "warnings": list(task.warnings),
        "model": options.model or "built-in",
        "lora_rank": options.adapter_rank,
        "steps": trainer.state.global_step,
        "learning_rate": config.learning_rate,
        "batch_size": config.per_device_train_batch_size if options.max_tokens is None else None,
        "max_tokens": options.max_tokens,
        "accumulate": options.accumulate,
        "max_length": options.max_length,
        "bf16": config.bf16,
        "seed": options.seed,
        "versions": {
            "prefloss": prefloss.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }
