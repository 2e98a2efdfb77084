"""Running statistics and random draws that losses keep between calls, and the hyperparameters that take them.

Each hyperparameter takes the state itself, its configuration (`"running"` or `{"name": ..., **settings}`), or a fixed
value. `prefloss.get` makes a fresh state; the plain function of a loss needs the object or a fixed value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Annotated, Any

import torch
from torch import Tensor

from prefloss.arguments import integer, is_finite, real
from prefloss.feedback import Labels
from prefloss.losses._core import maths
from prefloss.losses._core.parameters import Coerce
from prefloss.losses._core.state import State, from_config


def stateful(
    kind: type[State],
    fixed: Callable[[Any], Any] | None = None,
    expected: str = "'running' or the object that keeps the state",
) -> Coerce:
    """What makes a hyperparameter a state: it takes the state, its name or `"running"`, or its `config()`.

    Args:
        kind: The class of the state.
        fixed: Converts any other value that the loss takes in place of a state; raises TypeError or ValueError for
            one that it does not. None refuses all.
        expected: What is taken, in words.

    Example:
        >>> Shift = Annotated[str | RewardShift, stateful(RewardShift)]
        >>> @prefloss.register(name="doctest_shifted", stateful=True, separable=False)
        ... def shifted(pairs: Pairs, *, shift: Shift = "running") -> Tensor:
        ...     return shift(pairs.margin(), pairs.valid) - pairs.margin()
        >>> prefloss.get("doctest_shifted")
        doctest_shifted(shift=running_shift())
        >>> prefloss.registry.unregister("doctest_shifted")
    """

    def convert(value: Any) -> Any:
        if isinstance(value, str) and value in ("running", kind.name):
            return kind()
        value = from_config(value, kind)
        if isinstance(value, kind):
            return value
        if fixed is None:
            raise (ValueError if isinstance(value, str) else TypeError)
        return fixed(value)

    return Coerce(convert, expected)


def _number(value: Any) -> float:
    # `Parameter.checked` says what was got and expected.
    if isinstance(value, bool) or not isinstance(value, Real | str):
        raise TypeError
    if isinstance(value, str) or not is_finite(value):
        raise ValueError
    return float(value)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(map(_number, value))


def _mean_and_std(value: Any) -> tuple[float, ...]:
    numbers = _numbers(value)
    if len(numbers) != 2 or numbers[1] < 0:
        raise ValueError
    return numbers


def _decay(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ValueError(f"decay: got {value!r}, expected a number >= 0 and < 1")
    return real("decay", value)


class RewardShift(State):
    """BCO's reward shift: mean of all rewards seen so far, each counted once, without gradient.

    Example:
        >>> shift = RewardShift()
        >>> counted = torch.tensor([True, True])
        >>> shift(torch.tensor([1.0, 3.0]), counted), shift(torch.tensor([5.0, 7.0]), counted)
        (tensor(2.), tensor(4.))
    """

    name = "running_shift"
    saved = ("total", "count")
    settings = ()

    def __init__(self) -> None:
        super().__init__()
        self.total: Tensor | float = 0.0
        self.count: Tensor | float = 0.0

    def __call__(self, rewards: Tensor, counted: Tensor) -> Tensor:
        """The shift after taking in the rewards beta * h that count, a scalar; 0 before the first one."""
        if self.training:
            count, total, _ = self.totals(rewards, counted)
            self.total = self.total + total
            self.count = self.count + count
        return maths.ratio(self.total, self.count, rewards)


class Moments(State):
    """Moving mean and standard deviation of a margin, starting from 0, without gradient.

    The standard deviation is the unbiased one of the batch of all ranks; a batch of one value leaves it unchanged.

    Args:
        decay: How much of the past is kept at each batch, in [0, 1).
    """

    name = "moments"
    saved = ("mean", "std")
    settings = ("decay",)

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = _decay(decay)
        self.mean: Tensor | float = 0.0
        self.std: Tensor | float = 0.0

    def __call__(self, values: Tensor, counted: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation after taking in the values that count, [n]."""
        if self.training:
            count, total, squares = self.totals(values, counted)
            mean = total / count.clamp(min=1)
            std = ((squares - total * mean) / (count - 1).clamp(min=1)).clamp(min=0).sqrt()
            self.mean = torch.where(count > 0, self._moved(self.mean, mean), self.mean)
            self.std = torch.where(count > 1, self._moved(self.std, std), self.std)
        return self.mean, self.std

    def _moved(self, old: Tensor | float, new: Tensor) -> Tensor:
        return self.decay * old + (1 - self.decay) * new


def _stream(seed: int, call: int) -> torch.Generator:
    # Distinct streams for distinct (seed, call) pairs; the constant is prime and larger than any run is long.
    return torch.Generator().manual_seed((seed * 1_000_003 + call) % 2**63)


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
        self.seed = integer("seed", seed)
        self.drawn = 0

    def __call__(self) -> torch.Generator:
        """A CPU generator for one call; evaluation draws the same numbers every time."""
        generator = _stream(self.seed, self.drawn)
        self.drawn += self.training
        return generator


class Recent(State):
    """The last values of a quantity on this rank, to compare a batch with; empty at first.

    Args:
        size: How many values are kept.
        batch: A batch is filled up to this many with values drawn from those kept.
        seed: Seed of the draws, any integer.
    """

    name = "recent"
    saved = ("values", "drawn")
    settings = ("size", "batch", "seed")

    def __init__(self, size: int = 2048, batch: int = 256, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("size", size), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
                raise ValueError(f"{name}: got {value!r}, expected a whole number >= 0")
        self.size, self.batch, self.seed = int(size), int(batch), integer("seed", seed)
        self.values: list[float] = []
        self.drawn = 0

    def __call__(self, values: Tensor, counted: Tensor) -> list[float]:
        """Values of earlier batches, drawn without replacement; then, in training, take in those that count."""
        new = values.detach()[counted & values.detach().isfinite()].tolist()
        missing = min(len(self.values), max(0, self.batch - len(new)))
        order = torch.randperm(len(self.values), generator=_stream(self.seed, self.drawn)).tolist()
        drawn = [self.values[place] for place in order[:missing]]
        if self.training:
            self.drawn += 1
            # A new list: state dicts hold the old one.
            kept = self.values + new
            self.values = kept[max(0, len(kept) - self.size) :]
        return drawn


KLBaseline = Callable[[Labels], Tensor]
"""Labels -> KL baseline z0, a scalar or [n], nats, without gradient."""


def _mismatched(labels: Labels) -> Tensor:
    """The paper's estimate of KL(policy || reference): mean h of mismatched completions, at least 0."""
    if labels.mismatched is None:
        raise ValueError("kl_baseline: 'mismatched' reads labels.mismatched: got None, expected LogRatios")
    h = labels.mismatched.h.detach()
    # Completions without tokens have h = 0 and add nothing to the sum. The mean is clamped, as in the paper: clamping
    # each completion would raise the estimate.
    return (h.sum() / (~labels.mismatched.empty).sum().clamp(min=1)).clamp(min=0)


def _column(labels: Labels) -> Tensor:
    if labels.kl is None:
        raise ValueError("kl_baseline: 'column' reads labels.kl: got None, expected a scalar or [n] in nats")
    return labels.kl


def _zero(labels: Labels) -> Tensor:
    return torch.zeros((), device=labels.completions.device, dtype=labels.completions.policy.dtype)


def _auto(labels: Labels) -> Tensor:
    """What the labels carry: `kl`, else `mismatched`, else 0 with a warning."""
    if labels.kl is not None:
        return _column(labels)
    if labels.mismatched is not None:
        return _mismatched(labels)
    if not torch.compiler.is_compiling():
        warnings.warn(
            "kto: the labels carry neither `kl` nor `mismatched`, so the KL baseline is 0; pass one of them, or "
            "kl_baseline='zero' or 'running_mean' to choose.",
            UserWarning,
            stacklevel=2,
        )
    return _zero(labels)


class RunningMean(State):
    """KL baseline: mean log-ratio of the examples seen so far, at least 0; works at batch size 1 and in any order.

    A batch is compared with the batches before it; the first one gets 0. The data's own completions stand in for the
    paper's mismatched ones, which need a second forward pass.

    Args:
        decay: How much of the past is kept at each batch, in [0, 1).

    Example:
        >>> baseline = RunningMean(decay=0.5)
        >>> labels = Labels(completions=LogRatios.of([2.0]), desirable=[True])
        >>> baseline(labels), baseline(labels)
        (tensor(0.), tensor(2.))
    """

    name = "running_mean"
    saved = ("total", "weight")
    settings = ("decay",)

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = _decay(decay)
        self.total: Tensor | float = 0.0
        self.weight: Tensor | float = 0.0

    def __call__(self, labels: Labels) -> Tensor:
        """The baseline from earlier batches, a scalar; then, in training, take this batch in."""
        # Dividing by the accumulated weight removes the bias towards 0 of the first batches.
        value = maths.ratio(self.total, self.weight, labels.completions.policy).clamp(min=0)
        if self.training:
            count, total, _ = self.totals(labels.completions.h, ~labels.completions.empty)
            mean = total / count.clamp(min=1)
            self.total = torch.where(count > 0, self.decay * self.total + mean, self.total)
            self.weight = torch.where(count > 0, self.decay * self.weight + 1.0, self.weight)
        return value


BASELINES: Mapping[str, KLBaseline] = {
    "auto": _auto,
    "mismatched": _mismatched,
    "column": _column,
    "zero": _zero,
}
"""KL baselines without a state, by name."""


def _baseline(value: Any) -> Any:
    if callable(value) or (isinstance(value, str) and value in BASELINES):
        return value
    raise (ValueError if isinstance(value, str) else TypeError)


_NAMES = ", ".join(map(repr, [*BASELINES, RunningMean.name]))
DRAWS = stateful(Draws, Draws, "an integer seed or Draws")
Shift = Annotated[
    str | float | RewardShift, stateful(RewardShift, _number, "'running' or a finite number in nats")
]
Spread = Annotated[
    str | tuple[float, float] | Moments,
    stateful(Moments, _mean_and_std, "'running', two numbers (mean, std >= 0) or Moments"),
]
Seed = Annotated[int | Draws, DRAWS]
Queue = Annotated[
    str | tuple[float, ...] | Recent, stateful(Recent, _numbers, "'running', a list of numbers or Recent")
]
Baseline = Annotated[
    str | KLBaseline, stateful(RunningMean, _baseline, f"one of {_NAMES} or a callable Labels -> nats")
]


def generator(draws: int | Draws) -> torch.Generator:
    """The generator of one call, from a state or a seed."""
    return DRAWS.function(draws)()
