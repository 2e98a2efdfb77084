"""A loss with its hyperparameters bound: what `prefloss.get` returns."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from prefloss import feedback as _feedback
from prefloss.losses._core import modifiers, needs, reduce
from prefloss.losses._core.schedules import Schedule
from prefloss.losses._core.state import State

if TYPE_CHECKING:
    from prefloss.losses._core.registry import LossSpec


class Evaluation(NamedTuple):
    """A loss on a batch.

    Attributes:
        mean: What to minimise, a scalar.
        terms: Loss of each example by term, [n]; one term unless the loss is a sum of several.
        means: Mean of each term over the examples that it counts, before its weight, scalars.
    """

    mean: Tensor
    terms: dict[str, Tensor]
    means: dict[str, Tensor]


class Term(NamedTuple):
    """One loss of a weighted sum."""

    weight: float
    loss: Loss


class Loss:
    """A registered loss with checked hyperparameters.

    Attributes:
        spec: What the loss is and needs.
        params: Its hyperparameters, and the modifiers that were given; read-only.
        stated: Those of them that the caller gave; the others are defaults. Read-only.

    Example:
        >>> dpo = prefloss.get("dpo", beta=0.1)
        >>> pairs = prefloss.Pairs.of(chosen=[1.5], rejected=[-1.0])
        >>> dpo(pairs)
        tensor([0.5759])
        >>> dpo.mean(pairs)
        tensor(0.5759)
    """

    def __init__(self, spec: LossSpec, params: Mapping[str, Any], stated: Iterable[str] = ()) -> None:
        self.spec = spec
        self.params: Mapping[str, Any] = types.MappingProxyType(dict(params))
        self.stated: Mapping[str, Any] = types.MappingProxyType({name: params[name] for name in stated})

    @property
    def terms(self) -> tuple[Term, ...]:
        """Weight and loss of each term of a sum; a plain loss is a sum of one."""
        return (Term(1.0, self),)

    @property
    def term_names(self) -> tuple[str, ...]:
        """A name for each term, all different; the keys of `Evaluation.terms`."""
        return (self.name,)

    @property
    def couples_batch(self) -> bool:
        """Whether an example's loss depends on the other examples of its batch."""
        of_batch = ("auto", "mismatched")
        return any(
            not term.spec.separable and term.params.get("kl_baseline", "auto") in of_batch
            for _, term in self.terms
        )

    @property
    def reads_mismatched(self) -> bool:
        """Whether the loss reads completions under prompts they do not belong to."""
        return any(
            "mismatched" in term.spec.reads and term.params.get("kl_baseline") in ("auto", "mismatched")
            for _, term in self.terms
        )

    def counts(self, feedback: _feedback.Feedback) -> Tensor:
        """How many examples each term counts, [terms]."""
        return torch.stack(
            [term.counted(_feedback.convert(feedback, term.spec.feedback)).sum() for _, term in self.terms]
        )

    def replaced(self, **changes: Any) -> Loss:
        """A copy with these hyperparameters in place of its own, checked as `get` does.

        Raises:
            ValueError: If a hyperparameter is out of range.
            TypeError: If one is unknown or of the wrong type.

        Example:
            >>> prefloss.get("dpo").replaced(beta=0.5)
            dpo(beta=0.5)
        """
        from prefloss.losses._core.registry import bind

        bound = bind(self.name, {**copy.deepcopy(dict(self.params)), **changes})
        return Loss(bound.spec, bound.params, stated=[*self.stated, *changes])

    @property
    def name(self) -> str:
        """The loss's id in the registry."""
        return self.spec.name

    @property
    def beta(self) -> float | None:
        """The KL strength that trainers call beta, whatever the paper calls it; None if the loss has none."""
        return None if self.spec.beta is None else _now(self.params[self.spec.beta])

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the feedback that must be there, those of its modifiers included."""
        return self.spec.needs.union(*(modifiers.MODIFIERS[name].needs for name in self._modifiers))

    def __call__(self, feedback: _feedback.Feedback) -> Tensor:
        """Loss of each example, [n]: times its weight, and 0 where it does not count.

        Args:
            feedback: Of the kind the loss takes (`spec.feedback`).

        Raises:
            TypeError: If the feedback is of another kind; the message names the conversion.
            ValueError: If the loss needs something that the feedback lacks, or does not return one value per example.
        """
        needs.check(self.name, self.spec, self.needs, feedback)
        for name in self._modifiers:
            apply = modifiers.MODIFIERS[name].apply
            if apply is not None:
                feedback = apply(feedback, _now(self.params[name]), self.beta or 1.0)
        values = self._values(feedback)
        if "label_smoothing" in self._modifiers:
            assert isinstance(feedback, _feedback.Pairs)
            flip = _now(self.params["label_smoothing"])
            values = modifiers.smoothed(values, self._values(feedback.swapped()), flip)
        return reduce.weigh(values, feedback, self.counted(feedback))

    def counted(self, feedback: _feedback.Feedback) -> Tensor:
        """True at the examples that the loss and its mean count, [n]."""
        return feedback.valid if self.spec.valid is None else self.spec.valid(feedback)

    def evaluate(self, feedback: _feedback.Feedback) -> Evaluation:
        """The loss of a batch, its terms and what to minimise; warns once if some completion is empty.

        Raises:
            TypeError: As calling the loss does.
            ValueError: As calling the loss does.
        """
        warn_if_empty(feedback)
        values = self(feedback)
        mean = reduce.mean(values, self.counted(feedback))
        return Evaluation(mean, {self.name: values}, {self.name: mean})

    def mean(self, feedback: _feedback.Feedback) -> Tensor:
        """Mean loss over the examples that count, a scalar.

        Raises:
            TypeError: As calling the loss does.
            ValueError: As calling the loss does.
        """
        return self.evaluate(feedback).mean

    @property
    def state(self) -> dict[str, State]:
        """The hyperparameters that keep a state between calls."""
        return {name: value for name, value in self.params.items() if isinstance(value, State)}

    def state_dict(self) -> dict[str, Any]:
        """State kept between calls; empty for a stateless loss."""
        return {name: value.state_dict() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: If the state is of a loss that keeps other things.
        """
        if state.keys() != self.state.keys():
            raise ValueError(f"state: got {sorted(state)}, expected {sorted(self.state)} as {self!r} keeps")
        for name, value in self.state.items():
            value.load_state_dict(state[name])

    def train(self, mode: bool = True) -> Loss:
        """Let the state move (training) or hold it still (evaluation)."""
        for value in self.state.values():
            value.train(mode)
        return self

    def eval(self) -> Loss:
        """Hold the state still, as `torch.nn.Module.eval` does."""
        return self.train(False)

    def step(self) -> None:
        """Tell the schedules that an optimizer step was made."""
        for value in self.state.values():
            value.step()

    def sync_with(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Let the state see all ranks: `all_sum` sums a tensor over them."""
        for value in self.state.values():
            value.all_sum = all_sum

    def reduce_over(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Let the state see all ranks: `all_sum` sums a tensor over them."""
        for value in self.state.values():
            value.all_sum = all_sum

    def config(self) -> dict[str, Any]:
        """Name and hyperparameters as a configuration file holds them; `get(config.pop("name"), **config)` reads it."""
        return {"name": self.name, **{name: _plain(value) for name, value in self.params.items()}}

    def __repr__(self) -> str:
        """Name and every hyperparameter; `get(repr(loss))` gives the loss back."""
        written = ", ".join(f"{name}={value!r}" for name, value in self.params.items())
        return f"{self.name}({written})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: the registry, not the file, holds the function."""
        return _rebuild, (self.name, dict(self.params), self.state_dict())

    @property
    def _modifiers(self) -> list[str]:
        return [
            name for name in modifiers.MODIFIERS if name in self.params and name not in self.spec.parameters
        ]

    def _values(self, feedback: _feedback.Feedback) -> Tensor:
        own = {name: _now(self.params[name]) for name in self.spec.parameters}
        values = self.spec.function(feedback, **own)
        if values.shape != feedback.shape:
            raise ValueError(
                f"{self.name}: got values of shape {list(values.shape)}, expected {list(feedback.shape)}: "
                "one per example, not reduced"
            )
        return values


def warn_if_empty(feedback: _feedback.Feedback) -> None:
    """Warn, once per process, that some examples have a completion without tokens and are left out."""
    if torch.compiler.is_compiling() or _Warned.empty:
        return
    empty = int((~feedback.valid).sum())
    if empty:
        _Warned.empty = True
        warnings.warn(
            f"{empty} of {feedback.valid.numel()} examples have a completion without tokens (truncated away?); "
            "they are left out of the loss and of its mean. This warning is shown once.",
            UserWarning,
            stacklevel=4,
        )


class _Warned:
    empty = False


def _now(value: Any) -> Any:
    return value.value if isinstance(value, Schedule) else value


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON keeps it; one that is code is kept as its repr, and refused when read back."""
    if isinstance(value, State):
        return value.config()
    if isinstance(value, str | int | float | bool | types.NoneType):
        return value
    return list(value) if isinstance(value, tuple) else getattr(value, "name", repr(value))


def _rebuild(name: str, params: dict[str, Any], state: dict[str, Any]) -> Loss:
    from prefloss.losses._core.registry import get

    loss = get(name, **params)
    loss.load_state_dict(state)
    return loss
