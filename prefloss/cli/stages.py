"""The two stages of a run that keep their work, warm-up and training: begun, gone on with, stopped or failed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, TrainerState

import prefloss
from prefloss.cli.checkpoints import Diverged, Keeper, Schedule, StopRequest, of_any_process
from prefloss.cli.command_options import TrainOptions
from prefloss.cli.console import CliError, Clock, Screen, Stopped, first_line, loading, print_facts
from prefloss.cli.run_folder import WARM_START, WARM_UP, RunFolder, unwritable
from prefloss.cli.task import Row, Task
from prefloss.cli.trainer import Start
from prefloss.cli.watcher import Watcher
from prefloss.data.tokens import Encoded, encode, pad_id
from prefloss.demo.warm_start import WarmStart
from prefloss.training import distributed

# Steps, rows of a step and learning rate of the warm start: the world's sentences have 20 tokens, and a row of a file
# has some hundreds.
_WARM_UP_ON_WORLD, _WARM_UP_ON_FILE = (600, 32, 5e-3), (200, 8, 2e-3)

# What Python, safetensors and torch raise when a file cannot be written.
_WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


@dataclass(frozen=True)
class Run:
    """What the parts of one run share; `go_on` is the command that resumes it."""

    options: TrainOptions
    loss: prefloss.Loss
    task: Task
    start: Start
    config: Any
    folder: RunFolder
    screen: Screen
    clock: Clock
    schedule: Schedule
    stop: StopRequest
    go_on: str

    @property
    def kept(self) -> str:
        """What there is to go on with, and how."""
        last = self.folder.last_checkpoint() or self.folder.kept(WARM_START) or self.folder.kept(WARM_UP)
        return "nothing was trained yet" if last is None else f"kept in {last}; go on with: {self.go_on}"


@contextmanager
def faults_named(run: Run) -> Iterator[None]:
    """Turn a training that diverged or does not fit into memory into a `CliError` that says what is kept."""
    try:
        yield
    except (Diverged, FloatingPointError) as error:
        last = run.folder.last_checkpoint() or run.folder.kept(WARM_START)
        kept = "nothing was kept" if last is None else f"what was trained before is kept in {last}"
        there = "" if last is None else f", or from what was kept: --model {last}"
        raise CliError(
            f"the training diverged: {error}; {kept}. With the same options it would diverge again: start another run "
            f"in another --output, with a lower --learning-rate{there}"
        ) from error
    except torch.OutOfMemoryError as error:
        if run.options.max_tokens is not None:
            raise CliError(
                f"--max-tokens: {run.options.max_tokens} tokens at once do not fit into memory; try fewer; {run.kept}"
            ) from error
        rows = run.config.per_device_train_batch_size
        raise CliError(
            f"--batch-size: {rows} rows at once do not fit into memory; try fewer, with more --accumulate; {run.kept}"
        ) from error


@contextmanager
def writing(run: Run) -> Iterator[None]:
    """Around everything that writes to the run's folder: a `CliError` if it cannot be written."""
    try:
        yield
    except _WRITE_ERRORS as error:
        raise _unwritable(run, error) from error


def _unwritable(run: Run, error: Exception) -> CliError:
    # Half of a checkpoint would fill the disk for what is to come.
    run.folder.clear()
    return unwritable(run.folder.path, error, f"; {run.kept}")


def warm_up(run: Run) -> float | None:
    """Supervised training of a model with random weights, before it is copied as the reference; returns its loss."""
    options, task, start = run.options, run.task, run.start
    steps, count, rate = _WARM_UP_ON_WORLD if options.data is None else _WARM_UP_ON_FILE
    if options.warm_start is not None:
        steps = options.warm_start
    elif not start.untrained:
        steps = 0
    if steps == 0 or not task.spoken:
        return None
    fact = f"supervised, on {task.spoken_are}: {steps} steps of {count} rows"
    print_facts(run.screen.console, "warm-up", (fact,))
    if run.folder.kept(WARM_START) is not None:
        # A kill may have come between the two.
        run.folder.discard(WARM_UP)
        return _warmed(run)
    if not run.config.use_cpu:
        start.model.to(torch.accelerator.current_accelerator())
    rows, most = task.spoken, steps * count
    rows = rows if len(rows) <= most else random.Random(options.seed).sample(rows, most)
    warming = WarmStart(
        start.model,
        encoded(start.tokenizer, rows),
        padding=pad_id(start.tokenizer),
        steps=steps,
        batch_size=count,
        learning_rate=rate,
        max_length=options.max_length,
        seed=options.seed,
    )
    with run.clock.part("warm-up"):
        loss = _warm(run, warming, steps)
    with run.clock.part("saving"), writing(run), run.schedule.saving():
        if distributed.rank() == 0:
            folder = run.folder.unfinished / WARM_START
            start.model.save_pretrained(folder)
            start.tokenizer.save_pretrained(folder)
            (folder / "warm-up.json").write_text(json.dumps({"loss": loss}), encoding="utf-8")
        run.folder.complete(WARM_START)
        run.folder.discard(WARM_UP)
    # On a GPU, the same steps may differ by rounding: one model for all processes.
    return loss if distributed.rank() == 0 else _warmed(run)


def _warm(run: Run, warming: WarmStart, steps: int) -> float:
    """Take the steps of a warm-up that are left, saving on the way."""
    update = run.screen.stage("warm-up", steps)
    earlier = run.folder.kept(WARM_UP)
    if earlier is not None:
        with loading(f"--resume: {earlier}"):
            warming.load_state_dict(torch.load(earlier, weights_only=True, map_location="cpu"))

    def on_step(step: int, loss: float) -> None:
        update(step, f"{loss:.2f} nats per token")
        save, asked = of_any_process(run.schedule.due(step), run.stop.signal or 0, run.config.device)
        if (save or asked) and step < steps:
            with writing(run), run.schedule.saving():
                _save_warm_up(run, warming)
        if asked:
            raise Stopped(f"after step {step} of {steps} of the warm-up; {run.kept}", asked)

    return warming.run(on_step)


def _save_warm_up(run: Run, warming: WarmStart) -> None:
    """The first process saves; the others wait, for an end of theirs would end it."""
    if distributed.rank() == 0:
        with run.folder.file(WARM_UP) as path:
            torch.save(warming.state_dict(), path)
    distributed.barrier()


def _warmed(run: Run) -> float:
    """Load the model after its warm-up; returns the loss that it had."""
    folder = run.folder.path / WARM_START
    with loading(f"--resume: {folder}"):
        weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        run.start.model.load_state_dict(weights)
        run.start.model.train()
        return json.loads((folder / "warm-up.json").read_text(encoding="utf-8"))["loss"]


def train(run: Run, trainer: Any, watcher: Watcher, keeper: Keeper) -> None:
    """Train from the last checkpoint, or from the beginning, to the end."""
    last = run.folder.last_checkpoint()
    try:
        if last is None:
            _measure_step_zero(trainer, watcher)
            trainer.train()
        else:
            _go_on(trainer, watcher, str(last))
        if keeper.stopped:
            done = f"after step {trainer.state.global_step} of {trainer.state.max_steps}"
            raise Stopped(f"{done}; {run.kept}", keeper.stopped)
        watcher.measure(trainer.state)
    except Diverged:
        with writing(run):
            keeper.save_if_finite(trainer)
        raise
    except CliError:
        raise
    except Exception as error:
        if keeper.saving and isinstance(error, _WRITE_ERRORS):
            raise _unwritable(run, error) from error
        # What the loss itself refuses, such as scores in the wrong order, is in the data or the options.
        refused = str(error).startswith(tuple(term.loss.name for term in run.loss.terms))
        if refused and isinstance(error, FloatingPointError | ValueError):
            raise CliError(f"{error}; {run.kept}") from error
        if last is not None and not keeper.began:
            raise CliError(
                f"--resume: {last} cannot be loaded: {first_line(error)}; remove it to go on from the one before"
            ) from error
        raise


def _go_on(trainer: Any, watcher: Watcher, checkpoint: str) -> None:
    """Train on from a checkpoint; after the last step's, there is nothing left but its weights to load."""
    state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = state
    watcher.restore(state)


def _measure_step_zero(trainer: Any, watcher: Watcher) -> None:
    """Before the first step, policy and reference are one model: every log-ratio is 0."""
    try:
        watcher.measure(trainer.state)
    except Diverged as error:
        raise CliError(
            f"--model: {error}, before any training; expected a model of finite weights"
        ) from error
    first = watcher.measurements[0]
    off = max((abs(v) for v in (first.chosen, first.rejected, first.kl) if v is not None), default=0.0)
    if not off < 1e-3:
        raise CliError(
            f"before the first step, policy and reference differ by {off:.3g} nats per completion, expected 0; "
            "does the model compute otherwise in training than in evaluation, or not depend on its input alone?"
        )


def encoded(tokenizer: Any, rows: list[Row]) -> list[Encoded]:
    """Prompt and completion of rows as token ids."""
    return [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
