"""Fit the hyperparameters of a registered loss until its gradient is that of another function."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Feedback
from prefloss.hyperparameters import Interval, Parameter, plain_type
from prefloss.registry import MODIFIERS, Loss, LossSpec, get
from prefloss.testing.probed import Measured, measure
from prefloss.testing.subject import Subject

# Choices of discrete hyperparameters that are tried, starts that are drawn, and the best starts, which are followed.
_COMBINATIONS, _DRAWN, _FOLLOWED = 16, 6, 2
# Evaluations for each hyperparameter at first, and where the distance is then small.
_FEW, _MANY, _PROMISING = 6, 40, 0.3


@dataclass(frozen=True)
class Family:
    """A loss with its discrete hyperparameters chosen and its continuous ones free.

    Attributes:
        spec: The loss.
        fixed: The discrete hyperparameters.
        free: The continuous ones.
    """

    spec: LossSpec
    fixed: Mapping[str, Any]
    free: tuple[Parameter, ...]

    def member(self, point: Sequence[float]) -> Loss:
        """The loss at a point of the unbounded space in which the fit moves."""
        return self.bound([_inside(parameter, x) for parameter, x in zip(self.free, point, strict=True)])

    def bound(self, values: Sequence[float]) -> Loss:
        """The loss with these values of the free hyperparameters."""
        names = (parameter.name for parameter in self.free)
        return get(self.spec.name, **self.fixed, **dict(zip(names, values, strict=True))).eval()

    def values(self, loss: Loss) -> list[float]:
        """The values of the free hyperparameters in a loss of the family."""
        return [loss.params[parameter.name] for parameter in self.free]

    def starts(self) -> Iterator[list[float]]:
        """Points to start from: the defaults, then values over several orders of magnitude."""
        values = [_first(parameter) for parameter in self.free]
        source = random.Random(self.spec.name)
        scales = [[1.0] * len(values)]
        if values:
            scales += [[scale, *[1.0] * (len(values) - 1)] for scale in (0.01, 0.1, 0.3, 3.0, 10.0, 100.0)]
        if len(values) > 1:
            scales += [[10 ** source.uniform(-1.5, 1.5) for _ in values] for _ in range(_DRAWN)]
        for scale in scales:
            yield [_outside(p, value * s) for p, value, s in zip(self.free, values, scale, strict=True)]


def families(spec: LossSpec, feedback: Feedback, modifier: str | None = None) -> Iterator[Family]:
    """Every choice of a loss's discrete hyperparameters with which it takes the feedback.

    A modifier is one more continuous hyperparameter. A loss with a state is left out: a function has none.
    """
    loss = get(spec.name, **{name: _first(p) for name, p in spec.parameters.items() if p.required})
    free = [p for p in spec.parameters.values() if _is_continuous(p, spec)]
    others = [name for name in spec.parameters if name not in {p.name for p in free}]
    if any(name in loss.state for name in others):
        return
    choices = [[loss.params[name], *_alternatives(Subject(loss), name)] for name in others]
    if modifier is not None:
        free.append(MODIFIERS[modifier].parameter)
    for chosen in itertools.islice(itertools.product(*choices), _COMBINATIONS):
        family = Family(spec, dict(zip(others, chosen, strict=True)), tuple(free))
        try:
            family.member(next(family.starts()))(feedback)
        except ValueError:
            # A mean per token without token counts, for instance.
            continue
        yield family


def _alternatives(subject: Subject, name: str) -> list[Any]:
    return [value for value in subject.other_values(name) if isinstance(value, bool | str)]


def _is_continuous(parameter: Parameter, spec: LossSpec) -> bool:
    if plain_type(parameter.type) is float:
        return True
    try:
        # A state such as a running mean, which a fixed number can replace.
        parameter.checked(spec.name, 0.125)
    except (TypeError, ValueError):
        return False
    return True


def _first(parameter: Parameter) -> float:
    """A value to start from: the default if it is a number inside the range."""
    default, (low, high) = parameter.default, _range(parameter)
    inside = isinstance(default, int | float) and low < default < high
    if inside and (default or low < 0):
        return float(default) or 0.1
    return next(value for value in (0.1, 0.5, 1.5, low + 1.0) if low < value < high)


def _range(parameter: Parameter) -> tuple[float, float]:
    interval = parameter.constraint if isinstance(parameter.constraint, Interval) else Interval()
    lows = [bound for bound in (interval.gt, interval.ge) if bound is not None]
    highs = [bound for bound in (interval.lt, interval.le) if bound is not None]
    return max(lows, default=-math.inf), min(highs, default=math.inf)


def _inside(parameter: Parameter, x: float) -> float:
    """A number of the whole line -> a value in the parameter's range."""
    low, high = _range(parameter)
    x = min(max(x, -30.0), 30.0) if low > -math.inf else x
    if high < math.inf and low > -math.inf:
        return low + (high - low) / (1 + math.exp(-x))
    return low + math.exp(x) if low > -math.inf else x


def _outside(parameter: Parameter, value: float) -> float:
    """The inverse of `_inside`; a value beyond the range is moved to its edge."""
    low, high = _range(parameter)
    if high < math.inf and low > -math.inf:
        share = min(max((value - low) / (high - low), 1e-4), 1 - 1e-4)
        return math.log(share / (1 - share))
    return math.log(max(value - low, 1e-6)) if low > -math.inf else value


class Goal:
    """The gradients that a loss is fitted to.

    Args:
        batches: Feedback, and what the function does on it.
        tolerance: Largest relative difference that counts as rounding; a fit stops at a hundredth of it.
        rescaled: A constant factor between the function and the loss is allowed.
    """

    def __init__(
        self, batches: Sequence[tuple[Feedback, Measured]], tolerance: float, rescaled: bool = False
    ) -> None:
        self.batches, self.exact, self.rescaled = batches, tolerance / 100, rescaled

    @cached_property
    def _target(self) -> Tensor:
        return torch.cat([seen.slopes * self._weight(seen.slopes) for _, seen in self.batches])

    @staticmethod
    def _weight(slopes: Tensor) -> Tensor:
        # Each slope counts by its relative error; those that vanish, such as saturated ones, by their absolute one.
        return 1 / (slopes.abs() + 0.01 * slopes.abs().max()).clamp(min=1e-30)

    def residuals(self, loss: Loss) -> tuple[Tensor, float]:
        """What is left of the weighted gradients, and the factor of the loss."""
        seen = [measure(loss.mean, feedback).slopes for feedback, _ in self.batches]
        weights = [self._weight(goal.slopes) for _, goal in self.batches]
        slopes = torch.cat([slope * weight for slope, weight in zip(seen, weights, strict=True)])
        factor = 1.0
        if self.rescaled:
            size = float(slopes @ slopes)
            factor = float(self._target @ slopes) / size if 0 < size < math.inf else 0.0
        return torch.nan_to_num(self._target - factor * slopes, 1e3, 1e3, -1e3).clamp(-1e3, 1e3), factor

    def distance(self, loss: Loss) -> float:
        """Largest relative difference of a slope."""
        return float(self.residuals(loss)[0].abs().max())


def fit(family: Family, goal: Goal) -> tuple[Loss, float]:
    """The member of a family whose gradient is closest to the goal, and its distance; 0 is equal."""
    from scipy.optimize import least_squares

    def residuals(point: Any) -> Any:
        return goal.residuals(family.member(point))[0].numpy()

    def solved(point: Any, evaluations: int) -> tuple[Loss, float]:
        if len(point):
            point = least_squares(residuals, point, method="lm", max_nfev=evaluations).x
        loss = family.member(point)
        distance = goal.distance(loss)
        if goal.exact < distance < _PROMISING and evaluations < _MANY:
            return solved(point, _MANY)
        return _rounded(family, loss, goal), distance

    starts = sorted(family.starts(), key=lambda point: float((residuals(point) ** 2).sum()))
    found: list[tuple[Loss, float]] = []
    for start in starts[:_FOLLOWED]:
        found.append(solved(start, _FEW * len(start)))
        if found[-1][1] < goal.exact:
            break
    return min(found, key=lambda item: item[1])


def _rounded(family: Family, loss: Loss, goal: Goal) -> Loss:
    """The loss with round numbers, or numbers at the edge of their range, if these fit as well."""
    values, distance = family.values(loss), goal.distance(loss)
    if not values or distance > 0.05:
        return loss
    for digits in (1, 2, 3, 4, 6):
        rounded = [
            _round(parameter, value, digits) for parameter, value in zip(family.free, values, strict=True)
        ]
        try:
            candidate = family.bound(rounded)
        except ValueError:
            # The edge of a range that does not belong to it.
            continue
        if goal.distance(candidate) <= max(goal.exact / 10, distance):
            return candidate
    return loss


def _round(parameter: Parameter, value: float, digits: int) -> float:
    low, high = _range(parameter)
    for edge in (low, high, 0.0):
        if abs(value - edge) < 0.03:
            return float(edge)
    return float(f"{value:.{digits}g}")
