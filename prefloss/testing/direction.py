"""Checks of how a loss depends on its log-ratios: through a difference alone, in one direction."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.registry import Loss
from prefloss.testing.fields import altered, parts, reversed_tokens, shifted
from prefloss.testing.run import check
from prefloss.testing.subject import DEPENDENCE, SEARCHED, Subject, differs, shown

DROPS = (0.3, 5.0, 80.0, 1500.0)
"""By how much a log-prob is lowered, nats."""


def _is_modified(subject: Subject) -> str | None:
    if subject.modifiers:
        return f"changed by {', '.join(subject.modifiers)}: the trait is that of the plain loss"
    return None


def _has_no_difference(subject: Subject) -> str | None:
    spec = subject.spec
    if _is_modified(subject) or spec.difference_only:
        return _is_modified(subject)
    if spec.feedback is not Pairs:
        return f"takes {spec.feedback.__name__}, and only pairs have one difference"
    if not spec.needs_reference:
        return "has no reference, so no log-ratios to subtract"
    if subject.reads_rows:
        return "reads tokens, which a changed margin does not have"
    return (
        None if spec.separable else "mixes the pairs of a batch, so more than a pair's own difference matters"
    )


@check(_has_no_difference, change="declare difference_only=False")
def check_difference_only(subject: Subject) -> None:
    """Of what the policy gives, only the difference of a pair's log-ratios matters if and only if the loss says so."""
    if not subject.spec.difference_only:
        _check_another_dependence(subject)
        return
    declared, change = "difference_only=True", "only pairs with a reference have a difference of log-ratios"
    if subject.spec.feedback is not Pairs:
        raise subject.failed(declared, subject.spec.feedback.__name__, "Pairs", change=change)
    if not subject.spec.needs_reference:
        raise subject.failed(declared, "needs_reference=False", "needs_reference=True", change=change)
    for feedback in subject.searched():
        subject.narrowed(feedback, lambda item: _check_nothing_beside_the_difference(subject, item))


def _check_another_dependence(subject: Subject) -> None:
    for feedback in subject.searched():
        if subject.fails(feedback, lambda item: _check_nothing_beside_the_difference(subject, item)):
            return
    raise subject.failed(
        "difference_only=False",
        f"values that follow from the difference of the log-ratios alone in {SEARCHED} batches",
        "another dependence somewhere",
        change="declare difference_only=True, which admits label smoothing, margins and divergences",
    )


def _check_nothing_beside_the_difference(subject: Subject, feedback: Feedback) -> None:
    """Values stay where each pair keeps its difference."""
    assert isinstance(feedback, Pairs)
    values = subject.settled_values(feedback)
    source = random.Random(7)
    # Each pair by another constant, downwards, so that no log-prob rises above 0.
    nats = -torch.tensor([source.uniform(0.5, 4.0) for _ in range(len(values))], dtype=torch.float64)
    shifts = [(nats, nats)]
    chosen, rejected = feedback.chosen.tokens, feedback.rejected.tokens
    if chosen is not None and rejected is not None:
        shifts.append((nats * chosen, nats * rejected))
    moved = [subject.settled_values(_with_policy_shift(feedback, *sides)) for sides in shifts]
    # The loss may take the difference of the sums or of the means.
    if all(differs(values, other) for other in moved):
        what = f"values with {shown(nats)} nats added to the log-ratios of both sides"
        raise subject.failed(what, moved[0], values, feedback)
    for what, other in _with_the_same_log_ratios(feedback, nats):
        other_values = subject.settled_values(other)
        if differs(values, other_values):
            raise subject.failed(f"values with {what}", other_values, values, feedback)


def _with_the_same_log_ratios(pairs: Pairs, nats: Tensor) -> Iterator[tuple[str, Feedback]]:
    """The pairs with the same log-ratios of both sides, from another policy."""
    moved = replace(
        pairs,
        chosen=shifted(pairs.chosen, policy=nats, reference=nats),
        rejected=shifted(pairs.rejected, policy=2 * nats, reference=2 * nats),
    )
    yield "the same nats added to policy and reference of a side", moved
    reversed_pairs = replace(
        pairs, chosen=reversed_tokens(pairs.chosen), rejected=reversed_tokens(pairs.rejected)
    )
    yield "nats moved from token to token of a completion", reversed_pairs
    # What else the policy gives.
    for need in ("gold", "per_token.log_sum_sq", "per_token.kl", "per_token.reverse_kl"):
        yield f"another {need}", altered(pairs, need, 0)


def _with_policy_shift(pairs: Pairs, chosen: Tensor, rejected: Tensor) -> Pairs:
    return replace(
        pairs,
        chosen=shifted(pairs.chosen, policy=chosen),
        rejected=shifted(pairs.rejected, policy=rejected),
    )


@check(_is_modified, change="declare monotone=False")
def check_monotone(subject: Subject) -> None:
    """The loss never rises with the better completion's log-prob if and only if it declares monotone."""
    if subject.spec.monotone:
        for feedback in subject.searched(SEARCHED // 2):
            subject.narrowed(feedback, lambda item: _check_no_rise(subject, lambda: subject.settled, item))
        return
    # A state that moves with the batch may turn the direction, so look in training too.
    losses = [lambda: subject.settled, *([subject.fresh] if subject.loss.state else [])]
    changed = False

    def body(feedback: Feedback) -> None:
        nonlocal changed
        for loss in losses:
            changed = _check_no_rise(subject, loss, feedback) or changed

    batches = 2 * SEARCHED
    if not any(subject.fails(feedback, body) for feedback in subject.searched(batches)) and changed:
        got = (
            f"values that never rose with the policy's log-prob of the better completion in {batches} batches"
        )
        raise subject.failed("monotone=False", got, "a rise somewhere", change="declare monotone=True")


def _check_no_rise(subject: Subject, loss: Callable[[], Loss], feedback: Feedback) -> bool:
    """Fail if the loss rises with the better completion's log-prob; otherwise return whether it changes at all."""
    values, changed = _single_or_sum(subject, loss(), feedback), False
    for lower in _lowered(subject, feedback):
        below = _single_or_sum(subject, loss(), lower)
        rise = (values - below) / torch.maximum(values.abs(), below.abs()).clamp(min=1)
        if bool((rise > DEPENDENCE).any()):
            log_probs = f"from {_better_log_probs(lower)} to {_better_log_probs(feedback)}"
            what = f"value when the policy's log-prob of the better completion rises {log_probs}"
            got = f"a rise from {shown(below)} to {shown(values)}"
            raise subject.failed(what, got, "no rise", feedback)
        changed = changed or bool((rise.abs() > DEPENDENCE).any())
    return changed


def _single_or_sum(subject: Subject, loss: Loss, feedback: Feedback) -> Tensor:
    """Each value of a separable loss, the sum of the others': one example's rise may be another's fall."""
    values = subject.detached(loss, feedback)
    return values if subject.spec.separable else values.sum()


def _lowered(subject: Subject, feedback: Feedback) -> Iterator[Feedback]:
    """The feedback with a lower log-prob of the better completions: of all, and of one where they are coupled."""
    name = "chosen" if isinstance(feedback, Pairs) else "completions"
    part, better = parts(feedback)[name], _better(feedback)
    first = better & (better.flatten().cumsum(0).reshape(better.shape) == 1)
    coupled = not subject.spec.separable or bool(subject.loss.state)
    for which in (better, first) if coupled else (better,):
        for nats in DROPS:
            drop = torch.where(which, -nats, 0.0).to(part.policy.dtype)
            yield replace(feedback, **{name: shifted(part, policy=drop)})


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
    return shown(part.policy[_better(feedback)])
