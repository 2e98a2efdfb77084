"""One of TRL's own trainers, with the loss in it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

import prefloss
from prefloss.cli.console import CliError
from prefloss.cli.models import Start
from prefloss.cli.options import TrainOptions
from prefloss.cli.task import Task
from prefloss.data.tokens import pad_id
from prefloss.feedback import Pairs, columns_of
from prefloss.integrations.trl import FeedbackCollator, PreferenceLossCallback
from prefloss.integrations.trl.options import resolve

_BUILT_IN_RATE, _WHOLE_RATE, _LORA_RATE = 2e-4, 1e-6, 1e-5
_WORLD_STEPS, _MEASUREMENTS = 400, 10


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps; None if epochs decide.
        epochs: Passes over the data; None if steps decide.
        learning_rate: The highest one.
        batch_size: Rows per forward pass.
        on_cpu: Whether to leave an accelerator alone.
        bf16: Whether forward passes compute in bfloat16; weights stay float32.
    """

    steps: int | None
    epochs: float | None
    learning_rate: float
    batch_size: int
    on_cpu: bool
    bf16: bool

    @classmethod
    def of(cls, options: TrainOptions, start: Start) -> Plan:
        """Fill in what the options leave open."""
        small = start.built_in or start.untrained
        steps, epochs = options.steps, options.epochs
        if steps is None and epochs is None:
            steps, epochs = (_WORLD_STEPS, None) if options.data is None else (None, 3.0 if small else 1.0)
        on_cpu = options.cpu or start.built_in or not torch.accelerator.is_available()
        rate = _BUILT_IN_RATE if small else _LORA_RATE if options.lora else _WHOLE_RATE
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return cls(
            steps=steps,
            epochs=epochs,
            learning_rate=options.learning_rate or rate,
            batch_size=options.batch_size or (16 if options.data is None else 8),
            on_cpu=on_cpu,
            bf16=not on_cpu and has_bf16 if options.bf16 is None else options.bf16,
        )

    def __str__(self) -> str:
        """As one sentence."""
        length = f"{self.steps} steps" if self.steps is not None else f"{self.epochs:g} epochs"
        device = "cpu" if self.on_cpu else torch.accelerator.current_accelerator()
        bf16 = " in bfloat16" if self.bf16 else ""
        rate = f"learning rate {self.learning_rate:g} (AdamW, cosine)"
        return f"{length} of {self.batch_size} rows, {rate}, on {device}{bf16}"


def configuration(options: TrainOptions, task: Task, plan: Plan, loss: prefloss.Loss, folder: str) -> Any:
    """TRL's configuration of the run, checked against the loss before anything slow happens.

    Args:
        options: The options.
        task: Rows to train on.
        plan: How long and how fast.
        loss: The preference loss.
        folder: For what the trainer writes.

    Raises:
        CliError: If TRL's trainer cannot give the loss what it needs.
    """
    common: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": -1 if plan.steps is None else plan.steps,
        "num_train_epochs": plan.epochs or 1.0,
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "max_length": options.max_length,
        "gradient_checkpointing": options.gradient_checkpointing,
        "bf16": plan.bf16,
        "use_cpu": plan.on_cpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not plan.on_cpu and torch.cuda.is_available(),
        "seed": options.seed,
        # Weights and scores travel with the batch; TRL would take their columns out.
        "remove_unused_columns": not _feedback_columns(task),
    }
    if task.kind is Pairs:
        config = DPOConfig(**common, use_weighting="per_token.log_sum_sq" in loss.needs)
    elif not loss.reads_mismatched:
        # TRL takes its loss type here as "build mismatched completions or not".
        config = KTOConfig(**common, loss_type="apo_zero_unpaired", train_sampling_strategy="random")
    elif plan.batch_size >= 2:
        config = KTOConfig(**common)
    else:
        raise CliError(
            f"--batch-size: got 1, expected at least 2, because {loss.name} estimates its KL baseline from mismatched "
            "rows of a batch; use --accumulate for less memory, or --param kl_baseline=running_mean"
        )
    if config.n_gpu > 1:
        raise CliError(
            f"{config.n_gpu} GPUs are visible, and prefloss train runs on one: set CUDA_VISIBLE_DEVICES=0, or use "
            "PreferenceLossCallback in a script of your own under accelerate launch"
        )
    try:
        resolve(config, loss)
    except (TypeError, ValueError) as error:
        raise CliError(str(error)) from error
    return config


def build(
    task: Task, start: Start, config: Any, loss: prefloss.Loss, rank: int | None, watcher: TrainerCallback
) -> Any:
    """A trainer that is ready to train.

    Args:
        task: Rows to train on.
        start: Model and tokenizer.
        config: From `configuration`.
        loss: The preference loss.
        rank: Of a LoRA adapter; None trains the whole model.
        watcher: Sees every step.
    """
    paired = task.kind is Pairs
    collator = None
    if _feedback_columns(task):
        inner = DataCollatorForPreference if paired else DataCollatorForUnpairedPreference
        collator = FeedbackCollator(inner(pad_id(start.tokenizer), config.max_length))
    adapter = None if rank is None else _adapter(rank)
    trainer = (DPOTrainer if paired else KTOTrainer)(
        model=start.model,
        ref_model=None if adapter is not None else copy.deepcopy(start.model),
        args=config,
        train_dataset=task.train,
        data_collator=collator,
        processing_class=start.tokenizer,
        peft_config=adapter,
        callbacks=[PreferenceLossCallback(loss), watcher],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def total_steps(trainer: Any) -> int:
    """Optimizer steps that `trainer.train()` will make."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    batches = len(trainer.get_train_dataloader())
    per_epoch = max(1, math.ceil(batches / trainer.args.gradient_accumulation_steps))
    return math.ceil(trainer.args.num_train_epochs * per_epoch)


def _feedback_columns(task: Task) -> set[str]:
    """Columns that only the loss reads."""
    return set(task.train.column_names) - set(columns_of(task.kind))


def _adapter(rank: int) -> Any:
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise CliError("--lora: peft is not installed: pip install 'prefloss[peft]'") from error
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


class Watcher(TrainerCallback):
    """Reports every step, and measures now and then.

    Args:
        on_step: Called with the step and the last training loss.
        measure: Called with the step when it is time to measure.
    """

    def __init__(self, on_step: Callable[[int, float | None], None], measure: Callable[[int], None]) -> None:
        self._on_step, self._measure = on_step, measure
        self.losses: list[tuple[int, float]] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Keep the training loss; the last log, of the whole run, has none."""
        if logs and "loss" in logs:
            self.losses.append((state.global_step, logs["loss"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step; measure at a tenth of the run, two tenths, ..., the end."""
        self._on_step(state.global_step, self.losses[-1][1] if self.losses else None)
        done, total = state.global_step, state.max_steps
        # The step at which another tenth is complete; short runs measure at every step.
        if done * _MEASUREMENTS // total > (done - 1) * _MEASUREMENTS // total:
            self._measure(done)
