"""The callback: the loss of a batch, and all that goes with it between batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from prefloss.diagnosis import Thresholds
from prefloss.integrations.lightning._loader import StepLoader
from prefloss.registry import Loss
from prefloss.training import batch as _batch
from prefloss.training import distributed
from prefloss.training.objective import PreferenceObjective
from prefloss.training.reference import Reference


class PreferenceLossCallback(Callback):
    """Train a LightningModule of your own with a prefloss loss.

    Its `training_step` returns `callback.training_loss(self.model, batch)`, its `validation_step` calls
    `callback.validate(self.model, batch, batch_idx)`. The callback does the rest: the micro-batches of
    `Trainer(accumulate_grad_batches=...)` add up to the mean over all examples of the optimizer step, on all processes;
    the metrics are logged; the state of the loss goes into checkpoints and comes back. Metrics have the names that they
    have in the transformers integration, with `eval_` before
    those of validation, such as `eval_rewards/accuracies`, and `test_` before those of a test.

    Args:
        loss: Name of a registered loss, with hyperparameters if you like (`"ipo(tau=0.1)"`), or a `Loss`.
        reference: A `Reference`, or a model of its own (`Reference.model`). None only for a loss that needs none.
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
        loss: str | Loss,
        *,
        reference: Any = None,
        check_step_zero: bool = True,
        pairs: str | None = None,
        diagnose: Thresholds | Mapping[str, Any] | bool | None = True,
        **hyperparameters: Any,
    ) -> None:
        self.objective = PreferenceObjective(
            loss,
            reference=reference,
            check_step_zero=check_step_zero,
            pairs=pairs,
            diagnose=diagnose,
            **hyperparameters,
        )
        self._trainer: Trainer | None = None
        self._steps = 0
        self._used = False

    @property
    def loss(self) -> Loss:
        """The loss."""
        return self.objective.loss

    @property
    def reference(self) -> Reference:
        """The reference."""
        return self.objective.reference

    def training_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """What `training_step` returns.

        Args:
            model: The policy.
            batch: As `training_step` got it.

        Raises:
            ValueError: If the batch lacks something that the loss needs, or has something that it does not read.
            RuntimeError: If policy and reference should coincide and do not.
            FloatingPointError: If the loss of an example is not finite.
        """
        counted = batch.get(_batch.COUNTS)
        if counted is not None:
            batch = {**batch, _batch.COUNTS: distributed.all_sum(counted)}
        result = self.objective(model, batch)
        self._used = True
        module = None if self._trainer is None else self._trainer.lightning_module
        if self._trainer is None or module is None or not module.automatic_optimization:
            return result.loss
        # Lightning will divide by as many, whatever the last step of an epoch has.
        return result.loss * self._trainer.accumulate_grad_batches

    def validate(self, model: nn.Module, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """What `validation_step` and `test_step` call: adds a batch to the figures; its own loss comes back.

        Args:
            model: The policy.
            batch: As the step got it.
            batch_idx: Likewise.
        """
        return self.objective(model, batch, examples=self._unrepeated(batch, batch_idx)).loss

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the model to training mode, and have the training batches counted."""
        self._trainer = trainer
        if stage != "fit":
            return
        # from_pretrained leaves a model in evaluation mode, and Lightning leaves it as it is.
        pl_module.train()
        own = trainer.strategy.process_dataloader

        def process(loader: Any) -> Any:
            found = own(loader)
            return StepLoader(found, trainer, self._count) if trainer.training else found

        # The last that Lightning does to a loader; until teardown.
        trainer.strategy.process_dataloader = process  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        vars(trainer.strategy).pop("process_dataloader", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on from a checkpoint."""
        # Again, for a model that configure_model has made since.
        pl_module.train()
        self._steps = trainer.global_step
        # A resumed policy has left its reference, and so has one that trains a second time.
        self.objective.fresh = self.objective.check_step_zero and not self._steps and not self._used
        self.objective.forget_metrics()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: move the loss's schedules on, and log.

        Raises:
            RuntimeError: If the step was made without the loss.
        """
        if trainer.global_step == self._steps:
            return
        if not self._used:
            raise RuntimeError(
                f"{self!r} was not used: training_step has to return callback.training_loss(self.model, batch)"
            )
        self._steps = trainer.global_step
        self.objective.step()
        if self._steps % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            found = self.objective.metrics()
            pl_module.log("loss", found.pop("loss", float("nan")), prog_bar=True, batch_size=1)
            pl_module.log_dict(found, batch_size=1)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures of the validation."""
        found = self.objective.metrics(training=False)
        if not trainer.sanity_checking:
            pl_module.log_dict({f"eval_{name}": value for name, value in found.items()}, batch_size=1)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures of the test."""
        found = self.objective.metrics(training=False)
        pl_module.log_dict({f"test_{name}": value for name, value in found.items()}, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the loss's state, such as a running mean."""
        return {"loss": repr(self.loss), "loss_state": self.objective.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.objective.load_state_dict(state_dict["loss_state"])

    def _count(self, batches: list[Any]) -> None:
        # In the loader, where batches are not on the device yet.
        self.objective.count(batches, over_processes=False)

    def _unrepeated(self, batch: Mapping[str, Any], batch_idx: int) -> int | None:
        """How many examples of a validation batch are this rank's own; None for all.

        A distributed sampler gives the ranks that have one example fewer another one from the start of the data.
        """
        trainer = self._trainer
        loaders = (
            None
            if trainer is None
            else trainer.test_dataloaders
            if trainer.testing
            else trainer.val_dataloaders
        )
        sampler = getattr(loaders, "sampler", None)
        if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
            return None
        whole = len(sampler.dataset) % sampler.num_replicas  # type: ignore[arg-type]
        if not whole or sampler.rank < whole or batch_idx + 1 < len(loaders):  # type: ignore[arg-type]
            return None
        return _batch.Structure.split(batch)[0].examples - 1

    def __repr__(self) -> str:
        """The callback with its loss and reference."""
        return f"{type(self).__name__}({self.loss!r}, reference={self.reference!r})"
