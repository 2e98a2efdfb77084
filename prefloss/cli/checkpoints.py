"""When a run saves and when it stops: by steps or minutes, at its end, and at Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from prefloss.cli.run_folder import RunFolder
from prefloss.training import distributed


class Schedule:
    """When to save: every so many steps, or so often that a kill loses at most so many minutes."""

    def __init__(self, steps: int | None, minutes: float) -> None:
        self._steps, self._seconds = steps, 60 * minutes
        # Start of the work that is not saved, end of the last step, and how long the last save took.
        self._since = self._asked = time.monotonic()
        self._saving = 0.0

    def due(self, step: int, more: float = 0.0) -> bool:
        """Whether to save after this step; `more` is the seconds until the next one begins."""
        now = time.monotonic()
        last, self._asked = now - self._asked, now
        if self._steps is not None:
            return step % self._steps == 0
        # Skip this save only if a kill during the next step or its save would lose no more than is allowed.
        return now - self._since + more + last + self._saving >= self._seconds

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around every save."""
        began = time.monotonic()
        yield
        self.saved(began)

    def saved(self, began: float) -> None:
        """Note that what was reached at this time is saved now."""
        self._since, self._asked = began, time.monotonic()
        self._saving = self._asked - began


class StopRequest:
    """Ctrl-C or SIGTERM: noted, so that the run can save first; a second Ctrl-C raises KeyboardInterrupt.

    Attributes:
        signal: Number of the signal; None so far.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Note signals while the block runs. Only the main thread hears any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes a Ctrl-C on as SIGTERM, so that one does not count as a second.
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


class Diverged(Exception):
    """A loss, gradient, weight or log-prob is not finite; the message says which, and after which step."""


class Keeper(TrainerCallback):
    """Tells the trainer when to save and when to stop, and moves its complete checkpoints to their place.

    Attributes:
        began: Whether the trainer has loaded its checkpoint and trains.
        saving: Whether a save is under way.
        stopped: Number of the signal that stopped the training before its last step, or None.
    """

    def __init__(
        self, folder: RunFolder, keep: int, schedule: Schedule, stop: StopRequest, watcher: Any
    ) -> None:
        self._folder, self._keep, self._schedule, self._stop = folder, keep, schedule, stop
        self._watcher = watcher
        self._save_began = 0.0
        self.began = self.saving = False
        self.stopped: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the trainer has loaded all that it needs, the random states last."""
        self.began = True

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Refuse gradients that would make the weights NaN, before they do.

        Raises:
            Diverged: If there are any.
        """
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise Diverged(f"the gradient of step {state.global_step + 1} has the norm {norm.item()}")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Ask for a save if it is time, at the last step, and before a stop.

        Raises:
            Diverged: If the weights to save are not finite.
        """
        last = state.global_step >= state.max_steps
        due = self._schedule.due(state.global_step, self._watcher.seconds_after(state))
        save, asked = of_any_process(due or last, self._stop.signal or 0, args.device)
        if asked and not last:
            self.stopped = asked
            control.should_training_stop = True
        if save or self.stopped:
            self._begin_save(state, model)
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the checkpoint that the trainer wrote its place, and remove old ones."""
        self._end_save(state)
        self._folder.prune(self._keep)

    def save_if_finite(self, trainer: Any) -> None:
        """After a step that diverged: save what the trainer has, if that is new and finite."""
        state, last = trainer.state, self._folder.last_checkpoint()
        if not state.global_step or (last is not None and last.name == f"checkpoint-{state.global_step}"):
            return
        with contextlib.suppress(Diverged):
            self._begin_save(state, trainer.model)
            trainer._save_checkpoint(trainer.model_wrapped, None)
            # Nothing is removed: the steps before may be of more use.
            self._end_save(state)

    def _begin_save(self, state: Any, model: Any) -> None:
        if not all(bool(torch.isfinite(value).all()) for value in model.parameters()):
            raise Diverged(f"after step {state.global_step} the weights are not finite")
        self._save_began, self.saving = time.monotonic(), True

    def _end_save(self, state: Any) -> None:
        self._folder.complete(f"checkpoint-{state.global_step}")
        self._schedule.saved(self._save_began)
        self.saving = False


def of_any_process(save: bool, stop: int, device: Any) -> tuple[bool, int]:
    """What one process decided, for all: they save and stop at the same step."""
    if distributed.size() == 1:
        return save, stop
    decided = torch.tensor([float(save), float(stop)], device=device)
    torch.distributed.all_reduce(decided, torch.distributed.ReduceOp.MAX)
    return bool(decided[0]), int(decided[1])
