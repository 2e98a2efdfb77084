"""The pages of the losses, docs/_ext: families, snippets, relatives, papers."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import prefloss
import prefloss.registry

pytest.importorskip("pybtex")
sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "_ext"))
import loss_families
import loss_snippets
import papers
import relatives

ALL = list(prefloss.specs.values())


def test_every_loss_has_one_family() -> None:
    listed = [spec.name for family in prefloss.registry.FAMILIES for spec in loss_families.members(family)]
    assert sorted(listed) == sorted(prefloss.specs)


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_the_snippets_are_right(spec) -> None:
    assert repr(prefloss.get(loss_snippets.expression(spec))) == repr(prefloss.get(spec.name))
    text = loss_snippets.snippets(spec)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)
    assert "tab-item} Loop" in text


@pytest.mark.parametrize(
    ("name", "trainers"),
    [
        ("dpo", {"TRL", "transformers", "Frameworks", "Command line", "Loop"}),
        ("kto", {"TRL", "transformers", "Frameworks", "Command line", "Loop"}),
        ("dpo_pl", {"transformers", "Command line", "Loop"}),
        ("odpo", {"TRL", "transformers", "Command line", "Loop"}),
        ("tpo", {"Loop"}),
    ],
)
def test_the_trainers_of_a_loss(name: str, trainers: set[str]) -> None:
    text = loss_snippets.snippets(prefloss.specs[name])
    assert set(re.findall(r"\{tab-item\} (.+)", text)) == trainers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cdpo", {("dpo", 1.0)}),
        ("hdpo", {("dpo", 1.0)}),
        ("dro", {("a2po", 0.5)}),
        ("dpo_pl", {("dpo", 1.0)}),
        # squared, hinge and exponential losses are nobody else's
        ("ipo", set()),
        ("hinge", set()),
        ("gpo_exponential", set()),
    ],
)
def test_relatives(name: str, expected: set[tuple[str, float]]) -> None:
    found = {(item.name, item.factor) for item in relatives.relatives(prefloss.specs[name])}
    assert {item for item in found if item[0] != "s_dpo"} == expected


def test_every_paper_has_an_entry() -> None:
    missing = [
        (spec.name, number) for spec in ALL for number in papers.numbers(spec) if not papers.bibtex(spec)
    ]
    assert not missing


def test_the_paper_index_names_every_loss() -> None:
    page = papers.pages()["papers.md"]
    assert [spec.name for spec in ALL if papers.numbers(spec) and f"[{spec.name}]" not in page] == []
