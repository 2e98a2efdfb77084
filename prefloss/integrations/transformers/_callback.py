"""The callback: the user's handle on the loss in `transformers.Trainer`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.utils import logging

from prefloss.diagnosis import Thresholds, config_of
from prefloss.integrations._callback import LossCallback
from prefloss.integrations.transformers import _binding
from prefloss.registry import Loss
from prefloss.training import batch, checks
from prefloss.training.objective import PreferenceObjective
from prefloss.training.reference import Reference

logger = logging.get_logger(__name__)


class PreferenceLossCallback(LossCallback):
    """Train `transformers.Trainer` with a prefloss loss, on any feedback.

    Give the trainer `data_collator=PreferenceCollator(tokenizer)` and `remove_unused_columns=False`. Pairs become
    labels for a labelled loss, and groups of two for a listwise one; rankings become pairs as `pairs` says. One
    callback serves one trainer. In TRL's trainers use the callback of `prefloss.integrations.trl`.

    With gradient accumulation and several processes, an optimizer step minimises the mean over all examples of the step
    that the loss counts, however they fall into micro-batches. A loss that looks across its batch (`spec.separable` is
    False, such as `aot`) looks across one micro-batch of all processes.

    `Trainer.evaluate` gives the loss and TRL's metrics (`eval_rewards/accuracies` and others) as means over the whole
    evaluation; `Trainer.predict` gives each completion's log-prob under policy and reference, nats.

    Args:
        loss: Name of a registered loss, with hyperparameters if you like (`"ipo(tau=0.1)"`), or a `Loss`.
        reference: A `Reference`, or a model of its own (`Reference.model`). None only for a loss that needs none.
        check_step_zero: Stop if policy and reference differ at the first batch of a fresh training. False where they
            need not coincide: a policy trained further than its reference, a reference that is another model.
        pairs: How rankings become pairs for a pair loss: "all", "adjacent" or "best_worst".
        diagnose: Whether to watch the training and say what goes wrong, see `prefloss.diagnosis`: `Thresholds`, True
            for the default ones, or False.
        **hyperparameters: Of the loss, if given by name.

    Raises:
        ValueError: If the loss is unknown, a hyperparameter out of range, or a reference missing.
        TypeError: If a hyperparameter is unknown or of the wrong type, or hyperparameters accompany a `Loss`.

    Example:
        >>> PreferenceLossCallback("dpo", beta=0.2, reference=Reference.adapter_off())
        PreferenceLossCallback(dpo(beta=0.2), reference=Reference.adapter_off())
    """

    computes_for = "transformers'"

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
        super().__init__()
        self._objective = PreferenceObjective(
            loss,
            reference=reference,
            check_step_zero=check_step_zero,
            pairs=pairs,
            diagnose=diagnose,
            **hyperparameters,
        )
        self._bound = False
        _binding.install(PreferenceLossCallback)

    @property
    def loss(self) -> Loss:
        """The loss."""
        return self._objective.loss

    @property
    def reference(self) -> Reference:
        """The reference."""
        return self._objective.reference

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the trainer's configuration while it is being built."""
        self._take(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the loss's state from the checkpoint that training resumes from."""
        self._take(args)
        self._restore(state)
        # A resumed policy has left its reference, and so has one that trains a second time.
        self._objective.fresh = self._objective.check_step_zero and not state.global_step and not self._used
        self._objective.forget_metrics()
        # What a diagnosis says names the trainer's steps.
        self._objective.steps = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the loss's schedules on; stop a training that goes around the loss.

        Raises:
            RuntimeError: If an optimizer step was made without it.
        """
        self._check_used()
        self._objective.step()

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Add the figures of `Trainer.predict` to its metrics."""
        self._add_evaluated(metrics)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (transformers' `ExportableState`)."""
        return {
            "args": {
                "loss": repr(self.loss),
                "reference": self.reference.config(),
                "check_step_zero": self._objective.check_step_zero,
                "pairs": self._objective.pairs,
                "diagnose": config_of(self._objective.diagnosis),
            },
            "attributes": {"loss_state": self.loss_state},
        }

    @property
    def _stateful(self) -> PreferenceObjective:
        return self._objective

    def _take(self, args: Any) -> None:
        if not self._is_new(args):
            return
        checks.check_args(args)
        self._args = args
        logger.info(f"prefloss trains this model with {self!r}")
        if args.gradient_accumulation_steps > 1 and batch.looks_across(self.loss):
            warnings.warn(
                f"{self.loss.name}: an example's loss depends on its batch, one micro-batch of "
                f"{args.per_device_train_batch_size} examples on each process; accumulation does not enlarge it",
                UserWarning,
                stacklevel=2,
            )

    def _count(self, samples: Sequence[dict[str, Any]]) -> None:
        # The last fetch of an epoch may be empty.
        if samples:
            self._objective.count(samples)

    def _compute(self, trainer: Any, model: Any, inputs: Any, num_items: Any) -> dict[str, Tensor]:
        self._take(trainer.args)
        if not self._bound:
            checks.check_trainer(trainer)
            self._objective.autocast = trainer.accelerator.autocast
            self._bound = True
        counted = batch.COUNTS in inputs
        result = self._objective(
            model, inputs, examples=None if model.training else unrepeated(trainer, inputs)
        )
        if not model.training:
            return result.outputs
        self._used = True
        # A subclass that fetches its batches without the trainer's own method has not had them counted: then the
        # mean of the micro-batches' means.
        factor = 1.0 if counted else 1 / _micro_batches(trainer)
        if _divides(trainer, num_items):
            factor *= _micro_batches(trainer)
        return {**result.outputs, "loss": result.loss * factor}

    def _add_figures(self, logs: dict[str, float]) -> None:
        """Into what the trainer is about to log; `evaluate` returns the same dictionary."""
        if any(name.endswith("_runtime") and not name.startswith("train") for name in logs):
            self._add_evaluated(logs)
        elif "loss" in logs and self._bound:
            found = self._objective.metrics()
            logs.update({name: value for name, value in found.items() if name != "loss"})

    def _add_evaluated(self, logs: dict[str, float]) -> None:
        prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), None)
        if prefix is not None and self._bound:
            # Its `loss` takes the place of the trainer's, which is a mean of batch means.
            found = self._objective.metrics(training=False)
            logs.update({f"{prefix}_{name}": value for name, value in found.items()})

    def __repr__(self) -> str:
        """The callback with its loss and reference."""
        return f"{type(self).__name__}({self.loss!r}, reference={self.reference!r})"


def unrepeated(trainer: Any, inputs: Any) -> int | None:
    """How many examples of an evaluation batch are this rank's own.

    accelerate fills the last batches up with examples from the start of the data, so that all ranks have as many.
    """
    state = trainer.accelerator.gradient_state
    if trainer.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    count = batch.Structure.split(inputs)[0].examples
    return max(0, min(count, state.remainder - trainer.accelerator.process_index * count))


def _micro_batches(trainer: Any) -> int:
    """How many make this optimizer step; the last of an epoch may have fewer."""
    # Not there before training begins.
    return getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)


def _divides(trainer: Any, num_items: Any) -> bool:
    """Whether the trainer will divide by the number of micro-batches, which the loss is already."""
    stated = getattr(trainer, "loss_is_scaled_for_ga", None)
    return not (trainer.model_accepts_loss_kwargs and num_items is not None if stated is None else stated)
