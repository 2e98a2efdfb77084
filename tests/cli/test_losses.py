"""`prefloss losses`: the table, and a page for each loss."""

import re

import pytest
from typer.testing import CliRunner

import prefloss
from prefloss.cli.app import app


def shown(*arguments, columns="120"):
    result = CliRunner(env={"COLUMNS": columns}).invoke(app, ["losses", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("columns", ["80", "120"])
def test_every_loss_has_one_line_under_its_data(columns):
    lines = shown(columns=columns).splitlines()
    assert all(len(line) <= int(columns) for line in lines)
    for name, spec in prefloss.specs.items():
        (at,) = [i for i, line in enumerate(lines) if re.match(rf"  {name}\s", line)]
        heading = next(line for line in reversed(lines[:at]) if line and not line.startswith(" "))
        group = "Graded scores" if "scores" in spec.needs else spec.feedback.__name__
        assert heading.startswith(group)
        assert spec.summary.replace("`", "")[:20] in lines[at]
        assert ("* " in lines[at]) is not spec.needs_reference
        assert (spec.paper in lines[at]) or columns == "80"


def test_one_loss_in_full():
    page = shown("ipo")
    assert "ℓ = (h_w - h_l - 1/(2τ))²" in page
    assert "Azar et al. 2023, arXiv:2310.12036, Eq. 17." in page
    assert "tau = 0.1" in page
    assert "[> 0]" in page
    assert "Where peers differ" in page
    assert "log-probs of the policy and of a frozen reference" in page


def test_an_alias_shows_its_loss():
    assert shown("sigmoid") == shown("dpo")


@pytest.mark.parametrize("name", sorted(prefloss.specs))
def test_every_page_renders_narrow_or_wide(name):
    for columns in ("60", "120"):
        assert name in shown(name, columns=columns)


def test_an_unknown_loss_is_an_error_in_the_registrys_words():
    result = CliRunner().invoke(app, ["losses", "dpoo"])
    assert result.exit_code == 2
    assert "unknown loss 'dpoo'; did you mean 'dpo'" in result.output
    assert "Traceback" not in result.output
