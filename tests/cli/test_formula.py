"""Formulas in LaTeX as plain unicode."""

import re

import pytest

import prefloss
from prefloss.cli.losses import unicode_of


@pytest.mark.parametrize("name", sorted(prefloss.specs))
def test_no_latex_is_left_in_a_formula(name):
    text = unicode_of(prefloss.specs[name].formula)
    assert not re.search(r"[\\{}$]", text), text


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"\frac{1}{2\tau}", "1/(2τ)"),
        (r"\frac{a + b}{c}", "(a + b)/c"),
        (r"-\log\sigma(\beta h)", "-log σ(β h)"),
        (r"\log \frac{\pi(y)}{\pi_\mathrm{ref}(y)}", "log(π(y)/π_ref(y))"),
        (r"-\log \frac{1}{n} \sum_i x_i", "-log 1/n ∑_i x_i"),
        (r"\mathrm{KL}(\bar p \| V^*), h_{(k)}", "KL(p̅ ‖ V^*), h_(k)"),
        (r"x^2 + y^{-1} + h_{w}^2", "x² + y⁻¹ + h_w²"),
        (r"\sum_{k=1}^K e^{h_k}", "∑_(k=1)^K e^(h_k)"),
        ("", ""),
    ],
)
def test_formulas_read_as_they_would_be_said(latex, text):
    assert unicode_of(latex) == text
