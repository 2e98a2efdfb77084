"""What a loss keeps between calls: objects with a `state_dict`, reduced over ranks, still in evaluation.

Every state here is updated before it is used, as the authors' code does, except where its docstring says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


def _alone(sums: Tensor) -> Tensor:
    """Sum over the ranks of a run with one rank."""
    return sums


class State:
    """Base of the states: named numbers that are saved, restored and held still in evaluation.

    Subclasses list the attributes to save in `saved` and the constructor's arguments in `settings`.

    Attributes:
        training: Whether calls change the state.
        all_sum: Sums a tensor over all ranks; trainers set it, alone it is the identity.
    """

    name: ClassVar[str]
    saved: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self.training = True
        self.all_sum: Callable[[Tensor], Tensor] = _alone

    def train(self, mode: bool = True) -> None:
        """Let calls change the state, or hold it still."""
        self.training = mode

    def step(self) -> None:
        """An optimizer step was made; only schedules care."""

    def state_dict(self) -> dict[str, Any]:
        """The saved numbers, plain enough for JSON."""
        return {name: getattr(self, name) for name in self.saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: If the names are other ones.
        """
        if set(state) != set(self.saved):
            raise ValueError(f"state: got {sorted(state)}, expected {sorted(self.saved)} as {self!r} keeps")
        for name in self.saved:
            setattr(self, name, state[name])

    def config(self) -> dict[str, Any]:
        """As written in a configuration file: its name and settings."""
        return {"name": self.name, **{name: getattr(self, name) for name in self.settings}}

    def __repr__(self) -> str:
        """As written in a loss's string."""
        return f"{self.name}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.settings)})"

    def __eq__(self, other: object) -> bool:
        """Same kind, settings and state."""
        return (
            isinstance(other, State)
            and self.config() == other.config()
            and self.state_dict() == other.state_dict()
        )

    __hash__ = None  # type: ignore[assignment]

    def _totals(self, values: Tensor, keep: Tensor) -> tuple[float, float, float]:
        """Count, sum and sum of squares over all ranks of the values that count; NaN and infinity never do.

        One overflowed batch, which a gradient scaler skips, would otherwise stay in the state for good.
        """
        keep = keep & values.detach().isfinite()
        kept = torch.where(keep, values.detach(), 0.0).double()
        sums = self.all_sum(torch.stack([keep.sum().double(), kept.sum(), (kept**2).sum()]))
        count, total, squares = sums.tolist()
        return count, total, squares


class RewardShift(State):
    """BCO's reward shift: mean of all rewards seen so far, each counted once, without gradient.

    Example:
        >>> shift = RewardShift()
        >>> keep = torch.tensor([True, True])
        >>> shift(torch.tensor([1.0, 3.0]), keep), shift(torch.tensor([5.0, 7.0]), keep)
        (tensor(2.), tensor(4.))
    """

    name = "running_shift"
    saved = ("total", "count")
    settings = ()

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0
        self.count = 0.0

    def __call__(self, rewards: Tensor, keep: Tensor) -> Tensor:
        """The shift after taking in the rewards that count, a scalar; 0 while none was seen.

        Args:
            rewards: beta * h, any shape.
            keep: True where a reward counts, same shape.
        """
        if self.training:
            count, total, _ = self._totals(rewards, keep)
            self.total += total
            self.count += count
        return rewards.new_tensor(self.total / self.count if self.count else 0.0)


class Moments(State):
    """Moving mean and standard deviation of a margin, starting from 0, without gradient.

    The standard deviation is the unbiased one of the global batch; a batch of one leaves it as it is.

    Args:
        decay: How much of the past is kept at each batch, in [0, 1).
    """

    name = "moments"
    saved = ("mean", "std")
    settings = ("decay",)

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        check_decay(decay)
        self.decay = decay
        self.mean = 0.0
        self.std = 0.0

    def __call__(self, values: Tensor, keep: Tensor) -> tuple[float, float]:
        """Mean and standard deviation after taking in the values that count, [n]."""
        if self.training:
            count, total, squares = self._totals(values, keep)
            if count:
                self.mean = self.decay * self.mean + (1 - self.decay) * total / count
            if count > 1:
                variance = max(0.0, (squares - total**2 / count) / (count - 1))
                self.std = self.decay * self.std + (1 - self.decay) * variance**0.5
        return self.mean, self.std


class Draws(State):
    """Random numbers that a loss draws: reproducible from a seed, continued after a restart.

    Args:
        seed: Any integer.
    """

    name = "draws"
    saved = ("drawn",)
    settings = ("seed",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: got {seed!r}, expected an integer")
        self.seed = seed
        self.drawn = 0

    def __call__(self) -> torch.Generator:
        """A CPU generator for one call; evaluation draws the same numbers every time."""
        # Distinct streams for distinct (seed, call) pairs; the constant is prime and larger than any run is long.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.drawn) % 2**63)
        if self.training:
            self.drawn += 1
        return generator


class Recent(State):
    """The last values of a batch-wide quantity on this rank, to judge a batch against; empty at first.

    Args:
        size: How many values are kept.
        batch: A batch is filled up to this many with values drawn from those kept.
        seed: Of the draws, any integer.
    """

    name = "recent"
    saved = ("values", "drawn")
    settings = ("size", "batch", "seed")

    def __init__(self, size: int = 2048, batch: int = 256, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("size", size), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: got {value!r}, expected a whole number >= 0")
        self.size, self.batch = size, batch
        self.draws = Draws(seed)
        self.values: list[float] = []

    @property
    def seed(self) -> int:
        """Seed of the draws."""
        return self.draws.seed

    @property
    def drawn(self) -> int:
        """Calls that have drawn so far."""
        return self.draws.drawn

    @drawn.setter
    def drawn(self, value: int) -> None:
        self.draws.drawn = value

    def train(self, mode: bool = True) -> None:
        """Let calls change the state, or hold it still."""
        super().train(mode)
        self.draws.train(mode)

    def state_dict(self) -> dict[str, Any]:
        """The saved numbers, plain enough for JSON."""
        return {"values": list(self.values), "drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: If the names are other ones.
        """
        super().load_state_dict(state)
        self.values = list(self.values)

    def __call__(self, values: Tensor, keep: Tensor) -> list[float]:
        """Values from earlier batches, drawn without replacement; then, in training, take this batch in.

        Args:
            values: This batch's, any shape.
            keep: True where a value counts, same shape.
        """
        new = values.detach()[keep & values.detach().isfinite()].tolist()
        wanted = min(len(self.values), max(0, self.batch - len(new)))
        order = torch.randperm(len(self.values), generator=self.draws()).tolist()
        drawn = [self.values[place] for place in order[:wanted]]
        if self.training:
            kept = self.values + new
            self.values = kept[max(0, len(kept) - self.size) :]
        return drawn


def coercion(kind: Callable[..., State], plain: Callable[[Any], Any], wanted: str) -> Callable[[Any], Any]:
    """Turns what a configuration says of a state into what a loss takes.

    `"running"` and `{"name": ..., **settings}` make a fresh object, an object stays, and anything else is what
    `plain` makes of it: a value fixed for good.

    Args:
        kind: Class of the state.
        plain: Converts a fixed value; raises TypeError or ValueError on anything else.
        wanted: What is accepted, in words.
    """

    def coerce(value: Any) -> Any:
        if isinstance(value, str) and value == "running":
            return kind()
        if isinstance(value, State):
            if type(value) is kind:
                return value
            raise TypeError(f"got {value!r}, expected {wanted}")
        try:
            if isinstance(value, dict) and value.get("name") == kind.name:  # type: ignore[attr-defined]
                return kind(**{name: setting for name, setting in value.items() if name != "name"})
            return plain(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"got {value!r}, expected {wanted}") from error

    return coerce


def of_batch(name: str, held: Any, values: Tensor, keep: Tensor) -> Any:
    """What a coerced hyperparameter says of a batch: the state's answer, or the fixed value itself.

    Args:
        name: Of the hyperparameter.
        held: What its coercion gave.
        values: What the state takes in, any shape.
        keep: True where a value counts, same shape.

    Raises:
        ValueError: For `"running"`, which would forget its state after each call.
    """
    if isinstance(held, State):
        return held(values, keep)  # type: ignore[operator]
    if isinstance(held, str):
        raise ValueError(
            f"{name}: got {held!r}, expected the object itself, or a fixed value: the state lives in it"
        )
    return held


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"got {value!r}, expected a finite number")
    return float(value)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"got {value!r}, expected a list of numbers")
    return tuple(map(_number, value))


def _mean_and_std(value: Any) -> tuple[float, float]:
    mean, std = _numbers(value)
    if std < 0:
        raise ValueError(f"got std {std!r}, expected >= 0")
    return mean, std


MOMENTS = "'running', two numbers (mean, std >= 0) or Moments"
DRAWS = "an integer seed or Draws"
RECENT = "'running', a list of numbers or Recent"
as_moments = coercion(Moments, _mean_and_std, MOMENTS)
as_draws = coercion(Draws, Draws, DRAWS)
as_recent = coercion(Recent, _numbers, RECENT)


def check_decay(decay: Any) -> None:
    """Refuse what is no decay.

    Raises:
        ValueError: If it is not a number in [0, 1).
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise ValueError(f"decay: got {decay!r}, expected a number >= 0 and < 1")
