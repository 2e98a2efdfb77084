"""What a run was, for the title of its picture and for metrics.json."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers
import trl

import prefloss
from prefloss.cli._models import Start
from prefloss.cli._settings import Settings
from prefloss.cli._task import Task
from prefloss.cli._trainer import Plan
from prefloss.data.rows import KIND_WORDS


def setting(settings: Settings, start: Start, plan: Plan, trainer: Any) -> str:
    """Model, data and length in one line."""
    model = "built-in Llama" if start.built_in else settings.model
    data = "the generated world" if settings.data is None else settings.data.name
    return (
        f"{model} on {data}, {type(trainer).__name__}, {trainer.state.global_step} steps, "
        f"learning rate {plan.learning_rate:g}, seed {settings.seed}"
    )


def about(
    settings: Settings,
    loss: prefloss.Loss,
    task: Task,
    start: Start,
    plan: Plan,
    trainer: Any,
) -> dict[str, Any]:
    """Everything needed to repeat the run."""
    return {
        "loss_name": loss.name,
        "loss_parameters": {name: _plain(value) for name, value in loss.params.items()},
        "data": "generated world" if settings.data is None else str(settings.data),
        "data_kind": KIND_WORDS[task.kind],
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
        "bf16": plan.bf16,
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
