"""Check of examples that do not count: without tokens, or absent from a ranking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Rankings
from prefloss.testing import _fields
from prefloss.testing._run import check, for_all
from prefloss.testing._subject import Subject
from prefloss.testing._values import close, gradient, told


@check()
def check_empty_examples(subject: Subject) -> None:
    """An example without tokens has value 0, no gradient, and no influence on the others."""

    def body(feedback: Feedback) -> None:
        for part, place in _parts_to_empty(feedback):
            given = _fields.emptied(feedback, part, _kept(feedback, part, place))
            _check_emptied(subject, feedback, given, place)
        _check_nothing_left(subject, feedback)

    for_all(subject, body)
    if subject.spec.feedback is Rankings:
        for_all(subject, lambda feedback: _check_absent(subject, feedback))


def _parts_to_empty(feedback: Feedback) -> Iterator[tuple[str, int]]:
    for part in _fields.parts(feedback):
        if part != "mismatched":
            yield part, 0
            if feedback.shape[0] > 2:
                yield part, feedback.shape[0] - 1


def _kept(feedback: Feedback, part: str, place: int | None) -> Tensor:
    """False at the examples to empty; in a ranking one completion is left, which is too few."""
    count = feedback.shape[0]
    keep = torch.ones(count, dtype=torch.bool)
    if place is None:
        keep[:] = False
    else:
        keep[place] = False
    if not isinstance(feedback, Rankings):
        return keep
    places = _fields.parts(feedback)[part].shape[1]
    first = torch.arange(places) == 0
    return keep.unsqueeze(-1) | first


def _check_emptied(subject: Subject, whole: Feedback, given: Feedback, place: int) -> None:
    loss = subject.settled
    counted = loss.counted(given)
    values = subject.detached(loss, given)
    _, gradients = gradient(subject, loss, given)
    for path, slope in gradients.items():
        if not bool(torch.isfinite(slope).all()):
            problem = (
                f"with example {place} empty the gradient of {path} is {told(slope)}, expected finite numbers: an "
                "empty completion has 0 tokens, so divide by tokens.clamp(min=1) and guard both branches of a where"
            )
            raise subject.failed(problem, given)
    if not bool(torch.isfinite(values).all()):
        raise subject.failed(
            f"with example {place} empty the values are {told(values)}, expected finite ones", given
        )
    if bool(counted[place]):
        return
    # Each term of a sum counts its own examples.
    if not subject.is_sum:
        _check_left_out(
            subject, given, values[place], {path: slope[place] for path, slope in gradients.items()}
        )
    if subject.spec.separable or not subject.is_sum:
        _check_others(subject, whole, given, values, place)


def _check_left_out(subject: Subject, given: Feedback, value: Tensor, gradients: dict[str, Tensor]) -> None:
    if bool(value != 0):
        raise subject.failed(f"an empty example has value {told(value)}, expected 0", given)
    for path, slope in gradients.items():
        if bool((slope != 0).any()):
            raise subject.failed(
                f"of an empty example {path} has gradient {told(slope)}, expected zeros", given
            )


def _check_others(subject: Subject, whole: Feedback, given: Feedback, values: Tensor, place: int) -> None:
    others = torch.tensor([index for index in range(len(values)) if index != place], dtype=torch.long)
    if subject.draws_by_place or not len(others):
        return
    left = _fields.select(whole, others)
    if isinstance(left, Labels) and isinstance(whole, Labels):
        # The empty example's mismatched completion is a completion like the others.
        left = replace(left, mismatched=whole.mismatched)
    wanted = subject.detached(subject.settled, left)
    if not close(values[others], wanted):
        problem = (
            f"with example {place} empty the others' values are {told(values[others])}, expected {told(wanted)} as "
            "without it: leave examples that do not count (feedback.valid) out of every statistic of the batch"
        )
        raise subject.failed(problem, given)


def _check_nothing_left(subject: Subject, feedback: Feedback) -> None:
    given = feedback
    for part in _fields.parts(feedback):
        given = given if part == "mismatched" else _fields.emptied(given, part, _kept(feedback, part, None))
    if bool(subject.settled.counted(given).any()):
        return
    for loss in (subject.fresh(), subject.settled):
        value, gradients = gradient(subject, loss, given)
        if not bool(value == 0):
            raise subject.failed(f"with every example empty the mean is {told(value)}, expected 0", given)
        for path, slope in gradients.items():
            if bool((slope != 0).any()) or not bool(torch.isfinite(slope).all()):
                problem = f"with every example empty the gradient of {path} is {told(slope)}, expected zeros"
                raise subject.failed(problem, given)


def _check_absent(subject: Subject, feedback: Feedback) -> None:
    """What stands at an absent completion of a ranking is not read."""
    assert isinstance(feedback, Rankings)
    absent = ~feedback.present
    completions = _fields.moved(feedback.completions, policy=torch.where(absent, -7.5, 0.0))
    other = replace(feedback, completions=completions, scores=torch.where(absent, 55.0, feedback.scores))
    first, second = subject.detached(subject.settled, feedback), subject.detached(subject.settled, other)
    if not close(first, second):
        problem = (
            f"the values are {told(second)} when absent completions have another log-prob and score, expected "
            f"{told(first)} as before: read completions only where feedback.present is True"
        )
        raise subject.failed(problem, other)
    _, gradients = gradient(subject, subject.settled, feedback)
    for path, slope in gradients.items():
        if bool((slope[absent] != 0).any()) or not bool(torch.isfinite(slope).all()):
            problem = f"the gradient of {path} is {told(slope[absent])} at absent completions, expected zeros"
            raise subject.failed(problem, feedback)
