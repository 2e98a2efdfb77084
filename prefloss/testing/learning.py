"""Checks of what a loss teaches: each side of the feedback that it looks at, and in the right direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs
from prefloss.logratios import LogRatios
from prefloss.registry import Loss
from prefloss.testing import fields
from prefloss.testing.run import check
from prefloss.testing.subject import SEARCHED, Subject, differs

SIZES = (1, 2, 25)
"""Numbers of examples at which the direction is looked at."""


@check(
    change="a loss falls where the better completion's h rises, and where the worse one's falls: look at the signs"
)
def check_direction(subject: Subject) -> None:
    """Training raises what people preferred and lowers the rest, with 1, 2 and 25 examples.

    A step against the gradient is looked at where policy and reference are equal. A loss that is not convex may go
    the other way there, if it goes the right way on average over log-ratios from -10 to 10.
    """
    for size in SIZES:
        for mode, loss in subject.modes.items():
            start = _moved(subject, loss, size, magnitude=0.0)
            if _is_right(start) or _is_right(_moved(subject, loss, size, magnitude=10.0), or_zero=True):
                continue
            feedback = next(_clear(subject, size, 0.0))
            better, worse, *_ = fields.sides(feedback)
            what = f"a step against the gradient, {size} example(s), in {mode}"
            got = f"the log-probs of {better} by {start[0]:+.3g}, of {worse} by {start[1]:+.3g}"
            raise subject.failed(what, got, "the first up, the second down", feedback)


def _is_right(moved: Tensor, or_zero: bool = False) -> bool:
    up, down, rounding = moved[0], moved[1], 1e-6 * moved[2]
    right = (up >= -rounding) & (down <= rounding) & (up - down > rounding)
    return bool(right) or (or_zero and not bool(moved[2]))


def _moved(subject: Subject, loss: Loss, size: int, magnitude: float) -> Tensor:
    """How far a step moves the log-probs of the better, of the worse, and of all completions, these without a sign."""
    total = torch.zeros(3, dtype=torch.float64)
    for feedback in _clear(subject, size, magnitude):
        steps = _steps(subject, loss, feedback)
        better, worse, *_ = (steps[part][which] for part, which in fields.sides(feedback).values())
        total += torch.stack([better.sum(), worse.sum(), better.abs().sum() + worse.abs().sum()])
    return total


def _clear(subject: Subject, size: int, magnitude: float) -> Iterator[Feedback]:
    """Batches in which scores agree with the preference, and log-ratios have either sign equally often."""
    for turn in range(max(2, (50 if magnitude else 4) // size)):
        options = {"size": size, "magnitude": magnitude, "places": 2 + turn % 3}
        feedback = subject.seeded(800 + turn, subject.absence(turn), **options)
        if isinstance(feedback, Labels):
            votes = (torch.arange(size) + turn) % 2 == 0
            grades = {
                "scores": torch.where(votes, 0.9, 0.1).double(),
                "baseline": torch.full((size,), 0.5).double(),
            }
            filled = {name: value for name, value in grades.items() if getattr(feedback, name) is not None}
            feedback = replace(feedback, desirable=votes, **filled)
        elif isinstance(feedback, Pairs) and feedback.score_chosen is not None:
            high = torch.full_like(feedback.score_chosen, 0.9)
            feedback = replace(feedback, score_chosen=high, score_rejected=1 - high)
        yield feedback
        if magnitude and isinstance(feedback, Pairs) and feedback.chosen.reference is None:
            yield replace(feedback, chosen=feedback.rejected, rejected=feedback.chosen)
        elif magnitude:
            yield fields.map_parts(feedback, _negated)


def _negated(part: LogRatios) -> LogRatios:
    """The completions with policy and reference exchanged, so that h has the other sign."""
    if part.reference is None:
        return part
    rows = part.per_token
    if rows is not None and rows.reference is not None:
        return replace(rows, policy=rows.reference, reference=rows.policy).log_ratios()
    return replace(part, policy=part.reference, reference=part.policy)


def _steps(subject: Subject, loss: Loss, feedback: Feedback) -> dict[str, Tensor]:
    """How far a step against the gradient of the values moves each completion's log-prob, by part."""
    _, gradients = subject.gradient(loss, feedback, mean=False)
    return {
        path.split(".")[0]: -slope.sum(-1) if ".per_token." in path else -slope
        for path, slope in gradients.items()
        if path.endswith(".policy")
    }


@check(
    change="train this side too: look for .detach(), .item(), .data or torch.no_grad() where the loss reads it"
)
def check_sides(subject: Subject) -> None:
    """A side that changes the values has a gradient somewhere: chosen and rejected, upvotes and downvotes ..."""
    trained: dict[str, bool] = {}
    for feedback in subject.searched():
        steps = _steps(subject, subject.settled, feedback)
        for side, (part, which) in fields.sides(feedback).items():
            trained[side] = trained.get(side, False) or bool((steps[part][which] != 0).any())
        if all(trained.values()):
            return
    for feedback in subject.searched():
        for side, (part, which) in fields.sides(feedback).items():
            lower = fields.shifted(
                fields.parts(feedback)[part], policy=torch.where(which, -3.0, 0.0).double()
            )
            other = replace(feedback, **{part: lower})
            if not trained[side] and differs(subject.settled_values(feedback), subject.settled_values(other)):
                what = f"gradient to the log-probs of {side}, which change the values"
                raise subject.failed(what, f"zeros in {SEARCHED} batches", "another number somewhere", other)
