"""What comes of a check: it does not apply, has a hint, failed; and the report of all checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefloss.feedback import Feedback
from prefloss.testing.fields import show


class Skip(Exception):
    """A check that does not apply to a loss.

    Attributes:
        reason: Why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Hint(Skip):
    """A check found no fault, but something that the loss could declare; `reason` says what."""


class CheckFailed(AssertionError):
    """A loss lacks a property.

    Attributes:
        loss: Name of the loss.
        property: Name of the check, without `check_`.
        problem: What it got, what was expected, and what to change.
        feedback: The draw that shows it, or None.
    """

    def __init__(self, loss: str, property: str, problem: str, feedback: Feedback | None = None) -> None:
        self.loss, self.property, self.problem, self.feedback = loss, property, problem, feedback
        replay = "" if feedback is None else f"\n  To replay:\n    feedback = {show(feedback, ' ' * 8)}"
        super().__init__(f"{loss}: {property}: {problem}{replay}")


class CannotRun(CheckFailed):
    """The loss or its backward raised, or it did not return one value per example, on feedback that it takes."""


@dataclass(frozen=True)
class Report:
    """The checks of one loss; `str()` of it is a table.

    Attributes:
        loss: The loss, with its hyperparameters.
        passed: Names of the checks that it passed.
        skipped: Why a check did not run, by name.
        failed: The failures, by name.
        hints: What the loss could declare beside what it does, by name of the check.
    """

    loss: str
    passed: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, CheckFailed] = field(default_factory=dict)
    hints: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line per check."""
        rows = [
            *((name, "failed", error.problem.splitlines()[0]) for name, error in self.failed.items()),
            *((name, "hint", reason) for name, reason in self.hints.items()),
            *((name, "passed", "") for name in self.passed),
            *((name, "skipped", reason) for name, reason in self.skipped.items()),
        ]
        width = max((len(name) for name, _, _ in rows), default=0)
        lines = [f"  {name:<{width}}  {outcome:<7}  {remark}".rstrip() for name, outcome, remark in rows]
        counts = {"passed": self.passed, "skipped": self.skipped, "hints": self.hints, "failed": self.failed}
        shown = [f"{len(names)} {word}" for word, names in counts.items() if names or word != "hints"]
        return "\n".join([f"{self.loss}: {', '.join(shown)}", *lines])


class LossCheckError(AssertionError):
    """A loss failed some of its checks.

    Attributes:
        report: Every check and what came of it.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        details = "\n\n".join(str(error) for error in report.failed.values())
        super().__init__(f"{report}\n\n{details}")
