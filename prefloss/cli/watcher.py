"""What is seen of a training: a bar that follows it, its losses, and its measurements."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback

from prefloss.cli.checkpoints import Diverged
from prefloss.cli.console import Screen
from prefloss.demo.measure import Measurement

_MEASUREMENTS = 10


class Watcher(TrainerCallback, ExportableState):
    """Shows every step on a bar of this name, and measures after each tenth of the run.

    What it has seen is kept in checkpoints.

    Attributes:
        losses: (step, training loss).
        measurements: Before training, during, and after.
    """

    def __init__(self, screen: Screen, name: str, measure: Callable[[int], Measurement]) -> None:
        self._screen, self._name, self._measure = screen, name, measure
        self.losses: list[tuple[int, float]] = []
        self.measurements: list[Measurement] = []
        self._seconds = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (transformers' `ExportableState`)."""
        seen = {"losses": list(self.losses), "measurements": [asdict(item) for item in self.measurements]}
        return {"args": {}, "attributes": seen}

    def restore(self, state: Any) -> None:
        """Go on from the state of a trainer that was read from a checkpoint."""
        seen = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.losses = [(step, loss) for step, loss in seen["losses"]]
        self.measurements = [
            Measurement(**{**item, "samples": tuple(item["samples"])}) for item in seen["measurements"]
        ]
        self._screen.remember(self.measurements)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show a bar; the number of steps is known only now."""
        if state.global_step:
            self.restore(state)
        self._update = self._screen.stage(self._name, state.max_steps)
        self._update(state.global_step, "")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after the step before, if it is time: now that step has been saved, if it was to be."""
        self.measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the step."""
        self._update(state.global_step, f"loss {self.losses[-1][1]:.3f}" if self.losses else "")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Keep the training loss; the last log, of the whole run, has none.

        Raises:
            Diverged: If the loss is not finite.
        """
        if logs and "loss" in logs:
            if not torch.isfinite(torch.tensor(logs["loss"])):
                raise Diverged(f"the loss of step {state.global_step} is {logs['loss']}")
            self.losses.append((state.global_step, logs["loss"]))

    def measure(self, state: Any) -> None:
        """Measure, if it is time to and this step was not measured yet."""
        if not _is_time(state) or any(item.step == state.global_step for item in self.measurements):
            return
        began = time.monotonic()
        try:
            self.measurements.append(self._measure(state.global_step))
        except FloatingPointError as error:
            raise Diverged(f"after step {state.global_step} {error}") from error
        self._seconds = time.monotonic() - began
        self._screen.measured(self.measurements[-1])

    def seconds_after(self, state: Any) -> float:
        """How long measuring after this step may take, seconds."""
        return self._seconds if _is_time(state) else 0.0


def _is_time(state: Any) -> bool:
    """Whether another tenth of the run is complete with this step; in short runs, every step completes one."""
    done, total = state.global_step, state.max_steps
    return done == 0 or done * _MEASUREMENTS // total > (done - 1) * _MEASUREMENTS // total
