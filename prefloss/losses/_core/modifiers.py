"""Modifiers: changes that mean the same to every loss that admits them, given as further hyperparameters.

`get("hinge", label_smoothing=0.1, divergence="js")`. Each is written once; a loss that does not admit one refuses it
by name, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import torch

from prefloss.feedback import Labels, Pairs
from prefloss.losses._core import transforms
from prefloss.losses._core.parameters import Coerce, FlipProbability, Interval, Parameter, from_annotation

if TYPE_CHECKING:
    from prefloss.losses._core.registry import LossSpec


@dataclass(frozen=True)
class Modifier:
    """One modifier.

    Attributes:
        parameter: Its name, range and description.
        refusal: Why a loss does not admit it, or None if it does.
        needs: Fields of the feedback that it needs.
        apply: (feedback, value, beta) -> feedback; None for label smoothing, which evaluates the loss twice.
    """

    parameter: Parameter
    refusal: Callable[[LossSpec], str | None]
    needs: frozenset[str] = frozenset()
    apply: Callable[[Any, Any, float], Any] | None = None

    @property
    def name(self) -> str:
        """Its name among the hyperparameters."""
        return self.parameter.name


def admitted(spec: LossSpec) -> dict[str, Modifier]:
    """The modifiers that a loss admits, in the order in which they apply."""
    return {name: modifier for name, modifier in MODIFIERS.items() if refusal(spec, modifier) is None}


def refusal(spec: LossSpec, modifier: Modifier) -> str | None:
    """Why a loss does not admit a modifier, in words that follow "it"; None if it does."""
    if modifier.name in spec.parameters:
        return "has a hyperparameter of that name itself"
    return modifier.refusal(spec)


def _needs_margin(spec: LossSpec) -> str | None:
    if spec.feedback is not Pairs or not spec.difference_only:
        return "does not depend on the difference of two scores alone"
    return None


def _needs_plain_margin(spec: LossSpec) -> str | None:
    if _needs_margin(spec):
        return _needs_margin(spec)
    if spec.beta != "beta" or "tokens" in spec.needs:
        return "does not scale a margin in nats by beta"
    return "reads scores itself" if "scores" in spec.needs else None


def _no_second_smoothing(spec: LossSpec) -> str | None:
    if _needs_margin(spec):
        return _needs_margin(spec)
    if "scores" in spec.needs:
        return "reads graded preferences, which say how sure they are"
    return "has a noise level of its own (epsilon)" if "epsilon" in spec.parameters else None


def _needs_reference_margin(spec: LossSpec) -> str | None:
    if not spec.needs_reference:
        return "has no reference to diverge from"
    if spec.feedback is Pairs and any(name.startswith("per_token") for name in spec.needs):
        return "reads tokens, not sums"
    return _needs_margin(spec)


def _sums_over_tokens(spec: LossSpec) -> str | None:
    if spec.feedback not in (Pairs, Labels) or not spec.needs_reference:
        return "reads no log-ratios of single completions"
    return "reads tokens itself" if any(name.startswith("per_token") for name in spec.needs) else None


def _pairs_of_sums(spec: LossSpec) -> str | None:
    return "takes no pairs" if spec.feedback is not Pairs else _sums_over_tokens(spec)


def _keeps_pairs_apart(spec: LossSpec) -> str | None:
    if spec.feedback is not Pairs:
        return "takes no pairs"
    return None if spec.separable else "mixes the pairs of a batch, so a weight would reach others"


def _clamp(feedback: Any, bounds: tuple[float, float], beta: float) -> Any:
    def change(ratios: Any) -> Any:
        return transforms.clamped_tokens(ratios, *bounds)

    if isinstance(feedback, Labels):
        return replace(feedback, completions=change(feedback.completions))
    return replace(feedback, chosen=change(feedback.chosen), rejected=change(feedback.rejected))


def _score_margin(pairs: Pairs, weight: float, beta: float) -> Pairs:
    assert pairs.score_chosen is not None and pairs.score_rejected is not None
    return transforms.shifted(pairs, -weight * (pairs.score_chosen - pairs.score_rejected) / beta)


def _length_term(pairs: Pairs, alpha: float, beta: float) -> Pairs:
    assert pairs.chosen.tokens is not None and pairs.rejected.tokens is not None
    return transforms.shifted(pairs, alpha * (pairs.chosen.tokens - pairs.rejected.tokens) / beta)


def _wpo(pairs: Pairs, on: bool, beta: float) -> Pairs:
    if not on:
        return pairs
    confidence = transforms.confidence(pairs)
    return replace(pairs, weight=confidence if pairs.weight is None else pairs.weight * confidence)


def as_bounds(value: Any) -> tuple[float, float]:
    """Humanline's bounds: True for the authors' (-1, 1.5), or two numbers, low < high."""
    if value is True:
        return (-1.0, 1.5)
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(x, int | float) for x in value):
        low, high = value
        if low < high:
            return (float(low), float(high))
    raise ValueError(f"got {value!r}, expected {_BOUNDS}")


_BOUNDS = "True or two numbers (low, high) in nats, low < high"


def _made(
    name: str, annotation: Any, description: str, refusal: Any, needs: tuple[str, ...] = (), apply: Any = None
) -> Modifier:
    return Modifier(from_annotation(name, annotation, None, description), refusal, frozenset(needs), apply)


# The order in which they apply: weights (read from the tokens as they came), tokens, scores, margins.
MODIFIERS: dict[str, Modifier] = {
    modifier.name: modifier
    for modifier in (
        _made(
            "wpo",
            bool,
            "Weight each pair by how likely the policy is to write it (WPO, arXiv:2406.11827).",
            _keeps_pairs_apart,
            ("per_token.log_sum_sq",),
            _wpo,
        ),
        _made(
            "humanline",
            Annotated[Any, Coerce(as_bounds, _BOUNDS)],
            "Clamp each token's log-ratio to these bounds before the sum (Humanline, arXiv:2509.24207).",
            _sums_over_tokens,
            ("per_token",),
            _clamp,
        ),
        _made(
            "ld_alpha",
            Annotated[float, Interval(ge=0, le=1)],
            "Weight of the longer side's tokens beyond the shorter side's length (LD-DPO, arXiv:2409.06411).",
            _pairs_of_sums,
            ("per_token",),
            lambda pairs, alpha, beta: transforms.reweighted_tail(pairs, alpha),
        ),
        _made(
            "divergence",
            Annotated[Any, Coerce(transforms.as_divergence, transforms.DIVERGENCES)],
            "f-divergence in place of the reverse KL (f-DPO, arXiv:2309.16240).",
            _needs_reference_margin,
            (),
            lambda pairs, divergence, beta: transforms.scored(pairs, divergence.score),
        ),
        _made(
            "score_margin",
            float,
            "Subtract this times (score_chosen - score_rejected) from the scaled margin beta (h_w - h_l).",
            _needs_plain_margin,
            ("scores",),
            _score_margin,
        ),
        _made(
            "length_penalty",
            float,
            "Add this times (|y_w| - |y_l|) to the scaled margin, in 1/tokens (R-DPO, arXiv:2403.19159).",
            _needs_plain_margin,
            ("tokens",),
            _length_term,
        ),
        _made(
            "label_smoothing",
            FlipProbability,
            "Probability that a preference is flipped: that share of the loss of the reversed pair.",
            _no_second_smoothing,
        ),
    )
}


def smoothed(values: torch.Tensor, reversed_values: torch.Tensor, flip: float) -> torch.Tensor:
    """Expected loss when a preference is flipped with probability `flip`, [n]."""
    return (1 - flip) * values + flip * reversed_values
