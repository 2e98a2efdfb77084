"""Checks of the hyperparameters: what is out of range is refused, and none is ignored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_origin

import torch
from torch import Tensor

from prefloss import registry
from prefloss.feedback import Feedback
from prefloss.hyperparameters import Coerce, Interval, Parameter
from prefloss.hyperparameters import plain_type as _plain_type
from prefloss.testing import _fields
from prefloss.testing._altered import differs
from prefloss.testing._declared import required
from prefloss.testing._run import check
from prefloss.testing._settings import other_settings
from prefloss.testing._subject import Subject
from prefloss.testing._values import slopes


def _no_hyperparameters(subject: Subject) -> str | None:
    return None if subject.parameters else "has no hyperparameters of its own"


@check(_no_hyperparameters)
def check_hyperparameters(subject: Subject) -> None:
    """A hyperparameter out of its range, of another type or of another name is refused when the loss is built."""
    for name, parameter in subject.parameters.items():
        for value in _refusable(parameter):
            _check_refused(subject, name, value)
    _check_refused(subject, "no_such_hyperparameter", 1.0, "it has none of that name")
    for alias in subject.spec.aliases:
        if registry.specs.get(subject.name) is subject.spec:
            _check_alias(subject, alias)


def _refusable(parameter: Parameter) -> Iterator[Any]:
    if isinstance(parameter.constraint, Coerce):
        yield object()
        return
    plain = _plain_type(parameter.type)
    if get_origin(plain) is Literal:
        yield "no such choice"
    elif plain is bool:
        yield from ("yes", 1)
    elif plain in (int, float):
        yield from (math.nan, math.inf, "0.1", True)
        if isinstance(parameter.constraint, Interval):
            yield from _outside(parameter.constraint)


def _outside(interval: Interval) -> Iterator[float]:
    yield from (float(bound) for bound in (interval.gt, interval.lt) if bound is not None)
    yield from (float(bound) - 1e-6 for bound in (interval.ge, interval.gt) if bound is not None)
    yield from (float(bound) + 1e-6 for bound in (interval.le, interval.lt) if bound is not None)


def _check_refused(subject: Subject, name: str, value: Any, why: str = "") -> None:
    allowed = why or f"its range is {subject.parameters[name].constraint or subject.parameters[name].type}"
    try:
        subject.fresh(**{name: value})
    except (TypeError, ValueError) as error:
        if name in str(error):
            return
        raise subject.failed(f"{name}={value!r} is refused without naming {name}: {error}") from error
    raise subject.failed(
        f"get(..., {name}={value!r}) was accepted, but {allowed}: annotate it with an Interval"
    )


def _check_alias(subject: Subject, alias: str) -> None:
    try:
        loss = registry.get(alias, **required(subject))
        subject.detached(loss.eval(), subject.seeded(1, size=2))
    except (TypeError, ValueError) as error:
        raise subject.failed(f"its alias {alias!r} cannot be built: {error}") from error


@check(_no_hyperparameters)
def check_hyperparameter_effect(subject: Subject) -> None:
    """Every hyperparameter changes some value: none is accepted and ignored."""
    for name, parameter in subject.parameters.items():
        others = other_settings(subject, name, parameter)
        if others and not _has_effect(subject, name, others):
            raise subject.failed(
                f"{name}={others[0]!r} gave the values of {name}={subject.loss.params[name]!r} in every batch and "
                f"with every other choice: use {name} or take it out of the signature"
            )


def _has_effect(subject: Subject, name: str, values: list[Any]) -> bool:
    for choices in _choices(subject, name):
        for feedback in subject.searched(12, reference=True):
            base = _outcome(subject, feedback, choices)
            for value in values:
                other = _outcome(subject, feedback, {**choices, name: value})
                if base is not None and (other is None or differs(base, other)):
                    return True
    return False


def _choices(subject: Subject, name: str) -> Iterator[dict[str, Any]]:
    """As it stands, then with each other choice of the hyperparameters that choose between forms."""
    yield {}
    for other, parameter in subject.parameters.items():
        plain = _plain_type(parameter.type)
        if other != name and (get_origin(plain) is Literal or plain is bool or other.endswith("_weight")):
            for value in other_settings(subject, other, parameter):
                yield {other: value}


def _outcome(subject: Subject, feedback: Feedback, changes: dict[str, Any]) -> Tensor | None:
    """Values and gradient of the second batch in training, where a setting of the state shows; None if it raises."""
    try:
        loss = subject.fresh(**changes)
        if subject.loss.state:
            loss(subject.seeded(12, size=4, reference=True))
        leaves = {
            path: value.detach().requires_grad_() for path, value in _fields.trainable(feedback).items()
        }
        values = loss(_fields.with_tensors(feedback, {**leaves}))
    except (TypeError, ValueError):
        return None
    return torch.cat([values.detach(), *(slope.flatten() for slope in slopes(values.sum(), leaves).values())])
