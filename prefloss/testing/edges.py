"""Checks of unusual examples: a single one, those that do not count, padding, equal scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.testing.fields import ROWS, emptied, map_parts, map_rows, parts, select, shifted
from prefloss.testing.outcomes import CannotRun
from prefloss.testing.run import check, for_all
from prefloss.testing.subject import Subject


@check(
    change="a statistic of the batch needs a meaning for one example (an unbiased standard deviation has none)"
)
def check_single_example(subject: Subject) -> None:
    """A batch of one example has a finite value and a finite gradient, in training and in evaluation."""

    def body(feedback: Feedback) -> None:
        for mode, loss in subject.modes.items():
            subject.expect_finite(subject.results(loss, feedback), f"of one example in {mode}", feedback)

    for_all(subject, body, size=1)


@check(
    change="an empty completion has 0 tokens, so divide by tokens.clamp(min=1) and guard both branches of a where"
)
def check_empty_examples(subject: Subject) -> None:
    """An example without tokens has value 0, no gradient, and no influence on the others."""

    def body(feedback: Feedback) -> None:
        for part, place in _parts_to_empty(feedback):
            _check_emptied(subject, feedback, part, place)
        _check_all_empty(subject, feedback)

    for_all(subject, body)
    if subject.spec.feedback is Rankings:
        for_all(subject, lambda feedback: _check_absent(subject, feedback))


def _parts_to_empty(feedback: Feedback) -> Iterator[tuple[str, int]]:
    for part in parts(feedback):
        if part != "mismatched":
            yield part, 0
            if feedback.shape[0] > 2:
                yield part, feedback.shape[0] - 1


def _without_tokens(feedback: Feedback, part: str, places: Tensor | int) -> Feedback:
    """The feedback with some examples empty; in a ranking one completion is left, which is too few."""
    keep = torch.ones(feedback.shape[0], dtype=torch.bool)
    keep[places] = False
    if isinstance(feedback, Rankings):
        first = torch.arange(parts(feedback)[part].shape[1]) == 0
        keep = keep.unsqueeze(-1) | first
    return emptied(feedback, part, keep)


def _check_emptied(subject: Subject, whole: Feedback, part: str, place: int) -> None:
    feedback = _without_tokens(whole, part, place)
    values = subject.settled_values(feedback)
    results = subject.results(subject.settled, feedback)
    subject.expect_finite({**results, "values": values}, f"with example {place} empty", feedback)
    if bool(subject.settled.counted(feedback)[place]):
        return
    # Each term of a sum counts its own examples.
    if not subject.is_sum:
        slopes = {what: result[place] for what, result in results.items() if what != "mean"}
        subject.expect_zero({"value": values[place], **slopes}, "of an empty example", feedback)
    if subject.spec.separable or not subject.is_sum:
        _check_others(subject, whole, feedback, values, place)


def _check_others(subject: Subject, whole: Feedback, feedback: Feedback, values: Tensor, place: int) -> None:
    others = torch.tensor([index for index in range(len(values)) if index != place], dtype=torch.long)
    if subject.draws_by_place or not len(others):
        return
    left = select(whole, others)
    if isinstance(left, Labels) and isinstance(whole, Labels):
        # The empty example's mismatched completion is a completion like the others.
        left = replace(left, mismatched=whole.mismatched)
    what = f"values of the others with example {place} empty"
    change = "leave examples that do not count (feedback.valid) out of every statistic of the batch"
    subject.expect(what, values[others], subject.settled_values(left), feedback, change)


def _check_all_empty(subject: Subject, feedback: Feedback) -> None:
    for part in parts(feedback):
        if part != "mismatched":
            feedback = _without_tokens(feedback, part, torch.arange(feedback.shape[0]))
    if not bool(subject.settled.counted(feedback).any()):
        for loss in subject.modes.values():
            subject.expect_zero(subject.results(loss, feedback), "with every example empty", feedback)


def _check_absent(subject: Subject, feedback: Feedback) -> None:
    """An absent completion of a ranking is not read."""
    assert isinstance(feedback, Rankings)
    absent = ~feedback.present
    completions = shifted(feedback.completions, policy=torch.where(absent, -7.5, 0.0))
    other = replace(feedback, completions=completions, scores=torch.where(absent, 55.0, feedback.scores))
    what = "values with another log-prob and score at absent completions"
    change = "read completions only where feedback.present is True"
    subject.expect(what, subject.settled_values(other), subject.settled_values(feedback), other, change)
    _, gradients = subject.gradient(subject.settled, feedback)
    at_absent = {f"gradient of {path}": slope[absent] for path, slope in gradients.items()}
    subject.expect_zero(at_absent, "at absent completions", feedback)


@check(
    lambda subject: None if subject.reads_rows else "reads no tokens",
    change="use PerToken.sum and PerToken.mean, which read only inside the mask",
)
def check_padding(subject: Subject) -> None:
    """What stands outside the mask of the per-token rows is not read, and their width has no effect."""

    def body(feedback: Feedback) -> None:
        padded = map_parts(feedback, _padded)
        what = "values with other numbers outside the mask, and two more places"
        subject.expect(what, subject.settled_values(padded), subject.settled_values(feedback), padded)

    for_all(subject, body)


def _padded(part: LogRatios) -> LogRatios:
    assert part.per_token is not None
    wide = map_rows(part.per_token, lambda value: pad(value, (0, 2)))
    rows = {name: getattr(wide, name) for name in ROWS if getattr(wide, name) is not None}
    garbage = {name: torch.where(wide.mask, value, 55.0) for name, value in rows.items()}
    return replace(wide, **garbage).log_ratios()


def _reads_no_scores(subject: Subject) -> str | None:
    reads = subject.spec.feedback is Rankings or "scores" in subject.fields
    return None if reads else "reads no scores"


@check(
    _reads_no_scores,
    change="handle a difference of 0, or refuse equal scores with a ValueError that names them",
)
def check_ties(subject: Subject) -> None:
    """Equal scores give finite values and gradients, or are refused by name."""

    def body(feedback: Feedback) -> None:
        if isinstance(feedback, Pairs):
            feedback = replace(feedback, score_chosen=feedback.score_rejected)
        try:
            results = subject.results(subject.settled, feedback)
        except CannotRun as error:
            if isinstance(error.__cause__, ValueError) and "score" in str(error.__cause__):
                return
            raise
        subject.expect_finite(results, "with equal scores", feedback)

    for_all(subject, body, ties=True)
