"""f-divergence losses: published check values, points worked by hand, extremes, limits."""

import math

import pytest
import torch

import prefloss
from prefloss import Pairs
from prefloss.losses import divergences
from tests.losses.points import FAR, POINT, assert_empty_is_left_out, assert_finite, grid, losses_of

LOG_2 = math.log(2)

NAMES = losses_of(divergences)


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("f_dpo_forward_kl", 0.576152),
        ("f_dpo_js", 0.639099),
        ("f_dpo_alpha(alpha=0.5)", 0.582415),
        ("chipo(r_max=1.0)", 0.416166),
    ],
)
def test_check_values(name, value):
    assert prefloss.get(name)(POINT).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "h_w", "h_l", "value"),
    [
        # s = -1/2 and -2
        ("f_dpo_forward_kl(beta=2.0)", LOG_2, -LOG_2, softplus(-3.0)),
        # s = log(3/2) and log(1/2), so the margin is log 3
        ("f_dpo_js(beta=1.0)", math.log(3), -math.log(3), math.log(4 / 3)),
        # s = 2 (1 - 1/2) and 2 (1 - 2)
        ("f_dpo_alpha(beta=1.0, alpha=0.5)", math.log(4), -math.log(4), softplus(-3.0)),
        # s = 2 + log 2 and 1, and a margin of 1 + log 2 is inside the clip
        ("chipo(beta=1.0, r_max=1.0)", LOG_2, 0.0, softplus(-1.0 - LOG_2)),
        ("chipo(beta=1.0, r_max=0.5)", LOG_2, 0.0, softplus(-1.0)),
        ("chipo(beta=1.0, r_max=0.5)", 0.0, LOG_2, softplus(1.0)),
    ],
)
def test_points_worked_by_hand(name, h_w, h_l, value):
    assert prefloss.get(name)(Pairs.of([h_w], [h_l])).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "divergence"),
    [("f_dpo_forward_kl", "forward_kl"), ("f_dpo_js", "js"), ("f_dpo_alpha(alpha=0.3)", "alpha(0.3)")],
)
def test_they_are_dpo_with_the_modifier(name, divergence):
    pairs, _ = grid([-3.0, 0.5, 7.0])
    assert torch.equal(prefloss.get(name)(pairs), prefloss.get("dpo", divergence=divergence)(pairs))


def test_limits_of_alpha():
    pairs, _ = grid([-3.0, 0.5, 2.0])
    near_0, near_1 = (prefloss.get("f_dpo_alpha", alpha=alpha)(pairs) for alpha in (1e-6, 1 - 1e-6))
    assert torch.allclose(near_0, prefloss.get("dpo")(pairs), rtol=1e-4)
    assert torch.allclose(near_1, prefloss.get("f_dpo_forward_kl")(pairs), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [None, 1.0])
def test_extremes(name, beta):
    assert_finite(name, *grid(FAR), **({} if beta is None else {"beta": beta}))


def test_plain_forms_fail_where_these_do_not():
    h = torch.tensor(-100.0)
    assert (torch.exp(-h) - torch.exp(-h)).isnan()
    both = Pairs.of([-100.0], [-200.0])
    assert prefloss.get("f_dpo_forward_kl")(both).item() == pytest.approx(LOG_2)


def test_chipo_has_no_gradient_outside_the_clip():
    pairs, policies = grid([-5.0, 0.0, 5.0])
    _, gradients = assert_finite("chipo", pairs, policies)
    margin = pairs.margin()
    # 0.1 (e^5 + 5 - 1) is beyond 2, 0.1 (1 + 5) is not.
    outside = torch.maximum(pairs.chosen.h, pairs.rejected.h).gt(0) & margin.ne(0)
    assert (gradients[0][outside] == 0).all()
    assert (gradients[0][~outside] < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_completion_is_left_out(name):
    assert_empty_is_left_out(name)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("forward_kl", "f_dpo_forward_kl"),
        ("js_divergence", "f_dpo_js"),
        ("ms-swift:alpha_divergence", "f_dpo_alpha"),
    ],
)
def test_aliases(alias, name):
    assert prefloss.get(alias).name == name


@pytest.mark.parametrize("alpha", [0, 1, -0.5])
def test_alpha_is_between_the_two_kls(alpha):
    with pytest.raises(ValueError, match=r"alpha: got .*, expected a number > 0 and < 1"):
        prefloss.get("f_dpo_alpha", alpha=alpha)
