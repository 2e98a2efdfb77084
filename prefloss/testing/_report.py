"""What `check_loss` found: passed, skipped and failed checks, and one error that tells all failures."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefloss.testing._subject import CheckFailed


@dataclass(frozen=True)
class Report:
    """The checks of one loss; `str()` of it is a table.

    Attributes:
        loss: The loss, with its hyperparameters.
        passed: Names of the checks that it passed.
        skipped: Why a check did not run, by name.
        failed: What was found, by name.
    """

    loss: str
    passed: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, CheckFailed] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line per check."""
        rows = [
            *((name, "failed", _first_line(error.problem)) for name, error in self.failed.items()),
            *((name, "passed", "") for name in self.passed),
            *((name, "skipped", reason) for name, reason in self.skipped.items()),
        ]
        width = max((len(name) for name, _, _ in rows), default=0)
        lines = [f"  {name:<{width}}  {outcome:<7}  {remark}".rstrip() for name, outcome, remark in rows]
        counts = f"{len(self.passed)} passed, {len(self.skipped)} skipped, {len(self.failed)} failed"
        return "\n".join([f"{self.loss}: {counts}", *lines])


class LossCheckError(AssertionError):
    """A loss failed some of its checks.

    Attributes:
        report: All that was found.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        details = "\n\n".join(str(error) for error in report.failed.values())
        super().__init__(f"{report}\n\n{details}")


def _first_line(text: str) -> str:
    return text.splitlines()[0]
