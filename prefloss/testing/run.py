"""Run checks: one check on many draws, all checks of one loss, a pytest test of each check."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from prefloss.feedback import Feedback
from prefloss.registry import Loss
from prefloss.testing.outcomes import CheckFailed, Hint, LossCheckError, Report, Skip
from prefloss.testing.strategies import Flaky, drawn, hypothesis, st
from prefloss.testing.subject import MAX_EXAMPLES, Checkable, Subject, as_loss, under_test

FIRST = (
    "shape_and_dtype",
    "single_example",
    "no_mutation",
    "determinism",
    "gradient_nonzero",
    "preference",
    "direction",
)
"""Run before the others, in this order: what a loss without one of these does elsewhere follows from that."""

AFTER = {
    "batch_permutation": ("separability",),
    "empty_examples": ("separability", "batch_permutation"),
    "gradients": ("sides",),
    "torch_func": ("sides", "separability", "torch_compile"),
}
"""Further checks that a check builds on."""

WhyNot = Callable[[Subject], str | None]
"""Why a check does not apply to a loss; None if it applies."""


class Check(Protocol):
    """A property: returns if the loss has it."""

    __name__: str
    why_not: WhyNot

    def __call__(self, loss: Checkable, *, max_examples: int = MAX_EXAMPLES) -> None:
        """Raise CheckFailed if the loss lacks the property, Skip if it does not apply, Hint if it could declare it."""


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
    """The names of all checks, those first that the others build on."""
    return (*FIRST, *sorted(CHECKS.keys() - {*FIRST}))


def loss_checks(loss: Checkable, *, max_examples: int = MAX_EXAMPLES) -> list[tuple[str, Check | Skip]]:
    """Every check by name: the check, or why it does not apply to this loss. Each runs by itself.

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


class Series:
    """The checks of one loss in their order: none runs after a failure of one that it builds on."""

    def __init__(self, loss: Loss, max_examples: int, skip: Mapping[str, str], only: Iterable[str]) -> None:
        skips = {name: Skip(reason) for name, reason in skip.items()}
        checks = {**dict(loss_checks(loss, max_examples=max_examples)), **skips}
        self.loss, self.checks = loss, {name: checks[name] for name in names() if name in only}
        self._outcomes: dict[str, CheckFailed | Skip | None] = {}

    def outcome(self, name: str) -> CheckFailed | Skip | None:
        """What came of a check; None if the loss passed."""
        if name not in self._outcomes:
            self._outcomes[name] = self._run(name)
        return self._outcomes[name]

    def _run(self, name: str) -> CheckFailed | Skip | None:
        run = self.checks[name]
        if isinstance(run, Skip):
            return run
        before = FIRST[: FIRST.index(name)] if name in FIRST else FIRST + AFTER.get(name, ())
        for earlier in before:
            if earlier in self.checks and isinstance(self.outcome(earlier), CheckFailed):
                return Skip(f"not run: {earlier} failed")
        try:
            run(self.loss)
        except (CheckFailed, Skip) as outcome:
            return outcome
        return None


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
        What passed, what was skipped and why, and hints; `print` it for a table.

    Raises:
        LossCheckError: If any check failed; the message has all failures, its `report` has them one by one. Where the
            loss fails at something basic, such as its shape, the checks that build on it are skipped.
        ValueError: If `skip` names no check.

    Example:
        >>> report = check_loss("dpo", max_examples=2)
        >>> len(report.passed), report.skipped
        (31, {'padding': 'reads no tokens', 'scores': 'reads no scores', 'ties': 'reads no scores'})
    """
    series = Series(as_loss(loss, **traits), max_examples, _with_reasons(skip or {}), names())
    report = Report(repr(series.loss))
    for name in series.checks:
        outcome = series.outcome(name)
        if isinstance(outcome, CheckFailed):
            report.failed[name] = outcome
        elif isinstance(outcome, Skip):
            (report.hints if isinstance(outcome, Hint) else report.skipped)[name] = outcome.reason
    passed = tuple(name for name in series.checks if series.outcome(name) is None)
    report = replace(report, passed=passed)
    if report.failed:
        raise LossCheckError(report)
    return report


def parametrize_loss_checks(
    losses: Iterable[Checkable],
    *,
    expected_failures: Mapping[str, str] | None = None,
    only: Iterable[str] | None = None,
    max_examples: int = MAX_EXAMPLES,
    strict: bool = False,
) -> Callable[[Any], Any]:
    """A pytest decorator: one test for each loss and check, as arguments `loss` and `check`.

    A check that does not apply is shown as skipped, with the reason; one that builds on a failed one and one with a
    hint, too.

    Args:
        losses: Losses, their specs, names or functions.
        expected_failures: Known failures, `{check: reason}` for all losses or `{"loss:check": reason}` for one;
            strict: one that passes is an error.
        only: Names of the checks to run; all if None.
        max_examples: Draws that each check makes.
        strict: A hint fails, too: every trait that a loss has must be declared.

    Raises:
        ValueError: If a name is no check.
    """
    import pytest

    expected = expected_failures or {}
    _with_reasons({key.rpartition(":")[2]: reason for key, reason in expected.items()})
    selected = _with_reasons(dict.fromkeys(names() if only is None else only, "selected"))
    params = []
    for loss in map(as_loss, losses):
        series = Series(loss, max_examples, {}, selected)
        for name, check_or_skip in series.checks.items():
            reason = expected.get(f"{loss.name}:{name}", expected.get(name))
            if isinstance(check_or_skip, Skip):
                marks: Any = pytest.mark.skip(reason=f"{loss.name}: {name}: {check_or_skip.reason}")
            elif reason is not None:
                marks = pytest.mark.xfail(reason=reason, raises=CheckFailed, strict=True)
            else:
                marks = ()
            run = functools.partial(_run_in_pytest, series, name, strict)
            params.append(pytest.param(loss, run, id=f"{_label(loss)}-{name}", marks=marks))
    return pytest.mark.parametrize(("loss", "check"), params)


def _run_in_pytest(series: Series, name: str, strict: bool, loss: Checkable) -> None:
    """Run a check of the series, on another loss by itself; show a check that did not run as skipped."""
    import pytest

    if loss is not series.loss:
        CHECKS[name](loss)
        return
    outcome = series.outcome(name)
    if isinstance(outcome, CheckFailed):
        raise outcome
    if isinstance(outcome, Hint) and strict:
        raise CheckFailed(series.loss.name, name, outcome.reason)
    if isinstance(outcome, Skip):
        pytest.skip(f"{series.loss.name}: {name}: {outcome.reason}")


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
