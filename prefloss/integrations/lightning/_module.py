"""A LightningModule that trains a model of transformers with a preference loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from prefloss.diagnosis import Thresholds
from prefloss.integrations.lightning._callback import PreferenceLossCallback
from prefloss.registry import Loss


class PreferenceModule(LightningModule):
    """Train a causal language model of transformers on preferences, of any feedback.

    `trainer.fit(module, DataLoader(data, batch_size, collate_fn=PreferenceCollator(tokenizer)))` is all there is to
    it. Gradient accumulation, clipping, precision, strategies, validation and checkpoints are the trainer's; see
    `PreferenceLossCallback` for what is exact about them and for the names of the metrics. `module.model` is the model.

    Args:
        model: The policy.
        loss: Name of a registered loss, with hyperparameters if you like (`"ipo(tau=0.1)"`), or a `Loss`.
        reference: A `Reference`, or a model of its own (`Reference.model`). None only for a loss that needs none.
        learning_rate: Of AdamW, if no optimizer is given.
        optimizer: Makes the optimizer from the parameters that are trained.
        scheduler: Makes a learning-rate scheduler from the optimizer; it moves on at each optimizer step.
        check_step_zero: Stop if policy and reference differ at the first training batch.
        pairs: How rankings become pairs for a pair loss: "all", "adjacent" or "best_worst".
        diagnose: Whether to watch the training and say what goes wrong, see `prefloss.diagnosis`: `Thresholds`, True
            for the default ones, or False.
        **hyperparameters: Of the loss, if given by name.

    Raises:
        ValueError: If the loss is unknown, a hyperparameter out of range, or a reference missing.
        TypeError: If a hyperparameter is unknown or of the wrong type, or hyperparameters accompany a `Loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss,
        *,
        reference: Any = None,
        learning_rate: float = 1e-6,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        check_step_zero: bool = True,
        pairs: str | None = None,
        diagnose: Thresholds | Mapping[str, Any] | bool | None = True,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        self.model = model
        # A callback is no module: a reference model in it is neither trained nor saved with this one.
        self.preference = PreferenceLossCallback(
            loss,
            reference=reference,
            check_step_zero=check_step_zero,
            pairs=pairs,
            diagnose=diagnose,
            **hyperparameters,
        )
        self._optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate))
        self._scheduler = scheduler

    def configure_callbacks(self) -> list[Callback]:
        """The loss comes with its callback."""
        return [self.preference]

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler if there is one."""
        optimizer = self._optimizer([value for value in self.parameters() if value.requires_grad])
        if self._scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "step"},
        }

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.preference.training_loss(self.model, batch)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch to the figures of the validation."""
        self.preference.validate(self.model, batch, batch_idx)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """The same for a test."""
        self.preference.validate(self.model, batch, batch_idx)
