"""Checks of the values: one per example, repeatable, weighted, in the order of the examples.

And of unusual examples: a single one, those that do not count, padding, equal scores, another device.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import pad

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.testing import fields
from prefloss.testing.outcomes import CannotRun
from prefloss.testing.run import check, for_all
from prefloss.testing.subject import Subject, shown


@check(draws={"size": 3})
def check_shape_and_dtype(subject: Subject, feedback: Feedback) -> None:
    """The loss gives one value per example: float64 for float64, float32 for float32 and for half precision."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        _check_shape_and_dtype(subject, fields.cast_to(feedback, dtype), dtype)


def _check_shape_and_dtype(subject: Subject, feedback: Feedback, dtype: torch.dtype) -> None:
    values = subject.settled_values(feedback)
    if values.shape != feedback.shape:
        shapes = str(list(values.shape)), str(list(feedback.shape))
        raise subject.failed("shape of the values", *shapes, feedback, "do not reduce")
    expected = torch.promote_types(dtype, torch.float32)
    if values.dtype != expected:
        what = f"values from {dtype} log-probs"
        change = "make constants with new_tensor or plain numbers, and do not cast"
        raise subject.failed(what, str(values.dtype), str(expected), feedback, change)
    if dtype in (torch.float64, torch.float32):
        change = "look for log, sqrt or a power of a number below 0, and for a division by 0"
        subject.expect_finite({"values": values}, "from ordinary log-probs", feedback, change)


@check(change="use no in-place operation (x += y, x.clamp_(), x[i] = y) on what comes in", draws={})
def check_no_mutation(subject: Subject, feedback: Feedback) -> None:
    """The loss leaves every tensor of its feedback as it was."""
    before = {path: (value.clone(), value._version) for path, value in fields.tensors(feedback).items()}
    for loss in subject.modes.values():
        subject.detached(loss, feedback)
        for path, value in fields.tensors(feedback).items():
            copied, version = before[path]
            if not torch.equal(value, copied) or value._version != version:
                restored = fields.with_tensors(feedback, {path: copied})
                raise subject.failed(f"{path} after the call", value, copied, restored)
            if value.requires_grad:
                change = (
                    "make no leaf of what comes in: values carry the gradient of the policy by themselves"
                )
                raise subject.failed(f"{path}.requires_grad", "True", "False as before", feedback, change)


@check(
    change="draw numbers from a state such as prefloss.hyperparameters.Draws, and let no state move in evaluation",
    draws={},
)
def check_determinism(subject: Subject, feedback: Feedback) -> None:
    """In evaluation the same feedback gives the same values, again and in another object of the same settings."""
    # So that a loss that seeds the generator does not find it as it left it.
    torch.rand(3)
    generator = torch.get_rng_state()
    first = subject.settled_values(feedback)
    drawn = not torch.equal(torch.get_rng_state(), generator)
    torch.rand(3)
    second = subject.settled_values(feedback)
    subject.expect("values of the same call again", second, first, feedback, exactly=True)
    if drawn:
        raise subject.failed("torch's random numbers", "some drawn or seeded by the loss", "none", feedback)
    one, other = (subject.detached(subject.fresh().eval(), feedback) for _ in range(2))
    what = "values of a second loss of the same settings"
    subject.expect(what, other, one, feedback, exactly=True)


@check(
    lambda subject: "draws random numbers by place in the batch" if subject.draws_by_place else None,
    change="a value belongs to its example, so put sorted or gathered values back in their places",
)
def check_batch_permutation(subject: Subject) -> None:
    """Values follow their examples when the batch is reordered; the order within a ranking has no effect."""

    def body(feedback: Feedback) -> None:
        values = subject.settled_values(feedback)
        for order in _orders(len(values)):
            reordered = subject.settled_values(fields.select(feedback, order))
            subject.expect(f"values in the order {order.tolist()}", reordered, values[order], feedback)

    for_all(subject, body)
    if subject.spec.feedback is Rankings:
        # Seeded, so that no two completions have equal log-ratios: a loss that ranks by them may take any order then.
        for feedback in subject.searched(subject.examples, size=2):
            _check_order_of_completions(subject, feedback)


def _orders(count: int) -> list[Tensor]:
    places = torch.arange(count)
    return [places.flip(0), places.roll(1)] if count > 1 else []


def _check_order_of_completions(subject: Subject, feedback: Feedback) -> None:
    assert isinstance(feedback, Rankings)
    values = subject.settled_values(feedback)
    by_place = {"completions": feedback.completions, "scores": feedback.scores, "mask": feedback.present}
    for order in _orders(feedback.completions.shape[1]):
        other = replace(feedback, **{name: value[:, order] for name, value in by_place.items()})
        what = f"values with the completions of each group in the order {order.tolist()}"
        change = "rank by the scores, not by place"
        subject.expect(what, subject.settled_values(other), values, feedback, change)


@check(change="leave the weights to prefloss, which multiplies by them", draws={"weight": True})
def check_weights(subject: Subject, feedback: Feedback) -> None:
    """An example's weight multiplies its value, and the mean divides by the number of examples."""
    assert feedback.weight is not None
    products = subject.settled_values(replace(feedback, weight=None)) * feedback.weight
    weighted = subject.settled_values(feedback)
    subject.expect(f"values with weights {shown(feedback.weight)}", weighted, products, feedback)
    # The terms of a sum may count different examples, so its mean is not the mean of its values.
    if not subject.is_sum:
        mean = weighted.sum() / subject.settled.counted(feedback).sum().clamp(min=1)
        subject.expect("mean", subject.call(subject.settled.mean, feedback), mean, feedback)


@check(
    change="a statistic of the batch needs a meaning for one example (an unbiased standard deviation has none), and "
    "squeeze() without a dimension takes a batch of one away",
    draws={"size": 1},
)
def check_single_example(subject: Subject, feedback: Feedback) -> None:
    """A batch of one example has a finite value, in training and in evaluation; `gradient_nonzero` looks further."""
    for mode, loss in subject.modes.items():
        try:
            value = subject.detached(loss, feedback)
        except CannotRun as error:
            got = str(error.__cause__ or error.problem)
            raise subject.failed("a batch of one example", got, "one finite value", feedback) from error
        subject.expect_finite({"value": value}, f"of one example in {mode}", feedback)


@check(
    change="an empty completion has 0 tokens, so divide by tokens.clamp(min=1) and guard both branches of a where",
    draws={},
)
def check_empty_examples(subject: Subject, feedback: Feedback) -> None:
    """An example without tokens has value 0, no gradient, and no influence on the others."""
    size, every_empty = feedback.shape[0], feedback
    for part in (part for part in fields.parts(feedback) if part != "mismatched"):
        for place in (0, size - 1) if size > 2 else (0,):
            _check_emptied(subject, feedback, part, place)
        every_empty = _without_tokens(every_empty, part, torch.arange(size))
    if not bool(subject.settled.counted(every_empty).any()):
        for loss in subject.modes.values():
            results = subject.results(loss, every_empty)
            subject.expect_zero(results, "with every example empty", every_empty)
    if isinstance(feedback, Rankings):
        _check_absent(subject, feedback)


def _without_tokens(feedback: Feedback, part: str, places: Tensor | int) -> Feedback:
    """The feedback with some examples empty; in a ranking one completion is left, which is too few."""
    keep = torch.ones(feedback.shape[0], dtype=torch.bool)
    keep[places] = False
    if isinstance(feedback, Rankings):
        first = torch.arange(fields.parts(feedback)[part].shape[1]) == 0
        keep = keep.unsqueeze(-1) | first
    return fields.emptied(feedback, part, keep)


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
    left = fields.select(whole, others)
    if isinstance(left, Labels) and isinstance(whole, Labels):
        # The empty example's mismatched completion is a completion like the others.
        left = replace(left, mismatched=whole.mismatched)
    what = f"values of the others with example {place} empty"
    change = "leave examples that do not count (feedback.valid) out of every statistic of the batch"
    subject.expect(what, values[others], subject.settled_values(left), feedback, change)


def _check_absent(subject: Subject, feedback: Rankings) -> None:
    """An absent completion of a ranking is not read."""
    absent = ~feedback.present
    completions = fields.shifted(feedback.completions, policy=torch.where(absent, -7.5, 0.0))
    other = replace(feedback, completions=completions, scores=torch.where(absent, 55.0, feedback.scores))
    what = "values with another log-prob and score at absent completions"
    change = "read and count completions only where feedback.present is True"
    subject.expect(what, subject.settled_values(other), subject.settled_values(feedback), other, change)
    places = torch.arange(absent.shape[1] + 1) % absent.shape[1]
    wider = replace(
        feedback,
        completions=feedback.completions[:, places],
        scores=feedback.scores[:, places],
        mask=feedback.present[:, places] & (torch.arange(len(places)) < absent.shape[1]),
    )
    what = "values with one more place, of absent completions"
    subject.expect(what, subject.settled_values(wider), subject.settled_values(feedback), wider, change)
    _, gradients = subject.gradient(subject.settled, feedback)
    at_absent = {f"gradient of {path}": slope[absent] for path, slope in gradients.items()}
    subject.expect_zero(at_absent, "at absent completions", feedback)


@check(
    lambda subject: None if subject.reads_rows else "reads no tokens",
    change="use PerToken.sum and PerToken.mean, which read only inside the mask",
    draws={},
)
def check_padding(subject: Subject, feedback: Feedback) -> None:
    """What stands outside the mask of the per-token rows is not read; width, padding and gaps have no effect."""
    values = subject.settled_values(feedback)
    for where, (left, right, gaps) in PADDINGS.items():
        padded = fields.map_parts(feedback, functools.partial(_padded, left=left, right=right, gaps=gaps))
        subject.expect(f"values with {where}", subject.settled_values(padded), values, padded)


PADDINGS = {
    "other numbers outside the mask": (0, 0, 0),
    "two more places at the right": (0, 2, 0),
    "two more places at the left, as padding_side='left' makes them": (2, 0, 0),
    "a gap after each token, as masked tokens in the middle of a completion make it": (0, 0, 1),
}
"""More places at the left and at the right of a row and after each token; all of them outside the mask."""


def _padded(part: LogRatios, left: int, right: int, gaps: int) -> LogRatios:
    assert part.per_token is not None

    def spread(value: Tensor) -> Tensor:
        return pad(pad(value.unsqueeze(-1), (0, gaps)).flatten(-2), (left, right))

    wide = fields.map_rows(part.per_token, spread)
    rows = {name: value for name, value in fields.tensors(wide).items() if name in fields.ROWS}
    garbage = {name: torch.where(wide.mask, value, 55.0) for name, value in rows.items()}
    return replace(wide, **garbage).log_ratios()


@check(
    lambda subject: None if subject.reads_scores else "reads no scores",
    change="handle a difference of 0, or refuse equal scores with a ValueError that names them",
    draws={"ties": True},
)
def check_ties(subject: Subject, feedback: Feedback) -> None:
    """Equal scores give finite values and gradients, or are refused by name."""
    if isinstance(feedback, Pairs):
        feedback = replace(feedback, score_chosen=feedback.score_rejected)
    _check_finite_or_refused(subject, feedback, "with equal scores")


def _check_finite_or_refused(subject: Subject, feedback: Feedback, where: str) -> None:
    try:
        results = subject.results(subject.settled, feedback)
    except CannotRun as error:
        if isinstance(error.__cause__, ValueError) and "score" in str(error.__cause__):
            return
        raise
    subject.expect_finite(results, where, feedback)


@check(
    lambda subject: None if subject.reads_scores else "reads no scores",
    change="scores may be any numbers in any order: clamp the argument of an exp, take no log or root of a score or of "
    "a difference, or refuse what does not fit with a ValueError that names the scores",
)
def check_scores(subject: Subject) -> None:
    """Scores of any sign and size, also where the chosen one's is the lower, give finite values or are refused."""
    generator = torch.Generator().manual_seed(0)
    for turn, size in enumerate((1.0, 30.0, 1000.0)):
        drawn = subject.seeded(800 + turn, subject.absence(turn), size=8)
        others = {
            path: size * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for path, value in fields.numbers(drawn).items()
            if path.startswith("score")
        }
        feedback = fields.with_tensors(drawn, others)
        _check_finite_or_refused(subject, feedback, f"with scores from about {-size:g} to {size:g}")


@check(
    change="make constants where the log-probs are: h.new_zeros(n), torch.zeros_like(h), torch.tensor(x).to(h), or "
    "plain numbers; call no .cpu() or .numpy()"
)
def check_device(subject: Subject) -> None:
    """The loss works on an accelerator: it makes every tensor on the device of the log-probs."""
    drawn, settled = subject.seeded(8, size=4), subject.settled
    try:
        # Fake tensors have no values, and refuse to mix devices as an accelerator would.
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            on_device = {
                path: torch.empty(value.shape, dtype=value.dtype, device="meta")
                for path, value in fields.tensors(drawn).items()
            }
            settled(fields.with_tensors(drawn, on_device))
    except Exception as error:
        # What depends on values, such as .item(), cannot be followed; `torch_compile` looks at that.
        if "devices" in str(error) or "returned values on" in str(error):
            got = str(error).splitlines()[0]
            raise subject.failed("a call on an accelerator", got, "no tensor on the CPU", drawn) from error
