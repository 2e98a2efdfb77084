"""Checks of what a loss declares of its dependence: on the batch, the reference, other fields, its KL strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Rankings
from prefloss.logratios import LogRatios
from prefloss.losses._loss import Loss
from prefloss.testing import _fields
from prefloss.testing._altered import altered, differs, from_to
from prefloss.testing._draws import Seeded
from prefloss.testing._run import check, for_all
from prefloss.testing._settings import other_settings
from prefloss.testing._subject import SEARCHED, Subject
from prefloss.testing._values import close, told


@check()
def check_separability(subject: Subject) -> None:
    """A separable loss gives an example the same value alone as in a batch; one that is not, somewhere does not."""
    if subject.spec.separable:
        for_all(subject, lambda feedback: _check_alone(subject, feedback))
        return
    for feedback in subject.searched():
        for loss in (lambda: subject.settled, subject.fresh):
            if differs(subject.detached(loss(), feedback), _alone(subject, loss, feedback)):
                return
    raise subject.failed(
        f"declares separable=False, but in {SEARCHED} batches every example had the value that it has alone: "
        "declare separable=True"
    )


def _alone(subject: Subject, loss: Callable[[], Loss], feedback: Feedback) -> Tensor:
    count = feedback.shape[0]
    return torch.cat(
        [subject.detached(loss(), _fields.select(feedback, torch.tensor([place]))) for place in range(count)]
    )


def _check_alone(subject: Subject, feedback: Feedback) -> None:
    values = subject.detached(subject.settled, feedback)
    alone = _alone(subject, lambda: subject.settled, feedback)
    if not close(values, alone):
        problem = (
            f"in the batch the values are {told(values)}, alone they are {told(alone)}: declare separable=False, or "
            "use no mean, sum, sort or other statistic over the batch"
        )
        raise subject.failed(problem, feedback)


@check()
def check_needs_reference(subject: Subject) -> None:
    """The reference's log-probs matter if and only if the loss declares needs_reference."""
    for feedback in subject.searched(reference=True):
        values = subject.detached(subject.settled, feedback)
        other = subject.detached(subject.settled, _other_reference(feedback))
        if subject.spec.needs_reference and differs(values, other):
            return
        if not subject.spec.needs_reference:
            _check_unread_reference(subject, feedback, values, other)
    if subject.spec.needs_reference:
        raise subject.failed(
            f"declares needs_reference=True, but in {SEARCHED} batches the reference changed no value: declare "
            "needs_reference=False, which spares trainers a forward pass"
        )


def _check_unread_reference(subject: Subject, feedback: Feedback, values: Tensor, other: Tensor) -> None:
    if not close(values, other):
        problem = f"declares needs_reference=False, but another reference changed the values {from_to(values, other)}"
        raise subject.failed(f"{problem}: declare needs_reference=True", feedback)
    bare = subject.detached(subject.settled, _fields.map_parts(feedback, lambda _, part: _unreferenced(part)))
    if not close(values, bare):
        problem = (
            f"declares needs_reference=False, but without a reference the values went {from_to(values, bare)}"
        )
        raise subject.failed(f"{problem}: declare needs_reference=True", feedback)


def _other_reference(feedback: Feedback) -> Feedback:
    source = Seeded(3)

    def change(_: str, part: LogRatios) -> LogRatios:
        nats = [source.number(-9.0, -0.5) for _ in range(part.policy.numel())]
        return _fields.moved(part, reference=torch.tensor(nats, dtype=part.policy.dtype).reshape(part.shape))

    return _fields.map_parts(feedback, change)


def _unreferenced(part: LogRatios) -> LogRatios:
    rows = part.per_token
    return replace(part, reference=None, per_token=None if rows is None else replace(rows, reference=None))


@check()
def check_needs(subject: Subject) -> None:
    """What the loss needs is asked for by name, and matters; what it does not list in needs or reads does not."""
    _check_missing(subject)
    for name in sorted(subject.fields):
        if name == "scores" and subject.spec.feedback is Rankings:
            continue
        if name == "per_token" and any(other.startswith("per_token.") for other in subject.fields):
            continue
        _check_matters(subject, name)
    for feedback in subject.searched(6, fields=subject.fields | {*_fields.available(subject.spec.feedback)}):
        _check_undeclared(subject, feedback)


def _check_missing(subject: Subject) -> None:
    feedback = subject.seeded(1, size=2)
    for name in sorted(
        subject.loss.needs - {"scores"} if subject.spec.feedback is Rankings else subject.loss.needs
    ):
        lacking = _fields.without(feedback, name)
        try:
            subject.settled(lacking)
        except Exception as error:
            words = {name, name.split(".")[-1], *({"score_chosen"} if name == "scores" else ())}
            if isinstance(error, ValueError | TypeError) and any(word in str(error) for word in words):
                continue
            problem = f"without {name} it raised {type(error).__name__}: {error}"
            raise subject.failed(f"{problem}, wanted a ValueError that names {name}", lacking) from error
        raise subject.failed(
            f"declares needs={name!r}, but gave values without it: declare it in reads", lacking
        )


def _check_matters(subject: Subject, name: str) -> None:
    for loss in _settings(subject):
        for seed in range(SEARCHED):
            # What is read in its place, as a KL baseline instead of mismatched completions, is sometimes absent.
            absent = subject.absences[seed % len(subject.absences)] - {name}
            feedback = subject.seeded(seed, absent, size=4)
            values = subject.detached(loss, feedback)
            if differs(values, subject.detached(loss, altered(feedback, name, seed))):
                return
    trait = "needs" if name in subject.loss.needs else "reads"
    raise subject.failed(
        f"declares {trait}={name!r}, but in {SEARCHED} batches another {name} changed no value: leave it out of {trait}"
    )


def _settings(subject: Subject) -> Iterator[Loss]:
    """The loss as it is, then with another value of one hyperparameter each."""
    yield subject.settled
    for name, parameter in subject.parameters.items():
        for value in other_settings(subject, name, parameter)[:1]:
            yield subject.fresh(**{name: value}).eval()


def _check_undeclared(subject: Subject, feedback: Feedback) -> None:
    values = subject.detached(subject.settled, feedback)
    for name in _undeclared(subject):
        lacking = _fields.without(feedback, name)
        try:
            other = subject.settled(lacking).detach()
        except Exception as error:
            problem = (
                f"without {name} it raised {type(error).__name__}: {error}\n  Declare it in needs or in reads"
            )
            raise subject.failed(problem, lacking) from error
        advice = f"declare {name!r} in needs or in reads"
        if not close(values, other):
            raise subject.failed(
                f"without {name} the values went {from_to(values, other)}: {advice}", feedback
            )
        # Rows fix the token counts, so counts change only where there are no rows.
        base = _fields.without(feedback, "per_token") if name == "tokens" else feedback
        other = subject.detached(subject.settled, altered(base, name, 0))
        if not close(values, other):
            raise subject.failed(
                f"with another {name} the values went {from_to(values, other)}: {advice}", feedback
            )


def _undeclared(subject: Subject) -> list[str]:
    reads_rows = any(field.startswith("per_token") for field in subject.fields)
    implied = {"tokens", "per_token"} if reads_rows else set[str]()
    return [name for name in _fields.available(subject.spec.feedback) if name not in subject.fields | implied]


@check(lambda subject: None if subject.spec.beta else "declares no KL strength")
def check_beta(subject: Subject) -> None:
    """The hyperparameter that the loss declares as its KL strength is one, and changes the values."""
    name = subject.spec.beta
    assert name is not None
    now = subject.loss.beta
    if isinstance(now, bool) or not isinstance(now, int | float):
        raise subject.failed(f"declares beta={name!r}, which is {now!r}, wanted a number")
    for feedback in subject.searched():
        if differs(_with(subject, feedback), _with(subject, feedback, **{name: 2 * now or 1.0})):
            return
    raise subject.failed(
        f"declares beta={name!r}, but in {SEARCHED} batches {name}={2 * now:g} gave the values of {name}={now:g}: use "
        "it, or declare the hyperparameter that is the KL strength"
    )


def _with(subject: Subject, feedback: Feedback, **changes: Any) -> Tensor:
    """The values after one batch of training, so that a setting of the state shows too."""
    loss = subject.fresh(**changes)
    if loss.state:
        subject.detached(loss, subject.seeded(12, size=4))
        return subject.detached(loss, feedback)
    return subject.detached(loss.eval(), feedback)
