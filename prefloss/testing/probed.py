"""A function that may be a loss, called on feedback whatever arguments it takes, and its traits as measured."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from prefloss.arguments import function as checked_function
from prefloss.arguments import shown
from prefloss.feedback import KINDS, Feedback, Pairs
from prefloss.logratios import LogRatios
from prefloss.registry import Loss, LossSpec
from prefloss.testing.draws import Recipe, draw
from prefloss.testing.fields import altered, available, map_parts, select, shifted, trainable, with_leaves

# Examples in a batch; even, so that it has two halves.
_SIZE = 12
_COUNTS = ("chosen_tokens", "rejected_tokens")


@dataclass(frozen=True)
class Measured:
    """What a function does on some feedback.

    Attributes:
        value: Its mean over the examples.
        by_path: Gradient of the mean to everything that is trained, such as `chosen.policy`; 0 where there is none.
    """

    value: float
    by_path: dict[str, Tensor]

    @property
    def slopes(self) -> Tensor:
        """The gradient, flat."""
        return torch.cat([slope.flatten() for slope in self.by_path.values()])

    def near(self, other: Measured, tolerance: float) -> bool:
        """Whether value and gradient are the same, up to rounding."""
        size = max(float(self.slopes.abs().max()), 1e-30)
        same_value = math.isclose(self.value, other.value, rel_tol=tolerance, abs_tol=tolerance * size)
        return same_value and float((self.slopes - other.slopes).abs().max()) <= tolerance * size


def measure(function: Callable[[Any], Tensor], feedback: Feedback) -> Measured:
    """Value and gradient of a function feedback -> scalar."""
    attached, leaves = with_leaves(feedback, trainable(feedback))
    value = function(attached)
    slopes: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if value.requires_grad:
        slopes = torch.autograd.grad(value, tuple(leaves.values()), allow_unused=True, materialize_grads=True)
    return Measured(float(value.detach()), dict(zip(leaves, (s.double() for s in slopes), strict=True)))


@dataclass(frozen=True)
class MeasuredTraits:
    """Traits of a function, in the words of `LossSpec`; None where values of single tokens would have to be tried."""

    needs_reference: bool
    separable: bool
    difference_only: bool | None = None
    reads_tokens: bool | None = None

    def admit(self, spec: LossSpec) -> bool:
        """Whether a loss declares these traits."""
        needs, reads = "tokens" in spec.needs, "tokens" in spec.needs | spec.reads
        return (
            spec.needs_reference == self.needs_reference
            and spec.separable == self.separable
            and self.difference_only in (None, spec.difference_only)
            and self.reads_tokens in (None, needs, reads)
        )


class Probed:
    """A function under test.

    Args:
        function: Of log-probs, or of feedback.
        kind: The feedback that it takes, or None.

    Raises:
        TypeError: If it is no function, or takes other arguments.
    """

    def __init__(self, function: Callable[..., Any], kind: type | None) -> None:
        checked_function("function", function, "a function of log-probs, or of feedback")
        if kind is not None and kind not in KINDS:
            raise TypeError(f"feedback: got {shown(kind)}, expected Pairs, Labels or Rankings")
        # A loss with a state keeps it as it is.
        held = copy.deepcopy(function).eval() if isinstance(function, Loss) else function
        self._function, names = held, _given(function)
        self.tokens = [name for name in _COUNTS if name in names]
        tensors = len(names) - len(self.tokens)
        self.takes_feedback = tensors == 1 or kind is not None or isinstance(function, Loss)
        self.kind = function.spec.feedback if isinstance(function, Loss) else kind or Pairs
        self.reference = tensors == 4
        if not self.takes_feedback and tensors not in (2, 4):
            raise TypeError(
                f"function: got one that takes {', '.join(names) or 'nothing'}, expected four log-prob tensors, two "
                "without a reference, or feedback; wrap it in a lambda that passes on the rest"
            )

    @property
    def fields(self) -> frozenset[str]:
        """What the function can read beside sums of log-probs."""
        if isinstance(self._function, Loss):
            return self._function.needs | self._function.spec.reads
        return frozenset(available(self.kind) if self.takes_feedback else ("tokens",) if self.tokens else ())

    def can_be(self, spec: LossSpec) -> bool:
        """Whether the function has what a loss needs."""
        reference = self.takes_feedback or self.reference or not spec.needs_reference
        return spec.feedback is self.kind and spec.needs <= self.fields and reference

    def batch(self, seed: int) -> Feedback:
        """Feedback with all that the function can read, from log-ratios of a tenth of a nat to those of tens."""
        recipe = Recipe(
            size=_SIZE, fields=self.fields, tokens="tokens" in self.fields, magnitude=40.0, masked=False
        )
        feedback = draw(Random(seed), self.kind, recipe)
        kept = torch.logspace(-2.5, 0, _SIZE, dtype=torch.float64)

        def shrunk(part: LogRatios) -> LogRatios:
            if part.reference is None:
                return part
            return shifted(part, policy=(kept.reshape(-1, *[1] * (part.h.ndim - 1)) - 1) * part.h)

        return map_parts(feedback, shrunk)

    def measured(self, feedback: Feedback) -> Measured:
        """Mean and gradient of the function; a sum over the batch becomes a mean."""
        size = feedback.shape[0] if self.returns(feedback) == "sum" else 1
        return measure(lambda data: self.values(data).mean() / size, feedback)

    def traits(self, feedback: Feedback, tolerance: float) -> MeasuredTraits:
        """What the function reads of this feedback."""
        seen, half = self.measured(feedback), feedback.shape[0] // 2

        def ignores(change: Callable[[LogRatios], LogRatios]) -> bool:
            return self.measured(map_parts(feedback, change)).near(seen, tolerance)

        def another_reference(part: LogRatios) -> LogRatios:
            return shifted(part, reference=-1.0 - part.policy.detach().cos())

        first = self.measured(select(feedback, torch.arange(half)))
        in_batch = {path: 2 * slope[:half] for path, slope in seen.by_path.items()}
        needs_reference = not ignores(another_reference)
        separable = first.near(Measured(first.value, in_batch), tolerance)
        if any(name.startswith("per_token") for name in self.fields):
            return MeasuredTraits(needs_reference, separable)
        # In both sides alike: by completion, or by token.
        difference_only = ignores(lambda part: shifted(part, policy=-0.7)) or (
            bool(self.tokens) and ignores(lambda part: shifted(part, policy=-0.3 * _tokens(part)))
        )
        reads_tokens = bool(self.tokens) and not self.measured(altered(feedback, "tokens", 0)).near(
            seen, tolerance
        )
        return MeasuredTraits(needs_reference, separable, difference_only, reads_tokens)

    def returns(self, feedback: Feedback) -> str:
        """What the function returns of a batch: one value for "each" example, the "mean", or the "sum"."""
        if self.values(feedback).ndim:
            return "each"
        twice = select(feedback, torch.arange(feedback.shape[0]).repeat(2))
        once, both = (float(self.values(data).detach()) for data in (feedback, twice))
        return "sum" if once and math.isclose(both, 2 * once, rel_tol=1e-4) else "mean"

    def values(self, feedback: Feedback) -> Tensor:
        """What the function returns of it, [n] or a scalar; TypeError if it is something else."""
        returned = self._function(*self._arguments(feedback), **self._counts(feedback))
        values = returned[0] if isinstance(returned, tuple | list) and returned else returned
        shapes = ([], list(feedback.shape))
        if isinstance(values, Tensor) and list(values.shape) in shapes and values.is_floating_point():
            return values
        got = shown(values) if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"function: returned {got}, expected losses of shape {shapes[1]}, or a scalar")

    def _arguments(self, feedback: Any) -> list[Any]:
        if self.takes_feedback:
            return [feedback]
        sides = (feedback.chosen, feedback.rejected)
        return [side.policy for side in sides] + [side.reference for side in sides if self.reference]

    def _counts(self, feedback: Any) -> dict[str, Tensor]:
        return {name: getattr(feedback, name.removesuffix("_tokens")).tokens for name in self.tokens}


def _tokens(part: LogRatios) -> Tensor:
    assert part.tokens is not None
    return part.tokens


def _given(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that a call gives: those without a default, token counts, and reference log-probs."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters
    if [p.kind for p in parameters.values()] == [inspect.Parameter.VAR_POSITIONAL]:
        return ["chosen", "rejected", "reference_chosen", "reference_rejected"]
    return [
        p.name
        for p in parameters.values()
        if p.name in _COUNTS or (p.kind in positional and (p.default is p.empty or p.name.startswith("ref")))
    ]
