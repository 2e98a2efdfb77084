"""Which registered loss does a function compute, and with which hyperparameters?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefloss.feedback import Feedback, has
from prefloss.registry import Loss, LossSpec, admitted, quiet, specs
from prefloss.testing.fitting import Goal, families, fit
from prefloss.testing.probed import Measured, Probed, measure


@dataclass(frozen=True)
class Identity:
    """What a function computes; `str()` of it is one sentence.

    Attributes:
        loss: The registered loss with its hyperparameters, or None if it is none of them.
        equals: Other losses that are the same function, with their hyperparameters, as far as the fit found them.
        nearest: The loss whose gradient is nearest; `loss`, if there is one.
        distance: Largest relative difference between its gradient and the function's, on feedback that took no part
            in the fit.
        factor: The function is this times the loss; negative for a reversed sign.
        offset: ... plus this; a constant, which has no gradient.
        returns: "each" for one value per example, "mean" or "sum" for one of the batch.
        compared: How many losses were fitted.
    """

    loss: Loss | None
    equals: tuple[Loss, ...]
    nearest: Loss
    distance: float
    factor: float
    offset: float
    returns: str
    compared: int

    def __bool__(self) -> bool:
        """Whether it is a registered loss."""
        return self.loss is not None

    def __str__(self) -> str:
        """The loss, how it is scaled, and its equals; or the nearest one."""
        shape = {"each": "one value per example", "mean": "the mean of a batch", "sum": "the sum of a batch"}
        factor = "" if self.factor == 1 else f"{self.factor:.6g} * "
        offset = "" if self.offset == 0 else f" {'+-'[self.offset < 0]} {abs(self.offset):.6g}"
        if self.loss is None:
            nearest = f"{factor}{_text(self.nearest)}, whose gradient differs by up to {self.distance:.2g} of its size"
            return f"none of {self.compared} losses; nearest: {nearest}"
        equals = f"; the same as {', '.join(map(_text, self.equals))}" if self.equals else ""
        return f"{factor}{_text(self.loss)}{offset}, in value and gradient: {shape[self.returns]}{equals}"


def identify(
    function: Callable[..., Any],
    *,
    feedback: type | None = None,
    among: Iterable[str] | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Identity:
    """Which registered loss a function computes, in value and gradient, or that it is none.

    Continuous hyperparameters are fitted by least squares from several starts, discrete ones tried one by one. What
    fits has to agree again on other feedback.

    Args:
        function: Summed log-probs (policy chosen, policy rejected, reference chosen, reference rejected), [pairs] each,
            nats, float64 -> losses, [pairs], or a scalar; of a tuple the first counts. With two parameters it reads no
            reference. Parameters `chosen_tokens` and `rejected_tokens` get token counts. Or a function of one
            argument, feedback; or a loss.
        feedback: `Pairs`, `Labels` or `Rankings`, for a function of feedback; None takes a loss's own kind, else Pairs.
        among: Names of the losses to compare with; None for all that read only what the function can read. A loss that
            keeps a state is compared with a number in place of the state, if it takes one.
        tolerance: Largest relative difference that counts as rounding; a function that computes in float32 needs 1e-3.
        seed: Of the feedback on which they are compared.

    Raises:
        TypeError: If it is no function, takes other arguments, or returns no tensor of that shape.
        ValueError: If `among` has a name that no loss has, or none that fits.

    Example:
        >>> def simpo(chosen, rejected, chosen_tokens, rejected_tokens):
        ...     margin = chosen / chosen_tokens - rejected / rejected_tokens
        ...     return -torch.nn.functional.logsigmoid(2.0 * margin - 0.5).mean()
        >>> found = identify(simpo, among=["dpo", "ipo", "simpo"])
        >>> print(found)
        simpo(beta=2, gamma=0.5), in value and gradient: the mean of a batch
    """
    probed = Probed(function, feedback)
    compared = _candidates(probed, among)
    with quiet():
        data = _Data.of(probed, seed, tolerance)
        traits = probed.traits(data.fit[0][0], tolerance)
        found = _search([spec for spec in compared if traits.admit(spec)] or compared, data)
        return replace(found, returns=data.returns, compared=len(compared))


def compare(
    function: Callable[..., Any],
    loss: Loss,
    *,
    feedback: type | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Identity:
    """Whether a function computes a loss with these hyperparameters: as `identify`, with nothing fitted.

    Example:
        >>> def dpo(chosen, rejected, reference_chosen, reference_rejected):
        ...     margin = (chosen - reference_chosen) - (rejected - reference_rejected)
        ...     return -torch.nn.functional.logsigmoid(0.1 * margin)
        >>> (
        ...     bool(compare(dpo, prefloss.get("dpo", beta=0.1))),
        ...     bool(compare(dpo, prefloss.get("dpo", beta=0.2))),
        ... )
        (True, False)
    """
    probed = Probed(function, feedback)
    if not probed.can_be(loss.spec):
        raise ValueError(f"loss: got {loss!r}, expected one that reads only what the function can read")
    with quiet():
        data = _Data.of(probed, seed, tolerance)
        return replace(data.compared(loss.eval()), returns=data.returns, compared=1)


def _candidates(probed: Probed, among: Iterable[str] | None) -> list[LossSpec]:
    """The losses to compare with: those that read only what the function can read."""
    names = list(specs if among is None else among)
    for name in names:
        if name not in specs:
            raise ValueError(f"among: got {name!r}, expected names of registered losses")
    chosen = [specs[name] for name in names if probed.can_be(specs[name])]
    if not chosen:
        raise ValueError(f"among: got {names!r}, expected losses that read only what the function can read")
    return chosen


@dataclass(frozen=True)
class _Data:
    """Feedback and what the function does on it: to fit losses to, and fresh, to compare them on."""

    fit: Sequence[tuple[Feedback, Measured]]
    fresh: Sequence[tuple[Feedback, Measured]]
    returns: str
    tolerance: float

    @classmethod
    def of(cls, probed: Probed, seed: int, tolerance: float) -> _Data:
        """Measure a function; ValueError if it has no gradient."""
        drawn = [probed.batch(seed + turn) for turn in range(3)]
        seen = [(data, probed.measured(data)) for data in drawn]
        if not any(float(measured.slopes.abs().max()) for _, measured in seen):
            raise ValueError(
                "function: got one without a gradient to the policy's log-probs, expected a loss"
            )
        return cls(seen[:1], seen[1:], probed.returns(drawn[0]), tolerance)

    def compared(self, loss: Loss, rescaled: bool = False) -> Identity:
        """How a loss does on the fresh feedback."""
        residuals, factor = Goal(self.fresh, self.tolerance, rescaled).residuals(loss)
        factor = self._near(factor)
        rests = [seen.value - factor * measure(loss.mean, data).value for data, seen in self.fresh]
        rounding = self.tolerance * max(*(abs(seen.value) for _, seen in self.fresh), 1e-6)
        offset = sum(rests) / len(rests)
        constant = max(abs(rest - offset) for rest in rests) <= rounding
        offset = 0.0 if abs(offset) <= rounding else self._near(offset)
        distance = float(residuals.abs().max())
        same = distance < self.tolerance and constant and factor != 0
        return Identity(loss if same else None, (), loss, distance, factor, offset, "", 0)

    def _near(self, number: float) -> float:
        """A number without the digits that the fit left, where it is round but for them."""
        rounded = float(f"{number:.3g}")
        return rounded if math.isclose(number, rounded, rel_tol=self.tolerance) else number


def _search(compared: Sequence[LossSpec], data: _Data) -> Identity:
    """Fit every loss: as it is, then with a factor, then with a modifier; stop where one agrees."""
    feedback = data.fit[0][0]
    plain = [(spec, None) for spec in compared]
    modified = [(spec, name) for spec in compared for name in _numeric_modifiers(spec, feedback)]
    nearest: list[Identity] = []
    for tried, rescaled in ((plain, False), (plain, True), (modified, False)):
        goal = Goal(data.fit, data.tolerance, rescaled)
        fits = [fit(family, goal) for spec, name in tried for family in families(spec, feedback, name)]
        fits.sort(key=lambda found: found[1])
        seen = [data.compared(loss, rescaled) for loss, distance in fits if distance < data.tolerance]
        agreeing = sorted((one for one in seen if one), key=lambda one: _complexity(one.nearest))
        if agreeing:
            first, *others = agreeing
            return replace(first, equals=_distinct(first.nearest, [one.nearest for one in others]))
        if fits and not rescaled:
            nearest.append(data.compared(fits[0][0]))
    return min(nearest, key=lambda one: one.distance)


def _numeric_modifiers(spec: LossSpec, feedback: Feedback) -> list[str]:
    """The modifiers with one number that a loss admits and the feedback suffices for."""
    return [
        name
        for name, modifier in admitted(spec).items()
        if modifier.parameter.type is float and all(has(feedback, need) for need in modifier.needs)
    ]


def _complexity(loss: Loss) -> tuple[int, int]:
    """Sorts a loss before its generalisations."""
    return len(loss.params), list(specs).index(loss.name)


def _distinct(first: Loss, others: Iterable[Loss]) -> tuple[Loss, ...]:
    by_name = {loss.name: loss for loss in others if loss.name != first.name}
    return tuple(by_name.values())


def _text(loss: Loss) -> str:
    shown = (f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in loss.params.items())
    return f"{loss.name}({', '.join(shown)})"
