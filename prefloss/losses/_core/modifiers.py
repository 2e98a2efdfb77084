"""Modifiers: changes that mean the same in every loss that admits them, given as further hyperparameters.

`get("hinge", label_smoothing=0.1, divergence="js")`. Each is written once. A loss that does not admit one refuses it by
name, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from torch import Tensor

from prefloss.arguments import is_finite
from prefloss.feedback import Labels, Pairs
from prefloss.logratios import LogRatios
from prefloss.losses._core import transforms
from prefloss.losses._core.parameters import Coerce, FlipProbability, Interval, Parameter
from prefloss.losses._core.spec import LossSpec


@dataclass(frozen=True)
class Modifier:
    """One modifier.

    Attributes:
        parameter: Its name, range and description.
        refusal: Why a loss does not admit it, or None if it does.
        needs: Fields of the feedback that it needs.
        apply: (feedback, value, beta) -> feedback; None for label smoothing, which evaluates the loss twice.
        reward: (log-ratios, value, beta) -> log-ratios that the reward reads; None if it stays
            the same; text says why one completion has none.
        additive: The reward stays a sum over tokens.
        form: The loss that is DPO with it, and which of that loss's hyperparameters it is ("" for True): what that
            loss helps against, the modifier helps against in another loss.
    """

    parameter: Parameter
    refusal: Callable[[LossSpec], str | None]
    needs: frozenset[str] = frozenset()
    apply: Callable[[Any, Any, float], Any] | None = None
    reward: Callable[[LogRatios, Any, float], LogRatios] | str | None = None
    additive: bool = True
    form: tuple[str, str] | None = None


def admitted(spec: LossSpec) -> dict[str, Modifier]:
    """The modifiers that a loss admits, in the order in which they apply."""
    return {name: modifier for name, modifier in MODIFIERS.items() if refusal(spec, name) is None}


def refusal(spec: LossSpec, name: str) -> str | None:
    """Why a loss does not admit a modifier, in words that follow "it"; None if it does."""
    if name in spec.parameters:
        return "has a hyperparameter of that name itself"
    return MODIFIERS[name].refusal(spec)


def capabilities(spec: LossSpec) -> Mapping[str, str]:
    """What a loss takes, needs and admits: column -> words, in the order of the table.

    "no: ..." gives the reason that `prefloss.get` gives.

    Example:
        >>> row = capabilities(prefloss.specs["dpo"])
        >>> row["feedback"], row["reference"], row["divergence"], row["state"]
        ('Pairs', 'yes', 'yes', 'no')
    """
    composes = "pair and labelled losses" if spec.feedback is Pairs else spec.feedback.__name__
    refusals = {name: refusal(spec, name) for name in MODIFIERS}
    extras = ", ".join(sorted(need for need in spec.needs if need.startswith("per_token.")))
    return {
        "feedback": spec.feedback.__name__,
        "reference": "yes" if spec.needs_reference else "no",
        "needs": ", ".join(sorted(spec.needs)) or "-",
        "composes": f"with {composes}",
        "one example at a time": "yes" if spec.separable else "no: an example's loss depends on its batch",
        **{name: "yes" if reason is None else f"no: {reason}" for name, reason in refusals.items()},
        "fused": f"no: {extras} over the vocabulary is not computed by the fused path yet"
        if extras
        else "yes",
        "state": "yes" if spec.stateful else "no",
        "reward": f"no: {spec.reward}" if isinstance(spec.reward, str) else spec.reward.formula,
    }


def smoothed(values: Tensor, reversed_values: Tensor, flip: float) -> Tensor:
    """Expected loss when a preference is flipped with probability `flip`, [n]."""
    return (1 - flip) * values + flip * reversed_values


def _no_margin(spec: LossSpec) -> str | None:
    if spec.feedback is not Pairs or not spec.difference_only:
        return "does not depend on the difference of two scores alone"
    return None


def _no_scaled_margin(spec: LossSpec) -> str | None:
    if spec.beta != "beta" or "tokens" in spec.needs:
        return _no_margin(spec) or "does not scale a margin in nats by beta"
    return _no_margin(spec) or ("reads scores itself" if "scores" in spec.needs else None)


def _no_smoothing(spec: LossSpec) -> str | None:
    if "scores" in spec.needs:
        return _no_margin(spec) or "reads graded preferences, which say how sure they are"
    return _no_margin(spec) or ("has its own noise level (epsilon)" if "epsilon" in spec.parameters else None)


def _no_divergence(spec: LossSpec) -> str | None:
    if not spec.needs_reference:
        return "has no reference to diverge from"
    if spec.feedback is Pairs and _reads_tokens(spec):
        return "reads tokens, not sums"
    return _no_margin(spec)


def _no_sums(spec: LossSpec) -> str | None:
    if spec.feedback not in (Pairs, Labels) or not spec.needs_reference:
        return "reads no log-ratios of single completions"
    return "reads tokens itself" if _reads_tokens(spec) else None


def _no_separate_pairs(spec: LossSpec) -> str | None:
    if spec.feedback is not Pairs:
        return "takes no pairs"
    return None if spec.separable else "mixes the pairs of a batch, so a weight would reach others"


def _reads_tokens(spec: LossSpec) -> bool:
    return any(name.startswith("per_token") for name in spec.needs)


def _score_margin(pairs: Pairs, weight: float, beta: float) -> Pairs:
    return transforms.shifted(pairs, -weight * transforms.score_gap(pairs) / beta)


def _length_term(pairs: Pairs, alpha: float, beta: float) -> Pairs:
    longer_by = transforms.lengths(pairs.chosen) - transforms.lengths(pairs.rejected)
    return transforms.shifted(pairs, alpha * longer_by / beta)


def _lengthened(ratios: LogRatios, alpha: float, beta: float) -> LogRatios:
    return replace(ratios, policy=ratios.policy + alpha * transforms.lengths(ratios) / beta)


def _wpo(pairs: Pairs, on: bool, beta: float) -> Pairs:
    if not on:
        return pairs
    confidence = transforms.confidence(pairs)
    return replace(pairs, weight=confidence if pairs.weight is None else pairs.weight * confidence)


def _bounds(value: Any) -> tuple[float, float]:
    """Humanline's bounds: True for the authors' (-1, 1.5), or two numbers, low < high."""
    if value is True:
        return (-1.0, 1.5)
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)):
        low, high = value
        if low < high:
            return (float(low), float(high))
    raise ValueError


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def _modifier(
    name: str,
    annotation: Any,
    description: str,
    refusal: Callable[[LossSpec], str | None],
    apply: Callable[[Any, Any, float], Any] | None = None,
    needs: tuple[str, ...] = (),
    **rest: Any,
) -> tuple[str, Modifier]:
    parameter = Parameter.of(name, annotation, description=description)
    return name, Modifier(parameter, refusal, frozenset(needs), apply, **rest)


# The order in which they apply: weights (read from the tokens as they came), tokens, scores, margins.
MODIFIERS: dict[str, Modifier] = dict(
    [
        _modifier(
            "wpo",
            bool,
            "Weight each pair by how likely the policy is to write it (WPO, arXiv:2406.11827).",
            _no_separate_pairs,
            _wpo,
            ("per_token.log_sum_sq",),
            form=("wpo", ""),
        ),
        _modifier(
            "humanline",
            Annotated[Any, Coerce(_bounds, "True or two numbers (low, high) in nats, low < high")],
            "Clamp each token's log-ratio to these bounds before the sum (Humanline, arXiv:2509.24207).",
            _no_sums,
            lambda feedback, bounds, beta: transforms.clamped_tokens(feedback, *bounds),
            ("per_token",),
            reward=lambda ratios, bounds, beta: transforms.clamped(ratios, *bounds),
            form=("humanline_dpo", ""),
        ),
        _modifier(
            "ld_alpha",
            Annotated[float, Interval(ge=0, le=1)],
            "Weight of the longer side's tokens beyond the shorter side's length (LD-DPO, arXiv:2409.06411).",
            lambda spec: _no_sums(spec) if spec.feedback is Pairs else "takes no pairs",
            lambda pairs, alpha, beta: transforms.reweighted_tail(pairs, alpha),
            ("per_token",),
            reward=transforms.NO_TAIL,
            form=("ld_dpo", "alpha"),
        ),
        _modifier(
            "divergence",
            Annotated[Any, Coerce(transforms.as_divergence, transforms.DIVERGENCES)],
            "f-divergence in place of the reverse KL (f-DPO, arXiv:2309.16240).",
            _no_divergence,
            lambda pairs, divergence, beta: transforms.scored(pairs, divergence.score),
            reward=lambda ratios, divergence, beta: transforms.scored_side(ratios, divergence.score),
            additive=False,
        ),
        _modifier(
            "score_margin",
            float,
            "Subtract this times (score_chosen - score_rejected) from the scaled margin beta (h_w - h_l).",
            _no_scaled_margin,
            _score_margin,
            ("scores",),
            form=("margin_dpo", "margin_weight"),
        ),
        _modifier(
            "length_penalty",
            float,
            "Add this times (|y_w| - |y_l|) to the scaled margin, in 1/tokens (R-DPO, arXiv:2403.19159).",
            _no_scaled_margin,
            _length_term,
            ("tokens",),
            reward=_lengthened,
            form=("r_dpo", "alpha"),
        ),
        _modifier(
            "label_smoothing",
            FlipProbability,
            "Probability that a preference is flipped: that share of the loss of the reversed pair.",
            _no_smoothing,
            form=("cdpo", "epsilon"),
        ),
    ]
)
