"""How a loss gets into a trainer: the callback, and `attach` for those who want no class touched.

transformers hands a callback no trainer. So the first callback made wraps `compute_loss` of TRL's DPOTrainer and
KTOTrainer once per process, and the method that computes references beforehand; each wrapper looks into the trainer's
own list of callbacks, and without a `PreferenceLossCallback` there it calls TRL's method and does nothing else. Nothing
is stored on the trainer: adding the callback switches the loss, removing it gives the trainer its own back. `attach`
puts the same wrappers on one trainer instead.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from transformers.utils import logging
from trl import DPOTrainer, KTOTrainer

from prefloss.diagnosis import Diagnosis, Thresholds, config_of
from prefloss.integrations import _callback
from prefloss.integrations._callback import LossCallback
from prefloss.integrations.trl import _kernel, _options, _own, _step
from prefloss.registry import Loss, get
from prefloss.training.objective import PreferenceObjective

logger = logging.get_logger(__name__)


class PreferenceLossCallback(LossCallback):
    """Train a TRL trainer with a prefloss loss.

    Add it to a `DPOTrainer` (any pair loss; a labelled loss with a KL baseline other than the mismatched estimate)
    or a `KTOTrainer` (any labelled loss), at construction or with `trainer.add_callback`. One callback serves one
    trainer. The trainer's `beta`, `label_smoothing`, `desirable_weight` and `undesirable_weight` are taken over
    where its configuration sets them and the loss has them; any other loss option that it sets is refused.

    Args:
        loss: Name of a registered loss, with hyperparameters if you like (`"ipo(tau=0.1)"`), or a `Loss`.
        kernel: Who turns hidden states into log-probs: "trl" leaves that to TRL; "prefloss" computes them with
            `prefloss.linear_token_logps`, of completion tokens alone, and TRL's metrics with them. References that TRL
            computes beforehand while it builds the trainer are scored likewise if the callback is in it by then.
        diagnose: Whether to watch the training and say what goes wrong, see `prefloss.diagnosis`: `Thresholds`, True
            for the default ones, or False.
        **parameters: Its hyperparameters, if given by name.

    Raises:
        ValueError: If the loss is unknown, a hyperparameter out of range, or there is no such kernel.
        TypeError: If a hyperparameter is unknown or of the wrong type, or parameters accompany a `Loss`.
        RuntimeError: If `kernel` is "prefloss" and this TRL scores completions in an unknown way.
    """

    computes_for = "TRL's"
    _wraps_classes = True

    def __init__(
        self,
        loss: str | Loss,
        *,
        kernel: str = "trl",
        diagnose: Thresholds | Mapping[str, Any] | bool | None = True,
        **parameters: Any,
    ) -> None:
        super().__init__()
        _kernel.check_kernel(kernel)
        if isinstance(loss, Loss):
            if parameters:
                raise TypeError(
                    f"parameters: got {sorted(parameters)} with a Loss, expected them in the Loss"
                )
            # All of a Loss's hyperparameters count as stated.
            parameters = loss.config()
            loss = str(parameters.pop("name"))
        self._name, self._parameters = loss, parameters
        self._loss = get(loss, **parameters)
        self._kernel = kernel
        self._diagnosis = Diagnosis.of(self._loss, diagnose)
        self._inside = self._scored_references = False
        self._objective: PreferenceObjective | None = None
        if self._wraps_classes:
            _install()

    @property
    def loss(self) -> Loss:
        """The loss; once the callback is in a trainer, with what the trainer's configuration sets."""
        return self._loss

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the trainer's configuration against the loss while it is being built."""
        self._bind(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bind if added late, and restore the loss's state from the checkpoint that training resumes from."""
        self._bind(args)
        self._restore(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the loss's schedules on; stop a training that goes around the loss.

        Raises:
            RuntimeError: If an optimizer step was made without it.
        """
        self._check_used()
        self._loss.train().step()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Say what goes wrong in the training."""
        if self._diagnosis is not None and logs and "loss" in logs:
            self._diagnosis.judge(state.global_step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (transformers' `ExportableState`)."""
        config = self._loss.config()
        return {
            "args": {
                "loss": config.pop("name"),
                "kernel": self._kernel,
                "diagnose": config_of(self._diagnosis),
                **config,
            },
            "attributes": {"loss_state": self.loss_state},
        }

    @property
    def _stateful(self) -> Loss:
        return self._loss

    def _bind(self, args: Any) -> None:
        if not self._is_new(args):
            return
        self._loss = _options.resolve(args, self._name, self._parameters)
        if self._diagnosis is not None:
            self._diagnosis.loss = self._loss
        self._args = args
        logger.info(f"prefloss trains this model with {self._loss!r}")

    def _compute(self, trainer: Any, own: Callable[..., Any], inputs: Any, return_outputs: bool) -> Any:
        self._bind(trainer.args)
        if _own.made(inputs):
            self._objective = self._objective or _own.objective(trainer, self._loss, self._diagnosis)
            self._used = True
            loss, returned = _own.compute_loss(trainer, self._objective, inputs)
            return returned if return_outputs else loss
        if self._kernel == "prefloss" and not self._scored_references and _kernel.mixes_kernels(trainer):
            raise ValueError(
                "kernel: got 'prefloss', but the reference log-probs were computed beforehand by TRL's kernel in half "
                "precision; policy and reference would differ by its rounding. Give the callback to the trainer's "
                "constructor, or use kernel='trl'"
            )
        self._used = self._inside = True
        try:
            with _kernel.scoring(self._kernel):
                loss, returned = _step.compute_loss(trainer, self._loss, own, inputs, self._diagnosis)
        finally:
            self._inside = False
        return (loss, returned[1]) if return_outputs else loss

    def __repr__(self) -> str:
        """The callback with its loss."""
        return f"PreferenceLossCallback({self._loss!r})"


def attach(
    trainer: Any,
    loss: str | Loss,
    *,
    kernel: str = "trl",
    diagnose: Thresholds | Mapping[str, Any] | bool | None = True,
    **parameters: Any,
) -> PreferenceLossCallback:
    """Train this trainer with a prefloss loss, from now on.

    Args:
        trainer: A DPOTrainer or KTOTrainer.
        loss: As for `PreferenceLossCallback`.
        kernel: As for `PreferenceLossCallback`; references that the trainer computed beforehand stay as they are.
        diagnose: As for `PreferenceLossCallback`.
        **parameters: As for `PreferenceLossCallback`.

    Returns:
        The callback, now among the trainer's; `detach(trainer)` takes it out.

    Raises:
        TypeError: If the trainer is neither, or overrides `compute_loss`, or the loss takes a kind of feedback that
            it cannot give.
        ValueError: If the trainer's configuration and the loss contradict each other, or the trainer has a loss
            attached already.
        RuntimeError: If `kernel` is "prefloss" and this TRL scores completions in an unknown way.
    """
    callback = _AttachedCallback(loss, kernel=kernel, diagnose=diagnose, **parameters)
    owner = next(item for item in type(trainer).__mro__ if "compute_loss" in item.__dict__)
    if isinstance(trainer, DPOTrainer | KTOTrainer) and owner not in (DPOTrainer, KTOTrainer):
        # Wrapping the instance would go around whatever the override does; the callback sits beneath it.
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
    for name, wrapped in _WRAPPED.items():
        setattr(trainer, name, types.MethodType(wrapped(getattr(type(trainer), name)), trainer))
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
    for name in _WRAPPED:
        trainer.__dict__.pop(name, None)


def attached(trainer: Any) -> PreferenceLossCallback | None:
    """The trainer's `PreferenceLossCallback`, if it has one.

    Raises:
        ValueError: If it has several.
    """
    return _callback.attached(trainer, PreferenceLossCallback)


class _AttachedCallback(PreferenceLossCallback):
    """Made by `attach`, which wraps the method of one trainer and leaves the classes alone."""

    _wraps_classes = False


def _install() -> None:
    for trainer_class in (DPOTrainer, KTOTrainer):
        for name, wrapped in _WRAPPED.items():
            own = getattr(trainer_class, name)
            if not hasattr(own, "_prefloss"):
                setattr(trainer_class, name, wrapped(own))


def _asking_the_callbacks(own: Any) -> Any:
    @functools.wraps(own)
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        def of(batch: Any) -> Any:
            return own(self, model, batch, return_outputs, num_items_in_batch)

        callback = attached(self)
        if callback is None or callback._inside:
            return of(inputs)
        return callback._compute(self, of, inputs, return_outputs)

    compute_loss._prefloss = True  # type: ignore[attr-defined]
    return compute_loss


def _asking_for_the_kernel(own: Any) -> Any:
    def kernel_of(trainer: Any) -> str:
        callback = attached(trainer)
        if callback is None:
            return "trl"
        callback._scored_references = True
        return callback._kernel

    return _kernel.references_by(own, kernel_of)


def _scoring_own_batches(own: Any) -> Any:
    @functools.wraps(own)
    def compute_ref_log_probs(self: Any, model: Any, inputs: Any) -> Any:
        if attached(self) is None or not _own.made(inputs):
            return own(self, model, inputs)
        return _own.reference_sums(self, model, inputs)

    compute_ref_log_probs._prefloss = True  # type: ignore[attr-defined]
    return compute_ref_log_probs


_WRAPPED = {
    "compute_loss": _asking_the_callbacks,
    "compute_ref_log_probs": _scoring_own_batches,
    "_precompute_ref_logps": _asking_for_the_kernel,
}
