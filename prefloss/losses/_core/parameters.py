"""Hyperparameters: their types and ranges, declared in a loss's signature and checked when it is built."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from prefloss.losses._core import schedules

_TYPES = {float: "a number", int: "an integer", bool: "True or False", str: "a string"}


@dataclass(frozen=True)
class Interval:
    """Range of a number; a bound that is None is absent.

    Example:
        >>> str(Interval(ge=0, lt=0.5))
        '>= 0 and < 0.5'
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __contains__(self, value: float) -> bool:
        """Whether the value satisfies every bound; NaN satisfies none, infinity is no hyperparameter."""
        return (
            math.isfinite(value)
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        """The bounds in words that fit an error message and a table."""
        bounds = (("> ", self.gt), (">= ", self.ge), ("< ", self.lt), ("<= ", self.le))
        return " and ".join(f"{sign}{bound:g}" for sign, bound in bounds if bound is not None) or "finite"


@dataclass(frozen=True)
class Coerce:
    """Turns what a user writes in a config file into the object that a loss takes.

    Attributes:
        function: value -> object; raises ValueError or TypeError that says what was wanted.
        wanted: What it accepts, in words.
    """

    function: Callable[[Any], Any]
    wanted: str

    def __str__(self) -> str:
        """What it accepts."""
        return self.wanted


Positive = Annotated[float, Interval(gt=0)]
NonNegative = Annotated[float, Interval(ge=0)]
FlipProbability = Annotated[float, Interval(ge=0, lt=0.5)]


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter of a loss.

    Attributes:
        name: As in the signature.
        default: Value if not given; `inspect.Parameter.empty` if it must be.
        type: Its type without the range.
        constraint: `Interval`, `Coerce`, or None; `str()` of it says what is allowed.
        description: From the docstring's Args section.
    """

    name: str
    default: Any
    type: Any
    constraint: Interval | Coerce | None = None
    description: str = ""

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    def checked(self, loss: str, value: Any) -> Any:
        """The value to hand to the loss.

        Raises:
            TypeError: If the type is wrong.
            ValueError: If it is out of range.
        """
        value = schedules.from_config(value)
        if isinstance(value, schedules.Schedule):
            return self._checked_schedule(loss, value)
        where = f"{loss}: {self.name}: got {value!r}"
        if isinstance(self.constraint, Coerce):
            try:
                return self.constraint.function(value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}, expected {self.constraint}") from error
        if value is None:
            if type(None) in get_args(self.type):
                return value
            raise TypeError(f"{where}, expected {self._wanted(_plain_type(self.type))}")
        if get_origin(self.type) is Literal:
            if value not in get_args(self.type):
                raise ValueError(f"{where}, expected one of {', '.join(map(repr, get_args(self.type)))}")
            return value
        plain = _plain_type(self.type)
        if plain in _TYPES and not _is_a(value, plain):
            raise TypeError(f"{where}, expected {self._wanted(plain)}")
        if isinstance(self.constraint, Interval) and value not in self.constraint:
            raise ValueError(f"{where}, expected {self._wanted(plain)}")
        if plain is float and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}, expected a finite number")
        return value

    def _checked_schedule(self, loss: str, schedule: schedules.Schedule) -> schedules.Schedule:
        if _plain_type(self.type) is not float:
            raise TypeError(
                f"{loss}: {self.name}: got {schedule!r}, expected {self.constraint or self.type}: no number"
            )
        for end in (schedule.start, schedule.end):
            self.checked(loss, end)
        return schedule

    def _wanted(self, plain: Any) -> str:
        words = _TYPES.get(plain, str(plain))
        return f"{words} {self.constraint}" if isinstance(self.constraint, Interval) else words


def from_annotation(name: str, annotation: Any, default: Any, description: str) -> Parameter:
    """Read one keyword parameter of a loss's signature."""
    constraint = None
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        constraint = next((item for item in metadata if isinstance(item, (Interval, Coerce))), None)
    return Parameter(name, default, annotation, constraint, description)


def check(
    loss: str, parameters: Mapping[str, Parameter], given: Mapping[str, Any], also: Iterable[str] = ()
) -> dict[str, Any]:
    """All hyperparameters of a loss: those given, checked, and the defaults of the rest.

    Args:
        loss: Name of the loss, for messages.
        parameters: Its hyperparameters.
        given: Those that were given.
        also: Names of modifiers that it admits, for the hint at an unknown name.

    Raises:
        TypeError: If one is unknown, missing, or of the wrong type.
        ValueError: If one is out of range.
    """
    for name in given:
        if name not in parameters:
            raise TypeError(f"{loss}: unknown hyperparameter {name!r}{_hint(name, [*parameters], [*also])}")
    values = {}
    for name, parameter in parameters.items():
        if name not in given and parameter.required:
            raise TypeError(
                f"{loss}: missing hyperparameter {name!r}, expected {parameter.description or 'a value'}"
            )
        values[name] = parameter.checked(loss, given.get(name, parameter.default))
    return values


def _hint(name: str, own: list[str], modifiers: list[str]) -> str:
    close = difflib.get_close_matches(name, own + modifiers, n=1)
    takes = f"it takes {', '.join(map(repr, own))}" if own else "it takes none"
    admits = f"; and the modifiers {', '.join(modifiers)}" if modifiers else ""
    meant = f"; did you mean {close[0]!r}" if close else ""
    return f"{meant}; {takes}{admits}"


def _plain_type(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, type(int | str)):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return members[0] if len(members) == 1 else annotation
    return annotation


def _is_a(value: Any, plain: type) -> bool:
    if isinstance(value, bool):
        return plain is bool
    return isinstance(value, int | float) if plain is float else isinstance(value, plain)
