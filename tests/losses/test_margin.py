"""Losses of the scaled margin: published check values, points worked by hand, extremes."""

import math

import pytest
import torch

import prefloss
from prefloss import LogRatios, Pairs
from prefloss.losses import margin
from tests.losses.points import (
    FAR,
    POINT,
    assert_empty_is_left_out,
    assert_finite,
    grid,
    losses_of,
)

LOG_2 = math.log(2)

NAMES = losses_of(margin)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cdpo(epsilon=0.1)", 0.600939),
        ("robust_dpo(epsilon=0.1)", 0.544689),
        ("exo_pair(epsilon=0.001)", 2.339545),
        ("discopop(beta=0.1, tau=0.05)", 0.777443),
        ("gpo_exponential", 0.778801),
        ("gpo_truncated_quadratic", 0.5625),
        ("gpo_savage", 0.191689),
    ],
)
def test_check_values(name, value):
    assert prefloss.get(name)(POINT).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "margin", "value"),
    [
        ("cdpo(beta=1.0, epsilon=0.25)", math.log(3), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ("robust_dpo(beta=1.0, epsilon=0.25)", 0.0, LOG_2),
        ("robust_dpo(beta=1.0, epsilon=0.25)", math.log(3), 1.5 * math.log(4 / 3) - 0.5 * math.log(4)),
        ("robust_dpo(beta=1.0, epsilon=0.1)", 100.0, -12.5),
        ("exo_pair(beta=1.0, epsilon=0.25)", math.log(3), 0.0),
        ("exo_pair(beta=1.0, epsilon=0.25)", 0.0, 0.5 * math.log(4 / 3)),
        ("discopop(beta=1.0, tau=0.05)", 0.0, 0.5 * LOG_2 + 0.5),
        # Far to the right the exponential is left, far to the left the logistic loss.
        ("discopop(beta=1.0, tau=0.05)", 5.0, math.exp(-5)),
        ("discopop(beta=1.0, tau=0.05)", -5.0, math.log1p(math.exp(5))),
        ("gpo_exponential(beta=0.5)", 4.0, math.exp(-2)),
        ("gpo_truncated_quadratic(beta=0.5)", 4.0, 0.0),
        ("gpo_truncated_quadratic(beta=0.5)", -4.0, 9.0),
        ("gpo_savage(beta=0.5)", 2 * math.log(3), 1 / 16),
        ("gpo_savage(beta=0.5)", 0.0, 1 / 4),
    ],
)
def test_points_worked_by_hand(name, margin, value):
    assert prefloss.get(name)(Pairs.of([margin], [0.0])).item() == pytest.approx(value, abs=1e-5)


def test_cdpo_is_smoothed_dpo():
    pairs, _ = grid([-3.0, 0.5, 7.0])
    smoothed = prefloss.get("dpo", beta=0.3, label_smoothing=0.2)
    assert torch.allclose(prefloss.get("cdpo", beta=0.3, epsilon=0.2)(pairs), smoothed(pairs))


@pytest.mark.parametrize("name", ["cdpo(beta=1.0, epsilon=0.1)", "exo_pair(beta=1.0, epsilon=0.1)"])
def test_a_smoothed_target_has_its_minimum_where_the_odds_are_right(name):
    h = torch.tensor([math.log(9)], requires_grad=True)
    value = prefloss.get(name)(Pairs(LogRatios(h, torch.zeros(1)), LogRatios.of([0.0])))
    (gradient,) = torch.autograd.grad(value, h)
    assert gradient.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [None, 1.0])
def test_extremes(name, beta):
    given = {} if beta is None else {prefloss.specs[name].beta: beta}
    assert_finite(name, *grid(FAR), **given)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_completion_is_left_out(name):
    assert_empty_is_left_out(name)


def test_plain_forms_fail_where_these_do_not():
    z = torch.tensor(-100.0)
    assert (torch.sigmoid(z / 0.05) * torch.exp(-z)).isnan()
    assert torch.log(torch.sigmoid(z * 2)) == -math.inf
    assert prefloss.get("discopop", beta=1.0)(Pairs.of([-100.0], [0.0])).item() == 100


def test_exponent_is_clamped_at_80():
    h = torch.tensor([-1000.0, -70.0], requires_grad=True)
    values = prefloss.get("gpo_exponential", beta=1.0)(
        Pairs(LogRatios(h, torch.zeros(2)), LogRatios.of([0.0, 0.0]))
    )
    (gradient,) = torch.autograd.grad(values.sum(), h)
    assert values.tolist() == pytest.approx([math.exp(80), math.exp(70)], rel=1e-5)
    assert gradient.tolist() == pytest.approx([0.0, -math.exp(70)], rel=1e-5)


@pytest.mark.parametrize(
    ("alias", "name", "params"),
    [
        ("robust", "robust_dpo", {}),
        ("gpo_exp", "gpo_exponential", {}),
        ("gpo_trunc_quad", "gpo_truncated_quadratic", {}),
    ],
)
def test_aliases(alias, name, params):
    loss = prefloss.get(alias)
    assert loss.name == name
    assert loss.params == {**prefloss.get(name).params, **params}


@pytest.mark.parametrize(
    "given",
    [
        "robust_dpo(epsilon=0.5)",
        "cdpo(epsilon=0.5)",
        "exo_pair(epsilon=0)",
        "discopop(tau=0)",
    ],
)
def test_ranges(given):
    with pytest.raises(ValueError, match="expected a number >"):
        prefloss.get(given)
