"""Which losses are the same function at some setting: found by evaluating them, values and gradients, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

import prefloss
from prefloss import Pairs, Rankings
from prefloss.feedback import Feedback
from prefloss.hyperparameters import Interval, plain_type
from prefloss.registry import MODIFIERS, LossSpec, admitted, quiet
from prefloss.testing.draws import Recipe, draw
from prefloss.testing.fields import available, trainable, with_leaves

# Relative difference that counts as rounding.
ROUNDING = 1e-8
# Values of the modifiers that take no plain number.
_CHOICES = {
    "wpo": [True],
    "humanline": [True],
    "divergence": ["forward_kl", "js", "chi_squared", "alpha(0.5)"],
}


@dataclass(frozen=True, eq=False)
class Measured:
    """Values of a loss, [examples], and its gradients, one row."""

    values: Tensor
    slopes: Tensor


@dataclass(frozen=True)
class Relative:
    """Another loss that a loss becomes.

    Attributes:
        settings: What turns the loss into it; empty for the defaults.
        name: The other loss.
        its_settings: Hyperparameters of the other loss beside the KL strength, which is the same in both.
        factor: The loss is this times the other ...
        offset: ... plus this.
        pairs: True for a ranking loss that is a pair loss on groups of two.
    """

    settings: dict[str, Any]
    name: str
    its_settings: dict[str, Any]
    factor: float
    offset: float
    pairs: bool


@cache
def relatives(spec: LossSpec) -> list[Relative]:
    """Losses that a loss equals at its defaults, at the ends of its ranges, or on groups of two."""
    found: dict[str, Relative] = {}
    for settings in _settings(spec):
        for other, its_settings in _others(spec):
            pairs = spec.feedback is not other.feedback
            line = _line(
                _measured(spec.name, _frozen(settings), pairs), _measured(other.name, _frozen(its_settings))
            )
            if line and other.name not in found:
                its_own = {key: value for key, value in its_settings.items() if key != other.beta}
                found[other.name] = Relative(settings, other.name, its_own, *line, pairs)
    return list(found.values())


def _settings(spec: LossSpec) -> Iterator[dict[str, Any]]:
    """The defaults; then one hyperparameter at each end of its range, or at each of its other choices."""
    yield {}
    for name, parameter in spec.parameters.items():
        if name == spec.beta or parameter.required:
            continue
        for value in _ends(parameter):
            if value != parameter.default:
                yield {name: value}


def _ends(parameter: Any) -> list[Any]:
    if get_origin(parameter.type) is Literal:
        return list(get_args(parameter.type))
    if plain_type(parameter.type) is bool:
        return [False, True]
    number = plain_type(parameter.type)
    if number not in (int, float):
        return []
    within = parameter.constraint if isinstance(parameter.constraint, Interval) else Interval()
    return [number(value) for value in (0, 1) if value in within]


def _others(spec: LossSpec) -> Iterator[tuple[LossSpec, dict[str, Any]]]:
    """Losses to compare with, at their defaults and the loss's KL strength; then DPO with each modifier."""
    strength = spec.parameters[spec.beta].default if spec.beta else None
    for other in prefloss.specs.values():
        on_pairs = spec.feedback is Rankings and other.feedback is Pairs
        if other is spec or not (other.feedback is spec.feedback or on_pairs):
            continue
        if any(parameter.required for parameter in other.parameters.values()):
            continue
        yield other, {other.beta: strength} if other.beta and strength is not None else {}
    if spec.feedback is Pairs and strength is not None:
        for name, value in _modifiers(spec):
            yield prefloss.specs["dpo"], {"beta": strength, name: value}


def _modifiers(spec: LossSpec) -> Iterator[tuple[str, Any]]:
    """DPO's modifiers, with the numbers that are among the loss's own defaults."""
    numbers = [item.default for item in spec.parameters.values() if type(item.default) is float]
    for name in admitted(prefloss.specs["dpo"]):
        if MODIFIERS[name].parameter.type is float:
            yield from ((name, number) for number in numbers)
        else:
            yield from ((name, value) for value in _CHOICES[name])


def _line(one: Measured | None, other: Measured | None) -> tuple[float, float] | None:
    """a and b where one = a * other + b in values and gradients; None if there are none."""
    if one is None or other is None or not bool(other.slopes.abs().max()):
        return None
    factor = float((one.slopes @ other.slopes) / (other.slopes @ other.slopes))
    factor = float(f"{factor:.8g}")
    rest = one.values - factor * other.values
    off = torch.cat([one.slopes - factor * other.slopes, rest - rest[0]]).abs().max()
    if abs(factor) < ROUNDING or off > ROUNDING * one.slopes.abs().max():
        return None
    return factor, 0.0 if abs(rest[0]) < ROUNDING else float(rest[0])


def _frozen(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(settings.items()))


@cache
def _measured(name: str, settings: tuple[tuple[str, Any], ...], pairs: bool = False) -> Measured | None:
    """A loss on the feedback of all comparisons; None where it refuses the setting."""
    try:
        loss = prefloss.get(name, **dict(settings)).eval()
    except ValueError:
        return None
    feedback = _feedback(Pairs if pairs else loss.spec.feedback)
    feedback, leaves = with_leaves(feedback, trainable(feedback))
    with quiet():
        values = loss(feedback.to_rankings() if pairs else feedback)
    slopes = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    rows = [
        torch.zeros_like(leaf) if slope is None else slope
        for leaf, slope in zip(leaves.values(), slopes, strict=True)
    ]
    return Measured(values.detach(), torch.cat([row.flatten() for row in rows]))


@cache
def _feedback(kind: type) -> Feedback:
    fields = frozenset(available(kind))
    return draw(Random(0), kind, Recipe(size=6, places=3, fields=fields, masked=False, magnitude=4.0))
