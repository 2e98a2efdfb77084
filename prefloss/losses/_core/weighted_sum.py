"""Sums of losses, as `0.8*dpo + 0.2*bco_pair + 1.0*nll`; each term keeps its own mask, divisor and metric."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from prefloss.arguments import instance, real, shown
from prefloss.feedback import Feedback, Labels, Pairs, convert
from prefloss.losses._core.loss import Evaluation, Loss, Term
from prefloss.losses._core.rewards import ImplicitReward
from prefloss.losses._core.spec import LossSpec
from prefloss.losses._core.state import State


class WeightedSum(Loss):
    """A weighted sum of losses on the same feedback; terms that take labels see each side of a pair as a label.

    Args:
        terms: Weight and loss of each term.

    Raises:
        TypeError: If a term is not a weight and a loss, or the terms take feedback that cannot come from one batch.
        ValueError: If there is no term, a weight is not above 0, or two terms share one state.

    Example:
        >>> loss = prefloss.get("0.8*dpo(beta=0.1) + 0.2*hinge(beta=0.1)")
        >>> loss.mean(prefloss.Pairs.of(chosen=[1.5], rejected=[-1.0]))
        tensor(0.6108)
    """

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        instance("terms", terms, Sequence, "a list of weights and losses")
        self._terms = tuple(_term(place, term) for place, term in enumerate(terms))
        if not self._terms:
            raise ValueError("terms: got none, expected a weight and a loss for each term")
        states = [id(state) for _, loss in self._terms for state in loss.state.values()]
        if len(set(states)) < len(states):
            raise ValueError(
                "terms: got two with one state, which would move twice, expected a loss of its own for each"
            )
        super().__init__(_spec_of(self._terms), {})

    @property
    def terms(self) -> tuple[Term, ...]:
        """Weight and loss of each term."""
        return self._terms

    @property
    def term_names(self) -> tuple[str, ...]:
        """The terms' names, numbered where a loss stands twice."""
        names = [loss.name for _, loss in self.terms]
        return tuple(
            name if names.count(name) == 1 else f"{name}_{names[:place].count(name) + 1}"
            for place, name in enumerate(names)
        )

    def replaced(self, **changes: Any) -> Loss:
        """Refused: a sum has no hyperparameters of its own."""
        raise TypeError(
            f"{self.name}: got {sorted(changes)} for a sum of losses, expected changes of its terms"
        )

    @property
    def beta(self) -> float | None:
        """The KL strength of the first term that has one."""
        return next((loss.beta for _, loss in self.terms if loss.beta is not None), None)

    @property
    def reward(self) -> ImplicitReward:
        """That of the terms that have one; terms without, such as `nll`, do not change it.

        Raises:
            ValueError: If no term has a reward, or two have different ones.

        Example:
            >>> prefloss.get("dpo(beta=0.1) + 1.0*nll").reward
            β h, beta=0.1
        """
        found: dict[str, ImplicitReward] = {}
        for name, (_, loss) in zip(self.term_names, self.terms, strict=True):
            if not isinstance(loss.spec.reward, str):
                found[name] = loss.reward
        if not found:
            return self.terms[0].loss.reward
        (first, reward), *others = found.items()
        for name, other in others:
            if other != reward:
                raise ValueError(
                    f"loss: got a sum whose terms imply different rewards, {first} ({reward}) and {name} ({other}); "
                    "expected one of the terms"
                )
        return reward

    @property
    def needs(self) -> frozenset[str]:
        """What any term needs."""
        return frozenset().union(*(loss.needs for _, loss in self.terms))

    @property
    def couples_batch(self) -> bool:
        """Whether in any term an example's loss depends on the others of its batch."""
        return any(loss.couples_batch for _, loss in self.terms)

    @property
    def reads_mismatched(self) -> bool:
        """Whether any term reads completions under prompts they do not belong to."""
        return any(loss.reads_mismatched for _, loss in self.terms)

    def __call__(self, feedback: Feedback) -> Tensor:
        """Weighted sum of the terms' values, [n]; an example that a term leaves out adds 0 there.

        The mean of these is not what `mean` returns when the terms count different examples.
        """
        values = [_folded(loss(convert(feedback, loss.spec.feedback)), feedback) for _, loss in self.terms]
        return sum(weight * value for (weight, _), value in zip(self.terms, values, strict=True))  # type: ignore[return-value]

    def evaluate(self, feedback: Feedback) -> Evaluation:
        """Each term on the batch, reduced by its own rule, and the weighted sum of their means."""
        parts = {
            name: loss.evaluate(convert(feedback, loss.spec.feedback))
            for name, (_, loss) in zip(self.term_names, self.terms, strict=True)
        }
        values = {name: _folded(next(iter(part.terms.values())), feedback) for name, part in parts.items()}
        means = {name: part.mean for name, part in parts.items()}
        mean = sum(weight * value for (weight, _), value in zip(self.terms, means.values(), strict=True))
        return Evaluation(mean, values, means)  # type: ignore[arg-type]

    @property
    def state(self) -> dict[str, State]:
        """The terms' states, by term and hyperparameter."""
        return {
            f"{term}.{name}": value
            for term, (_, loss) in zip(self.term_names, self.terms, strict=True)
            for name, value in loss.state.items()
        }

    def config(self) -> dict[str, Any]:
        """The expression."""
        return {"name": repr(self)}

    def __repr__(self) -> str:
        """The expression; `get(repr(loss))` gives the loss back."""
        return " + ".join(f"{weight!r}*{loss!r}" for weight, loss in self.terms)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the terms."""
        return WeightedSum, (self.terms,)


def _term(place: int, term: Any) -> Term:
    name = f"terms[{place}]"
    if not isinstance(term, tuple | list) or len(term) != 2:
        raise TypeError(f"{name}: got {shown(term)}, expected a weight and a loss")
    weight, loss = term
    instance(f"{name}[1]", loss, Loss, "a Loss as prefloss.get(...) gives")
    return Term(real(f"{name}[0]", weight, above=0), loss)


def _spec_of(terms: Sequence[Term]) -> LossSpec:
    specs = [loss.spec for _, loss in terms]
    kinds = {spec.feedback for spec in specs}
    if len(kinds) > 1 and kinds != {Pairs, Labels}:
        listed = ", ".join(f"{spec.name} takes {spec.feedback.__name__}" for spec in specs)
        raise TypeError(f"terms: got losses of different feedback ({listed}), expected one kind")

    def over(combine: Callable[[Any], Any], *traits: str) -> dict[str, Any]:
        return {trait: combine([getattr(spec, trait) for spec in specs]) for trait in traits}

    return LossSpec(
        name=" + ".join(f"{weight:g}*{loss.name}" for weight, loss in terms),
        function=_no_function,
        feedback=Pairs if Pairs in kinds else kinds.pop(),
        parameters=types.MappingProxyType({}),
        summary="Weighted sum of losses.",
        # The weights decide about holds_chosen; prefloss.diagnosis.resists_falling measures.
        **over(all, "separable", "difference_only", "monotone", "holds_chosen"),
        **over(any, "needs_reference", "stateful"),
        **over(lambda sets: frozenset().union(*sets), "needs", "reads"),
    )


def _no_function(feedback: Feedback, **parameters: Any) -> Tensor:
    raise TypeError("a sum of losses has no function of its own; call its terms")


def _folded(values: Tensor, feedback: Feedback) -> Tensor:
    """Values by example: labels made from pairs fold back, so that each pair has the mean of its two."""
    return values if values.shape == feedback.shape else values.reshape(2, *feedback.shape).mean(0)
