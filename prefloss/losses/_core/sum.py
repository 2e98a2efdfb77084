"""Sums of losses: `get("0.8*dpo + 0.2*bco_pair + 1.0*nll")`; each term keeps its own mask, divisor and metric."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs
from prefloss.losses._core.loss import Evaluation, Loss, Term
from prefloss.losses._core.registry import LossSpec
from prefloss.losses._core.state import State


class Composite(Loss):
    """A weighted sum of losses on the same feedback; labelled losses among pair losses see each side as a vote.

    Args:
        terms: Weight and loss of each term.

    Raises:
        TypeError: If the terms take feedback that cannot come from one batch.

    Example:
        >>> loss = prefloss.get("0.8*dpo(beta=0.1) + 0.2*hinge(beta=0.1)")
        >>> loss.mean(prefloss.Pairs.of(chosen=[1.5], rejected=[-1.0]))
        tensor(0.6108)
    """

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        self._terms = tuple(Term(weight, loss) for weight, loss in terms)
        super().__init__(_spec_of(self._terms), {})
        self._names = tuple(_distinct([loss.name for _, loss in self._terms]))

    @property
    def terms(self) -> tuple[Term, ...]:
        """Weight and loss of each term."""
        return self._terms

    @property
    def term_names(self) -> tuple[str, ...]:
        """The terms' names, numbered where a loss stands twice."""
        return self._names

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
    def needs(self) -> frozenset[str]:
        """What any term needs."""
        return frozenset().union(*(loss.needs for _, loss in self.terms))

    def __call__(self, feedback: Feedback) -> Tensor:
        """Weighted sum of the terms' values, [n]; an example that a term leaves out adds 0 there.

        The mean of these is not what `mean` returns when the terms count different examples.
        """
        values = [_per_example(loss(_seen_by(loss, feedback)), feedback) for _, loss in self.terms]
        return sum(weight * value for (weight, _), value in zip(self.terms, values, strict=True))  # type: ignore[return-value]

    def evaluate(self, feedback: Feedback) -> Evaluation:
        """Each term on the batch, reduced by its own rule, and the weighted sum of their means."""
        found = [loss.evaluate(_seen_by(loss, feedback)) for _, loss in self.terms]
        values = {
            key: _per_example(next(iter(part.terms.values())), feedback)
            for key, part in zip(self._names, found, strict=True)
        }
        means = {key: part.mean for key, part in zip(self._names, found, strict=True)}
        total = sum(weight * part.mean for (weight, _), part in zip(self.terms, found, strict=True))
        return Evaluation(total, values, means)  # type: ignore[arg-type]

    @property
    def state(self) -> dict[str, State]:
        """The terms' states, by term and hyperparameter."""
        return {
            f"{key}.{name}": value
            for key, (_, loss) in zip(self._names, self.terms, strict=True)
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
        return Composite, (self.terms,)


def from_terms(terms: Sequence[tuple[float, Loss]]) -> Loss:
    """The weighted sum of losses; a single term of weight 1 is the loss itself."""
    terms = list(terms)
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1.0 else Composite(terms)


def _spec_of(terms: Sequence[tuple[float, Loss]]) -> LossSpec:
    specs = [loss.spec for _, loss in terms]
    kinds = {spec.feedback for spec in specs}
    if len(kinds) > 1 and kinds != {Pairs, Labels}:
        listed = ", ".join(f"{spec.name} takes {spec.feedback.__name__}" for spec in specs)
        raise TypeError(f"terms: got losses of different feedback ({listed}), expected one kind")
    return LossSpec(
        name=" + ".join(f"{weight:g}*{loss.name}" for weight, loss in terms),
        function=_no_function,
        feedback=Pairs if Pairs in kinds else kinds.pop(),
        parameters=types.MappingProxyType({}),
        needs_reference=any(spec.needs_reference for spec in specs),
        separable=all(spec.separable for spec in specs),
        difference_only=all(spec.difference_only for spec in specs),
        monotone=all(spec.monotone for spec in specs),
        stateful=any(spec.stateful for spec in specs),
        needs=frozenset().union(*(spec.needs for spec in specs)),
        reads=frozenset().union(*(spec.reads for spec in specs)),
        summary="Weighted sum of losses.",
    )


def _no_function(feedback: Feedback, **parameters: Any) -> Tensor:
    raise TypeError("a sum of losses has no function of its own; call its terms")


def _seen_by(loss: Loss, feedback: Feedback) -> Feedback:
    if loss.spec.feedback is Labels and isinstance(feedback, Pairs):
        return feedback.to_labels()
    return feedback


def _per_example(values: Tensor, feedback: Feedback) -> Tensor:
    """Votes made from pairs fold back: each pair gets the mean of its two."""
    if values.shape == feedback.shape:
        return values
    return values.reshape(2, *feedback.shape).mean(0)


def _distinct(names: list[str]) -> list[str]:
    seen: Mapping[str, int] = {name: names.count(name) for name in names}
    return [
        name if seen[name] == 1 else f"{name}_{names[:place].count(name) + 1}"
        for place, name in enumerate(names)
    ]
