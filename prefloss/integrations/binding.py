"""What the callbacks of TRL's trainers and of `transformers.Trainer` share: a loss bound to one trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback

from prefloss.diagnosis import config_of
from prefloss.registry import Loss
from prefloss.training import PreferenceBatch
from prefloss.training.step import FeedbackObjective


class LossCallback(TrainerCallback, ExportableState):
    """A callback that trains its trainer with a loss.

    Attributes:
        objective: The loss in training.
        compute_loss_of: Whose `compute_loss` a subclass of the trainer must call.
    """

    compute_loss_of = "its parent's"

    def __init__(self, objective: FeedbackObjective) -> None:
        self.objective = objective
        self._args: Any = None
        # True once a training batch went through the loss.
        self._used = False

    @property
    def loss(self) -> Loss:
        """The loss; once the callback is in a trainer, with what the trainer's configuration sets."""
        return self.objective.loss

    @property
    def loss_state(self) -> dict[str, Any]:
        """State of the loss, such as a running mean; empty for a stateless one."""
        return self.objective.state_dict()

    @loss_state.setter
    def loss_state(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the trainer's configuration while it is being built."""
        self._bind(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bind if added late, and restore the loss's state from the checkpoint that training resumes from."""
        self._bind(args)
        saved = state.stateful_callbacks.get(type(self).__name__) if state.stateful_callbacks else None
        if isinstance(saved, dict) and state.global_step:
            self.loss_state = saved["attributes"]["loss_state"]
        self.objective.forget_metrics()
        # Warnings of the diagnosis name the trainer's steps.
        self.objective.steps = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the loss's schedules on; stop a training that bypasses the loss.

        Raises:
            RuntimeError: If an optimizer step was made without it.
        """
        if not self._used:
            raise RuntimeError(
                f"{self!r} was not used in a training step: the trainer's class overrides compute_loss without calling "
                f"{self.compute_loss_of}; call super().compute_loss there"
            )
        self.objective.step()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (transformers' `ExportableState`)."""
        return {"args": self._settings(), "attributes": {"loss_state": self.loss_state}}

    def _settings(self) -> dict[str, Any]:
        """Arguments that build the callback again."""
        return {"diagnose": config_of(self.objective.diagnosis)}

    def _bind(self, args: Any) -> None:
        """Bind the callback to the trainer with these arguments; later calls do nothing.

        Raises:
            RuntimeError: If it is in another trainer.
        """
        if self._args is None:
            self._check_args(args)
            self._args = args
        elif args is not self._args:
            raise RuntimeError(f"{self!r} is in another trainer already; make one callback for each")

    def _check_args(self, args: Any) -> None:
        """Check the trainer's configuration against the loss."""
        raise NotImplementedError


def attached(trainer: Any, kind: type) -> Any:
    """The trainer's callback of a class, or None.

    Raises:
        TypeError: If it is no trainer.
        ValueError: If it has several.
    """
    handler = getattr(trainer, "callback_handler", None)
    if handler is None:
        raise TypeError(f"trainer: got {type(trainer).__name__}, expected a trainer of transformers or TRL")
    callbacks = [item for item in handler.callbacks if isinstance(item, kind)]
    if len(callbacks) > 1:
        raise ValueError(f"callbacks: got {callbacks!r}, expected one PreferenceLossCallback")
    return callbacks[0] if callbacks else None


def evaluation_prefix(logs: Mapping[str, Any]) -> str | None:
    """`eval` or `test` if these are the logs of an evaluation, which state a runtime; else None."""
    names = (name.removesuffix("_runtime") for name in logs if name.endswith("_runtime"))
    return next((name for name in names if name != "train"), None)


def own_examples(trainer: Any, batch: Mapping[str, Any]) -> int | None:
    """Number of this process's own examples in an evaluation batch; None for all.

    accelerate fills the last batches up with examples from the start of the data, so that all processes have as many.
    """
    state = trainer.accelerator.gradient_state
    if trainer.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    count = PreferenceBatch.of(batch).examples
    return max(0, min(count, state.remainder - trainer.accelerator.process_index * count))


def wrap_method(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a method of a class by `wrapper(method)`, once.

    Args:
        owner: The class.
        name: Name of the method.
        wrapper: Method -> method.
    """
    method = getattr(owner, name)
    if not hasattr(method, "_prefloss"):
        wrapped: Any = functools.wraps(method)(wrapper(method))
        wrapped._prefloss = True
        setattr(owner, name, wrapped)


@contextmanager
def replaced(owner: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Temporarily set attributes of `owner`; on exit, restore them, or remove what it inherited."""
    before = {name: getattr(owner, name) for name in settings}
    inherited = {name for name in settings if name not in vars(owner)}
    try:
        for name, value in settings.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            if name in inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
