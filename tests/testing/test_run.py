"""`check_loss` and `parametrize_loss_checks`: what they take, report and refuse."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import prefloss
from prefloss import Pairs, testing
from prefloss.hyperparameters import Positive
from prefloss.testing import (
    CannotRun,
    CheckFailed,
    LossCheckError,
    Skip,
    check_loss,
    checks,
    parametrize_loss_checks,
)


def logistic(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


def wrong_twice(pairs: Pairs, *, beta: Positive = 0.1, gamma: float = 0.0):
    return -torch.log(torch.sigmoid(beta * pairs.margin()))


TRAITS = {"difference_only": True, "monotone": True}


def test_plain_function_with_traits_passes_and_leaves_no_trace():
    report = check_loss(logistic, max_examples=3, **TRAITS)
    assert set(report.passed) | set(report.skipped) == set(checks.names())
    assert "logistic" not in prefloss.specs
    assert not report.failed


def test_all_failures_are_reported_at_once():
    with pytest.raises(LossCheckError) as caught:
        check_loss(wrong_twice, max_examples=3)
    report = caught.value.report
    assert set(report.failed) == {"extremes", "hyperparameter_effect"}
    assert set(report.hints) == {"difference_only", "monotone"}
    assert "shape_and_dtype" in report.passed
    message = str(caught.value)
    for words in ("declare monotone=True", "F.logsigmoid", "gamma=", "To replay"):
        assert words in message


def test_report_is_a_table():
    report = check_loss(logistic, max_examples=2, skip={"torch_compile": "slow"}, **TRAITS)
    lines = str(report).splitlines()
    assert (
        lines[0]
        == f"logistic(beta=0.1): {len(report.passed)} passed, {len(report.skipped)} skipped, 0 failed"
    )
    assert any(line.split() == ["torch_compile", "skipped", "slow"] for line in lines)
    assert any(line.split() == ["separability", "passed"] for line in lines)


def test_skipped_checks_need_a_reason():
    with pytest.raises(ValueError, match="expected why the check is left out"):
        check_loss(logistic, skip={"torch_compile": " "})
    with pytest.raises(ValueError, match="got 'no_such_check', expected one of"):
        check_loss(logistic, skip={"no_such_check": "because"})


def test_loss_that_gives_no_values_is_reported_once():
    def crashes(pairs: Pairs, *, beta: Positive = 0.1):
        raise RuntimeError("out of order")

    with pytest.raises(LossCheckError) as caught:
        check_loss(crashes, max_examples=2)
    report = caught.value.report
    assert list(report.failed) == ["shape_and_dtype"]
    assert isinstance(report.failed["shape_and_dtype"], CannotRun)
    assert "RuntimeError: out of order" in str(caught.value)
    assert report.skipped["monotone"].startswith("not run")


def test_failure_names_loss_property_and_draw():
    with pytest.raises(CheckFailed) as caught:
        checks.check_extremes(testing.as_loss(wrong_twice))
    error = caught.value
    assert (error.loss, error.property) == ("wrong_twice", "extremes")
    assert isinstance(error, AssertionError)
    assert isinstance(error.feedback, Pairs)
    assert error.feedback.shape == (1,)
    assert "policy=torch.tensor([" in str(error)


def test_check_that_does_not_apply_says_why():
    by_name = dict(testing.loss_checks("nll"))
    assert isinstance(by_name["beta"], Skip)
    assert by_name["beta"].reason == "declares no KL strength"
    with pytest.raises(Skip, match="declares no KL strength"):
        checks.check_beta("nll")


def test_undocumented_loss_of_a_user_needs_no_page():
    assert "no formula" in check_loss(logistic, max_examples=2, **TRAITS).skipped["documentation"]


def test_stateful_loss_is_left_as_it_was():
    loss = prefloss.get("bco_pair")
    before = loss.state_dict()
    check_loss(loss, max_examples=2)
    assert loss.state_dict() == before


def marks(decorator, name):
    return {
        param.id.rpartition("-")[2]: param.marks
        for param in decorator.mark.args[1]
        if param.values[0].name == name
    }


def test_decorator_gives_every_check_of_every_loss():
    of_checks = marks(parametrize_loss_checks(["dpo", logistic]), "dpo")
    assert set(of_checks) == set(checks.names())
    assert set(marks(parametrize_loss_checks(["dpo"], only=["repr"]), "dpo")) == {"repr"}


def test_decorator_shows_skips_and_expected_failures():
    expected = {"extremes": "known", "dpo:monotone": "only here"}
    decorator = parametrize_loss_checks(["dpo", "ipo"], expected_failures=expected)
    for name, strict in (("dpo", ["extremes", "monotone"]), ("ipo", ["extremes"])):
        of_checks = marks(decorator, name)
        failing = [check for check, marked in of_checks.items() for mark in marked if mark.name == "xfail"]
        assert sorted(failing) == strict
        assert all(mark.kwargs["strict"] for check in failing for mark in of_checks[check])
    (skipped,) = marks(parametrize_loss_checks(["nll"]), "nll")["beta"]
    assert skipped.kwargs["reason"] == "nll: beta: declares no KL strength"
    with pytest.raises(ValueError, match="expected one of"):
        parametrize_loss_checks(["dpo"], expected_failures={"dpo:no_such_check": "because"})


def test_loss_named_like_an_alias_is_tested_itself():
    """AUDIT K1."""

    def sigmoid(pairs: Pairs, *, beta: Positive = 0.1):
        return pairs.margin() * float("nan")

    with pytest.raises(LossCheckError) as caught:
        check_loss(sigmoid, max_examples=2)
    assert caught.value.report.loss == "sigmoid(beta=0.1)"
    assert list(caught.value.report.failed) == ["shape_and_dtype"]
    assert prefloss.get("sigmoid").name == "dpo"


def test_error_in_backward_is_a_failed_check():
    """AUDIT K2."""

    def clamps(pairs: Pairs, *, beta: Positive = 0.1):
        p = torch.sigmoid(beta * pairs.margin())
        p.clamp_(min=1e-6)
        return -p.log()

    with pytest.raises(LossCheckError) as caught:
        check_loss(clamps, max_examples=2)
    (failed,) = caught.value.report.failed.values()
    assert isinstance(failed, CannotRun)
    assert "backward: got RuntimeError" in failed.problem
    assert "in-place" in failed.problem


def test_one_nan_gives_one_failure():
    """AUDIT K7: it gave fifteen."""
    with pytest.raises(LossCheckError) as caught:
        check_loss(always_nan, max_examples=2)
    report = caught.value.report
    assert list(report.failed) == ["shape_and_dtype"]
    assert report.skipped["extremes"] == "not run: shape_and_dtype failed"


def always_nan(pairs: Pairs, *, beta: Positive = 0.1):
    return torch.log(-(pairs.margin() ** 2) * beta - 1)


def test_first_loss_with_default_traits_has_hints_and_no_failure():
    """AUDIT K7."""
    report = check_loss(logistic, max_examples=2, skip={"torch_compile": "slow"})
    assert set(report.hints) == {"difference_only", "monotone"}
    assert "2 hints" in str(report)


def run_as_tests(loss, **options):
    outcomes = {}
    for param in parametrize_loss_checks([loss], max_examples=2, **options).mark.args[1]:
        if not param.marks:
            try:
                param.values[1](param.values[0])
            except (CheckFailed, pytest.skip.Exception) as outcome:
                outcomes[param.id.rpartition("-")[2]] = outcome
    return outcomes


def test_hint_is_shown_as_skipped_or_fails_where_all_traits_must_be_declared():
    only = ["difference_only", "monotone"]
    shown, strict = (run_as_tests(logistic, only=only, strict=strict) for strict in (False, True))
    assert {type(outcome) for outcome in shown.values()} == {pytest.skip.Exception}
    assert {type(outcome) for outcome in strict.values()} == {CheckFailed}
    assert "declare monotone=True" in str(shown["monotone"])


def test_one_cause_is_one_failed_test():
    """AUDIT K7."""
    outcomes = run_as_tests(always_nan, only=["shape_and_dtype", "extremes", "monotone"])
    assert isinstance(outcomes.pop("shape_and_dtype"), CheckFailed)
    assert all("not run: shape_and_dtype failed" in str(outcome) for outcome in outcomes.values())
    assert set(outcomes) == {"extremes", "monotone"}


@parametrize_loss_checks([testing.as_loss(logistic, **TRAITS)], max_examples=2)
def test_decorator_runs_on_a_plain_function(loss, check):
    check(loss)


def test_missing_hypothesis_is_explained():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "from prefloss.testing import identify\n"
        "try:\n    from prefloss.testing import check_loss\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "prefloss.testing needs hypothesis: pip install 'prefloss[test]'"
