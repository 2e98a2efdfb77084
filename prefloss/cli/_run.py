"""One training run: model, warm start, trainer, measurements. Loads transformers and TRL."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import prefloss
from prefloss.cli import _models, _output, _trainer
from prefloss.cli._about import about, setting
from prefloss.cli._clock import Clock
from prefloss.cli._errors import CliError
from prefloss.cli._facts import tell, tell_dropped, tell_merged
from prefloss.cli._live import Screen
from prefloss.cli._report import Result
from prefloss.cli._settings import Settings
from prefloss.cli._task import Row, Task
from prefloss.data.tokens import Encoded, encode, encode_prompt, pad_id
from prefloss.demo.measure import Measurement, Meter
from prefloss.demo.warm_start import warm_start
from prefloss.registry import WeightedSum as Composite


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
    tell(console, "loss", (repr(loss),))
    tell(console, "data", task.facts, task.warnings)
    start = _models.start(settings, task)
    tell(console, "model", start.facts)
    settings = _within_positions(settings, start.model, console)
    plan = _trainer.plan(settings, start)
    config = _trainer.configure(settings, task, plan, loss, str(folder))
    with Screen(console) as screen, _threads(1 if start.built_in else None):
        warm_loss = _warm(settings, task, start, plan, screen, clock)
        screen.say("")
        tell(console, "training", (plan.words,))
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
        tell_dropped(screen.console, len(task.train), len(trainer.train_dataset), settings.max_length)
        tell_merged(screen.console, start.tokenizer, task)
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
        setting=setting(settings, start, plan, trainer),
        prompts=[_as_text(prompt) for prompt in task.prompts],
        seconds=clock.seconds,
        about=about(settings, loss, task, start, plan, trainer),
    )


def _train(trainer: Any, loss: prefloss.Loss) -> None:
    try:
        trainer.train()
    except (FloatingPointError, ValueError) as error:
        # What the loss itself refuses, such as scores in the wrong order, is in the data or the options.
        terms = [term for _, term in loss.terms] if isinstance(loss, Composite) else [loss]
        if str(error).startswith(tuple(term.name for term in terms)):
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
    tell(screen.console, "warm-up", (f"supervised, on {task.spoken_are}: {steps} steps of {how.rows} rows",))
    if not plan.on_cpu:
        start.model.to(torch.accelerator.current_accelerator())
    update = screen.stage("warm-up", steps)
    rows = _encoded(start.tokenizer, _some(task.spoken, steps * how.rows, settings.seed))
    with clock.part("warm-up"):
        return warm_start(
            start.model,
            rows,
            padding=pad_id(start.tokenizer),
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
        autocast=lambda: torch.autocast(trainer.model.device.type, torch.bfloat16, enabled=plan.bf16),
    )


def _within_positions(settings: Settings, model: Any, console: Console) -> Settings:
    """No sequence longer than the model has positions for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None or settings.max_length <= most:
        return settings
    tell(console, "", (), (f"--max-length {settings.max_length} cut to the {most} positions of the model",))
    return dataclasses.replace(settings, max_length=most)


def _check_start(found: Measurement) -> None:
    """Before the first step, policy and reference are one model: every log-ratio is 0."""
    off = max((abs(v) for v in (found.chosen, found.rejected, found.kl) if v is not None), default=0.0)
    if not off < 1e-3:
        raise CliError(
            f"before the first step, policy and reference differ by {off:.3g} nats per completion, expected 0; "
            "does the model compute otherwise in training than in evaluation, or not depend on its input alone?"
        )


def _encoded(tokenizer: Any, rows: list[Row]) -> list[Encoded]:
    return [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]


def _some(rows: list[Row], most: int, seed: int) -> list[Row]:
    return rows if len(rows) <= most else random.Random(seed).sample(rows, most)


def _as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
