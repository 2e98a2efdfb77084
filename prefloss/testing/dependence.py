"""Checks of what a loss depends on: other examples, the reference, fields, a difference, and in which direction."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.registry import Loss
from prefloss.testing import fields
from prefloss.testing.run import check, for_all
from prefloss.testing.subject import DEPENDENCE, SEARCHED, Subject, differs, shown

DROPS = (0.3, 5.0, 80.0, 1500.0)
"""By how much a log-prob is lowered, nats."""


@check(change="declare separable=False, or use no mean, sum, sort or other statistic over the batch")
def check_separability(subject: Subject) -> None:
    """A separable loss gives an example the same value alone as in a batch; one that is not, somewhere does not."""

    def body(feedback: Feedback) -> None:
        what = "values in the batch, against those of the examples alone"
        alone = _alone(subject, subject.settled, feedback)
        subject.expect(what, subject.settled_values(feedback), alone, feedback)

    if subject.spec.separable:
        for_all(subject, body)
        return
    for feedback in subject.searched():
        for loss in subject.modes.values():
            if differs(subject.detached(copy.deepcopy(loss), feedback), _alone(subject, loss, feedback)):
                return
    got = f"the value that each example has alone, in {SEARCHED} batches"
    change = "declare separable=True: a batch may then be split"
    raise subject.hint("separable=False", got, change)


def _alone(subject: Subject, loss: Loss, feedback: Feedback) -> Tensor:
    examples = [fields.select(feedback, torch.tensor([place])) for place in range(feedback.shape[0])]
    return torch.cat([subject.detached(copy.deepcopy(loss), example) for example in examples])


@check(change="declare needs_reference=True")
def check_needs_reference(subject: Subject) -> None:
    """The reference's log-probs matter if and only if the loss declares needs_reference; for each side it trains."""
    generator = torch.Generator().manual_seed(3)

    def change_reference(part: LogRatios) -> LogRatios:
        nats = torch.empty_like(part.policy).uniform_(-9.0, -0.5, generator=generator)
        return fields.shifted(part, reference=nats)

    for feedback in subject.searched(reference=True):
        values = subject.settled_values(feedback)
        other_values = subject.settled_values(fields.map_parts(feedback, change_reference))
        if not subject.spec.needs_reference:
            subject.expect("values with another reference", other_values, values, feedback)
            absent = {path: None for path in fields.tensors(feedback) if path.endswith(".reference")}
            bare = subject.settled_values(fields.with_tensors(feedback, absent))
            subject.expect("values without a reference", bare, values, feedback)
        elif differs(values, other_values):
            for side in ("chosen", "rejected") if isinstance(feedback, Pairs) else ():
                _check_reference_of(subject, side)
            return
    if subject.spec.needs_reference:
        change = "read h or margin(), or declare needs_reference=False, which spares trainers a forward pass"
        raise subject.no_effect("values with another reference", change)


def _check_reference_of(subject: Subject, side: str) -> None:
    policy_matters = False
    for feedback in subject.searched():
        part, values = fields.parts(feedback)[side], subject.settled_values(feedback)
        other, lower = (
            subject.settled_values(replace(feedback, **{side: fields.shifted(part, **{of: -2.0})}))
            for of in ("reference", "policy")
        )
        if differs(values, other):
            return
        policy_matters = policy_matters or differs(values, lower)
    if policy_matters:
        change = f"read {side}.h in place of {side}.policy, or no reference at all"
        raise subject.no_effect(f"values with another reference of {side} alone", change)


@check()
def check_preference(subject: Subject) -> None:
    """What people preferred matters: other labels, other scores, or the sides of a pair exchanged, change a value."""
    for feedback in subject.searched():
        if differs(subject.settled_values(feedback), subject.settled_values(_turned(feedback))):
            return
    opposite = {Pairs: "chosen and rejected exchanged", Labels: "opposite labels and scores"}
    what = f"values with {opposite.get(subject.spec.feedback, 'the scores reversed')}"
    raise subject.no_effect(
        what, "a loss learns what people preferred, so read it, and look at the signs of both sides"
    )


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
    name, now = str(subject.spec.beta), subject.loss.beta
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
    loss = subject.trained(subject.seeded(12, size=4), **changes)
    return subject.detached(loss if loss.state else loss.eval(), feedback)


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
    for need in fields.available(subject.spec.feedback):
        if need not in subject.fields | implied:
            _check_unread(subject, need)


def _check_refused_without(subject: Subject, need: str) -> None:
    lacking = fields.without(subject.seeded(1, size=2), need)
    got, cause = "values", None
    try:
        subject.settled(lacking)
    except Exception as error:
        words = {need, need.split(".")[-1], *fields.covered_by(subject.spec.feedback, need)}
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
            if differs(values, subject.detached(loss, fields.altered(feedback, need, turn))):
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
    """Values stay without a field, and with other numbers in it."""
    what, change = f"values without {need}", f"declare {need!r} in needs or in reads"

    def body(feedback: Feedback) -> None:
        values = subject.settled_values(feedback)
        try:
            bare = subject.settled(fields.without(feedback, need)).detach()
        except Exception as error:
            got = f"{type(error).__name__} ({error})"
            raise subject.failed(what, got, values, feedback, change) from error
        subject.expect(what, bare, values, feedback, change)
        other_values = subject.settled_values(fields.altered(feedback, need, 0))
        subject.expect(f"values with other {need}", other_values, values, feedback, change)

    for feedback in subject.searched(2, size=3, fields=subject.fields | {need}):
        subject.narrowed(feedback, body)


def _is_modified(subject: Subject) -> str | None:
    modifiers = ", ".join(subject.loss.modifiers)
    return f"changed by {modifiers}: the trait is that of the plain loss" if modifiers else None


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
    """Of what the policy gives, only the difference of a pair's log-ratios matters if and only if that is declared."""
    body = functools.partial(_check_nothing_beside_the_difference, subject)
    if not subject.spec.difference_only:
        if any(subject.fails(feedback, body) for feedback in subject.searched()):
            return
        got = f"values that follow from the difference of the log-ratios alone in {SEARCHED} batches"
        change = "declare difference_only=True, which admits label smoothing, margins and divergences"
        raise subject.hint("difference_only=False", got, change)
    declared, change = "difference_only=True", "only pairs with a reference have a difference of log-ratios"
    if subject.spec.feedback is not Pairs:
        raise subject.failed(declared, subject.spec.feedback.__name__, "Pairs", change=change)
    if not subject.spec.needs_reference:
        raise subject.failed(declared, "needs_reference=False", "needs_reference=True", change=change)
    for feedback in subject.searched():
        subject.narrowed(feedback, body)


def _check_nothing_beside_the_difference(subject: Subject, feedback: Feedback) -> None:
    """Values stay where each pair keeps its difference."""
    assert isinstance(feedback, Pairs)
    values = subject.settled_values(feedback)
    # Each pair by another constant, downwards, so that no log-prob rises above 0.
    generator = torch.Generator().manual_seed(7)
    nats = torch.empty(len(values), dtype=torch.float64).uniform_(-4.0, -0.5, generator=generator)
    # The loss may take the difference of the sums or of the means.
    shifts = [
        lambda side: fields.shifted(side, policy=nats),
        lambda side: fields.shifted(side, policy=nats * side.tokens),
    ]
    moved = [subject.settled_values(_with_sides(feedback, shift)) for shift in shifts]
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
        chosen=fields.shifted(pairs.chosen, policy=nats, reference=nats),
        rejected=fields.shifted(pairs.rejected, policy=2 * nats, reference=2 * nats),
    )
    yield "the same nats added to policy and reference of a side", moved
    yield "nats moved from token to token of a completion", _with_sides(pairs, fields.reversed_tokens)
    # What else the policy gives.
    for need in ("gold", "per_token.log_sum_sq", "per_token.kl", "per_token.reverse_kl"):
        yield f"another {need}", fields.altered(pairs, need, 0)


def _with_sides(pairs: Pairs, change: Callable[[LogRatios], LogRatios]) -> Pairs:
    return replace(pairs, chosen=change(pairs.chosen), rejected=change(pairs.rejected))


@check(_is_modified, change="declare monotone=False")
def check_monotone(subject: Subject) -> None:
    """The loss never rises with the better completion's log-prob if and only if it declares monotone."""
    if subject.spec.monotone:
        for feedback in subject.searched(SEARCHED // 2):
            subject.narrowed(feedback, lambda item: _check_no_rise(subject, subject.settled, item))
        return
    # A state that moves with the batch may turn the direction, so look in training too.
    losses = [subject.settled, *([subject.fresh()] if subject.loss.state else [])]
    changed: list[bool] = []

    def body(feedback: Feedback) -> None:
        changed.extend([_check_no_rise(subject, loss, feedback) for loss in losses])

    batches = 2 * SEARCHED
    if not any(subject.fails(feedback, body) for feedback in subject.searched(batches)) and any(changed):
        got = f"values that never rose with the better completion's log-prob in {batches} batches"
        raise subject.hint("monotone=False", got, "declare monotone=True")


def _check_no_rise(subject: Subject, loss: Loss, feedback: Feedback) -> bool:
    """Fail if the loss rises with the better completion's log-prob; otherwise return whether it changes at all."""

    def evaluated(feedback: Feedback) -> Tensor:
        values = subject.detached(copy.deepcopy(loss), feedback)
        # Where examples are coupled, one's rise may be another's fall.
        return values if subject.spec.separable else values.sum()

    def log_probs(feedback: Feedback) -> str:
        name, better = _better(feedback)
        return shown(fields.parts(feedback)[name].policy[better])

    values, changed = evaluated(feedback), False
    for lower in _lowered(subject, feedback):
        below = evaluated(lower)
        rise = (values - below) / torch.maximum(values.abs(), below.abs()).clamp(min=1)
        if bool((rise > DEPENDENCE).any()):
            change = f"from {log_probs(lower)} to {log_probs(feedback)}"
            what = f"value when the policy's log-prob of the better completion rises {change}"
            got = f"a rise from {shown(below)} to {shown(values)}"
            raise subject.failed(what, got, "no rise", feedback)
        changed = changed or bool((rise.abs() > DEPENDENCE).any())
    return changed


def _lowered(subject: Subject, feedback: Feedback) -> Iterator[Feedback]:
    """The feedback with a lower log-prob of the better completions: of all, and of one where they are coupled."""
    name, better = _better(feedback)
    part = fields.parts(feedback)[name]
    first = better & (better.flatten().cumsum(0).reshape(better.shape) == 1)
    coupled = not subject.spec.separable or bool(subject.loss.state)
    for which in (better, first) if coupled else (better,):
        for nats in DROPS:
            drop = torch.where(which, -nats, 0.0).to(part.policy.dtype)
            yield replace(feedback, **{name: fields.shifted(part, policy=drop)})


def _better(feedback: Feedback) -> tuple[str, Tensor]:
    """A part of the feedback, and True at its completions that people preferred."""
    return next(iter(fields.sides(feedback).values()))
