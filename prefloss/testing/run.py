"""Run checks: one check on many draws, all checks of one loss, a pytest test of each check."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from prefloss.feedback import Feedback
from prefloss.registry import Loss
from prefloss.testing.outcomes import CannotRun, CheckFailed, LossCheckError, Report, Skip
from prefloss.testing.strategies import Flaky, drawn, hypothesis, st
from prefloss.testing.subject import MAX_EXAMPLES, Checkable, Subject, as_loss, under_test

FIRST = "shape_and_dtype"
"""Runs before the others: a loss that fails to return values has no other property."""

WhyNot = Callable[[Subject], str | None]
"""Why a check does not apply to a loss; None if it applies."""


class Check(Protocol):
    """A property: returns if the loss has it."""

    __name__: str
    why_not: WhyNot

    def __call__(self, loss: Checkable, *, max_examples: int = MAX_EXAMPLES) -> None:
        """Raise CheckFailed if the loss lacks the property, Skip if it does not apply."""


CHECKS: dict[str, Check] = {}
"""Every check by name; the modules of the checks fill it."""


def check(
    why_not: WhyNot = lambda subject: None, *, change: str = "", draws: dict[str, Any] | None = None
) -> Callable[[Callable[..., None]], Check]:
    """Register `check_<property>(subject)` as the public check of that property.

    Args:
        why_not: subject -> why the check does not apply, or None.
        change: What a loss that fails the check should change.
        draws: Options of `for_all`, which then calls `check_<property>(subject, feedback)`.
    """

    def decorate(body: Callable[..., None]) -> Check:
        name = body.__name__.removeprefix("check_")

        def run(loss: Checkable, *, max_examples: int = MAX_EXAMPLES) -> None:
            bound = as_loss(loss)
            with under_test(bound.spec):
                subject = Subject(bound, name, max_examples, change)
                reason = why_not(subject)
                if reason:
                    raise Skip(reason)
                if draws is None:
                    body(subject)
                else:
                    for_all(subject, functools.partial(body, subject), **draws)

        public: Any = functools.wraps(body, ("__module__", "__name__", "__qualname__", "__doc__"), ())(run)
        del public.__wrapped__
        public.why_not = why_not
        CHECKS[name] = public
        return public

    return decorate


def for_all(subject: Subject, body: Callable[[Feedback], None], **options: Any) -> None:
    """Call `body` on drawn feedback; a failure is shrunk to the simplest draw that fails.

    Args:
        subject: The loss. What it reads but does not need is absent from some draws.
        body: Raises CheckFailed where the property does not hold.
        **options: As of `Recipe`, such as `size`, `magnitude`, `dtype`.
    """
    failures: list[CheckFailed] = []
    kind = subject.spec.feedback
    feedback_of_all_forms = [drawn(kind, subject.recipe(absent, **options)) for absent in subject.absences]

    @hypothesis.settings(
        max_examples=subject.examples,
        deadline=None,
        database=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=[*hypothesis.HealthCheck],  # type: ignore[arg-type]
    )
    @hypothesis.given(st.one_of(feedback_of_all_forms))
    def run(feedback: Feedback) -> None:
        try:
            body(feedback)
        except CheckFailed as error:
            failures.append(error)
            raise

    try:
        run()
        return
    except CheckFailed as error:
        failed = error
    except Flaky:
        # The loss gave other values when the draw was tried again; what it gave first counts.
        failed = failures[0]
    # A new one, without the notes that hypothesis adds: the message has the draw already.
    raise type(failed)(failed.loss, failed.property, failed.problem, failed.feedback)


def names() -> tuple[str, ...]:
    """The names of all checks, `shape_and_dtype` first."""
    return (FIRST, *sorted(CHECKS.keys() - {FIRST}))


def loss_checks(loss: Checkable, *, max_examples: int = MAX_EXAMPLES) -> list[tuple[str, Check | Skip]]:
    """Every check by name: the check, or why it does not apply to this loss.

    Args:
        loss: A loss, its spec, its name or its function.
        max_examples: Draws that each check makes.

    Example:
        >>> dict(loss_checks("simpo"))["ties"]
        Skip('reads no scores')
    """
    bound = as_loss(loss)
    checks: list[tuple[str, Check | Skip]] = []
    with under_test(bound.spec):
        subject = Subject(bound)
        for name in names():
            reason = CHECKS[name].why_not(subject)
            limited: Any = functools.partial(CHECKS[name], max_examples=max_examples)
            limited = functools.update_wrapper(limited, CHECKS[name])
            checks.append((name, Skip(reason) if reason else limited))
    return checks


def check_loss(
    loss: Checkable, *, skip: Mapping[str, str] | None = None, max_examples: int = MAX_EXAMPLES, **traits: Any
) -> Report:
    """Run every check on a loss.

    Args:
        loss: A function, decorated with `register` or not, or a loss, its spec, its name or an expression.
        skip: Checks to leave out, each with the reason; the report shows it.
        max_examples: Draws that each check makes.
        **traits: Of a function that is not registered, as `register` takes them: `monotone=True` ...

    Returns:
        What passed and what was skipped and why; `print` it for a table.

    Raises:
        LossCheckError: If any check failed; the message has all failures, its `report` has them one by one.
        ValueError: If `skip` names no check.

    Example:
        >>> report = check_loss("dpo", max_examples=2)
        >>> len(report.passed), report.skipped
        (28, {'padding': 'reads no tokens', 'ties': 'reads no scores'})
    """
    left_out = _with_reasons(skip or {})
    bound = as_loss(loss, **traits)
    passed: list[str] = []
    skipped: dict[str, str] = {}
    failed: dict[str, CheckFailed] = {}
    with under_test(bound.spec):
        for name, check_or_skip in loss_checks(bound, max_examples=max_examples):
            if name in left_out:
                skipped[name] = left_out[name]
            elif isinstance(check_or_skip, Skip):
                skipped[name] = check_or_skip.reason
            elif isinstance(failed.get(FIRST), CannotRun):
                skipped[name] = f"not run: {FIRST} found that the loss gives no values"
            else:
                try:
                    check_or_skip(bound)
                except CheckFailed as error:
                    failed[name] = error
                else:
                    passed.append(name)
        report = Report(repr(bound), tuple(passed), skipped, failed)
    if failed:
        raise LossCheckError(report)
    return report


def parametrize_loss_checks(
    losses: Iterable[Checkable],
    *,
    expected_failures: Mapping[str, str] | None = None,
    only: Iterable[str] | None = None,
    max_examples: int = MAX_EXAMPLES,
) -> Callable[[Any], Any]:
    """A pytest decorator: one test for each loss and check, as arguments `loss` and `check`.

    A check that does not apply is shown as skipped, with the reason.

    Args:
        losses: Losses, their specs, names or functions.
        expected_failures: Known failures, `{check: reason}` for all losses or `{"loss:check": reason}` for one;
            strict: one that passes is an error.
        only: Names of the checks to run; all if None.
        max_examples: Draws that each check makes.

    Raises:
        ValueError: If a name is no check.
    """
    import pytest

    expected = expected_failures or {}
    _with_reasons({key.rpartition(":")[2]: reason for key, reason in expected.items()})
    selected = _with_reasons(dict.fromkeys(names() if only is None else only, "selected"))
    params = []
    for loss in map(as_loss, losses):
        for name, check_or_skip in loss_checks(loss, max_examples=max_examples):
            if name not in selected:
                continue
            reason = expected.get(f"{loss.name}:{name}", expected.get(name))
            if isinstance(check_or_skip, Skip):
                marks: Any = pytest.mark.skip(reason=f"{loss.name}: {name}: {check_or_skip.reason}")
            elif reason is not None:
                marks = pytest.mark.xfail(reason=reason, raises=CheckFailed, strict=True)
            else:
                marks = ()
            params.append(pytest.param(loss, check_or_skip, id=f"{_label(loss)}-{name}", marks=marks))
    return pytest.mark.parametrize(("loss", "check"), params)


def _label(loss: Loss) -> str:
    """Name and the hyperparameters that are not at their defaults."""
    defaults = {name: parameter.default for name, parameter in loss.spec.parameters.items()}
    plain = int | float | str | bool | None
    changed = [
        f"{name}={value!r}"
        for name, value in loss.params.items()
        if name not in defaults or (isinstance(value, plain) and value != defaults[name])
    ]
    return f"{loss.name}({', '.join(changed)})" if changed else loss.name


def _with_reasons(reasons: Mapping[str, str]) -> Mapping[str, str]:
    """The checks with a reason each, if every name is a check and every reason has words."""
    for name, reason in reasons.items():
        if name not in CHECKS:
            raise ValueError(f"check: got {name!r}, expected one of {', '.join(names())}")
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(
                f"{name}: got the reason {reason!r}, expected why the check is left out, in words"
            )
    return reasons
