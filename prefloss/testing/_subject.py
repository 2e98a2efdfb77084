"""The loss under test: fresh copies of it, feedback that fits it, and failures that say what to do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prefloss import registry as _registry
from prefloss.feedback import Feedback
from prefloss.losses._core import loss as _loss
from prefloss.losses._core.catalogue import _specs
from prefloss.losses._core.loss import Loss
from prefloss.losses._core.parameters import Interval, Parameter
from prefloss.losses._core.running import Draws
from prefloss.losses._core.spec import LossSpec
from prefloss.losses._core.weighted_sum import WeightedSum, _no_function
from prefloss.testing import _fields
from prefloss.testing._draws import Seeded, Wanted, draw

Checkable = Loss | LossSpec | str | Callable[..., Tensor]
"""What can be checked: a loss, its spec, its name, or its function."""

MAGNITUDES = (10.0, 1.0, 100.0, 2000.0)
"""Largest log-ratios of the draws in which a dependence is looked for, nats, one after the other."""

SEARCHED = 40
"""How many draws a search looks at before it says that there is nothing to find."""


class Skip(Exception):
    """A check that does not apply to a loss.

    Attributes:
        reason: Why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class CheckFailed(AssertionError):
    """A loss lacks a property.

    Attributes:
        loss: Name of the loss.
        property: Name of the check, without `check_`.
        problem: What was found, what was wanted, and what to change.
        feedback: The draw on which it showed, or None.
    """

    def __init__(self, loss: str, property: str, problem: str, feedback: Feedback | None = None) -> None:
        self.loss, self.property, self.problem, self.feedback = loss, property, problem, feedback
        replay = (
            "" if feedback is None else f"\n  To replay:\n    feedback = {_fields.show(feedback, ' ' * 8)}"
        )
        super().__init__(f"{loss}: {property}: {problem}{replay}")


class CannotRun(CheckFailed):
    """The loss raised, or did not return one value per example, on feedback that it says it takes."""


class Subject:
    """A loss while it is being checked.

    Attributes:
        spec: What it says of itself.
        loss: As it was given; never called, so that its state stays what it was.
        check: Name of the check that runs.
        examples: How many draws a check makes.
    """

    def __init__(self, loss: Loss, check: str = "loss", examples: int = 25) -> None:
        self.spec, self.loss, self.check, self.examples = loss.spec, copy.deepcopy(loss), check, examples

    @property
    def name(self) -> str:
        """As messages call it."""
        return self.spec.name

    @property
    def fields(self) -> frozenset[str]:
        """What it needs or reads."""
        return self.loss.needs | self.spec.reads

    @property
    def is_sum(self) -> bool:
        """Whether it is a sum of losses, each of which counts its own examples."""
        return isinstance(self.loss, WeightedSum)

    @property
    def modifiers(self) -> list[str]:
        """Names of the modifiers that change it, so that traits of the plain loss need not hold."""
        return self.loss.modifiers

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Its hyperparameters; a sum of losses has none of its own."""
        return self.spec.parameters

    @property
    def draws_by_place(self) -> bool:
        """Whether an example's random numbers depend on its place in the batch; never in a separable loss."""
        return not self.spec.separable and any(isinstance(state, Draws) for state in self.loss.state.values())

    def fresh(self, **changes: Any) -> Loss:
        """The loss with its first state, in training; `changes` replace hyperparameters."""
        if not changes:
            return copy.deepcopy(self.loss).train()
        params = {**copy.deepcopy(dict(self.loss.params)), **changes}
        return _registry.get(self.name, **params).train()

    @cached_property
    def settled(self) -> Loss:
        """The loss in evaluation, its state moved by one batch."""
        loss = self.fresh()
        if loss.state:
            self.values(loss, self.seeded(11, size=4))
        return loss.eval()

    def seeded(self, seed: int, absent: frozenset[str] = frozenset(), **wanted: Any) -> Feedback:
        """Feedback from a seed, with all that the loss reads but what is `absent`."""
        return draw(Seeded(seed), self.spec.feedback, self.wanted(absent, **wanted))

    def wanted(self, absent: frozenset[str] = frozenset(), **wanted: Any) -> Wanted:
        """What feedback this loss takes."""
        options = {"fields": self.fields - absent, **wanted}
        if "reference" not in options:
            options["reference"] = self.reads_reference
        return replace(Wanted(), **options)

    @cached_property
    def reads_reference(self) -> bool:
        """Whether it needs reference log-probs: as declared, or in the form that its hyperparameters choose."""
        if self.spec.needs_reference:
            return True
        return not self._works(self.seeded(5, size=3, reference=False)) and self._works(
            self.seeded(5, size=3, reference=True)
        )

    @cached_property
    def absences(self) -> list[frozenset[str]]:
        """Which of the fields that it reads may be left out: nothing, or any one without which it works."""
        found = [frozenset[str]()]
        for name in sorted(self.spec.reads - self.loss.needs - {"tokens"}):
            if self._works(self.seeded(5, frozenset({name}), size=3)):
                found.append(frozenset({name}))
        return found

    def searched(self, count: int = SEARCHED, **wanted: Any) -> Iterator[Feedback]:
        """Draws in which to look for a dependence: of all magnitudes, with and without what may be absent."""
        options = {"size": 4, **wanted}
        for seed in range(count):
            absent = self.absences[seed % len(self.absences)]
            magnitude = MAGNITUDES[seed // 2 % len(MAGNITUDES)]
            yield self.seeded(100 + seed, absent, **{"magnitude": magnitude, **options})

    def values(self, loss: Loss, feedback: Feedback) -> Tensor:
        """The loss of each example, or a failure that says what it raised."""
        return self._called(loss, feedback, loss)

    def mean(self, loss: Loss, feedback: Feedback) -> Tensor:
        """The mean loss, or a failure that says what it raised."""
        return self._called(loss, feedback, loss.mean)

    def detached(self, loss: Loss, feedback: Feedback) -> Tensor:
        """The loss of each example, without gradient."""
        with torch.no_grad():
            return self.values(loss, feedback)

    def failed(self, problem: str, feedback: Feedback | None = None) -> CheckFailed:
        """A failure of the check that runs; raise it."""
        return CheckFailed(self.name, self.check, problem, feedback)

    def _called(self, loss: Loss, feedback: Feedback, function: Callable[[Feedback], Tensor]) -> Tensor:
        try:
            result = function(feedback)
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}\n  It takes {_taken(self)}."
            raise CannotRun(self.name, self.check, problem, feedback) from error
        if not isinstance(result, Tensor):
            problem = f"returned {type(result).__name__}, expected a tensor, one value per example"
            raise CannotRun(self.name, self.check, problem, feedback)
        return result

    def _works(self, feedback: Feedback) -> bool:
        try:
            self.fresh()(feedback)
        except Exception:
            return False
        return True


def _taken(subject: Subject) -> str:
    needs = ", ".join(sorted(subject.loss.needs)) or "nothing"
    reads = ", ".join(sorted(subject.spec.reads)) or "nothing"
    reference = "a reference" if subject.spec.needs_reference else "no reference"
    return f"{subject.spec.feedback.__name__} with {reference}, declares needs: {needs}; reads: {reads}"


def as_loss(loss: Checkable, **traits: Any) -> Loss:
    """What is to be checked, bound: hyperparameters without a default get a value within their range.

    Args:
        loss: A loss, its spec, its name or expression, or a function, registered or not.
        **traits: Of a function that is not registered, as `register` takes them.

    Raises:
        TypeError: If it is none of these, or traits are given for a loss that has its own.

    Example:
        >>> def slope(pairs: prefloss.Pairs, *, beta: float = 0.1) -> torch.Tensor:
        ...     return -beta * pairs.margin()
        >>> as_loss(slope, difference_only=True, monotone=True)
        slope(beta=0.1)
    """
    if callable(loss) and not isinstance(loss, Loss):
        known = next((spec for spec in _registry.specs.values() if spec.function is loss), None)
        if known is None:
            name = traits.pop("name", None) or getattr(loss, "__name__", "")
            return _bound(_registry.spec_from(loss, name, **traits))
        loss = known
    if traits:
        raise TypeError(
            f"loss: got traits {sorted(traits)} beside {loss!r}, expected them only for a plain function"
        )
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, LossSpec):
        return _bound(loss)
    if isinstance(loss, str):
        return _bound(_registry.spec_of(loss)) if loss in _registry.specs else _registry.get(loss)
    raise TypeError(f"loss: got {loss!r}, expected a loss, its spec, its name or its function")


def _bound(spec: LossSpec) -> Loss:
    given = {name: _within(parameter) for name, parameter in spec.parameters.items() if parameter.required}
    with registered(spec), quiet():
        return _registry.get(spec.name, **given)


def _within(parameter: Parameter) -> Any:
    if not isinstance(parameter.constraint, Interval):
        return 0.5
    return next((value for value in (0.5, 1.5, 0.05, 5.0, -0.5) if value in parameter.constraint), 1)


@contextmanager
def registered(spec: LossSpec) -> Iterator[None]:
    """Have a loss in the registry for a while, so that its string and its pickle find it.

    Raises:
        ValueError: If another loss has its name.
    """
    if _registry.specs.get(spec.name) is spec or spec.function is _no_function:
        yield
        return
    if spec.name in _registry.specs:
        raise ValueError(
            f"name: {spec.name!r} is taken by another loss, expected a free one: pass name='...'"
        )
    _specs[spec.name] = spec
    try:
        yield
    finally:
        del _specs[spec.name]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that unusual feedback is meant to give, and as if they had never been given."""
    told = _loss._Warned.empty
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            _loss._Warned.empty = told
