"""How a loss gets into a TRL trainer: the callback, and `attach` for a single trainer.

transformers hands a callback no trainer. So the first callback wraps methods of TRL's DPOTrainer and KTOTrainer, once
per process. Each wrapper looks for a `PreferenceLossCallback` in the trainer's list of callbacks; without one it
only calls TRL's method. Nothing is stored on the trainer: adding the callback switches the loss, removing it restores
TRL's. `attach` puts the same wrappers on one trainer and leaves the classes alone.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from prefloss.integrations import binding
from prefloss.integrations.binding import (
    LossCallback,
    evaluation_prefix,
    own_examples,
    replaced,
    wrap_method,
)
from prefloss.integrations.trl import kernel as kernels
from prefloss.integrations.trl import options
from prefloss.integrations.trl.capture import capture, loss_settings
from prefloss.integrations.trl.seams import recorder_of
from prefloss.integrations.trl.versions import DPOTrainer, KTOTrainer, check_in_place
from prefloss.registry import Loss
from prefloss.training import FeedbackObjective, PreferenceBatch, PreferenceObjective, Reference, batch_logps

logger = logging.get_logger(__name__)


class PreferenceLossCallback(LossCallback):
    """Train a TRL trainer with a prefloss loss.

    Add it to a `DPOTrainer` (any loss of pairs; a loss of labels with a KL baseline other than the mismatched estimate)
    or a `KTOTrainer` (any loss of labels), at construction or with `trainer.add_callback`. One callback serves one
    trainer. Where the trainer's configuration sets `beta`, `label_smoothing`, `desirable_weight` or
    `undesirable_weight` and the loss has them, the loss takes them over; any other loss option that it sets is refused.

    Args:
        loss: Name of a registered loss, with hyperparameters if needed (`"ipo(tau=0.1)"`), or a `Loss`.
        kernel: "trl" leaves log-probs to TRL; "prefloss" computes them from hidden states with
            `prefloss.linear_token_logps`, for completion tokens only, with TRL's metrics. That includes references
            which TRL computes while it builds the trainer, if the callback is in it by then.
        diagnose: Watch the training and warn when it goes wrong, see `prefloss.diagnosis`: `Thresholds`, True for the
            default ones, or False.
        **hyperparameters: Of the loss, if given by name.

    Raises:
        ValueError: If the loss or the kernel is unknown, or a hyperparameter out of range.
        TypeError: If a hyperparameter is unknown or of the wrong type, or hyperparameters accompany a `Loss`.
        RuntimeError: If `kernel` is "prefloss" and this TRL scores completions in an unknown way.
    """

    compute_loss_of = "TRL's"
    _wraps_classes = True

    def __init__(
        self, loss: str | Loss, *, kernel: str = "trl", diagnose: Any = True, **hyperparameters: Any
    ) -> None:
        kernels.check_kernel(kernel)
        super().__init__(FeedbackObjective(loss, diagnose=diagnose, **hyperparameters))
        self._kernel = kernel
        self._inside = self._scored_references = False
        if self._wraps_classes:
            for trainer_class in (DPOTrainer, KTOTrainer):
                for name, wrapper in _wrappers(trainer_class).items():
                    wrap_method(trainer_class, name, wrapper)

    def _settings(self) -> dict[str, Any]:
        return {"loss": repr(self.loss), "kernel": self._kernel, **super()._settings()}

    def resolve(self, args: Any) -> Loss:
        """The loss with what the trainer's configuration sets; for a trainer with options of its own, override this."""
        return options.resolve(args, self.loss)

    def _check_args(self, args: Any) -> None:
        check_in_place()
        self.objective.replace_loss(self.resolve(args))
        logger.info(f"prefloss trains this model with {self.loss!r}")

    def _compute(self, trainer: Any, compute_loss: Callable[..., Any], batch: Any, outputs: bool) -> Any:
        """TRL's `compute_loss` with our loss; `compute_loss` is TRL's own as a function of the batch."""
        self._bind(trainer.args)
        if PreferenceBatch.recognizes(batch):
            self._used = True
            loss, returned = self._compute_own(trainer, batch)
            return (loss, returned) if outputs else loss
        if not self._scored_references:
            self._check_references(trainer)
        self._used = self._inside = True
        try:
            with kernels.scoring(self._kernel):
                captured = capture(trainer, self.loss, compute_loss, batch)
        finally:
            self._inside = False
        # TRL logs what is returned as a mean over processes, in evaluation too, hence a share of the whole step.
        training = trainer.model.training
        loss = self.objective.share(captured.feedback, training=training, router=captured.router)
        return (loss, captured.returned[1]) if outputs else loss

    def _check_references(self, trainer: Any) -> None:
        """Refuse references that the trainer computed before it had the callback, and that do not fit."""
        if self._kernel == "prefloss" and kernels.mixes_kernels(trainer):
            raise ValueError(
                "kernel: got 'prefloss', but the reference log-probs were computed beforehand by TRL's kernel in half "
                "precision; policy and reference would differ by its rounding. Give the callback to the trainer's "
                "constructor, or use kernel='trl'"
            )
        older = hasattr(trainer, "get_batch_loss_metrics")
        if not (older and getattr(trainer.args, "precompute_ref_log_probs", False)):
            return
        named = trainer.args.loss_type
        if "ipo" in ([named] if isinstance(named, str) else named):
            raise ValueError(
                f"{type(trainer.args).__name__}.loss_type: got {named!r}, for which this TRL computed "
                "means of the reference log-probs beforehand, expected sums; give the callback to the trainer's "
                "constructor"
            )

    def _compute_own(self, trainer: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The loss of a batch of `PreferenceCollator`, and outputs whose `logits` are its log-probs, [pairs, 2].

        TRL reads padded rows only, so prefloss runs the forward passes too, with the trainer's model and reference.
        """
        if not isinstance(self.objective, PreferenceObjective):
            self.objective = _objective_of(trainer, self.objective)
        examples = None if trainer.model.training else own_examples(trainer, batch)
        result = self.objective(trainer.model_wrapped, batch, examples=examples)
        return result.loss, SimpleNamespace(logits=result.outputs["logps"])

    def _add_metrics(self, trainer: Any, logs: dict[str, float]) -> None:
        """Add our metrics to what the trainer logs; TRL's own values win where names are the same."""
        training = trainer.model.training
        if self._args is None or (training and "loss" not in logs):
            return
        prefix = "" if training else f"{evaluation_prefix(logs) or 'eval'}_"
        metrics = self.objective.metrics(training=training)
        logs.update({f"{prefix}{name}": value for name, value in metrics.items() if name != "loss"})

    def __repr__(self) -> str:
        """The callback with its loss."""
        return f"PreferenceLossCallback({self.loss!r})"


def attach(trainer: Any, loss: str | Loss, **settings: Any) -> PreferenceLossCallback:
    """Train this trainer with a prefloss loss, from now on.

    Args:
        trainer: A DPOTrainer or KTOTrainer.
        loss: As for `PreferenceLossCallback`.
        **settings: `kernel`, `diagnose` and hyperparameters, as for `PreferenceLossCallback`. References that the
            trainer computed beforehand stay as they are.

    Returns:
        The callback, now among the trainer's; `detach(trainer)` removes it.

    Raises:
        TypeError: If the trainer is neither, or overrides `compute_loss`, or the loss takes a kind of feedback that
            it cannot give.
        ValueError: If the trainer's configuration and the loss contradict each other, or the trainer has a loss
            attached already.
        RuntimeError: If `kernel` is "prefloss" and this TRL scores completions in an unknown way.
    """
    callback = _AttachedCallback(loss, **settings)
    options.config_class(getattr(trainer, "args", None))
    owner = next(item for item in type(trainer).__mro__ if "compute_loss" in item.__dict__)
    if owner not in (DPOTrainer, KTOTrainer):
        # Wrapping the instance would bypass the override; the callback's wrapper sits beneath it.
        raise TypeError(
            f"trainer: got {type(trainer).__name__}, whose compute_loss is overridden in {owner.__name__}; add a "
            "PreferenceLossCallback instead"
        )
    if attached(trainer) is not None:
        raise ValueError(
            f"trainer: got one with {attached(trainer)!r}, expected one without; detach(trainer) first"
        )
    callback._bind(trainer.args)
    trainer.add_callback(callback)
    for name, wrapper in _wrappers(type(trainer)).items():
        method = getattr(type(trainer), name)
        setattr(trainer, name, types.MethodType(functools.wraps(method)(wrapper(method)), trainer))
    return callback


def detach(trainer: Any) -> None:
    """Give a trainer its own loss back.

    Raises:
        ValueError: If it has no prefloss loss.
    """
    callback = attached(trainer)
    if callback is None:
        raise ValueError("trainer: got one without a prefloss loss, expected one with")
    trainer.remove_callback(callback)
    for name in _WRAPPERS:
        trainer.__dict__.pop(name, None)


def attached(trainer: Any) -> PreferenceLossCallback | None:
    """The trainer's `PreferenceLossCallback`, if it has one.

    Raises:
        ValueError: If it has several.
    """
    return binding.attached(trainer, PreferenceLossCallback)


class _AttachedCallback(PreferenceLossCallback):
    """Made by `attach`, which wraps the methods of one trainer and leaves the classes alone."""

    _wraps_classes = False


def _objective_of(trainer: Any, objective: FeedbackObjective) -> PreferenceObjective:
    """The same loss and diagnosis on batches of `PreferenceCollator`, with the trainer's reference.

    Raises:
        TypeError: If the trainer is a KTOTrainer.
    """
    if isinstance(trainer, KTOTrainer):
        raise TypeError(
            "data_collator: got PreferenceCollator in a KTOTrainer, expected TRL's own, which builds the mismatched "
            "completions; or train with transformers.Trainer and prefloss.integrations.transformers"
        )
    on_batches = PreferenceObjective(
        objective.loss,
        reference=Reference.cached() if trainer.args.precompute_ref_log_probs else _reference(trainer),
        check_step_zero=False,
        autocast=trainer.accelerator.autocast,
        diagnose=False,
    )
    on_batches.diagnosis, on_batches.steps = objective.diagnosis, objective.steps
    return on_batches


def _reference(trainer: Any) -> Reference:
    """The reference that TRL computes: a model, an adapter named "ref", or adapters off; none before precomputing."""
    if trainer.ref_model is not None:
        return Reference.model(trainer.ref_model)
    policy = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if not hasattr(policy, "peft_config"):
        return Reference.none()
    return Reference.adapter("ref") if "ref" in policy.peft_config else Reference.adapter_off()


def _computing(method: Any) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        def own(batch: Any) -> Any:
            return method(self, model, batch, return_outputs, num_items_in_batch)

        callback = attached(self)
        if callback is None or callback._inside:
            return own(inputs)
        return callback._compute(self, own, inputs, return_outputs)

    return compute_loss


def _predicting(method: Any) -> Any:
    """Trainers up to TRL 0.28 evaluate without `compute_loss`, and return (loss, logits, labels)."""

    def prediction_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        callback = attached(self)
        if callback is None or callback._inside:
            return method(self, model, inputs, *args, **kwargs)
        rest: list[Any] = [None, None]

        def own(batch: Any) -> Any:
            loss, *rest[:] = method(self, model, batch, *args, **kwargs)
            return loss

        with torch.no_grad():
            loss = callback._compute(self, own, self._prepare_inputs(inputs), False)
        return (loss.detach(), *rest)

    return prediction_step


def _logging(method: Any) -> Any:
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        callback = attached(self)
        if callback is not None:
            callback._add_metrics(self, logs)
        return method(self, logs, *args, **kwargs)

    return log


def _precomputing(method: Any) -> Any:
    def kernel_of(trainer: Any) -> str:
        callback = attached(trainer)
        if callback is None:
            return "trl"
        callback._scored_references = True
        return callback._kernel

    return kernels.references_by(method, kernel_of)


def _scoring_references(method: Any) -> Any:
    def compute_ref_log_probs(self: Any, *args: Any) -> Any:
        callback, inputs = attached(self), args[-1]
        if callback is None:
            return method(self, *args)
        if PreferenceBatch.recognizes(inputs):
            # Up to TRL 1.8 the model is not among the arguments.
            return _reference_sums(self, args[0] if len(args) == 2 else self.ref_model or self.model, inputs)
        if not hasattr(self, "get_batch_loss_metrics"):
            return method(self, *args)
        # Up to TRL 0.28, DPOTrainer divides these by the length for "ipo", as it does the policy's.
        callback._scored_references = True
        with replaced(self, loss_settings(self, callback.loss)):
            return method(self, *args)

    return compute_ref_log_probs


def _reference_sums(trainer: Any, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Reference log-probs of chosen and rejected completions of a `PreferenceCollator`'s batch, [pairs] each, nats."""
    batch, reference = PreferenceBatch.of(inputs), _reference(trainer)
    reference.bind(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
    logps = reference.logps(model, batch, trainer.accelerator.autocast)
    if logps is None:
        # Without a reference model, TRL scores with the policy before it trains.
        with torch.no_grad():
            logps = batch_logps(model, batch.rows).logps
    return tuple(logps.sum(-1).chunk(2))


_WRAPPERS: Mapping[str, Callable[[Any], Any]] = {
    "compute_loss": _computing,
    "prediction_step": _predicting,
    "compute_ref_log_probs": _scoring_references,
    "_precompute_ref_logps": _precomputing,
    "log": _logging,
}


def _wrappers(trainer: type) -> dict[str, Callable[[Any], Any]]:
    """Those of the methods that a class of trainers has, and that do not lead to each other.

    Raises:
        RuntimeError: If prefloss does not know how it computes its loss.
    """
    recorder_of(trainer)
    alone = hasattr(trainer, "get_batch_loss_metrics")
    return {
        name: wrapper
        for name, wrapper in _WRAPPERS.items()
        if hasattr(trainer, name) and (alone or name != "prediction_step")
    }
