"""Check of what a loss lists in needs and reads."""

from __future__ import annotations

from collections.abc import Iterator

from prefloss.feedback import Feedback, Rankings
from prefloss.losses._core.loss import Loss
from prefloss.testing import _fields
from prefloss.testing._altered import altered, differs, from_to, narrowed
from prefloss.testing._run import check
from prefloss.testing._settings import other_settings
from prefloss.testing._subject import SEARCHED, Subject
from prefloss.testing._values import close


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
    for name in _undeclared(subject):
        _check_unread(subject, name)


def _check_missing(subject: Subject) -> None:
    feedback = subject.seeded(1, size=2)
    for name in sorted(
        subject.loss.needs - {"scores"} if subject.spec.feedback is Rankings else subject.loss.needs
    ):
        lacking = _fields.without(feedback, name)
        try:
            subject.settled(lacking)
        except Exception as error:
            words = {name, name.split(".")[-1], *({"score_chosen"} if name == "scores" else ())}
            if isinstance(error, ValueError | TypeError) and any(word in str(error) for word in words):
                continue
            problem = f"without {name} it raised {type(error).__name__}: {error}"
            raise subject.failed(f"{problem}, expected a ValueError that names {name}", lacking) from error
        raise subject.failed(
            f"declares needs={name!r}, but gave values without it: declare it in reads", lacking
        )


def _check_matters(subject: Subject, name: str) -> None:
    for loss in _settings(subject):
        for seed in range(SEARCHED):
            # What is read in its place, as a KL baseline instead of mismatched completions, is sometimes absent.
            absent = subject.absences[seed % len(subject.absences)] - {name}
            feedback = subject.seeded(seed, absent, size=4)
            values = subject.detached(loss, feedback)
            if differs(values, subject.detached(loss, altered(feedback, name, seed))):
                return
    trait = "needs" if name in subject.loss.needs else "reads"
    raise subject.failed(
        f"declares {trait}={name!r}, but in {SEARCHED} batches another {name} changed no value: leave it out of {trait}"
    )


def _settings(subject: Subject) -> Iterator[Loss]:
    """The loss as it is, then with another value of one hyperparameter each."""
    yield subject.settled
    for name, parameter in subject.parameters.items():
        for value in other_settings(subject, name, parameter)[:1]:
            yield subject.fresh(**{name: value}).eval()


def _check_unread(subject: Subject, name: str) -> None:
    for feedback in subject.searched(2, size=3, fields=subject.fields | {name}):
        problem, smallest = narrowed(feedback, lambda item: _reading(subject, item, name))
        if problem:
            raise subject.failed(f"{problem}: declare {name!r} in needs or in reads", smallest)


def _reading(subject: Subject, feedback: Feedback, name: str) -> str | None:
    """What shows that the loss reads something, or None."""
    values = subject.detached(subject.settled, feedback)
    try:
        other = subject.settled(_fields.without(feedback, name)).detach()
    except Exception as error:
        return f"without {name} it raised {type(error).__name__} ({error})"
    if not close(values, other):
        return f"without {name} the values went {from_to(values, other)}"
    other = subject.detached(subject.settled, altered(feedback, name, 0))
    return None if close(values, other) else f"with another {name} the values went {from_to(values, other)}"


def _undeclared(subject: Subject) -> list[str]:
    reads_rows = any(field.startswith("per_token") for field in subject.fields)
    implied = {"tokens", "per_token"} if reads_rows else set[str]()
    return [name for name in _fields.available(subject.spec.feedback) if name not in subject.fields | implied]
