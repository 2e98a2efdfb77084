"""Checks of what a loss declares of its dependence: on the batch, the reference, other fields, its KL strength."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.losses._core.loss import Loss
from prefloss.testing import _fields
from prefloss.testing._altered import differs, from_to
from prefloss.testing._draws import Seeded
from prefloss.testing._run import check, for_all
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
def check_preference(subject: Subject) -> None:
    """What people preferred matters: other votes, other scores, or the sides of a pair exchanged, change a value."""
    for feedback in subject.searched():
        if differs(
            subject.detached(subject.settled, feedback), subject.detached(subject.settled, _turned(feedback))
        ):
            return
    what = {
        Pairs: "exchanging chosen and rejected",
        Labels: "turning votes and scores",
        Rankings: "reversing the scores",
    }
    raise subject.failed(
        f"in {SEARCHED} batches {what[subject.spec.feedback]} changed no value: the loss does not learn what people "
        "preferred"
    )


def _turned(feedback: Feedback) -> Feedback:
    """The opposite preference; scores of a pair stay, so that graded losses see the opposite too."""
    if isinstance(feedback, Labels):
        scores = None if feedback.scores is None else 1.1 - feedback.scores
        return replace(feedback, desirable=~feedback.desirable, scores=scores)
    if isinstance(feedback, Rankings):
        return replace(feedback, scores=1.1 - feedback.scores)
    return replace(feedback, chosen=feedback.rejected, rejected=feedback.chosen)


@check(lambda subject: None if subject.spec.beta else "declares no KL strength")
def check_beta(subject: Subject) -> None:
    """The hyperparameter that the loss declares as its KL strength is one, and changes the values."""
    name = subject.spec.beta
    assert name is not None
    now = subject.loss.beta
    if isinstance(now, bool) or not isinstance(now, int | float):
        raise subject.failed(f"declares beta={name!r}, which is {now!r}, expected a number")
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
