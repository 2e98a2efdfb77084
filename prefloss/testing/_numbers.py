"""Checks of the numbers: digits in float32, what stands in the padding, equal scores."""

from __future__ import annotations

from dataclasses import replace

import torch

from prefloss.feedback import Feedback, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.testing import _fields
from prefloss.testing._run import check, for_all
from prefloss.testing._subject import CannotRun, Subject
from prefloss.testing._values import close, gradient, told


@check(lambda subject: None if _reads_rows(subject) else "reads no tokens")
def check_padding(subject: Subject) -> None:
    """What stands outside the mask of the per-token rows is not read, and its width means nothing."""

    def body(feedback: Feedback) -> None:
        padded = _fields.map_parts(feedback, lambda _, part: _padded(part))
        values, other = (subject.detached(subject.settled, item) for item in (feedback, padded))
        if not close(values, other):
            problem = (
                f"with other numbers outside the mask, and two more places, the values are {told(other)}, expected "
                f"{told(values)}: use PerToken.sum and PerToken.mean, which read what the mask holds"
            )
            raise subject.failed(problem, padded)

    for_all(subject, body)


def _reads_rows(subject: Subject) -> bool:
    return any(name.startswith("per_token") for name in subject.fields)


def _padded(part: LogRatios) -> LogRatios:
    rows = part.per_token
    assert rows is not None
    wide = rows._map(lambda value: torch.nn.functional.pad(value, (0, 2)))
    further = {name: getattr(wide, name) for name in _fields.ROWS if getattr(wide, name) is not None}
    garbage = {name: torch.where(wide.mask, value, 55.0) for name, value in further.items()}
    return _fields.summed(replace(wide, **garbage))


@check()
def check_precision(subject: Subject) -> None:
    """In float32 a value has the leading digit of float64, as far as the rounding of what goes into it allows."""
    drawn = []
    for seed in range(max(subject.examples, 3)):
        absent = subject.absences[seed % len(subject.absences)]
        options = {"magnitude": (20.0, 200.0, 2000.0)[seed % 3], "size": 4, "dtype": torch.float32}
        narrow = subject.seeded(600 + seed, absent, **options)
        wide = _fields.cast_to(narrow, torch.float64)
        wanted = subject.detached(subject.settled, wide)
        moved = [subject.detached(subject.settled, _rounded(wide, turn)) - wanted for turn in range(4)]
        allowed = 30 * torch.stack(moved).abs().amax(0) + 0.2 * wanted.abs() + 1e-36
        drawn.append((narrow, subject.detached(subject.settled, narrow).double(), wanted, allowed))
    # What adds up large terms rounds them; a loss that stays small everywhere has no such excuse.
    largest = max(float(wanted.abs().max()) for _, _, wanted, _ in drawn)
    rounding = 3e-7 * largest if largest > 4 else 0.0
    for narrow, found, wanted, allowed in drawn:
        if not bool(((found - wanted).abs() <= allowed + rounding).all()):
            problem = (
                f"got {told(found)} in float32 and {told(wanted)} in float64, expected the same leading digits: a "
                "difference of nearly equal numbers loses them, so write 1 - sigmoid(x) as sigmoid(-x), exp(x) - 1 as "
                "expm1(x), log(1 + x) as log1p(x)"
            )
            raise subject.failed(problem, narrow)


def _rounded(feedback: Feedback, turn: int) -> Feedback:
    """The feedback with its log-probs off by about as much as float32 rounds them."""

    def off(_: str, part: LogRatios) -> LogRatios:
        signs = 1.0 - 2.0 * ((torch.arange(part.policy.numel()).reshape(part.shape) + turn) % 2)
        reference = 0.0 if part.reference is None else 2e-7 * part.reference * (1 - turn // 2 * 2)
        return _fields.moved(part, policy=2e-7 * part.policy * signs, reference=reference)

    return _fields.map_parts(feedback, off)


@check(lambda subject: None if _reads_scores(subject) else "reads no scores")
def check_ties(subject: Subject) -> None:
    """Equal scores give finite values and gradients, or are refused by name."""

    def body(feedback: Feedback) -> None:
        given = _tied(feedback)
        try:
            value, gradients = gradient(subject, subject.settled, given)
        except CannotRun as error:
            if isinstance(error.__cause__, ValueError) and "score" in str(error.__cause__):
                return
            raise
        for name, found in {"value": value, **gradients}.items():
            if not bool(torch.isfinite(found).all()):
                what = "the mean" if name == "value" else f"the gradient of {name}"
                raise subject.failed(
                    f"with equal scores {what} is {told(found)}, expected finite numbers", given
                )

    for_all(subject, body, ties=True)


def _reads_scores(subject: Subject) -> bool:
    return subject.spec.feedback is Rankings or "scores" in subject.fields


def _tied(feedback: Feedback) -> Feedback:
    return (
        replace(feedback, score_chosen=feedback.score_rejected) if isinstance(feedback, Pairs) else feedback
    )


@check()
def check_nan(subject: Subject) -> None:
    """A NaN among the policy's log-probs shows in the loss, wherever the loss reads it."""
    for seed in range(min(subject.examples, 6)):
        absent = subject.absences[seed % len(subject.absences)]
        feedback = subject.seeded(700 + seed, absent, size=3)
        _, gradients = gradient(subject, subject.settled, feedback, mean=False)
        for path, slope in gradients.items():
            if not bool((slope != 0).any()):
                continue
            place = tuple((slope != 0).nonzero()[0].tolist())
            poisoned = _fields.trainable(feedback)[path].clone()
            poisoned[place] = torch.nan
            given = _fields.with_tensors(feedback, {path: poisoned})
            values = subject.detached(subject.settled, given)
            if not bool(torch.isnan(values).any()):
                problem = (
                    f"with {path}{list(place)} NaN the values are {told(values)}, expected NaN: hide no fault of the "
                    "model with nan_to_num or with a comparison that is False for NaN"
                )
                raise subject.failed(problem, given)
