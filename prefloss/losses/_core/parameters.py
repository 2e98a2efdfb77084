"""Hyperparameters: their types and ranges, declared in a loss's signature and checked when the loss is built."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from prefloss.arguments import flag, function, instance, integer, is_finite, real, shown
from prefloss.losses._core.state import SCHEDULES, Schedule, from_config

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

    def __post_init__(self) -> None:
        """Check that the bounds are numbers."""
        for name in ("gt", "ge", "lt", "le"):
            if getattr(self, name) is not None:
                real(name, getattr(self, name))

    def __contains__(self, value: float) -> bool:
        """Whether the value satisfies every bound; NaN and infinity never do."""
        bounds = ((gt, self.gt), (ge, self.ge), (lt, self.lt), (le, self.le))
        return is_finite(value) and all(bound is None or holds(value, bound) for holds, bound in bounds)

    def __str__(self) -> str:
        """The bounds in words that fit an error message and a table."""
        bounds = (("> ", self.gt), (">= ", self.ge), ("< ", self.lt), ("<= ", self.le))
        return " and ".join(f"{sign}{bound:g}" for sign, bound in bounds if bound is not None) or "finite"


@dataclass(frozen=True)
class Coerce:
    """Turns what a user writes in a configuration file into the object that a loss takes.

    Attributes:
        function: value -> object; raises ValueError or TypeError for a value that it does not accept.
        expected: What it accepts, in words.
    """

    function: Callable[[Any], Any]
    expected: str

    def __post_init__(self) -> None:
        """Check that there is a function."""
        function("function", self.function, "a function value -> object")

    def __str__(self) -> str:
        """What it accepts."""
        return self.expected


Positive = Annotated[float, Interval(gt=0)]
NonNegative = Annotated[float, Interval(ge=0)]
FlipProbability = Annotated[float, Interval(ge=0, lt=0.5)]
Share = Annotated[float, Interval(gt=0, le=1)]


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

    @classmethod
    def of(cls, name: str, annotation: Any, default: Any = None, description: str = "") -> Parameter:
        """Read one keyword parameter of a signature; the range is part of its annotation."""
        constraint = None
        if get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
            constraint = next((item for item in metadata if isinstance(item, Interval | Coerce)), None)
        return cls(name, default, annotation, constraint, description)

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    @property
    def expected(self) -> str:
        """The values that it takes, in words."""
        if isinstance(self.constraint, Coerce):
            return str(self.constraint)
        if get_origin(self.type) is Literal:
            return f"one of {', '.join(map(repr, get_args(self.type)))}"
        plain = plain_type(self.type)
        words = _TYPES.get(plain, str(plain))
        if self.constraint is not None:
            return f"{words} {self.constraint}"
        return "a finite number" if plain is float else words

    def checked(self, loss: str, value: Any) -> Any:
        """The value to hand to the loss; TypeError if its type is wrong, ValueError if it is out of range."""
        try:
            value = from_config(value, *SCHEDULES)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{loss}: {self.name}: {error}") from error
        if isinstance(value, Schedule) and plain_type(self.type) is float:
            for end in (value.start, value.end):
                self.checked(loss, end)
            return value
        try:
            return self._convert(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            # A state or a function of the loss's author may say more.
            reason = f" ({shown(str(error))})" if str(error) else ""
            message = f"{loss}: {self.name}: got {shown(value)}, expected {self.expected}"
            raise kind(message + (reason if isinstance(self.constraint, Coerce) else "")) from error

    def _convert(self, value: Any) -> Any:
        if isinstance(value, Schedule):
            raise TypeError
        if isinstance(self.constraint, Coerce):
            return self.constraint.function(value)
        if value is None:
            if type(None) not in get_args(self.type):
                raise TypeError
            return value
        if get_origin(self.type) is Literal:
            # 1.0 == 1, so compare types too.
            equal = [one for one in get_args(self.type) if isinstance(value, type(one)) and value == one]
            if not equal:
                raise ValueError
            return equal[0]
        # As Python's own type, which repr() writes so that `get` can read it.
        take = _TAKERS.get(plain_type(self.type))
        value = value if take is None else take(self.name, value)
        if isinstance(self.constraint, Interval) and value not in self.constraint:
            raise ValueError
        return value


def plain_type(annotation: Any) -> Any:
    """A type without None, if that leaves one type: float for `float | None`."""
    if get_origin(annotation) in (Union, type(int | str)):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return members[0] if len(members) == 1 else annotation
    return annotation


def check(
    loss: str, parameters: Mapping[str, Parameter], values: Mapping[str, Any], modifiers: Iterable[str] = ()
) -> dict[str, Any]:
    """All hyperparameters of a loss: the values given, checked, and the defaults of the rest.

    Raises as `Parameter.checked` does; TypeError if a name is unknown (the hint lists the modifiers) or missing.
    """
    for name in values:
        if name not in parameters:
            hint = _hint(name, [*parameters], [*modifiers])
            raise TypeError(f"{loss}: unknown hyperparameter {name!r}{hint}")
    for name, parameter in parameters.items():
        if name not in values and parameter.required:
            meaning = parameter.description or "a value"
            raise TypeError(f"{loss}: missing hyperparameter {name!r}, expected {meaning}")
    return {
        name: parameter.checked(loss, values.get(name, parameter.default))
        for name, parameter in parameters.items()
    }


def _hint(name: str, parameters: list[str], modifiers: list[str]) -> str:
    close = difflib.get_close_matches(name, parameters + modifiers, n=1)
    takes = f"it takes {', '.join(map(repr, parameters))}" if parameters else "it takes none"
    admits = f"; and the modifiers {', '.join(modifiers)}" if modifiers else ""
    meant = f"; did you mean {close[0]!r}" if close else ""
    return f"{meant}; {takes}{admits}"


def _text(name: str, value: Any) -> str:
    return str.__str__(instance(name, value, str, "a string"))


_TAKERS: Mapping[type, Callable[[str, Any], Any]] = {float: real, int: integer, bool: flag, str: _text}
