"""One training run: model, warm start, trainer, measurements. Loads transformers and TRL."""

from __future__ import annotations

import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from rich.console import Console

import prefloss
from prefloss.cli.command_options import TrainOptions
from prefloss.cli.console import CliError, Clock, Screen, print_facts
from prefloss.cli.report import Result
from prefloss.cli.task import Row, Task
from prefloss.cli.trainer import Start, Watcher, build, configuration, plan_text, start_of
from prefloss.data.rows import KIND_WORDS
from prefloss.data.tokens import Encoded, encode, encode_prompt, pad_id
from prefloss.demo.measure import Measurement, Meter
from prefloss.demo.warm_start import warm_start
from prefloss.diagnosis import resists_falling

# Weights that an earlier run may have left in the output folder.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")

# Steps, rows of a step and learning rate of the warm start: the world's sentences have 20 tokens, and a row of a file
# has some hundreds.
_WARM_UP_ON_WORLD, _WARM_UP_ON_FILE = (600, 32, 5e-3), (200, 8, 2e-3)


@dataclass(frozen=True)
class _Run:
    """What the parts of one run share."""

    options: TrainOptions
    loss: prefloss.Loss
    task: Task
    start: Start
    config: Any
    screen: Screen
    clock: Clock


def run(
    options: TrainOptions, loss: prefloss.Loss, task: Task, folder: Path, console: Console, clock: Clock
) -> Result:
    """Load the model, warm it up, train it, save it; a `CliError` if model, data and loss do not go together."""
    print_facts(console, "loss", (repr(loss),))
    print_facts(console, "data", task.facts, task.warnings)
    start = start_of(options, task)
    print_facts(console, "model", start.facts)
    options = _within_positions(options, start.model, console)
    config = configuration(options, start, task, loss, folder)
    # The built-in model has too little work for two threads.
    with Screen(console) as screen, _threads(1 if options.model is None else torch.get_num_threads()):
        parts = _Run(options, loss, task, start, config, screen, clock)
        warm_loss = _warm_up(parts)
        console.print()
        print_facts(console, "training", (plan_text(config),))
        return _preferences(parts, folder, warm_loss)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warm_up(run: _Run) -> float | None:
    """Supervised training of a model with random weights, before it is copied as the reference."""
    options, task, start, screen = run.options, run.task, run.start, run.screen
    steps, count, rate = _WARM_UP_ON_WORLD if options.data is None else _WARM_UP_ON_FILE
    if options.warm_start is not None:
        steps = options.warm_start
    elif not start.untrained:
        steps = 0
    if steps == 0 or not task.spoken:
        return None
    fact = f"supervised, on {task.spoken_are}: {steps} steps of {count} rows"
    print_facts(screen.console, "warm-up", (fact,))
    if not run.config.use_cpu:
        start.model.to(torch.accelerator.current_accelerator())
    update = screen.stage("warm-up", steps)
    rows, most = task.spoken, steps * count
    rows = rows if len(rows) <= most else random.Random(options.seed).sample(rows, most)
    with run.clock.part("warm-up"):
        return warm_start(
            start.model,
            _encoded(start.tokenizer, rows),
            padding=pad_id(start.tokenizer),
            steps=steps,
            batch_size=count,
            learning_rate=rate,
            max_length=options.max_length,
            seed=options.seed,
            on_step=lambda step, value: update(step, f"{value:.2f} nats per token"),
        )


def _preferences(run: _Run, folder: Path, warm_loss: float | None) -> Result:
    """Train with the preference loss, measuring on the way, and save the model."""
    loss, task, start, clock = run.loss, run.task, run.start, run.clock
    measurements: list[Measurement] = []

    def measure(step: int) -> None:
        with clock.part("measuring"):
            measurements.append(meter(step))
        run.screen.measured(measurements[-1])

    watcher = Watcher(run.screen, loss.name, measure)
    folder.mkdir(parents=True, exist_ok=True)
    with clock.part("training"):
        trainer = build(task, start, run.config, loss, run.options.adapter_rank, watcher)
        _print_cut_rows(run, len(trainer.train_dataset))
        meter = _meter(run, trainer)
        measure(0)
        _check_step_zero(measurements[0])
        try:
            trainer.train()
        except (FloatingPointError, ValueError) as error:
            # What the loss itself refuses, such as scores in the wrong order, is in the data or the options.
            if str(error).startswith(tuple(term.loss.name for term in loss.terms)):
                raise CliError(str(error)) from error
            raise
    with clock.part("saving"):
        # Shards of a larger model, or an adapter, would be loaded together with what is written now.
        for stale in (path for pattern in _WEIGHTS for path in folder.glob(pattern)):
            stale.unlink()
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        start.tokenizer.save_pretrained(folder)
    model = "built-in Llama" if run.options.model is None else run.options.model
    data = "the generated world" if run.options.data is None else run.options.data.name
    setting = (
        f"{model} on {data}, {type(trainer).__name__}, {trainer.state.global_step} steps, "
        f"learning rate {run.config.learning_rate:g}, seed {run.options.seed}"
    )
    return Result(
        loss=repr(loss),
        measurements=measurements,
        losses=watcher.losses,
        ceiling=task.ceiling,
        paired=task.paired,
        held_out=task.held_out,
        holds_chosen=resists_falling(loss),
        setting=setting,
        warm_loss=warm_loss,
        prompts=[prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in task.prompts],
        seconds=clock.seconds,
        about=_about(run, trainer),
    )


def _meter(run: _Run, trainer: Any) -> Meter:
    options, task, tokenizer = run.options, run.task, run.start.tokenizer
    return Meter(
        policy=trainer.model,
        reference=trainer.ref_model,
        tokenizer=tokenizer,
        better=_encoded(tokenizer, task.better),
        worse=_encoded(tokenizer, task.worse),
        paired=task.paired,
        prompts=[encode_prompt(tokenizer, prompt)[-options.max_length :] for prompt in task.prompts],
        reward=task.reward,
        max_new_tokens=32 if task.reward is not None else 64,
        max_length=options.max_length,
        batch_size=256 if options.data is None else 2 * run.config.per_device_train_batch_size,
        seed=options.seed,
        autocast=lambda: torch.autocast(trainer.model.device.type, torch.bfloat16, enabled=run.config.bf16),
    )


def _within_positions(options: TrainOptions, model: Any, console: Console) -> TrainOptions:
    """The options with no sequence longer than the model has positions for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None or options.max_length <= most:
        return options
    print_facts(
        console, "", (), (f"--max-length {options.max_length} cut to the {most} positions of the model",)
    )
    return replace(options, max_length=most)


def _print_cut_rows(run: _Run, kept: int) -> None:
    """Print how many rows TRL left out for their length, and how many prompts lose their end."""
    task, tokenizer, console = run.task, run.start.tokenizer, run.screen.console
    count, max_length = len(task.train), run.options.max_length
    if kept == 0:
        raise CliError(f"--max-length: all {count} rows have a prompt that alone fills {max_length} tokens")
    if kept < count:
        left = f"{count - kept} of {count} rows left out"
        print_facts(console, "", (), (f"{left}: their prompt alone fills --max-length {max_length}",))
    rows = [*task.better, *task.worse][:200]
    # TRL cuts off the end of a prompt that becomes another token when a completion follows.
    merged = sum(
        len(prompt) < len(encode_prompt(tokenizer, row["prompt"]))
        for row, (prompt, _) in zip(rows, _encoded(tokenizer, rows), strict=True)
    )
    if merged:
        advice = "check its chat template" if task.conversational else "end prompts with a line break"
        warning = (
            f"in {merged} of {len(rows)} rows the end of the prompt becomes another token when the completion "
            f"follows, and TRL leaves it out; {advice}"
        )
        print_facts(console, "", (), (warning,))


def _check_step_zero(first: Measurement) -> None:
    """Before the first step, policy and reference are one model: every log-ratio is 0."""
    off = max((abs(v) for v in (first.chosen, first.rejected, first.kl) if v is not None), default=0.0)
    if not off < 1e-3:
        raise CliError(
            f"before the first step, policy and reference differ by {off:.3g} nats per completion, expected 0; "
            "does the model compute otherwise in training than in evaluation, or not depend on its input alone?"
        )


def _encoded(tokenizer: Any, rows: list[Row]) -> list[Encoded]:
    return [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]


def _about(run: _Run, trainer: Any) -> dict[str, Any]:
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
        "facts": [*task.facts, *run.start.facts, plan_text(config)],
        "warnings": list(task.warnings),
        "model": options.model or "built-in",
        "lora_rank": options.adapter_rank,
        "steps": trainer.state.global_step,
        "learning_rate": config.learning_rate,
        "batch_size": config.per_device_train_batch_size,
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
