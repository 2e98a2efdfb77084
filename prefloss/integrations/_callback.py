"""What the callbacks of TRL's trainers and of `transformers.Trainer` share: one trainer each, a loss with a state."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback


class LossCallback(TrainerCallback, ExportableState):
    """A callback that trains its trainer with a loss.

    Attributes:
        computes_for: Whose `compute_loss` a subclass of the trainer must call.
    """

    computes_for = "its parent's"

    def __init__(self) -> None:
        self._args: Any = None
        self._used = False

    @property
    def loss_state(self) -> dict[str, Any]:
        """State of the loss, such as a running mean; empty for a stateless one."""
        return self._stateful.state_dict()

    @loss_state.setter
    def loss_state(self, state: dict[str, Any]) -> None:
        self._stateful.load_state_dict(state)

    @property
    def _stateful(self) -> Any:
        """What keeps the state."""
        raise NotImplementedError

    def _restore(self, state: Any) -> None:
        """Take the loss's state from the checkpoint that training resumes from."""
        saved = state.stateful_callbacks.get(type(self).__name__) if state.stateful_callbacks else None
        if isinstance(saved, dict) and state.global_step:
            self.loss_state = saved["attributes"]["loss_state"]

    def _is_new(self, args: Any) -> bool:
        """Whether these are the arguments of a trainer that the callback has not seen.

        Raises:
            RuntimeError: If it is in another one.
        """
        if self._args is not None and args is not self._args:
            raise RuntimeError(f"{self!r} is in another trainer already; make one callback for each")
        return self._args is None

    def _check_used(self) -> None:
        """Stop a training that goes around the loss.

        Raises:
            RuntimeError: If an optimizer step was made without it.
        """
        if not self._used:
            raise RuntimeError(
                f"{self!r} was not used in a training step: the trainer's class overrides compute_loss without calling "
                f"{self.computes_for}; call super().compute_loss there"
            )


def attached(trainer: Any, kind: type) -> Any:
    """The trainer's callback of a class, or None.

    Raises:
        ValueError: If it has several.
    """
    found = [item for item in trainer.callback_handler.callbacks if isinstance(item, kind)]
    if len(found) > 1:
        raise ValueError(f"callbacks: got {found!r}, expected one PreferenceLossCallback")
    return found[0] if found else None
