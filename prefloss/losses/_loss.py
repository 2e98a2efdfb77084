"""A loss with its hyperparameters bound: what `prefloss.get` returns."""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefloss import feedback as _feedback
from prefloss.losses import _reduce

if TYPE_CHECKING:
    from prefloss.losses._registry import LossSpec

_CONVERSIONS = {
    ("Rankings", "Pairs"): "convert with rankings.to_pairs('best_worst' | 'adjacent' | 'all')",
    ("Rankings", "Labels"): "convert with rankings.to_pairs(...).to_labels()",
    ("Pairs", "Labels"): "convert with pairs.to_labels()",
}


class Loss:
    """A registered loss with checked hyperparameters.

    Attributes:
        spec: What the loss is and needs.
        params: Its hyperparameters, read-only.

    Example:
        >>> dpo = prefloss.get("dpo", beta=0.1)
        >>> pairs = prefloss.Pairs.of(chosen=[1.5], rejected=[-1.0])
        >>> dpo(pairs)
        tensor([0.5759])
        >>> dpo.mean(pairs)
        tensor(0.5759)
    """

    def __init__(self, spec: LossSpec, params: Mapping[str, Any]) -> None:
        self.spec = spec
        self.params = types.MappingProxyType(dict(params))

    @property
    def name(self) -> str:
        """The loss's id in the registry."""
        return self.spec.name

    @property
    def beta(self) -> float | None:
        """The KL strength that trainers call beta, whatever the paper calls it; None if the loss has none."""
        return None if self.spec.beta is None else self.params[self.spec.beta]

    def __call__(self, feedback: _feedback.Feedback) -> Tensor:
        """Loss of each example, [n]: times its weight, and 0 where a completion is empty.

        Args:
            feedback: Of the kind the loss takes (`spec.feedback`).

        Raises:
            TypeError: If the feedback is of another kind; the message names the conversion.
            ValueError: If the loss needs something that the feedback lacks, or does not return one value per example.
        """
        self._check(feedback)
        values = self.spec.function(feedback, **self.params)
        if values.shape != feedback.shape:
            raise ValueError(
                f"{self.name}: got values of shape {list(values.shape)}, wanted {list(feedback.shape)}: "
                "one per example, not reduced"
            )
        return _reduce.weigh(values, feedback)

    def mean(self, feedback: _feedback.Feedback) -> Tensor:
        """Mean loss over the examples that count, a scalar; warns once if some have an empty completion.

        Raises:
            TypeError: As calling the loss does.
            ValueError: As calling the loss does.
        """
        return self.reduce(self(feedback), feedback)

    def reduce(self, values: Tensor, feedback: _feedback.Feedback) -> Tensor:
        """Mean of the values that calling the loss gave for `feedback`: their sum over the examples that count."""
        warn_if_empty(feedback)
        return _reduce.mean(values, feedback)

    @property
    def state(self) -> dict[str, Any]:
        """The hyperparameters that keep a state between calls (they have a `state_dict`)."""
        return {name: value for name, value in self.params.items() if hasattr(value, "state_dict")}

    def state_dict(self) -> dict[str, Any]:
        """State kept between calls; empty for a stateless loss."""
        return {name: value.state_dict() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: If the state is of a loss that keeps other things.
        """
        if state.keys() != self.state.keys():
            raise ValueError(f"state: got {sorted(state)}, wanted {sorted(self.state)} as {self!r} keeps")
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

    def __repr__(self) -> str:
        """Name and every hyperparameter, so that a run can be repeated."""
        written = ", ".join(f"{name}={value!r}" for name, value in self.params.items())
        return f"{self.name}({written})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: the registry, not the file, holds the function."""
        return _rebuild, (self.name, dict(self.params))

    def _check(self, feedback: _feedback.Feedback) -> None:
        wanted = self.spec.feedback
        if not isinstance(feedback, wanted):
            got = type(feedback).__name__
            hint = _CONVERSIONS.get((got, wanted.__name__))
            raise TypeError(
                f"{self.name}: feedback: got {got}, wanted {wanted.__name__}{f'; {hint}' if hint else ''}"
            )
        if self.spec.needs_reference and any(part.reference is None for part in feedback.parts):
            raise ValueError(
                f"{self.name}: reference: got None, wanted reference log-probs: the loss reads log-ratios"
            )


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
            stacklevel=3,
        )


class _Warned:
    empty = False


def _rebuild(name: str, params: dict[str, Any]) -> Loss:
    from prefloss.losses._registry import get

    return get(name, **params)
