"""One training run: model, warm start, trainer, measurements. Loads transformers and TRL."""

from __future__ import annotations

import dataclasses
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table
from rich.text import Text

import prefloss
from prefloss.cli import _models, _output, _trainer
from prefloss.cli._clock import Clock
from prefloss.cli._errors import CliError
from prefloss.cli._live import Screen
from prefloss.cli._report import Result
from prefloss.cli._settings import Settings
from prefloss.cli._task import Row, Task
from prefloss.data._tokens import Encoded, encode, encode_prompt
from prefloss.demo.measure import Measurement, Meter
from prefloss.demo.warm_start import warm_start


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """Length, batch and learning rate of the supervised warm start."""

    steps: int
    rows: int
    learning_rate: float


# The world's sentences have 20 tokens; a row of people's data has some hundreds.
ON_WORLD, ON_DATA = WarmUp(600, 32, 5e-3), WarmUp(200, 8, 2e-3)


def run(
    settings: Settings, loss: prefloss.Loss, task: Task, folder: Path, console: Console, clock: Clock
) -> Result:
    """Train as asked and save the model.

    Raises:
        CliError: If model, data and loss do not go together.
    """
    _tell(console, "loss", (repr(loss),))
    _tell(console, "data", task.facts, task.warnings)
    start = _models.start(settings, task)
    _tell(console, "model", start.facts)
    settings = _within_positions(settings, start.model, console)
    plan = _trainer.plan(settings, start)
    config = _trainer.configure(settings, task, plan, loss, str(folder))
    with Screen(console) as screen, _threads(1 if start.built_in else None):
        warm_loss = _warm(settings, task, start, plan, screen, clock)
        screen.say("")
        _tell(console, "training", (plan.words,))
        result = _preferences(settings, loss, task, start, plan, config, folder, screen, clock)
    return dataclasses.replace(result, warm_loss=warm_loss)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch on this many threads. A tiny model has little to share out: on busy cores, two threads only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _preferences(
    settings: Settings,
    loss: prefloss.Loss,
    task: Task,
    start: _models.Start,
    plan: _trainer.Plan,
    config: Any,
    folder: Path,
    screen: Screen,
    clock: Clock,
) -> Result:
    """Train with the preference loss, measuring on the way."""
    measured: list[Measurement] = []
    bars: list[Any] = []

    def measure(step: int) -> None:
        with clock.part("measuring"):
            measured.append(meter(step))
        screen.measured(measured[-1])

    def on_step(step: int, value: float | None) -> None:
        bars[0](step, "" if value is None else f"loss {value:.3f}")

    watcher = _trainer.Watcher(on_step, measure)
    folder.mkdir(parents=True, exist_ok=True)
    with clock.part("training"):
        trainer = _trainer.build(task, start, config, loss, settings.lora_rank, watcher)
        _tell_dropped(screen.console, len(task.train), len(trainer.train_dataset), settings.max_length)
        _tell_merged(screen.console, start.tokenizer, task)
        meter = _meter(settings, task, start, plan, trainer)
        measure(0)
        _check_start(measured[0])
        bars.append(screen.stage(loss.name, _trainer.total_steps(trainer)))
        _train(trainer, loss)
    with clock.part("saving"):
        _output.save(folder, trainer.accelerator.unwrap_model(trainer.model), start.tokenizer)
    return Result(
        loss=repr(loss),
        measurements=measured,
        losses=watcher.losses,
        ceiling=task.ceiling,
        paired=task.paired,
        held_out=task.held_out,
        warm_loss=None,
        setting=_setting(settings, start, plan, trainer),
        prompts=[_as_text(prompt) for prompt in task.prompts],
        seconds=clock.seconds,
        about=_about(settings, loss, task, start, plan, trainer),
    )


def _train(trainer: Any, loss: prefloss.Loss) -> None:
    try:
        trainer.train()
    except (FloatingPointError, ValueError) as error:
        # What the loss itself refuses, such as scores in the wrong order, is in the data or the options.
        if str(error).startswith(loss.name):
            raise CliError(str(error)) from error
        raise


def _warm(
    settings: Settings, task: Task, start: _models.Start, plan: _trainer.Plan, screen: Screen, clock: Clock
) -> float | None:
    """Teach a model with random weights to speak, before it is copied as the reference."""
    how = ON_WORLD if settings.data is None else ON_DATA
    steps = settings.warm_start
    if steps is None:
        steps = how.steps if start.untrained else 0
    if steps == 0 or not task.spoken:
        return None
    _tell(screen.console, "warm-up", (f"supervised, on {task.spoken_are}: {steps} steps of {how.rows} rows",))
    if not plan.on_cpu:
        start.model.to(torch.accelerator.current_accelerator())
    update = screen.stage("warm-up", steps)
    rows = _encoded(start.tokenizer, _some(task.spoken, steps * how.rows, settings.seed))
    with clock.part("warm-up"):
        return warm_start(
            start.model,
            rows,
            pad_id=start.tokenizer.pad_token_id or start.tokenizer.eos_token_id,
            steps=steps,
            batch_size=how.rows,
            learning_rate=how.learning_rate,
            max_length=settings.max_length,
            seed=settings.seed,
            on_step=lambda step, value: update(step, f"{value:.2f} nats per token"),
        )


def _meter(settings: Settings, task: Task, start: _models.Start, plan: _trainer.Plan, trainer: Any) -> Meter:
    prompts = [encode_prompt(start.tokenizer, prompt)[-settings.max_length :] for prompt in task.prompts]
    return Meter(
        policy=trainer.model,
        reference=trainer.ref_model,
        tokenizer=start.tokenizer,
        better=_encoded(start.tokenizer, task.better),
        worse=_encoded(start.tokenizer, task.worse),
        paired=task.paired,
        prompts=prompts,
        reward=task.reward,
        max_new_tokens=32 if task.reward is not None else 64,
        max_length=settings.max_length,
        batch_size=256 if settings.data is None else 2 * plan.batch_size,
        seed=settings.seed,
    )


def _within_positions(settings: Settings, model: Any, console: Console) -> Settings:
    """No sequence longer than the model has positions for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None or settings.max_length <= most:
        return settings
    _tell(console, "", (), (f"--max-length {settings.max_length} cut to the {most} positions of the model",))
    return dataclasses.replace(settings, max_length=most)


def _check_start(found: Measurement) -> None:
    """Before the first step, policy and reference are one model: every log-ratio is 0."""
    off = max((abs(v) for v in (found.chosen, found.rejected, found.kl) if v is not None), default=0.0)
    if not off < 1e-3:
        raise CliError(
            f"before the first step, policy and reference differ by {off:.3g} nats per completion, expected 0; "
            "does the model compute otherwise in training than in evaluation, or not depend on its input alone?"
        )


def _tell_dropped(console: Console, given: int, kept: int, max_length: int) -> None:
    if kept == 0:
        raise CliError(f"--max-length: all {given} rows have a prompt that alone fills {max_length} tokens")
    if kept < given:
        message = (
            f"{given - kept} of {given} rows left out: their prompt alone fills --max-length {max_length}"
        )
        _tell(console, "", (), (message,))


def _tell_merged(console: Console, tokenizer: Any, task: Task) -> None:
    """TRL cuts the end of a prompt whose last token changes when a completion follows."""
    rows = [*task.better, *task.worse][:200]
    merged = sum(
        len(encode(tokenizer, row["prompt"], row["completion"])[0])
        < len(encode_prompt(tokenizer, row["prompt"]))
        for row in rows
    )
    if merged:
        advice = "check its chat template" if task.conversational else "end prompts with a line break"
        message = (
            f"in {merged} of {len(rows)} rows the end of the prompt becomes another token when the completion "
            f"follows, and TRL leaves it out; {advice}"
        )
        _tell(console, "", (), (message,))


def _tell(console: Console, name: str, facts: tuple[str, ...], warnings: tuple[str, ...] = ()) -> None:
    lines = [(fact, "") for fact in facts] + [(warning, "yellow") for warning in warnings]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="cyan", width=8, no_wrap=True)
    grid.add_column()
    for i, (line, style) in enumerate(lines):
        grid.add_row(name if i == 0 else "", Text(line, style=style))
    console.print(grid)


def _encoded(tokenizer: Any, rows: list[Row]) -> list[Encoded]:
    return [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]


def _some(rows: list[Row], most: int, seed: int) -> list[Row]:
    return rows if len(rows) <= most else random.Random(seed).sample(rows, most)


def _as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _setting(settings: Settings, start: _models.Start, plan: _trainer.Plan, trainer: Any) -> str:
    model = "built-in Llama" if start.built_in else settings.model
    data = "the generated world" if settings.data is None else settings.data.name
    return (
        f"{model} on {data}, {type(trainer).__name__}, {trainer.state.global_step} steps, "
        f"learning rate {plan.learning_rate:g}, seed {settings.seed}"
    )


def _about(
    settings: Settings,
    loss: prefloss.Loss,
    task: Task,
    start: _models.Start,
    plan: _trainer.Plan,
    trainer: Any,
) -> dict[str, Any]:
    return {
        "loss_name": loss.name,
        "loss_parameters": {name: _plain(value) for name, value in loss.params.items()},
        "data": "generated world" if settings.data is None else str(settings.data),
        "data_kind": task.kind.value,
        "training_rows": len(trainer.train_dataset),
        "facts": [*task.facts, *start.facts, plan.words],
        "warnings": list(task.warnings),
        "model": settings.model or "built-in",
        "lora_rank": settings.lora_rank,
        "steps": trainer.state.global_step,
        "learning_rate": plan.learning_rate,
        "batch_size": plan.batch_size,
        "accumulate": settings.accumulate,
        "max_length": settings.max_length,
        "seed": settings.seed,
        "versions": {
            "prefloss": prefloss.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else repr(value)
