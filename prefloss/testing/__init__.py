"""The public kit: does a loss keep what it promises? It needs hypothesis: pip install 'prefloss[test]'.

One call checks a loss of your own::

    from prefloss.testing import check_loss

    print(check_loss(my_loss))

and one decorator makes a pytest test of each check::

    @parametrize_loss_checks([my_loss])
    def test_my_loss_keeps_its_properties(loss, check):
        check(loss)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prefloss.registry import Loss
from prefloss.testing import strategies as strategies
from prefloss.testing._report import LossCheckError as LossCheckError
from prefloss.testing._report import Report as Report
from prefloss.testing._run import MAX_EXAMPLES
from prefloss.testing._subject import CannotRun, Checkable, CheckFailed, Skip, as_loss, registered
from prefloss.testing.checks import FIRST, loss_checks, names

__all__ = [
    "CannotRun",
    "CheckFailed",
    "LossCheckError",
    "Report",
    "Skip",
    "as_loss",
    "check_loss",
    "loss_checks",
    "parametrize_loss_checks",
    "strategies",
]


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
        LossCheckError: If any check failed; the message tells every failure, its `report` has them one by one.
        ValueError: If `skip` names no check.

    Example:
        >>> report = check_loss("dpo", max_examples=2)
        >>> len(report.passed), report.skipped
        (28, {'padding': 'reads no tokens', 'ties': 'reads no scores'})
    """
    left_out = _checked(skip)
    bound = as_loss(loss, **traits)
    passed: list[str] = []
    skipped: dict[str, str] = {}
    failed: dict[str, CheckFailed] = {}
    with registered(bound.spec):
        for name, check in loss_checks(bound, max_examples=max_examples):
            if name in left_out:
                skipped[name] = left_out[name]
            elif isinstance(check, Skip):
                skipped[name] = check.reason
            elif isinstance(failed.get(FIRST), CannotRun):
                skipped[name] = f"not run: {FIRST} found that the loss gives no values"
            else:
                try:
                    check(bound)
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

    expected = dict(expected_failures or {})
    _checked({key.rpartition(":")[2]: reason for key, reason in expected.items()})
    wanted = set(names() if only is None else _checked(dict.fromkeys(only, "wanted")))
    params = []
    for loss in map(as_loss, losses):
        label = _label(loss)
        for name, check in loss_checks(loss, max_examples=max_examples):
            if name not in wanted:
                continue
            reason = expected.get(f"{loss.name}:{name}", expected.get(name))
            if isinstance(check, Skip):
                marks: Any = pytest.mark.skip(reason=f"{loss.name}: {name}: {check.reason}")
            elif reason is not None:
                marks = pytest.mark.xfail(reason=reason, raises=CheckFailed, strict=True)
            else:
                marks = ()
            params.append(pytest.param(loss, check, id=f"{label}-{name}", marks=marks))
    return pytest.mark.parametrize(("loss", "check"), params)


def _label(loss: Loss) -> str:
    """Name and the hyperparameters that are not at their defaults."""
    defaults = {name: parameter.default for name, parameter in loss.spec.parameters.items()}
    plain = int | float | str | bool | None
    given = [
        f"{name}={value!r}"
        for name, value in loss.params.items()
        if name not in defaults or (isinstance(value, plain) and value != defaults[name])
    ]
    return f"{loss.name}({', '.join(given)})" if given else loss.name


def _checked(named: Mapping[str, str] | None) -> dict[str, str]:
    for name, reason in (named or {}).items():
        if name not in names():
            raise ValueError(f"check: got {name!r}, expected one of {', '.join(names())}")
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(
                f"{name}: got the reason {reason!r}, expected why the check is left out, in words"
            )
    return dict(named or {})
