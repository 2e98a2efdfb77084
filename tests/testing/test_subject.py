"""The loss under test: what is taken for a loss, and what a check leaves behind."""

import subprocess
import sys

import pytest
import torch.nn.functional as F

import prefloss
from prefloss import Pairs, registry, testing
from prefloss.hyperparameters import Positive
from prefloss.testing import check_loss
from prefloss.testing.subject import under_test

TRAITS = {"difference_only": True, "monotone": True}


def logistic(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


def test_decorated_function_name_spec_and_loss_are_taken():
    decorated = registry.register(name="decorated_logistic", **TRAITS)(logistic)
    try:
        for loss in (decorated, "decorated_logistic", prefloss.specs["decorated_logistic"]):
            assert testing.as_loss(loss).name == "decorated_logistic"
        assert "monotone" in check_loss(decorated, max_examples=2).passed
    finally:
        registry.unregister("decorated_logistic")


def test_required_hyperparameters_get_a_value():
    def needs_alpha(pairs: Pairs, *, alpha: Positive, beta: Positive = 0.1):
        return -F.logsigmoid(beta * pairs.margin() - alpha)

    assert testing.as_loss(needs_alpha).params["alpha"] == 0.5
    check_loss(needs_alpha, max_examples=2, **TRAITS)


def test_taken_name_and_traits_of_a_registered_loss_are_refused():
    def dpo(pairs: Pairs, *, beta: Positive = 0.1):
        return -F.logsigmoid(beta * pairs.margin())

    with pytest.raises(ValueError, match="got 'dpo', which another loss has"):
        check_loss(dpo)
    assert check_loss(dpo, name="my_dpo", max_examples=2, **TRAITS).loss == "my_dpo(beta=0.1)"
    with pytest.raises(TypeError, match=r"got \['monotone'\] beside .*, expected none"):
        check_loss("dpo", monotone=True)
    with pytest.raises(TypeError, match="expected a loss, its spec, its name or its function"):
        check_loss(3)  # type: ignore[arg-type]


def test_loss_under_test_is_registered_for_a_while():
    loss = testing.as_loss(logistic)
    with under_test(loss.spec), under_test(loss.spec):
        assert prefloss.specs["logistic"] is loss.spec
    assert "logistic" not in prefloss.specs


def test_warning_that_is_shown_once_is_still_shown_after_a_check():
    code = """
import warnings, prefloss
from prefloss.testing.checks import check_empty_examples

check_empty_examples("dpo", max_examples=2)
empty = prefloss.LogRatios(policy=[-1.0], reference=[-2.0], tokens=[0])
with warnings.catch_warnings(record=True) as shown:
    warnings.simplefilter("always")
    prefloss.get("dpo").mean(prefloss.Pairs(chosen=empty, rejected=empty))
print(*(warning.message for warning in shown))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "have a completion without tokens" in done.stdout
