"""Checks of what a loss declares of its dependence: on the batch, on a difference, on direction, on the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.losses._loss import Loss
from prefloss.testing import _fields
from prefloss.testing._draws import Seeded
from prefloss.testing._run import check, for_all
from prefloss.testing._subject import SEARCHED, Subject
from prefloss.testing._values import close, told

NOTICED = 1e-6
"""Relative difference between two float64 values that counts as a dependence."""


def differs(first: Tensor, second: Tensor) -> bool:
    """Whether some value differs by more than rounding can explain."""
    return not close(first, second, NOTICED)


@check()
def check_separability(subject: Subject) -> None:
    """A separable loss gives an example the same value alone as in a batch; one that is not, somewhere does not."""
    if subject.spec.separable:
        for_all(subject, lambda feedback: _check_alone(subject, feedback))
        return
    for feedback in subject.searched():
        for loss in (lambda: subject.settled, subject.fresh):
            if differs(subject.detached(loss(), feedback), _alone(subject, loss, feedback)):
                return
    raise subject.failed(
        f"declares separable=False, but in {SEARCHED} batches every example had the value that it has alone: "
        "declare separable=True"
    )


def _alone(subject: Subject, loss: Callable[[], Loss], feedback: Feedback) -> Tensor:
    count = feedback.shape[0]
    return torch.cat(
        [subject.detached(loss(), _fields.select(feedback, torch.tensor([place]))) for place in range(count)]
    )


def _check_alone(subject: Subject, feedback: Feedback) -> None:
    values = subject.detached(subject.settled, feedback)
    alone = _alone(subject, lambda: subject.settled, feedback)
    if not close(values, alone):
        problem = (
            f"in the batch the values are {told(values)}, alone they are {told(alone)}: declare separable=False, or "
            "use no mean, sum, sort or other statistic over the batch"
        )
        raise subject.failed(problem, feedback)


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
    return None if spec.separable else "mixes the pairs of a batch, so more than a pair's own difference matters"


@check(_no_score_difference)
def check_difference_only(subject: Subject) -> None:
    """Of what the policy gives, only the difference of a pair's log-ratios matters if and only if the loss says so."""
    spec = subject.spec
    if spec.difference_only and spec.feedback is not Pairs:
        raise subject.failed(f"declares difference_only=True, but takes {spec.feedback.__name__}: only pairs differ")
    if spec.difference_only and not spec.needs_reference:
        raise subject.failed("declares difference_only=True and needs_reference=False: without one are no log-ratios")
    for feedback in subject.searched():
        if _difference_problem(subject, feedback) is None:
            continue
        if not spec.difference_only:
            return
        problem, smallest = _narrowed(feedback, lambda item: _difference_problem(subject, item))
        raise subject.failed(f"{problem}: declare difference_only=False", smallest)
    if not spec.difference_only:
        raise subject.failed(
            f"declares difference_only=False, but in {SEARCHED} batches only the difference of the log-ratios "
            "mattered: declare difference_only=True, which admits label smoothing, margins and divergences"
        )


def _narrowed(feedback: Feedback, problem: Callable[[Feedback], str | None]) -> tuple[str | None, Feedback]:
    """The first single example that shows a problem, or all of them."""
    for place in range(feedback.shape[0]):
        alone = _fields.select(feedback, torch.tensor([place]))
        found = problem(alone)
        if found:
            return found, alone
    return problem(feedback), feedback


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
        return f"with {told(nats)} nats added to the {what} of both sides the values went {_from_to(values, other)}"
    for what, other in _same_differences(feedback, nats):
        found = subject.detached(loss, other)
        if differs(values, found):
            return f"with {what} the values went {_from_to(values, found)}"
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
    mixed = replace(pairs, chosen=_mixed(pairs.chosen), rejected=_mixed(pairs.rejected))
    yield "nats moved from token to token of a completion", mixed
    for name in ("gold", *(f"per_token.{row}" for row in ("log_sum_sq", "kl", "reverse_kl"))):
        other = _altered(pairs, name, 0)
        assert isinstance(other, Pairs)
        yield f"another {name}", other


def _both_sides(pairs: Pairs, chosen: Tensor, rejected: Tensor) -> Pairs:
    return replace(
        pairs,
        chosen=_fields.moved(pairs.chosen, policy=chosen),
        rejected=_fields.moved(pairs.rejected, policy=rejected),
    )


def _mixed(ratios: LogRatios) -> LogRatios:
    """The same sums from other rows: policy log-probs in the reverse order of the tokens."""
    rows = ratios.per_token
    if rows is None:
        return ratios
    tokens = rows.mask.sum(-1, keepdim=True)
    place = (tokens - 1 - torch.arange(rows.mask.shape[-1])).clamp(min=0)
    policy = torch.where(rows.mask, rows.policy.gather(-1, place), 0.0)
    return _fields.summed(replace(rows, policy=policy))


def _from_to(first: Tensor, second: Tensor) -> str:
    return f"from {told(first)} to {told(second)}"


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
                problem, smallest = _narrowed(feedback, lambda item: _rises(subject, lambda: subject.settled, item)[0])
                raise subject.failed(f"{problem}: declare monotone=False", smallest)
        return
    moved = False
    for feedback in subject.searched(2 * SEARCHED):
        # A state that moves with the batch may turn the direction, so look in training too.
        for loss in (lambda: subject.settled, subject.fresh) if subject.loss.state else (lambda: subject.settled,):
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


@check()
def check_needs_reference(subject: Subject) -> None:
    """The reference's log-probs matter if and only if the loss declares needs_reference."""
    for feedback in subject.searched(reference=True):
        values = subject.detached(subject.settled, feedback)
        other = subject.detached(subject.settled, _other_reference(feedback))
        if subject.spec.needs_reference and differs(values, other):
            return
        if not subject.spec.needs_reference:
            _check_unread_reference(subject, feedback, values, other)
    if subject.spec.needs_reference:
        raise subject.failed(
            f"declares needs_reference=True, but in {SEARCHED} batches the reference changed no value: declare "
            "needs_reference=False, which spares trainers a forward pass"
        )


def _check_unread_reference(subject: Subject, feedback: Feedback, values: Tensor, other: Tensor) -> None:
    if not close(values, other):
        problem = f"declares needs_reference=False, but another reference changed the values {_from_to(values, other)}"
        raise subject.failed(f"{problem}: declare needs_reference=True", feedback)
    bare = subject.detached(subject.settled, _fields.map_parts(feedback, lambda _, part: _unreferenced(part)))
    if not close(values, bare):
        problem = f"declares needs_reference=False, but without a reference the values went {_from_to(values, bare)}"
        raise subject.failed(f"{problem}: declare needs_reference=True", feedback)


def _other_reference(feedback: Feedback) -> Feedback:
    source = Seeded(3)

    def change(_: str, part: LogRatios) -> LogRatios:
        nats = [source.number(-9.0, -0.5) for _ in range(part.policy.numel())]
        return _fields.moved(part, reference=torch.tensor(nats, dtype=part.policy.dtype).reshape(part.shape))

    return _fields.map_parts(feedback, change)


def _unreferenced(part: LogRatios) -> LogRatios:
    rows = part.per_token
    return replace(part, reference=None, per_token=None if rows is None else replace(rows, reference=None))


@check()
def check_needs(subject: Subject) -> None:
    """What the loss needs is asked for by name, and matters; what it does not list in needs or reads does not."""
    _check_missing(subject)
    for name in sorted(subject.fields):
        if name == "scores" and subject.spec.feedback is Rankings:
            continue
        if name == "per_token" and any(other.startswith("per_token.") for other in subject.fields):
            continue
        _check_matters(subject, name)
    for feedback in subject.searched(6, fields=subject.fields | {*_fields.available(subject.spec.feedback)}):
        _check_undeclared(subject, feedback)


def _check_missing(subject: Subject) -> None:
    feedback = subject.seeded(1, size=2)
    for name in sorted(subject.loss.needs - {"scores"} if subject.spec.feedback is Rankings else subject.loss.needs):
        lacking = _fields.without(feedback, name)
        try:
            subject.settled(lacking)
        except Exception as error:
            words = {name, name.split(".")[-1], *({"score_chosen"} if name == "scores" else ())}
            if isinstance(error, ValueError | TypeError) and any(word in str(error) for word in words):
                continue
            problem = f"without {name} it raised {type(error).__name__}: {error}"
            raise subject.failed(f"{problem}, wanted a ValueError that names {name}", lacking) from error
        raise subject.failed(f"declares needs={name!r}, but gave values without it: declare it in reads", lacking)


def _check_matters(subject: Subject, name: str) -> None:
    for seed in range(SEARCHED):
        # What is read in its place, as a KL baseline instead of mismatched completions, is sometimes absent.
        absent = subject.absences[seed % len(subject.absences)] - {name}
        feedback = subject.seeded(seed, absent, size=4)
        values = subject.detached(subject.settled, feedback)
        if differs(values, subject.detached(subject.settled, _altered(feedback, name, seed))):
            return
    trait = "needs" if name in subject.loss.needs else "reads"
    raise subject.failed(
        f"declares {trait}={name!r}, but in {SEARCHED} batches another {name} changed no value: leave it out of {trait}"
    )


def _check_undeclared(subject: Subject, feedback: Feedback) -> None:
    values = subject.detached(subject.settled, feedback)
    for name in _undeclared(subject):
        lacking = _fields.without(feedback, name)
        try:
            other = subject.settled(lacking).detach()
        except Exception as error:
            problem = f"without {name} it raised {type(error).__name__}: {error}\n  Declare it in needs or in reads"
            raise subject.failed(problem, lacking) from error
        advice = f"declare {name!r} in needs or in reads"
        if not close(values, other):
            raise subject.failed(f"without {name} the values went {_from_to(values, other)}: {advice}", feedback)
        # Rows fix the token counts, so counts change only where there are no rows.
        base = _fields.without(feedback, "per_token") if name == "tokens" else feedback
        other = subject.detached(subject.settled, _altered(base, name, 0))
        if not close(values, other):
            raise subject.failed(f"with another {name} the values went {_from_to(values, other)}: {advice}", feedback)


def _undeclared(subject: Subject) -> list[str]:
    reads_rows = any(field.startswith("per_token") for field in subject.fields)
    implied = {"tokens", "per_token"} if reads_rows else set[str]()
    return [name for name in _fields.available(subject.spec.feedback) if name not in subject.fields | implied]


def _altered(feedback: Feedback, name: str, seed: int) -> Feedback:
    """The feedback with something else in place of what is there under this name."""
    first, _, row = name.partition(".")
    if name == "tokens":
        return _with_other_tokens(feedback)
    if name == "per_token":
        return _fields.map_parts(feedback, lambda _, part: _mixed(part))
    changes: dict[str, Tensor | None] = {}
    for path, value in _fields.tensors(feedback).items():
        if _belongs(path, first, row) and value.is_floating_point():
            changes[path] = _other_values(value, seed, rising=first == "scores")
    return _fields.with_tensors(feedback, changes)


def _belongs(path: str, first: str, row: str) -> bool:
    if first == "per_token":
        return path.endswith(f".per_token.{row}")
    if first == "scores":
        return path in ("scores", "score_chosen")
    if first in ("gold", "mismatched"):
        return path in (f"{first}.policy", f"{first}.per_token.policy")
    return path == first


def _other_values(value: Tensor, seed: int, rising: bool) -> Tensor:
    source = Seeded(1000 + seed)
    shares = torch.tensor([source.number(0.2, 0.9) for _ in range(value.numel())], dtype=value.dtype)
    shares = shares.reshape(value.shape)
    # A score stays in (0, 1) and above that of the rejected completion.
    return value + shares * (1 - value) if rising else value * (1 + shares)


def _with_other_tokens(feedback: Feedback) -> Feedback:
    def change(name: str, part: LogRatios) -> LogRatios:
        extra = (torch.arange(part.policy.numel()).reshape(part.shape) + len(name)) % 3 + 1
        return part if part.tokens is None else replace(part, tokens=part.tokens + extra)

    return _fields.map_parts(feedback, change)


@check(lambda subject: None if subject.spec.beta else "declares no KL strength")
def check_beta(subject: Subject) -> None:
    """The hyperparameter that the loss declares as its KL strength is one, and changes the values."""
    name = subject.spec.beta
    assert name is not None
    now = subject.loss.beta
    if isinstance(now, bool) or not isinstance(now, int | float):
        raise subject.failed(f"declares beta={name!r}, which is {now!r}, wanted a number")
    for feedback in subject.searched():
        if differs(_with(subject, feedback), _with(subject, feedback, **{name: 2 * now or 1.0})):
            return
    raise subject.failed(
        f"declares beta={name!r}, but in {SEARCHED} batches {name}={2 * now:g} gave the values of {name}={now:g}: use "
        "it, or declare the hyperparameter that is the KL strength"
    )


def _with(subject: Subject, feedback: Feedback, **changes: Any) -> Tensor:
    """The values after one batch of training, so that a setting of the state shows too."""
    loss = subject.fresh(**changes)
    if loss.state:
        subject.detached(loss, subject.seeded(12, size=4))
        return subject.detached(loss, feedback)
    return subject.detached(loss.eval(), feedback)

