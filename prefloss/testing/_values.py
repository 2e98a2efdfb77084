"""Checks of the values themselves: shape, dtype, repeatability, order of the examples, examples that do not count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Rankings
from prefloss.testing import _fields
from prefloss.testing._run import check, for_all
from prefloss.testing._subject import Subject

RELATIVE = 1e-8
"""Difference between two float64 values, relative to their size, that counts as rounding."""


def close(first: Tensor, second: Tensor, relative: float = RELATIVE) -> bool:
    """Whether two tensors agree but for rounding; NaN agrees with nothing."""
    return first.shape == second.shape and bool((gap(first, second) <= relative).all())


def gap(first: Tensor, second: Tensor) -> Tensor:
    """Difference of each entry, relative to its size where that is above 1."""
    first, second = first.detach().double(), second.detach().double()
    return (first - second).abs() / torch.maximum(first.abs(), second.abs()).clamp(min=1)


def told(values: Tensor) -> str:
    """Numbers as messages show them."""
    numbers = [float(f"{value:.8g}") for value in values.detach().double().flatten().tolist()]
    return repr(numbers[0] if values.ndim == 0 else numbers)


@check()
def check_shape_and_dtype(subject: Subject) -> None:
    """The loss gives one value per example: float64 for float64, float32 for float32 and for half precision."""

    def body(feedback: Feedback) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            given = _fields.cast_to(feedback, dtype)
            values = subject.detached(subject.settled, given)
            if values.shape != given.shape:
                problem = (
                    f"got values of shape {list(values.shape)}, expected {list(given.shape)}: do not reduce"
                )
                raise subject.failed(problem, given)
            wanted = torch.float64 if dtype == torch.float64 else torch.float32
            if values.dtype != wanted:
                problem = (
                    f"got {values.dtype} from {dtype} log-probs, expected {wanted}: make constants with "
                    "new_tensor or plain numbers, and do not cast"
                )
                raise subject.failed(problem, given)
            if dtype in (torch.float64, torch.float32) and not bool(torch.isfinite(values).all()):
                raise subject.failed(
                    f"got {told(values)} from ordinary log-probs, expected finite values", given
                )

    for_all(subject, body)


@check()
def check_no_mutation(subject: Subject) -> None:
    """The loss leaves every tensor of its feedback as it was."""

    def body(feedback: Feedback) -> None:
        before = {path: value.clone() for path, value in _fields.tensors(feedback).items()}
        versions = {path: value._version for path, value in _fields.tensors(feedback).items()}
        for loss in (subject.fresh(), subject.settled):
            subject.detached(loss, feedback)
            for path, value in _fields.tensors(feedback).items():
                if not torch.equal(value, before[path]) or value._version != versions[path]:
                    problem = (
                        f"{path} was {told(before[path])} before the call and is {told(value)} after it, expected it "
                        "unchanged: use no in-place operation (x += y, x.clamp_(), x[i] = y) on what comes in"
                    )
                    raise subject.failed(problem, _fields.with_tensors(feedback, {path: before[path]}))

    for_all(subject, body)


@check()
def check_determinism(subject: Subject) -> None:
    """In evaluation the same feedback gives the same values, again and in another object of the same settings."""

    def body(feedback: Feedback) -> None:
        first = subject.detached(subject.settled, feedback)
        torch.rand(3)
        second = subject.detached(subject.settled, feedback)
        if not torch.equal(first, second):
            problem = (
                f"the same call gave {told(first)} and then {told(second)}, expected the same twice: draw random "
                "numbers from a state such as prefloss.losses._core.state.Draws, and let no state move in evaluation"
            )
            raise subject.failed(problem, feedback)
        others = [subject.detached(subject.fresh().eval(), feedback) for _ in range(2)]
        if not torch.equal(*others):
            problem = f"two losses of the same settings gave {told(others[0])} and {told(others[1])}, expected the same"
            raise subject.failed(problem, feedback)

    for_all(subject, body)


def _place_matters(subject: Subject) -> str | None:
    if subject.draws_by_place:
        return "draws random numbers by place in the batch"
    return None


@check(_place_matters)
def check_batch_permutation(subject: Subject) -> None:
    """Values follow their examples when the batch is reordered; the order within a ranking means nothing."""

    def body(feedback: Feedback) -> None:
        values = subject.detached(subject.settled, feedback)
        for order in _orders(len(values)):
            moved = subject.detached(subject.settled, _fields.select(feedback, order))
            if not close(moved, values[order]):
                problem = (
                    f"in the order {order.tolist()} the values are {told(moved)}, expected {told(values[order])}: a "
                    "value belongs to its example, so put sorted or gathered values back in their places"
                )
                raise subject.failed(problem, feedback)

    for_all(subject, body)
    if subject.spec.feedback is Rankings:
        # Seeded, so that no two completions have equal log-ratios: a loss that ranks by them may take any order then.
        for feedback in subject.searched(subject.examples, size=2):
            _check_candidates(subject, feedback)


def _orders(count: int) -> Iterator[Tensor]:
    if count > 1:
        yield torch.arange(count).flip(0)
        yield torch.arange(count).roll(1)


def _check_candidates(subject: Subject, feedback: Feedback) -> None:
    assert isinstance(feedback, Rankings)
    values = subject.detached(subject.settled, feedback)
    for order in _orders(feedback.completions.shape[1]):
        reordered = replace(
            feedback,
            completions=feedback.completions[:, order],
            scores=feedback.scores[:, order],
            mask=None if feedback.mask is None else feedback.mask[:, order],
        )
        moved = subject.detached(subject.settled, reordered)
        if not close(moved, values):
            problem = (
                f"with the completions of each group in the order {order.tolist()} the values are {told(moved)}, "
                f"expected {told(values)} as before: rank by the scores, not by place"
            )
            raise subject.failed(problem, feedback)


@check()
def check_weights(subject: Subject) -> None:
    """An example's weight multiplies its value, and the mean divides by the number of examples."""

    def body(feedback: Feedback) -> None:
        values = subject.detached(subject.settled, replace(feedback, weight=None))
        weighted = subject.detached(subject.settled, feedback)
        assert feedback.weight is not None
        if not close(weighted, values * feedback.weight):
            problem = (
                f"with weights {told(feedback.weight)} the values are {told(weighted)}, expected "
                f"{told(values * feedback.weight)}: leave the weights to prefloss, which multiplies by them"
            )
            raise subject.failed(problem, feedback)
        mean = subject.mean(subject.settled, feedback).detach()
        wanted = weighted.sum() / subject.settled.counted(feedback).sum().clamp(min=1)
        # The terms of a sum may count different examples, so its mean is not the mean of its values.
        if not subject.is_sum and not close(mean, wanted):
            raise subject.failed(f"the mean is {told(mean)}, expected {told(wanted)}", feedback)

    for_all(subject, body, weight=True)


@check()
def check_single_example(subject: Subject) -> None:
    """A batch of one example has a finite value and a finite gradient, in training and in evaluation."""

    def body(feedback: Feedback) -> None:
        for loss in (subject.fresh(), subject.settled):
            mode = "evaluation" if loss is subject.settled else "training"
            value, gradients = gradient(subject, loss, feedback)
            for name, found in {"value": value, **gradients}.items():
                if not bool(torch.isfinite(found).all()):
                    what = "the value" if name == "value" else f"the gradient of {name}"
                    problem = (
                        f"in {mode}, {what} is {told(found)}, expected finite numbers: a statistic of the batch needs "
                        "a meaning for one example (an unbiased standard deviation has none)"
                    )
                    raise subject.failed(problem, feedback)

    for_all(subject, body, size=1)


def gradient(
    subject: Subject, loss: object, feedback: Feedback, mean: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss (or the sum of the values) and its gradient to all that may have one, by path."""
    leaves = {path: value.detach().requires_grad_() for path, value in _fields.trainable(feedback).items()}
    given = _fields.with_tensors(feedback, {**leaves})
    value = subject.mean(loss, given) if mean else subject.values(loss, given).sum()  # type: ignore[arg-type]
    return value.detach(), slopes(value, leaves)


def slopes(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of a scalar to each leaf; 0 where there is none."""
    if not value.requires_grad:
        return {path: torch.zeros_like(leaf) for path, leaf in leaves.items()}
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {
        path: torch.zeros_like(leaf) if slope is None else slope
        for (path, leaf), slope in zip(leaves.items(), found, strict=True)
    }
