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
from prefloss.cli._errors import CliError
from prefloss.cli._models import Start
from prefloss.cli._settings import Settings
from prefloss.cli._task import Task
from prefloss.data.tokens import pad_id
from prefloss.feedback import Pairs, columns_of
from prefloss.integrations.trl import FeedbackCollator, PreferenceLossCallback, resolve, wants_mismatched
from prefloss.losses import Composite

BUILT_IN_RATE, WHOLE_RATE, LORA_RATE = 2e-4, 1e-6, 1e-5
DEMO_STEPS, MEASUREMENTS = 400, 10


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

    @property
    def words(self) -> str:
        """As one sentence."""
        length = f"{self.steps} steps" if self.steps is not None else f"{self.epochs:g} epochs"
        device = "cpu" if self.on_cpu else torch.accelerator.current_accelerator()
        bf16 = " in bfloat16" if self.bf16 else ""
        rate = f"learning rate {self.learning_rate:g} (AdamW, cosine)"
        return f"{length} of {self.batch_size} rows, {rate}, on {device}{bf16}"


def plan(settings: Settings, start: Start) -> Plan:
    """Fill in what the options leave open."""
    small = start.built_in or start.untrained
    steps, epochs = settings.steps, settings.epochs
    if steps is None and epochs is None:
        if settings.data is None:
            steps = DEMO_STEPS
        else:
            epochs = 3.0 if small else 1.0
    on_cpu = settings.cpu or start.built_in or not torch.accelerator.is_available()
    rate = BUILT_IN_RATE if small else WHOLE_RATE if settings.lora_rank is None else LORA_RATE
    return Plan(
        steps=steps,
        epochs=epochs,
        learning_rate=settings.learning_rate or rate,
        batch_size=settings.batch_size or (16 if settings.data is None else 8),
        on_cpu=on_cpu,
        bf16=not on_cpu and _has_bf16() if settings.bf16 is None else settings.bf16,
    )


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def configure(settings: Settings, task: Task, plan: Plan, loss: prefloss.Loss, folder: str) -> Any:
    """TRL's configuration of the run, checked against the loss before anything slow happens.

    Args:
        settings: The options.
        task: Rows to train on.
        plan: How long and how fast.
        loss: The preference loss.
        folder: For what the trainer writes.

    Raises:
        CliError: If TRL's trainer cannot give the loss what it needs.
    """
    on_cuda = not plan.on_cpu and torch.cuda.is_available()
    common: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": -1 if plan.steps is None else plan.steps,
        "num_train_epochs": plan.epochs or 1.0,
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "max_length": settings.max_length,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "bf16": plan.bf16,
        "use_cpu": plan.on_cpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_cuda,
        "seed": settings.seed,
        # Weights and scores travel with the batch; TRL would take their columns out.
        "remove_unused_columns": not _travellers(task),
    }
    if task.kind is Pairs:
        config = DPOConfig(**common, use_weighting="per_token.log_sum_sq" in loss.needs)
    else:
        config = _kto_config(common, loss, plan)
    if config.n_gpu > 1:
        raise CliError(
            f"{config.n_gpu} GPUs are visible, and prefloss train runs on one: set CUDA_VISIBLE_DEVICES=0, or use "
            "PreferenceLossCallback in a script of your own under accelerate launch"
        )
    try:
        resolve(config, repr(loss) if isinstance(loss, Composite) else loss.name, dict(loss.params))
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
        config: From `configure`.
        loss: The preference loss.
        rank: Of a LoRA adapter; None trains the whole model.
        watcher: Sees every step.
    """
    paired = task.kind is Pairs
    collator = None
    if _travellers(task):
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


def _travellers(task: Task) -> set[str]:
    """Columns that only the loss reads."""
    return set(task.train.column_names) - set(columns_of(task.kind))


def total_steps(trainer: Any) -> int:
    """Optimizer steps that `trainer.train()` will make."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    batches = len(trainer.get_train_dataloader())
    per_epoch = max(1, math.ceil(batches / trainer.args.gradient_accumulation_steps))
    return math.ceil(trainer.args.num_train_epochs * per_epoch)


def _kto_config(common: dict[str, Any], loss: prefloss.Loss, plan: Plan) -> KTOConfig:
    # TRL takes its loss type here as "build mismatched completions or not".
    if not wants_mismatched(loss):
        return KTOConfig(**common, loss_type="apo_zero_unpaired", train_sampling_strategy="random")
    if plan.batch_size < 2:
        raise CliError(
            f"--batch-size: {loss.name} estimates its KL baseline from mismatched rows of a batch, so it needs at "
            "least 2, got 1; use --accumulate for less memory, or --param kl_baseline=running_mean"
        )
    return KTOConfig(**common)


def _adapter(rank: int) -> Any:
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise CliError("--lora: peft is not installed: pip install 'prefloss[peft]'") from error
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


class Watcher(TrainerCallback):
    """Tells the screen about every step, and measures now and then.

    Args:
        on_step: Called with the step and the mean training loss since the last call.
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
        """Advance the bar; measure at a tenth of the run, two tenths, ..., the end."""
        self._on_step(state.global_step, self.losses[-1][1] if self.losses else None)
        done, total = state.global_step, state.max_steps
        # The step at which another tenth is complete; short runs measure at every step.
        if done * MEASUREMENTS // total > (done - 1) * MEASUREMENTS // total:
            self._measure(done)
