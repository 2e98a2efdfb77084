"""Checks of what a loss depends on: other examples, the reference, the preference, fields, its KL strength."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.registry import Loss
from prefloss.testing.fields import altered, available, covered_by, map_parts, select, shifted, without
from prefloss.testing.run import check, for_all
from prefloss.testing.subject import SEARCHED, Subject, differs


@check(change="declare separable=False, or use no mean, sum, sort or other statistic over the batch")
def check_separability(subject: Subject) -> None:
    """A separable loss gives an example the same value alone as in a batch; one that is not, somewhere does not."""
    if subject.spec.separable:
        for_all(subject, lambda feedback: _check_alone(subject, feedback))
        return
    for feedback in subject.searched():
        for loss in (lambda: subject.settled, subject.fresh):
            if differs(subject.detached(loss(), feedback), _alone(subject, loss, feedback)):
                return
    got = f"the value that each example has alone in {SEARCHED} batches"
    raise subject.failed("separable=False", got, "another value somewhere", change="declare separable=True")


def _check_alone(subject: Subject, feedback: Feedback) -> None:
    alone = _alone(subject, lambda: subject.settled, feedback)
    what = "values in the batch, against those of the examples alone"
    subject.expect(what, subject.settled_values(feedback), alone, feedback)


def _alone(subject: Subject, loss: Callable[[], Loss], feedback: Feedback) -> Tensor:
    examples = [select(feedback, torch.tensor([place])) for place in range(feedback.shape[0])]
    return torch.cat([subject.detached(loss(), example) for example in examples])


@check(change="declare needs_reference=True")
def check_needs_reference(subject: Subject) -> None:
    """The reference's log-probs matter if and only if the loss declares needs_reference."""
    for feedback in subject.searched(reference=True):
        values = subject.settled_values(feedback)
        other_values = subject.settled_values(_with_other_reference(feedback))
        if not subject.spec.needs_reference:
            subject.expect("values with another reference", other_values, values, feedback)
            bare = subject.settled_values(map_parts(feedback, _without_reference))
            subject.expect("values without a reference", bare, values, feedback)
        elif differs(values, other_values):
            return
    if subject.spec.needs_reference:
        change = "declare needs_reference=False, which spares trainers a forward pass"
        raise subject.no_effect("values with another reference", change)


def _with_other_reference(feedback: Feedback) -> Feedback:
    source = random.Random(3)

    def change(part: LogRatios) -> LogRatios:
        nats = [source.uniform(-9.0, -0.5) for _ in range(part.policy.numel())]
        return shifted(part, reference=torch.tensor(nats, dtype=part.policy.dtype).reshape(part.shape))

    return map_parts(feedback, change)


def _without_reference(part: LogRatios) -> LogRatios:
    rows = part.per_token
    return replace(part, reference=None, per_token=None if rows is None else replace(rows, reference=None))


@check()
def check_preference(subject: Subject) -> None:
    """What people preferred matters: other labels, other scores, or the sides of a pair exchanged, change a value."""
    for feedback in subject.searched():
        if differs(subject.settled_values(feedback), subject.settled_values(_turned(feedback))):
            return
    opposite = {
        Pairs: "chosen and rejected exchanged",
        Labels: "opposite labels and scores",
        Rankings: "the scores reversed",
    }
    what = f"values with {opposite[subject.spec.feedback]}"
    raise subject.no_effect(what, "a loss learns what people preferred, so read it")


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
    """The hyperparameter that the loss declares as its KL strength is a number, and changes the values."""
    name, now = subject.spec.beta, subject.loss.beta
    assert name is not None
    if isinstance(now, bool) or not isinstance(now, int | float):
        raise subject.failed(f"beta={name!r}", repr(now), "a number")
    for feedback in subject.searched():
        changed = _after_training(subject, feedback, **{name: 2 * now or 1.0})
        if differs(_after_training(subject, feedback), changed):
            return
    change = f"use {name}, or declare the hyperparameter that is the KL strength"
    raise subject.no_effect(f"values with {name}={2 * now:g} instead of {now:g}", change)


def _after_training(subject: Subject, feedback: Feedback, **changes: Any) -> Tensor:
    """The values after one batch of training, so that a setting of the state shows too."""
    loss = subject.fresh(**changes)
    if not loss.state:
        return subject.detached(loss.eval(), feedback)
    subject.detached(loss, subject.seeded(12, size=4))
    return subject.detached(loss, feedback)


@check()
def check_needs(subject: Subject) -> None:
    """What the loss needs is asked for by name, and matters; what it does not list in needs or reads does not."""
    # A ranking always has scores, and rows are read through one of their fields.
    ranking = {"scores"} if subject.spec.feedback is Rankings else set[str]()
    rows = {"per_token"} if any(name.startswith("per_token.") for name in subject.fields) else set[str]()
    for need in sorted(subject.loss.needs - ranking):
        _check_refused_without(subject, need)
    for need in sorted(subject.fields - ranking - rows):
        _check_matters(subject, need)
    implied = {"tokens", "per_token"} if subject.reads_rows else set[str]()
    for need in available(subject.spec.feedback):
        if need not in subject.fields | implied:
            _check_unread(subject, need)


def _check_refused_without(subject: Subject, need: str) -> None:
    lacking = without(subject.seeded(1, size=2), need)
    got, cause = "values", None
    try:
        subject.settled(lacking)
    except Exception as error:
        words = {need, need.split(".")[-1], *covered_by(subject.spec.feedback, need)}
        if isinstance(error, ValueError | TypeError) and any(word in str(error) for word in words):
            return
        got, cause = f"{type(error).__name__}: {error}", error
    expected = f"a ValueError that names {need}"
    raise subject.failed(f"call without {need}", got, expected, lacking, "declare it in reads") from cause


def _check_matters(subject: Subject, need: str) -> None:
    for loss in _losses_of_each_setting(subject):
        for turn in range(SEARCHED):
            # What is read in its place, as a KL baseline instead of mismatched completions, is sometimes absent.
            feedback = subject.seeded(turn, subject.absence(turn) - {need}, size=4)
            values = subject.detached(loss, feedback)
            if differs(values, subject.detached(loss, altered(feedback, need, turn))):
                return
    trait = "needs" if need in subject.loss.needs else "reads"
    raise subject.no_effect(f"values with other {need}", f"leave {need!r} out of {trait}")


def _losses_of_each_setting(subject: Subject) -> Iterator[Loss]:
    """The loss as it is, then with another value of one hyperparameter each."""
    yield subject.settled
    for name in subject.spec.parameters:
        for value in subject.other_values(name)[:1]:
            yield subject.fresh(**{name: value}).eval()


def _check_unread(subject: Subject, need: str) -> None:
    for feedback in subject.searched(2, size=3, fields=subject.fields | {need}):
        subject.narrowed(feedback, lambda item: _check_unchanged(subject, item, need))


def _check_unchanged(subject: Subject, feedback: Feedback, need: str) -> None:
    """Values stay without a field, and with other numbers in it."""
    values = subject.settled_values(feedback)
    what, change = f"values without {need}", f"declare {need!r} in needs or in reads"
    try:
        bare = subject.settled(without(feedback, need)).detach()
    except Exception as error:
        got = f"{type(error).__name__} ({error})"
        raise subject.failed(what, got, values, feedback, change) from error
    subject.expect(what, bare, values, feedback, change)
    other_values = subject.settled_values(altered(feedback, need, 0))
    subject.expect(f"values with other {need}", other_values, values, feedback, change)
