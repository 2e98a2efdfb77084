"""What the user asked of `prefloss train`, and the loss that it names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefloss
from prefloss.cli._errors import CliError


@dataclass(frozen=True)
class Settings:
    """The options of `prefloss train`; None where the default depends on the others."""

    loss: str = "dpo"
    params: tuple[str, ...] = ()
    model: str | None = None
    data: Path | None = None
    output: Path | None = None
    overwrite: bool = False
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    accumulate: int = 1
    max_length: int = 512
    eval_fraction: float = 0.1
    samples: int | None = None
    lora_rank: int | None = None
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    warm_start: int | None = None
    seed: int = 0
    cpu: bool = False

    def check(self) -> None:
        """Refuse what no run could do.

        Raises:
            CliError: If an option is out of range, or two contradict each other.
        """
        if not 0 <= self.eval_fraction < 1:
            raise CliError(f"--eval-fraction: expected a number >= 0 and < 1, got {self.eval_fraction}")
        if self.epochs is not None and not self.epochs > 0:
            raise CliError(f"--epochs: expected a number > 0, got {self.epochs}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise CliError(f"--learning-rate: expected a number > 0, got {self.learning_rate}")
        if self.steps is not None and self.epochs is not None:
            raise CliError("--steps and --epochs: expected one of them, got both")
        if self.lora_rank is not None and self.model is None:
            raise CliError(
                "--lora: expected a --model to adapt; the built-in model is small enough to train whole"
            )


def find_loss(settings: Settings) -> prefloss.Loss:
    """The loss that `--loss` and `--param` name.

    Raises:
        CliError: If there is none, or a hyperparameter is wrong; the registry's own words.
    """
    try:
        return prefloss.get(settings.loss, **dict(map(_parameter, settings.params)))
    except (TypeError, ValueError) as error:
        raise CliError(str(error)) from error


def _parameter(text: str) -> tuple[str, Any]:
    """`tau=0.1` -> ("tau", 0.1): numbers, true, false and null are read as such, the rest is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise CliError(f"--param: expected NAME=VALUE, as tau=0.1, got {text!r}")
    value = {"True": "true", "False": "false", "None": "null"}.get(value.strip(), value.strip())
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value
