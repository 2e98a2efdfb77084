"""`prefloss losses`: the table, and a page for each loss."""

import itertools
import re

import pytest
import torch
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


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_list_shows_whole_summaries_in_families(columns):
    lines = shown(columns=columns).splitlines()
    for name, spec in prefloss.specs.items():
        at = next(i for i, line in enumerate(lines) if re.match(rf"  {name}\s", line))
        words = lines[at].replace(spec.paper, "").split()[1:]
        below = itertools.takewhile(lambda line: line.startswith(" " * 20), lines[at + 1 :])
        told = " ".join([*words, *" ".join(below).split()]).removeprefix("* ")
        assert told == spec.summary.replace("`", "")
    families = [line.strip() for line in lines if re.match(r" \S", line)]
    assert {*families} <= {*prefloss.registry.FAMILIES.values()}
    assert families[:2] == [prefloss.registry.FAMILIES[name] for name in ("pairwise", "margin")]


def test_every_loss_of_ours_has_a_family_and_one_of_a_user_has_none():
    assert all(spec.family for spec in prefloss.specs.values())
    assert prefloss.registry.spec_from(lambda_loss).family == ""


def lambda_loss(pairs: prefloss.Pairs) -> torch.Tensor:
    return pairs.margin()


def test_losses_for_a_purpose_fit_80_columns_and_say_why():
    output = shown("--for", "pairs,length", columns="80")
    assert max(map(len, output.splitlines())) <= 80
    found = prefloss.losses.suggest("pairs", "length")
    flat = " ".join(output.split())
    for text in (
        found.start,
        *found.notes,
        *(x for one in found for x in (one.loss, one.why, *one.evidence)),
    ):
        assert " ".join(text.split()) in flat


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--for", "votes,noizy"], "--for: got 'noizy'; did you mean 'noisy'? expected some of pairs, votes"),
        (["--for", ""], "--for: got none, expected some of pairs"),
        (["--for", "reference,no-reference"], "--for: got both"),
        (["ipo", "--for", "noisy"], "--for: got it beside the name 'ipo', expected one of them"),
    ],
)
def test_a_purpose_that_means_nothing_is_one_line(arguments, said):
    result = CliRunner().invoke(app, ["losses", *arguments])
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
