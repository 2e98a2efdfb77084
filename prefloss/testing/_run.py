"""Run a check: on draws of hypothesis, which shrinks what fails, or on seeded ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from prefloss.feedback import Feedback
from prefloss.testing._subject import Checkable, CheckFailed, Skip, Subject, as_loss, quiet, registered
from prefloss.testing.strategies import Flaky, hypothesis, wanted_feedback

MAX_EXAMPLES = 25
"""Draws that a check makes unless told otherwise."""


class Check(Protocol):
    """A property: returns if the loss has it."""

    __name__: str

    def __call__(self, loss: Checkable, *, max_examples: int = MAX_EXAMPLES) -> None:
        """Raise CheckFailed if the loss lacks the property, Skip if it does not apply."""
        ...


@dataclass(frozen=True)
class Property:
    """A check with the rule that says to which losses it applies."""

    name: str
    check: Check
    skip: Callable[[Subject], str | None]

    def skipped(self, subject: Subject) -> str | None:
        """Why it does not apply, or None."""
        return self.skip(subject)


PROPERTIES: dict[str, Property] = {}
"""Every property by name, in the order in which `check_loss` runs them."""


def _never(subject: Subject) -> str | None:
    return None


def check(skip: Callable[[Subject], str | None] = _never) -> Callable[[Callable[[Subject], None]], Check]:
    """Make `check_<property>(subject)` a public check of that property.

    Args:
        skip: subject -> why the check does not apply, or None.
    """

    def decorate(body: Callable[[Subject], None]) -> Check:
        name = body.__name__.removeprefix("check_")

        def run(loss: Checkable, *, max_examples: int = MAX_EXAMPLES) -> None:
            bound = as_loss(loss)
            with registered(bound.spec), quiet():
                subject = Subject(bound, name, max_examples)
                reason = skip(subject)
                if reason:
                    raise Skip(reason)
                body(subject)

        public: Any = functools.update_wrapper(
            run, body, ("__module__", "__name__", "__qualname__", "__doc__"), ()
        )
        del public.__wrapped__
        PROPERTIES[name] = Property(name, public, skip)
        return public

    return decorate


def for_all(subject: Subject, body: Callable[[Feedback], None], **wanted: Any) -> None:
    """Call `body` on drawn feedback; what fails is shrunk to the simplest draw that fails.

    Args:
        subject: The loss.
        body: Raises CheckFailed where the property does not hold.
        **wanted: As `Wanted` has it, such as `size`, `magnitude`, `dtype`.
    """
    failures: list[CheckFailed] = []

    @hypothesis.settings(
        max_examples=subject.examples,
        deadline=None,
        database=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=[*hypothesis.HealthCheck],  # type: ignore[arg-type]
    )
    @hypothesis.given(wanted_feedback(subject, **wanted))
    def run(feedback: Feedback) -> None:
        try:
            body(feedback)
        except CheckFailed as error:
            failures.append(error)
            raise

    try:
        run()
    except CheckFailed as error:
        raise _plain(error) from None
    except Flaky:
        # The loss gave other values when the draw was tried again; what it gave first counts.
        raise _plain(failures[0]) from None


def _plain(error: CheckFailed) -> CheckFailed:
    """The failure without the notes that hypothesis adds: the message has the draw already."""
    again = type(error)(error.loss, error.property, error.problem, error.feedback)
    again.__cause__ = error.__cause__
    return again
