"""Losses of a chosen against a rejected completion: published check values, points worked by hand, extremes."""

import math

import pytest
import torch

import prefloss
from prefloss import LogRatios, Pairs
from prefloss.losses import pairwise
from tests.losses.points import (
    CHOSEN,
    FAR,
    POINT,
    REJECTED,
    assert_empty_is_left_out,
    assert_finite,
    grid,
    losses_of,
)

LOG_2 = math.log(2)

NAMES = losses_of(pairwise)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dpo", 0.575939),
        ("ipo", 22.325625),
        ("ipo(per_token=False)", 6.25),
        ("hinge", 0.75),
        ("ln_dpo(beta=5.0)", 0.225413),
        ("r_dpo(alpha=0.01)", 0.567232),
        ("hdpo(alpha=0.9)", 0.593650),
        ("dpo_nll(nll_weight=1.0)", 2.575939),
    ],
)
def test_check_values(name, value):
    assert prefloss.get(name)(POINT).item() == pytest.approx(value, abs=1e-6)


def test_xpo_check_value():
    pairs = Pairs(CHOSEN, REJECTED, gold=LogRatios(policy=[-30.0], reference=[-29.0], tokens=[9]))
    assert prefloss.get("xpo")(pairs).item() == pytest.approx(0.575639, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "margin", "value"),
    [
        ("dpo(beta=1.0)", 0.0, LOG_2),
        ("dpo(beta=1.0)", math.log(3), math.log(4 / 3)),
    ],
)
def test_points_worked_by_hand(name, margin, value):
    assert prefloss.get(name)(Pairs.of([margin], [0.0])).item() == pytest.approx(value, abs=1e-5)


def test_ipo_is_gpo_squared():
    pairs, _ = grid([-3.0, 0.5, 7.0])
    z = 0.2 * pairs.margin()
    assert torch.allclose(prefloss.get("ipo", tau=0.1, per_token=False)(pairs) * 0.2**2, (z - 1) ** 2)


def test_r_dpo_expects_less_of_a_longer_winner():
    def value(n_chosen, n_rejected):
        pairs = Pairs(LogRatios.of([0.0], [n_chosen]), LogRatios.of([0.0], [n_rejected]))
        return prefloss.get("r_dpo", alpha=0.1)(pairs).item()

    assert value(20, 10) == pytest.approx(math.log1p(math.exp(-1)))
    assert value(10, 20) == pytest.approx(math.log1p(math.exp(1)))


def test_r_dpo_keeps_float64():
    sides = [LogRatios(torch.tensor([-2.0]).double(), torch.tensor([-2.0]).double(), [n]) for n in (12, 5)]
    assert prefloss.get("r_dpo", alpha=0.01)(Pairs(*sides)).item() == pytest.approx(
        math.log1p(math.exp(-0.07)), rel=1e-14
    )


def test_r_dpo_without_lengths_says_so():
    with pytest.raises(ValueError, match="tokens: got None"):
        prefloss.losses.r_dpo(Pairs.of([0.0], [0.0]))


def test_hdpo_weighs_policy_and_reference():
    pairs = Pairs(LogRatios([-10.0], [-16.0]), LogRatios([-20.0], [-20.0]))
    # 0.5 * (-10 + 20) - (-16 + 20) = 1
    assert prefloss.get("hdpo", beta=1.0, alpha=0.5)(pairs).item() == pytest.approx(math.log1p(math.exp(-1)))
    assert torch.equal(prefloss.get("hdpo", alpha=1.0)(pairs), prefloss.get("dpo")(pairs))


def test_ln_dpo_divides_each_side_by_its_own_length():
    pairs = Pairs(LogRatios.of([6.0], [3]), LogRatios.of([5.0], [5]))
    assert prefloss.get("ln_dpo", beta=1.0)(pairs).item() == pytest.approx(math.log1p(math.exp(-1)))


def test_dpo_nll_adds_the_mean_of_the_chosen_side():
    pairs = Pairs(LogRatios([-6.0], [-6.0], [3]), LogRatios([-9.0], [-9.0], [4]))
    assert prefloss.get("dpo_nll", nll_weight=0.5)(pairs).item() == pytest.approx(LOG_2 + 1.0)


def test_dpo_nll_is_the_sum_of_its_terms():
    pairs, _ = grid([-3.0, 0.5, 7.0])
    total = prefloss.get("1.0*dpo + 0.3*nll").mean(pairs)
    assert torch.allclose(prefloss.get("dpo_nll", nll_weight=0.3).mean(pairs), total)


def test_xpo_lowers_the_samples_of_the_reference():
    policy = torch.tensor([-30.0], requires_grad=True)
    pairs = Pairs(CHOSEN, REJECTED, gold=LogRatios(policy, torch.tensor([-30.0])))
    (gradient,) = torch.autograd.grad(prefloss.get("xpo", alpha=0.25)(pairs), policy)
    assert gradient.item() == 0.25
    with pytest.raises(ValueError, match="xpo: gold: got None"):
        prefloss.get("xpo")(Pairs(CHOSEN, REJECTED))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [None, 1.0])
def test_extremes(name, beta):
    given = {} if beta is None else {prefloss.specs[name].beta: beta}
    assert_finite(name, *grid(FAR), **given)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_completion_is_left_out(name):
    assert_empty_is_left_out(name)


@pytest.mark.parametrize(
    ("alias", "name", "params"),
    [
        ("sigmoid", "dpo", {}),
        ("RSOLoss", "hinge", {}),
        ("openrlhf:ipo", "ipo", {"per_token": False}),
        ("sigmoid_norm", "ln_dpo", {"beta": 5.0}),
        ("dpo_norm", "ln_dpo", {}),
    ],
)
def test_aliases(alias, name, params):
    loss = prefloss.get(alias)
    assert loss.name == name
    assert loss.params == {**prefloss.get(name).params, **params}


@pytest.mark.parametrize(
    "given",
    [
        "r_dpo(alpha=-0.01)",
    ],
)
def test_ranges(given):
    with pytest.raises(ValueError, match="expected a number >"):
        prefloss.get(given)
