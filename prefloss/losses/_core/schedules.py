"""Hyperparameters that change as training goes on; any numeric hyperparameter takes one."""

from __future__ import annotations

import math
from typing import Any

from prefloss.losses._core.state import State


class Schedule(State):
    """A number that moves from `start` to `end` in `steps` optimizer steps, then stays there.

    Args:
        start: Value before the first step.
        end: Value from step `steps` on.
        steps: Number of optimizer steps, at least 1.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If `steps` is below 1 or a value not finite.
    """

    saved = ("done",)
    settings = ("start", "end", "steps")

    def __init__(self, start: float, end: float, steps: int) -> None:
        super().__init__()
        for name, value in (("start", start), ("end", end), ("steps", steps)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: got {value!r}, expected a number")
            if not math.isfinite(value):
                raise ValueError(f"{name}: got {value!r}, expected a finite number")
        if steps < 1 or steps != int(steps):
            raise ValueError(f"steps: got {steps!r}, expected a whole number of optimizer steps >= 1")
        self.start, self.end, self.steps = start, end, int(steps)
        self.done = 0

    @property
    def value(self) -> float:
        """The number now."""
        return self.start + (self.end - self.start) * self._progress(min(1.0, self.done / self.steps))

    def step(self) -> None:
        """Move on by one optimizer step; not in evaluation."""
        if self.training:
            self.done += 1

    def _progress(self, part: float) -> float:
        raise NotImplementedError


class Linear(Schedule):
    """Moves in a straight line.

    Example:
        >>> beta = Linear(0.5, 0.1, steps=4)
        >>> beta.step()
        >>> beta.value
        0.4
    """

    name = "linear"

    def _progress(self, part: float) -> float:
        return part


class Cosine(Schedule):
    """Moves along half a cosine: slowly at both ends."""

    name = "cosine"

    def _progress(self, part: float) -> float:
        return (1 - math.cos(math.pi * part)) / 2


SCHEDULES: dict[str, type[Schedule]] = {kind.name: kind for kind in (Linear, Cosine)}


def from_config(value: Any) -> Any:
    """`{"name": "linear", "start": 0.5, "end": 0.1, "steps": 100}` as a schedule; anything else unchanged."""
    if isinstance(value, dict) and value.get("name") in SCHEDULES:
        return SCHEDULES[value["name"]](**{key: item for key, item in value.items() if key != "name"})
    return value
