"""Checks of the values: one per example, repeatable, in the order of the examples, times their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Rankings
from prefloss.testing.fields import cast_to, select, tensors, with_tensors
from prefloss.testing.run import check, for_all
from prefloss.testing.subject import Subject, shown


@check()
def check_shape_and_dtype(subject: Subject) -> None:
    """The loss gives one value per example: float64 for float64, float32 for float32 and for half precision."""

    def body(feedback: Feedback) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            _check_shape_and_dtype(subject, cast_to(feedback, dtype), dtype)

    for_all(subject, body)


def _check_shape_and_dtype(subject: Subject, feedback: Feedback, dtype: torch.dtype) -> None:
    values = subject.settled_values(feedback)
    if values.shape != feedback.shape:
        shapes = str(list(values.shape)), str(list(feedback.shape))
        raise subject.failed("shape of the values", *shapes, feedback, "do not reduce")
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    if values.dtype != expected:
        change = "make constants with new_tensor or plain numbers, and do not cast"
        raise subject.failed(
            f"values from {dtype} log-probs", str(values.dtype), str(expected), feedback, change
        )
    if dtype in (torch.float64, torch.float32):
        subject.expect_finite({"values": values}, "from ordinary log-probs", feedback)


@check(change="use no in-place operation (x += y, x.clamp_(), x[i] = y) on what comes in")
def check_no_mutation(subject: Subject) -> None:
    """The loss leaves every tensor of its feedback as it was."""

    def body(feedback: Feedback) -> None:
        before = {path: value.clone() for path, value in tensors(feedback).items()}
        versions = {path: value._version for path, value in tensors(feedback).items()}
        for loss in subject.modes.values():
            subject.detached(loss, feedback)
            for path, value in tensors(feedback).items():
                if not torch.equal(value, before[path]) or value._version != versions[path]:
                    restored = with_tensors(feedback, {path: before[path]})
                    raise subject.failed(f"{path} after the call", value, before[path], restored)

    for_all(subject, body)


@check(
    change="draw numbers from a state such as prefloss.hyperparameters.Draws, and let no state move in evaluation"
)
def check_determinism(subject: Subject) -> None:
    """In evaluation the same feedback gives the same values, again and in another object of the same settings."""

    def body(feedback: Feedback) -> None:
        first = subject.settled_values(feedback)
        torch.rand(3)
        second = subject.settled_values(feedback)
        if not torch.equal(first, second):
            raise subject.failed("values of the same call again", second, first, feedback)
        one, other = (subject.detached(subject.fresh().eval(), feedback) for _ in range(2))
        if not torch.equal(one, other):
            raise subject.failed("values of a second loss of the same settings", other, one, feedback)

    for_all(subject, body)


@check(
    lambda subject: "draws random numbers by place in the batch" if subject.draws_by_place else None,
    change="a value belongs to its example, so put sorted or gathered values back in their places",
)
def check_batch_permutation(subject: Subject) -> None:
    """Values follow their examples when the batch is reordered; the order within a ranking has no effect."""

    def body(feedback: Feedback) -> None:
        values = subject.settled_values(feedback)
        for order in _orders(len(values)):
            reordered = subject.settled_values(select(feedback, order))
            subject.expect(f"values in the order {order.tolist()}", reordered, values[order], feedback)

    for_all(subject, body)
    if subject.spec.feedback is Rankings:
        # Seeded, so that no two completions have equal log-ratios: a loss that ranks by them may take any order then.
        for feedback in subject.searched(subject.examples, size=2):
            _check_order_of_completions(subject, feedback)


def _orders(count: int) -> Iterator[Tensor]:
    if count > 1:
        yield torch.arange(count).flip(0)
        yield torch.arange(count).roll(1)


def _check_order_of_completions(subject: Subject, feedback: Feedback) -> None:
    assert isinstance(feedback, Rankings)
    values = subject.settled_values(feedback)
    for order in _orders(feedback.completions.shape[1]):
        other = replace(
            feedback,
            completions=feedback.completions[:, order],
            scores=feedback.scores[:, order],
            mask=None if feedback.mask is None else feedback.mask[:, order],
        )
        what = f"values with the completions of each group in the order {order.tolist()}"
        change = "rank by the scores, not by place"
        subject.expect(what, subject.settled_values(other), values, feedback, change)


@check(change="leave the weights to prefloss, which multiplies by them")
def check_weights(subject: Subject) -> None:
    """An example's weight multiplies its value, and the mean divides by the number of examples."""

    def body(feedback: Feedback) -> None:
        assert feedback.weight is not None
        products = subject.settled_values(replace(feedback, weight=None)) * feedback.weight
        weighted = subject.settled_values(feedback)
        subject.expect(f"values with weights {shown(feedback.weight)}", weighted, products, feedback)
        # The terms of a sum may count different examples, so its mean is not the mean of its values.
        if not subject.is_sum:
            mean = weighted.sum() / subject.settled.counted(feedback).sum().clamp(min=1)
            subject.expect("mean", subject.call(subject.settled.mean, feedback), mean, feedback)

    for_all(subject, body, weight=True)
