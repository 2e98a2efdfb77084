"""The loss under test: fresh copies of it, feedback that fits it, and failures that say what to change."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Rankings
from prefloss.hyperparameters import Coerce, Draws, Interval, Parameter, State, plain_type
from prefloss.registry import Loss, LossSpec, get, quiet, registered, spec_from, specs
from prefloss.testing.draws import Recipe, draw
from prefloss.testing.fields import select, trainable, with_leaves
from prefloss.testing.outcomes import CannotRun, CheckFailed, Hint

Checkable = Loss | LossSpec | str | Callable[..., Tensor]
"""What can be checked: a loss, its spec, its name, or its function."""

Shown = Tensor | str
"""What a message shows: numbers, or text as it is."""

MAX_EXAMPLES = 25
"""Draws that a check makes by default."""

MAGNITUDES = (10.0, 1.0, 100.0, 2000.0)
"""Largest log-ratios of the draws in which a dependence is searched, nats, one after the other."""

SEARCHED = 40
"""Batches that a search looks at before it concludes that there is nothing to find."""

ROUNDING, DEPENDENCE = 1e-8, 1e-6
"""Differences of float64 values, relative to their size: below one is rounding, above the other a dependence."""


def close(first: Tensor, second: Tensor, relative: float = ROUNDING) -> bool:
    """Whether two tensors agree up to rounding; NaN agrees with nothing."""
    if first.shape != second.shape:
        return False
    first, second = first.detach().double(), second.detach().double()
    size = torch.maximum(first.abs(), second.abs()).clamp(min=1)
    return bool(((first == second) | ((first - second).abs() / size <= relative)).all())


def differs(first: Tensor, second: Tensor) -> bool:
    """Whether some finite value differs by more than rounding can explain; `extremes` reports those that are not."""
    finite = torch.isfinite(first) & torch.isfinite(second)
    return not close(first[finite], second[finite], DEPENDENCE)


def shown(values: Shown) -> str:
    """Numbers as messages show them; text as it is."""
    if isinstance(values, str):
        return values
    numbers = [float(f"{value:.8g}") for value in values.flatten().tolist()]
    return repr(numbers[0] if values.ndim == 0 else numbers)


class Subject:
    """A loss while it is checked.

    Attributes:
        spec: What it declares.
        loss: A copy that is never called, so that its state stays what it was.
        check: Name of the check that runs.
        examples: Draws that a check makes.
        change: What a loss that fails the check should change.
    """

    def __init__(
        self, loss: Loss, check: str = "loss", examples: int = MAX_EXAMPLES, change: str = ""
    ) -> None:
        self.spec, self.loss = loss.spec, copy.deepcopy(loss)
        self.check, self.examples, self.change = check, examples, change

    @property
    def fields(self) -> frozenset[str]:
        """What it needs or reads."""
        return self.loss.needs | self.spec.reads

    @property
    def reads_rows(self) -> bool:
        """Whether it reads values of single tokens."""
        return any(name.startswith("per_token") for name in self.fields)

    @property
    def reads_scores(self) -> bool:
        """Whether it reads scores; a ranking always has them."""
        return self.spec.feedback is Rankings or "scores" in self.fields

    @property
    def is_sum(self) -> bool:
        """Whether it is a sum of losses, each of which counts its own examples."""
        return self.loss.terms[0].loss is not self.loss

    @property
    def draws_by_place(self) -> bool:
        """Whether an example's random numbers depend on its place in the batch; never in a separable loss."""
        return not self.spec.separable and any(isinstance(state, Draws) for state in self.loss.state.values())

    def fresh(self, **changes: Any) -> Loss:
        """The loss with its first state, in training; `changes` replace hyperparameters."""
        return (self.loss.replaced(**changes) if changes else copy.deepcopy(self.loss)).train()

    def trained(self, *batches: Feedback, **changes: Any) -> Loss:
        """The fresh loss after some batches."""
        loss = self.fresh(**changes)
        for feedback in batches if loss.state else ():
            self.detached(loss, feedback)
        return loss

    @cached_property
    def settled(self) -> Loss:
        """The loss in evaluation, its state moved by one batch."""
        return self.trained(self.seeded(11, size=4)).eval()

    @property
    def modes(self) -> dict[str, Loss]:
        """The loss in training and in evaluation, which are the same where it keeps no state."""
        training = {"training": self.fresh()} if self.loss.state else {}
        return {**training, "evaluation": self.settled}

    def other_values(self, name: str) -> list[Any]:
        """Other values of a hyperparameter, within its range; none where only code or an object can say them."""
        parameter, now = self.spec.parameters[name], self.loss.params[name]
        if isinstance(now, State | Callable):
            return []
        kind = plain_type(parameter.type)
        kind = type(now) if kind is Any or isinstance(parameter.constraint, Coerce) else kind
        values = [None] if now is not None and type(None) in get_args(parameter.type) else []
        if get_origin(kind) is Literal:
            values += get_args(kind)
        elif kind is bool:
            values += [not now]
        elif kind is str:
            values += self._written_in_its_code
        elif kind in (int, float):
            around = 1 if now is None or isinstance(now, str) else now
            numbers = (2 * around, around / 2, around + 1, around - 1, 0.3, 0.7)
            values += list(dict.fromkeys(map(kind, numbers)))
        elif isinstance(now, tuple | list) and all(isinstance(number, int | float) for number in now):
            values += [type(now)(2 * number + 1 for number in now)]
        return [value for value in values if value != now and self._takes(name, value)][:3]

    @cached_property
    def _written_in_its_code(self) -> list[str]:
        """The strings in the code of the function: the choices that it knows, where its signature does not say them."""
        constants = getattr(inspect.unwrap(self.spec.function), "__code__", None)
        found = list(constants.co_consts) if constants else []
        for constant in found:
            found += (
                constant if isinstance(constant, tuple | frozenset) else getattr(constant, "co_consts", ())
            )
        return [constant for constant in found if isinstance(constant, str) and constant.isidentifier()]

    def _takes(self, name: str, value: Any) -> bool:
        """Whether the loss can be built and called with this value; code may refuse more than a range can say."""
        try:
            loss = self.fresh(**{name: value})
            if isinstance(value, str) or isinstance(self.spec.parameters[name].constraint, Coerce):
                loss.eval()(self.seeded(5, size=3))
        except Exception:
            return False
        return True

    def recipe(self, absent: frozenset[str] = frozenset(), **options: Any) -> Recipe:
        """What to draw for this loss: all that it reads except `absent`; `options` as of `Recipe`."""
        reference = options.pop("reference", None)
        reference = self.reads_reference if reference is None else reference
        return Recipe(**{"fields": self.fields - absent, "reference": reference, **options})

    def seeded(self, seed: int, absent: frozenset[str] = frozenset(), **options: Any) -> Feedback:
        """Feedback from a seed, with all that the loss reads except `absent`."""
        return draw(random.Random(seed), self.spec.feedback, self.recipe(absent, **options))

    @cached_property
    def reads_reference(self) -> bool:
        """Whether it needs reference log-probs: as declared, or in the form that its hyperparameters choose."""
        if self.spec.needs_reference:
            return True
        return not self._works(reference=False) and self._works(reference=True)

    @cached_property
    def absences(self) -> list[frozenset[str]]:
        """Which of the fields that it reads may be left out: nothing, or any one without which it works."""
        optional = sorted(self.spec.reads - self.loss.needs - {"tokens"})
        absences = [frozenset({name}) for name in optional]
        return [frozenset(), *(absent for absent in absences if self._works(absent))]

    def absence(self, turn: int) -> frozenset[str]:
        """What to leave out in this turn: each possible absence after the other."""
        return self.absences[turn % len(self.absences)]

    def searched(self, count: int = SEARCHED, **options: Any) -> Iterator[Feedback]:
        """Draws in which to look for a dependence: of all magnitudes, with and without what may be absent."""
        for turn in range(count):
            defaults = {"size": 4, "magnitude": MAGNITUDES[turn // 2 % len(MAGNITUDES)]}
            yield self.seeded(100 + turn, self.absence(turn), **{**defaults, **options})

    def call(self, function: Callable[[Feedback], Tensor], feedback: Feedback) -> Tensor:
        """What the loss, or its mean, returns; CannotRun if it raises or returns no tensor."""
        try:
            result = function(feedback)
        except Exception as error:
            needs, reads = (
                ", ".join(sorted(names)) or "nothing" for names in (self.loss.needs, self.spec.reads)
            )
            reference = "a reference" if self.spec.needs_reference else "no reference"
            problem = (
                f"call: got {type(error).__name__}: {error}, expected values\n  It takes "
                f"{self.spec.feedback.__name__} with {reference}, declares needs: {needs}; reads: {reads}."
            )
            raise CannotRun(self.spec.name, self.check, problem, feedback) from error
        if not isinstance(result, Tensor):
            problem = f"call: got {type(result).__name__}, expected a tensor, one value per example"
            raise CannotRun(self.spec.name, self.check, problem, feedback)
        return result

    def detached(self, loss: Loss, feedback: Feedback) -> Tensor:
        """The loss of each example, without gradient."""
        with torch.no_grad():
            return self.call(loss, feedback)

    def settled_values(self, feedback: Feedback) -> Tensor:
        """The settled loss of each example, without gradient."""
        return self.detached(self.settled, feedback)

    def slopes(self, value: Tensor, leaves: dict[str, Tensor], feedback: Feedback) -> dict[str, Tensor]:
        """Gradient of a scalar to each leaf, 0 where there is none; CannotRun if the backward pass raises."""
        if not value.requires_grad:
            return {path: torch.zeros_like(leaf) for path, leaf in leaves.items()}
        inputs = tuple(leaves.values())
        try:
            gradients = torch.autograd.grad(
                value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        except Exception as error:
            problem = (
                f"backward: got {type(error).__name__}: {error}, expected a gradient; use no in-place operation "
                "(x += y, x.clamp_(), x[i] = y), and look at backward() of a custom autograd function"
            )
            raise CannotRun(self.spec.name, self.check, problem, feedback) from error
        return dict(zip(leaves, gradients, strict=True))

    def gradient(self, loss: Loss, feedback: Feedback, mean: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss (or the sum of the values) and its gradient to all that may have one, by path."""
        attached, leaves = with_leaves(feedback, trainable(feedback))
        value = self.call(loss.mean, attached) if mean else self.call(loss, attached).sum()
        return value.detach(), self.slopes(value, leaves, feedback)

    def results(self, loss: Loss, feedback: Feedback) -> dict[str, Tensor]:
        """The mean loss and its gradients, by the names that messages use."""
        mean, gradients = self.gradient(loss, feedback)
        return {"mean": mean, **{f"gradient of {path}": slope for path, slope in gradients.items()}}

    def failed(
        self, what: str, got: Shown, expected: Shown, feedback: Feedback | None = None, change: str = ""
    ) -> CheckFailed:
        """A failure of this check, to raise; `feedback` shows it, `change` replaces the check's own hint."""
        change = change or self.change
        problem = f"{what}: got {shown(got)}, expected {shown(expected)}{f'; {change}' if change else ''}"
        return CheckFailed(self.spec.name, self.check, problem, feedback)

    def no_effect(self, what: str, change: str) -> CheckFailed:
        """A failure, to raise, of values that no batch of a search changed."""
        return self.failed(what, f"the same in {SEARCHED} batches", "other ones somewhere", change=change)

    def expect(
        self,
        what: str,
        got: Tensor,
        expected: Tensor,
        feedback: Feedback,
        change: str = "",
        exactly: bool = False,
    ) -> None:
        """Fail unless two tensors agree, up to rounding or `exactly`; other arguments as of `failed`."""
        if not (torch.equal(got, expected) if exactly else close(got, expected)):
            raise self.failed(what, got, expected, feedback, change)

    def hint(self, what: str, got: str, change: str) -> Hint:
        """A hint, to raise, that the loss has what it does not declare."""
        return Hint(f"{what}: got {got}; {change}")

    def expect_finite(
        self, results: Mapping[str, Tensor], where: str, feedback: Feedback, change: str = ""
    ) -> None:
        """Fail unless all results, by name, are finite."""
        for what, result in results.items():
            if not bool(torch.isfinite(result).all()):
                raise self.failed(f"{what} {where}", result, "finite numbers", feedback, change)

    def expect_zero(self, results: Mapping[str, Tensor], where: str, feedback: Feedback) -> None:
        """Fail unless all results, by name, are 0."""
        for what, result in results.items():
            if bool((result != 0).any()):
                raise self.failed(f"{what} {where}", result, torch.zeros_like(result), feedback)

    def narrowed(self, feedback: Feedback, body: Callable[[Feedback], Any]) -> None:
        """Call `body` on the feedback; if it fails, fail on the first single example that shows it, or on all."""
        try:
            body(feedback)
            return
        except CheckFailed as error:
            failure = error
        for place in range(feedback.shape[0]):
            body(select(feedback, torch.tensor([place])))
        raise failure

    def fails(self, feedback: Feedback, body: Callable[[Feedback], Any]) -> bool:
        """Whether `body` fails on the feedback; a loss that raises is a failure of the check itself."""
        try:
            body(feedback)
        except CannotRun:
            raise
        except CheckFailed:
            return True
        return False

    def _works(self, absent: frozenset[str] = frozenset(), **options: Any) -> bool:
        try:
            self.fresh()(self.seeded(5, absent, size=3, **options))
        except Exception:
            return False
        return True


@contextmanager
def under_test(spec: LossSpec) -> Iterator[None]:
    """Register a loss inside a `with` block, and silence the warnings that unusual feedback causes."""
    with registered(spec), quiet():
        yield


def as_loss(loss: Checkable, **traits: Any) -> Loss:
    """A loss to check: hyperparameters without a default get a value within their range.

    Args:
        loss: A loss, its spec, its name or expression, or a function, registered or not.
        **traits: Of a function that is not registered, as `register` takes them.

    Raises:
        TypeError: If it is none of these, or there are traits beside a loss that has its own.

    Example:
        >>> def slope(pairs: prefloss.Pairs, *, beta: float = 0.1) -> torch.Tensor:
        ...     return -beta * pairs.margin()
        >>> as_loss(slope, difference_only=True, monotone=True)
        slope(beta=0.1)
    """
    if callable(loss) and not isinstance(loss, Loss):
        known = next((spec for spec in specs.values() if spec.function is loss), None)
        loss, traits = known or spec_from(loss, **traits), traits if known else {}
    if traits:
        raise TypeError(f"traits: got {sorted(traits)} beside {loss!r}, expected none: it has its own")
    if isinstance(loss, str):
        loss = specs[loss] if loss in specs else get(loss)
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, LossSpec):
        raise TypeError(f"loss: got {loss!r}, expected a loss, its spec, its name or its function")
    required = {name: parameter for name, parameter in loss.parameters.items() if parameter.required}
    with under_test(loss):
        return get(loss.name, **{name: _within(parameter) for name, parameter in required.items()})


def _within(parameter: Parameter) -> Any:
    if not isinstance(parameter.constraint, Interval):
        return 0.5
    return next((value for value in (0.5, 1.5, 0.05, 5.0, -0.5) if value in parameter.constraint), 1)
