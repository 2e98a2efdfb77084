"""prefloss in Lightning, on any feedback.

- `PreferenceModule(model, "dpo", reference=...)`: a LightningModule, for `trainer.fit(module, loader)`.
- `PreferenceLossCallback("dpo", reference=...)`: the same for a LightningModule of your own.

Batches come from a `PreferenceCollator`, models from transformers.
"""

from __future__ import annotations

try:
    import lightning as _lightning  # noqa: F401
except ModuleNotFoundError as error:
    # An import error inside lightning does not mean that lightning is missing.
    if error.name != "lightning":
        raise
    raise ModuleNotFoundError(
        "prefloss.integrations.lightning needs Lightning: pip install 'prefloss[lightning]'", name="lightning"
    ) from error

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from prefloss.arguments import function, instance, real
from prefloss.registry import Loss
from prefloss.training import (
    PreferenceBatch,
    PreferenceObjective,
    Reference,
    TokenBatchSampler,
    distributed,
)
from prefloss.training.batch import COUNTS


class PreferenceLossCallback(Callback):
    """Train a LightningModule of your own with a prefloss loss.

    Its `training_step` returns `callback.training_loss(self.model, batch)`; its `validation_step` calls
    `callback.validate(self.model, batch, batch_idx)`. The callback does the rest: the micro-batches of
    `Trainer(accumulate_grad_batches=...)` add up to the mean over all examples of the optimizer step, on all processes;
    the metrics are logged; the state of the loss is saved in checkpoints and restored. Metrics have the same names in
    every trainer, with `eval_` before those of validation, such as `eval_rewards/accuracies`, and `test_` before those
    of a test.

    Args:
        loss: Name of a registered loss, with hyperparameters if needed (`"ipo(tau=0.1)"`), or a `Loss`.
        **options: `reference`, `check_step_zero`, `rankings_as`, `diagnose` and hyperparameters of the loss, as for
            `PreferenceObjective`.

    Raises:
        ValueError: If the loss is unknown, a hyperparameter out of range, or a reference missing.
        TypeError: If a hyperparameter is unknown or of the wrong type, or hyperparameters accompany a `Loss`.
    """

    def __init__(self, loss: str | Loss, **options: Any) -> None:
        self.objective = PreferenceObjective(loss, **options)
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
            batch: The argument of `training_step`.

        Raises:
            ValueError: If the batch lacks something that the loss needs, or has something that it does not read.
            RuntimeError: If policy and reference should agree and do not.
            FloatingPointError: If the loss of an example is not finite.
        """
        counts = batch.get(COUNTS)
        if counts is not None:
            batch = PreferenceBatch({**batch, COUNTS: distributed.all_sum(counts)})
        result = self.objective(model, batch)
        self._used = True
        module = None if self._trainer is None else self._trainer.lightning_module
        if self._trainer is None or module is None or not module.automatic_optimization:
            return result.loss
        # Lightning divides by this number, even where the last step of an epoch has fewer micro-batches.
        return result.loss * self._trainer.accumulate_grad_batches

    def validate(self, model: nn.Module, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """What `validation_step` and `test_step` call: adds a batch to the metrics and returns its loss.

        Args:
            model: The policy.
            batch: The argument of the step.
            batch_idx: The argument of the step.
        """
        return self.objective(model, batch, examples=self._own_examples(batch, batch_idx)).loss

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the model to training mode, and count the examples of each optimizer step."""
        self._trainer = trainer
        if stage != "fit":
            return
        # from_pretrained returns a model in evaluation mode, and Lightning does not change it.
        pl_module.train()
        process_dataloader = trainer.strategy.process_dataloader

        def process(loader: Any) -> Any:
            processed = process_dataloader(loader)
            if not trainer.training:
                return processed
            by_tokens = isinstance(getattr(processed, "batch_sampler", None), TokenBatchSampler)
            return (TokenStepLoader if by_tokens else StepLoader)(processed, trainer, self._count)

        # The last thing that Lightning does to a loader; restored by teardown.
        trainer.strategy.process_dataloader = process  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the trainer."""
        vars(trainer.strategy).pop("process_dataloader", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or continue from a checkpoint."""
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
            metrics = self.objective.metrics()
            pl_module.log("loss", metrics.pop("loss", float("nan")), prog_bar=True, batch_size=1)
            pl_module.log_dict(metrics, batch_size=1)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the validation."""
        self._log_evaluation(pl_module, "eval", silent=bool(trainer.sanity_checking))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the test."""
        self._log_evaluation(pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the loss's state, such as a running mean."""
        return {"loss": repr(self.loss), "loss_state": self.objective.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.objective.load_state_dict(state_dict["loss_state"])

    def _count(self, batches: list[Any]) -> None:
        # In the loader, batches are not on the device yet.
        self.objective.count(batches, over_processes=False)

    def _log_evaluation(self, pl_module: LightningModule, prefix: str, silent: bool = False) -> None:
        metrics = self.objective.metrics(training=False)
        if not silent:
            pl_module.log_dict({f"{prefix}_{name}": value for name, value in metrics.items()}, batch_size=1)

    def _own_examples(self, batch: Mapping[str, Any], batch_idx: int) -> int | None:
        """Number of this process's own examples in a validation batch; None for all.

        A distributed sampler repeats an example from the start of the data on processes that have one fewer.
        """
        trainer = self._trainer
        if trainer is None:
            return None
        loaders: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        sampler: Any = getattr(loaders, "sampler", None)
        if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
            return None
        remainder = len(sampler.dataset) % sampler.num_replicas  # type: ignore[arg-type]
        if not remainder or sampler.rank < remainder or batch_idx + 1 < len(loaders):
            return None
        return PreferenceBatch.of(batch).examples - 1

    def __repr__(self) -> str:
        """The callback with its loss and reference."""
        return f"{type(self).__name__}({self.loss!r}, reference={self.reference!r})"


class PreferenceModule(LightningModule):
    """Train a causal language model of transformers on preferences, of any feedback.

    Run `trainer.fit(module, DataLoader(data, batch_size, collate_fn=PreferenceCollator(tokenizer)))`. Gradient
    accumulation, clipping, precision, strategies, validation and checkpoints are the trainer's; see
    `PreferenceLossCallback` for how it computes the mean of a step and for the names of the metrics. `module.model` is
    the model.

    Args:
        model: The policy.
        loss: Name of a registered loss, with hyperparameters if needed (`"ipo(tau=0.1)"`), or a `Loss`.
        learning_rate: Of AdamW, if no optimizer is given.
        optimizer: Makes the optimizer from the trainable parameters.
        scheduler: Makes a learning-rate scheduler from the optimizer; it advances at each optimizer step.
        **options: As for `PreferenceLossCallback`.

    Raises:
        ValueError: If the loss is unknown, a hyperparameter out of range, or a reference missing.
        TypeError: If a hyperparameter is unknown or of the wrong type, or hyperparameters accompany a `Loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss,
        *,
        learning_rate: float = 1e-6,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = instance(
            "model", model, nn.Module, "the policy: a causal language model of transformers"
        )
        real("learning_rate", learning_rate, above=0)
        for name, value in (("optimizer", optimizer), ("scheduler", scheduler)):
            if value is not None:
                function(name, value, "a function that makes one")
        # A callback is not a module, so its reference model is neither trained nor saved with this one.
        self.preference = PreferenceLossCallback(loss, **options)
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
        """Add a batch to the metrics of the validation."""
        self.preference.validate(self.model, batch, batch_idx)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch to the metrics of the test."""
        self.preference.validate(self.model, batch, batch_idx)


class StepLoader:
    """A loader that counts the batches of each optimizer step before it hands out the first.

    Lightning hands out one batch at a time, but the mean over an optimizer step must be known when its first batch is
    used. So the loader reads ahead by the number of accumulated batches.

    Args:
        loader: The loader to read; its attributes are available here, so that Lightning finds the sampler.
        trainer: Gives the batches of a step and of an epoch.
        count: Called with the batches of each step.
    """

    def __init__(self, loader: Any, trainer: Any, count: Callable[[list[Any]], None]) -> None:
        self._loader = loader
        self._trainer = trainer
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        batches = itertools.islice(iter(self._loader), self._remaining())
        # Read at each step: a callback may change it.
        while step := list(itertools.islice(batches, self._trainer.accumulate_grad_batches)):
            self._count(step)
            yield from step

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling look up attributes before `_loader` is set.
        if name.startswith("__") or "_loader" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._loader, name)

    def _remaining(self) -> int | None:
        """Batches left in the epoch: the trainer may limit them, or resume within an epoch."""
        limit = self._trainer.limit_train_batches
        try:
            most = limit if isinstance(limit, int) else int(len(self) * limit)
        except TypeError:
            return None
        return max(0, most - self._used())

    def _used(self) -> int:
        """Batches of the epoch that the trainer has used."""
        return self._trainer.fit_loop.epoch_loop.batch_progress.current.ready


class TokenStepLoader(StepLoader):
    """The same for batches by tokens: a training that is resumed within an epoch goes on with the batches left."""

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps in a checkpoint."""
        return self._loader.batch_sampler.state_dict(self._used())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were used; a `ValueError` if the batches are others."""
        self._loader.batch_sampler.load_state_dict(state)
