"""What a loss keeps between calls: objects with a `state_dict`, summed over ranks, held still in evaluation.

Every state is updated before it is used, as the authors' code does, except where its docstring says otherwise.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefloss.arguments import instance, integer, is_finite, real, shown


class State:
    """Base of the states: named numbers that are saved, restored and held still in evaluation.

    A class derived from it names itself, lists what is saved and what are settings, and takes in a batch where it is
    called, if `self.training`; `totals` adds up a batch over all ranks.

    Attributes:
        name: What configurations call it.
        saved: Attributes to save.
        settings: Arguments of the constructor.
        training: Whether calls change the state.
        all_sum: Sums a tensor over all ranks. Trainers set it; the default is for one rank.
    """

    name: ClassVar[str]
    saved: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self.training = True
        self.all_sum: Callable[[Tensor], Tensor] = torch.clone

    def train(self, mode: bool = True) -> None:
        """Let calls change the state, or hold it still."""
        self.training = mode

    def step(self) -> None:
        """Called after each optimizer step; schedules move on."""

    def state_dict(self) -> dict[str, Any]:
        """The saved numbers, plain enough for JSON."""
        values = {name: getattr(self, name) for name in self.saved}
        return {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; ValueError if the names differ, TypeError if a value is another kind."""
        instance("state", state, Mapping, f"what {self!r} saved")
        if set(state) != set(self.saved):
            raise ValueError(
                f"state: got {sorted(map(str, state))}, expected {sorted(self.saved)} for {self!r}"
            )
        for name, now in self.state_dict().items():
            if not _is_like(state[name], now):
                raise TypeError(
                    f"state: {name}: got {shown(state[name])}, expected something like {shown(now)} for {self!r}"
                )
        for name in self.saved:
            setattr(self, name, state[name])

    def config(self) -> dict[str, Any]:
        """Name and settings, as written in a configuration file."""
        return {"name": self.name, **{name: getattr(self, name) for name in self.settings}}

    def __repr__(self) -> str:
        """Name and settings, as written in a loss's string."""
        return f"{self.name}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.settings)})"

    def __eq__(self, other: object) -> bool:
        """Same name, settings and state."""
        if not isinstance(other, State):
            return False
        return (self.config(), self.state_dict()) == (other.config(), other.state_dict())

    __hash__ = None  # type: ignore[assignment]

    def totals(self, values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, sum and sum of squares over all ranks of the values that count, [n] each; without gradient.

        Three scalars, float64. They stay tensors, so that `torch.func.vmap` can keep a state for each of many runs.
        NaN and infinity are left out: a gradient scaler skips a batch that overflows, but the state would keep it.
        """
        counted = counted & values.detach().isfinite()
        kept = torch.where(counted, values.detach(), 0.0).double()
        sums = self.all_sum(torch.stack([counted.sum().double(), kept.sum(), (kept**2).sum()]))
        count, total, squares = sums.unbind()
        return count, total, squares


def _is_like(value: Any, current: Any) -> bool:
    """Whether a saved value may take the place of the one that a state holds."""
    if isinstance(current, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
    if isinstance(current, list):
        return isinstance(value, list) and all(_is_like(item, 0.0) for item in value)
    return True


def from_config(value: Any, *kinds: type[State]) -> Any:
    """`{"name": "moments", "decay": 0.5}` as the state of that name among `kinds`; anything else unchanged.

    Raises:
        TypeError: If a setting is unknown, missing or of the wrong type.
        ValueError: If a setting is out of range.
    """
    for kind in kinds:
        if isinstance(value, dict) and value.get("name") == kind.name:
            settings = {name: setting for name, setting in value.items() if name != "name"}
            _check_settings(kind, settings)
            return kind(**settings)
    return value


def _check_settings(kind: type[State], settings: Mapping[str, Any]) -> None:
    """Say in the user's words what `kind(**settings)` would refuse in Python's."""
    parameters = inspect.signature(kind).parameters
    unknown = [name for name in settings if name not in parameters]
    missing = [
        name
        for name, one in parameters.items()
        if one.default is inspect.Parameter.empty and name not in settings
    ]
    if unknown or missing:
        wrong = f"without {missing[0]}" if missing else f"with {unknown[0]}"
        given = ", ".join(f"{name}={shown(value)}" for name, value in settings.items())
        raise TypeError(f"got {kind.name}({given}) {wrong}, expected {kind.name}({', '.join(parameters)})")


def resolve(name: str, value: Any, *inputs: Any, functions: Mapping[str, Callable[..., Any]] = {}) -> Any:
    """The value of a hyperparameter for a batch: what its state or function makes of the inputs, or the fixed value.

    The name of a state, such as `"running"`, is refused: a state made here would be forgotten after the call.
    """
    if isinstance(value, str):
        if value not in functions:
            raise ValueError(
                f"{name}: got {value!r}, expected the object that keeps the state, or a fixed value; "
                "prefloss.get(...) makes the object"
            )
        value = functions[value]
    return value(*inputs) if callable(value) else value


class Schedule(State):
    """A number that moves from `start` to `end` in `steps` optimizer steps, then stays there.

    Args:
        start: Value before the first step.
        end: Value from step `steps` on.
        steps: Number of optimizer steps, at least 1.
    """

    saved = ("done",)
    settings = ("start", "end", "steps")

    def __init__(self, start: float, end: float, steps: int) -> None:
        super().__init__()
        self.start, self.end, self.steps = real("start", start), real("end", end), int(real("steps", steps))
        if steps < 1 or steps != self.steps:
            raise ValueError(f"steps: got {shown(steps)}, expected a whole number of optimizer steps >= 1")
        self.done = 0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; raises as `State.load_state_dict` does."""
        if isinstance(state, Mapping) and "done" in state:
            integer("state: done", state["done"], 0)
        super().load_state_dict(state)

    @property
    def value(self) -> float:
        """The number now."""
        return self.start + (self.end - self.start) * self._progress(min(1.0, self.done / self.steps))

    def step(self) -> None:
        """Move on by one optimizer step; not in evaluation."""
        if self.training:
            self.done += 1

    def _progress(self, elapsed: float) -> float:
        """Share of the way from start to end, after this share of the steps."""
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

    def _progress(self, elapsed: float) -> float:
        return elapsed


class Cosine(Schedule):
    """Moves along half a cosine: slowly at both ends."""

    name = "cosine"

    def _progress(self, elapsed: float) -> float:
        return (1 - math.cos(math.pi * elapsed)) / 2


SCHEDULES: tuple[type[Schedule], ...] = (Linear, Cosine)
