"""Checks of how a loss depends on its log-ratios: through a difference alone, in one direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.losses._core.loss import Loss
from prefloss.testing import _fields
from prefloss.testing._altered import NOTICED, altered, differs, from_to, mixed, narrowed
from prefloss.testing._draws import Seeded
from prefloss.testing._run import check
from prefloss.testing._subject import SEARCHED, Subject
from prefloss.testing._values import told


def _no_score_difference(subject: Subject) -> str | None:
    spec = subject.spec
    if subject.modifiers:
        return f"changed by {', '.join(subject.modifiers)}: the trait is that of the plain loss"
    if spec.difference_only:
        return None
    if spec.feedback is not Pairs:
        return f"takes {spec.feedback.__name__}, and only pairs have one difference"
    if not spec.needs_reference:
        return "has no reference, so no log-ratios to subtract"
    if any(name.startswith("per_token") for name in subject.fields):
        return "reads tokens, which a changed margin does not have"
    return (
        None if spec.separable else "mixes the pairs of a batch, so more than a pair's own difference matters"
    )


@check(_no_score_difference)
def check_difference_only(subject: Subject) -> None:
    """Of what the policy gives, only the difference of a pair's log-ratios matters if and only if the loss says so."""
    spec = subject.spec
    if spec.difference_only and spec.feedback is not Pairs:
        raise subject.failed(
            f"declares difference_only=True, but takes {spec.feedback.__name__}: only pairs differ"
        )
    if spec.difference_only and not spec.needs_reference:
        raise subject.failed(
            "declares difference_only=True and needs_reference=False: without one are no log-ratios"
        )
    for feedback in subject.searched():
        if _difference_problem(subject, feedback) is None:
            continue
        if not spec.difference_only:
            return
        problem, smallest = narrowed(feedback, lambda item: _difference_problem(subject, item))
        raise subject.failed(f"{problem}: declare difference_only=False", smallest)
    if not spec.difference_only:
        raise subject.failed(
            f"declares difference_only=False, but in {SEARCHED} batches only the difference of the log-ratios "
            "mattered: declare difference_only=True, which admits label smoothing, margins and divergences"
        )


def _difference_problem(subject: Subject, feedback: Feedback) -> str | None:
    """What shows that more than the difference matters, or None."""
    assert isinstance(feedback, Pairs)
    loss, source = subject.settled, Seeded(7)
    values = subject.detached(loss, feedback)
    # Each pair by another constant, downwards, so that no log-prob rises above 0.
    nats = -torch.tensor([source.number(0.5, 4.0) for _ in range(len(values))], dtype=torch.float64)
    shifts = [("log-ratios", _both_sides(feedback, nats, nats))]
    if feedback.chosen.tokens is not None and feedback.rejected.tokens is not None:
        means = _both_sides(feedback, nats * feedback.chosen.tokens, nats * feedback.rejected.tokens)
        shifts.append(("log-ratios per token", means))
    found = [(what, subject.detached(loss, other)) for what, other in shifts]
    if all(differs(values, other) for _, other in found):
        what, other = found[0]
        return f"with {told(nats)} nats added to the {what} of both sides the values went {from_to(values, other)}"
    for what, other in _same_differences(feedback, nats):
        found = subject.detached(loss, other)
        if differs(values, found):
            return f"with {what} the values went {from_to(values, found)}"
    return None


def _same_differences(pairs: Pairs, nats: Tensor) -> Iterator[tuple[str, Pairs]]:
    """The pairs with the same log-ratios of both sides, from another policy."""
    yield (
        "the same nats added to policy and reference of a side",
        replace(
            pairs,
            chosen=_fields.moved(pairs.chosen, policy=nats, reference=nats),
            rejected=_fields.moved(pairs.rejected, policy=2 * nats, reference=2 * nats),
        ),
    )
    other = replace(pairs, chosen=mixed(pairs.chosen), rejected=mixed(pairs.rejected))
    yield "nats moved from token to token of a completion", other
    for name in ("gold", *(f"per_token.{row}" for row in ("log_sum_sq", "kl", "reverse_kl"))):
        other = altered(pairs, name, 0)
        assert isinstance(other, Pairs)
        yield f"another {name}", other


def _both_sides(pairs: Pairs, chosen: Tensor, rejected: Tensor) -> Pairs:
    return replace(
        pairs,
        chosen=_fields.moved(pairs.chosen, policy=chosen),
        rejected=_fields.moved(pairs.rejected, policy=rejected),
    )


def _no_plain_direction(subject: Subject) -> str | None:
    if subject.modifiers:
        return f"changed by {', '.join(subject.modifiers)}: the trait is that of the plain loss"
    return None


@check(_no_plain_direction)
def check_monotone(subject: Subject) -> None:
    """The loss never rises with the better completion's log-prob if and only if it declares monotone."""
    if subject.spec.monotone:
        for feedback in subject.searched(SEARCHED // 2):
            if _rises(subject, lambda: subject.settled, feedback)[0]:
                problem, smallest = narrowed(
                    feedback, lambda item: _rises(subject, lambda: subject.settled, item)[0]
                )
                raise subject.failed(f"{problem}: declare monotone=False", smallest)
        return
    moved = False
    for feedback in subject.searched(2 * SEARCHED):
        # A state that moves with the batch may turn the direction, so look in training too.
        for loss in (
            (lambda: subject.settled, subject.fresh) if subject.loss.state else (lambda: subject.settled,)
        ):
            problem, changed = _rises(subject, loss, feedback)
            moved = moved or changed
            if problem:
                return
    if moved:
        raise subject.failed(
            f"declares monotone=False, but in {2 * SEARCHED} batches the value never rose with the policy's log-prob "
            "of the better completion: declare monotone=True"
        )


def _rises(subject: Subject, loss: Callable[[], Loss], feedback: Feedback) -> tuple[str | None, bool]:
    """What shows that the loss rose with the better completion's log-prob; and whether it changed at all."""
    values, changed = _of_interest(subject, loss(), feedback), False
    for lower in _lowered(subject, feedback):
        below = _of_interest(subject, loss(), lower)
        rise = (values - below) / torch.maximum(values.abs(), below.abs()).clamp(min=1)
        changed = changed or bool((rise.abs() > NOTICED).any())
        if bool((rise > NOTICED).any()):
            problem = (
                f"the value rose from {told(below)} to {told(values)} when the policy's log-prob of the better "
                f"completion rose from {_better_log_probs(lower)} to {_better_log_probs(feedback)}"
            )
            return problem, True
    return None, changed


def _of_interest(subject: Subject, loss: Loss, feedback: Feedback) -> Tensor:
    """Each value of a separable loss, the sum of the others': one example's rise may be another's fall."""
    values = subject.detached(loss, feedback)
    return values if subject.spec.separable else values.sum()


def _lowered(subject: Subject, feedback: Feedback) -> Iterator[Feedback]:
    """The feedback with a lower log-prob of the better completions: of all, and of one where they are coupled."""
    name = "chosen" if isinstance(feedback, Pairs) else "completions"
    part, better = _fields.parts(feedback)[name], _better(feedback)
    first = better & (better.flatten().cumsum(0).reshape(better.shape) == 1)
    for which in (better,) if subject.spec.separable and not subject.loss.state else (better, first):
        for nats in (0.3, 5.0, 80.0, 1500.0):
            down = torch.where(which, -nats, 0.0).to(part.policy.dtype)
            yield replace(feedback, **{name: _fields.moved(part, policy=down)})


def _better(feedback: Feedback) -> Tensor:
    """True at the completions that people preferred: the chosen, the upvoted, the best of a ranking."""
    if isinstance(feedback, Labels):
        return feedback.desirable
    if isinstance(feedback, Rankings):
        scores = feedback.scores.masked_fill(~feedback.present, -torch.inf)
        return scores == scores.max(-1, keepdim=True).values
    return torch.ones(feedback.shape, dtype=torch.bool)


def _better_log_probs(feedback: Feedback) -> str:
    part = feedback.chosen if isinstance(feedback, Pairs) else feedback.completions
    return told(part.policy[_better(feedback)])
