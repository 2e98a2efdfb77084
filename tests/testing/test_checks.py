"""All checks together: each is tested in the file of its module, and right losses pass every one."""

from pathlib import Path

import pytest

from prefloss.testing import check_loss, checks


@pytest.mark.parametrize("name", checks.names())
def test_check_is_public_and_has_a_test_file(name):
    check = getattr(checks, f"check_{name}")
    assert check.__doc__
    module = check.__module__.rpartition(".")[2]
    assert "Broken(" in Path(__file__).with_name(f"test_{module}.py").read_text()


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "kto", "bco", "dpo_pl", "wpo", "orpo"])
def test_right_loss_passes(name):
    report = check_loss(name, max_examples=5)
    assert len(report.passed) + len(report.skipped) == len(checks.names())
    assert not report.failed
    assert all(reason.strip() for reason in report.skipped.values())
