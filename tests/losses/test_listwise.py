"""Losses of rankings: check values, ties, absent completions, extremes."""

import math
from dataclasses import replace

import pytest
import torch

import prefloss
from prefloss import LogRatios, Pairs, Rankings, losses

NAMES = ("dpo_pl", "s_dpo", "infonca", "nca", "exo", "rrhf", "pro", "lipo_lambda")
GROUP = Rankings(completions=LogRatios.of([[1.5, 0.4, -1.0]]), scores=[[2.0, 1.0, 0.0]])


def made(policy, scores, tokens=None, **fields):
    policy = torch.as_tensor(policy)
    tokens = torch.full(policy.shape, 4) if tokens is None else torch.as_tensor(tokens)
    return Rankings(LogRatios(policy, torch.zeros_like(policy), tokens), torch.as_tensor(scores), **fields)


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("name", "parameters", "value"),
    [
        ("dpo_pl", {"beta": 0.1}, 1.609408),
        ("s_dpo", {"beta": 0.1}, 0.983813),
        ("infonca", {"beta": 0.1, "alpha": 1.0}, 1.033241),
        ("nca", {"beta": 0.1, "alpha": 1.0}, 1.354459),
        ("exo", {"beta": 0.1, "beta_r": 1.0}, 0.231452),
    ],
)
def test_check_values(name, parameters, value):
    assert prefloss.get(name, **parameters)(GROUP).item() == pytest.approx(value, abs=1e-6)


def test_two_completions_are_dpo_to_the_last_bit():
    h = torch.randn(50, 2) * 30
    better = torch.randint(2, (50, 1))
    scores = torch.cat([better, 1 - better], -1).float()
    group = made(h, scores)
    pairs = group.to_pairs()
    assert torch.equal(losses.dpo_pl(group, beta=0.3), losses.dpo(pairs, beta=0.3))
    assert torch.equal(losses.s_dpo(group, beta=0.3), losses.dpo(pairs, beta=0.3))


def test_one_hot_targets_are_the_simpler_losses():
    h = torch.tensor([[1.5, 0.4, -1.0]])
    group = made(h, [[2.0, 1.0, 0.0]])
    one_hot = losses.infonca(group, beta=0.1, alpha=1e-3)
    torch.testing.assert_close(one_hot, losses.s_dpo(group, beta=0.1))
    two = made(h[:, :2], [[2.0, 1.0]])
    pairs = Pairs.of(chosen=[1.5], rejected=[0.4])
    torch.testing.assert_close(losses.nca(two, beta=0.1, alpha=1e-3), losses.nca_pair(pairs, beta=0.1))


def test_ties_rank_in_the_order_given():
    tied = made([[0.5, 1.0, -1.0]], [[1.0, 1.0, 0.0]])
    ordered = made([[0.5, 1.0, -1.0]], [[2.0, 1.0, 0.0]])
    assert torch.equal(losses.dpo_pl(tied), losses.dpo_pl(ordered))
    assert torch.equal(losses.s_dpo(tied), losses.s_dpo(ordered))
    # Of the best two the first gets the NLL, and no hinge compares them.
    assert losses.rrhf(made([[-4.0, -2.0]], [[1.0, 1.0]])).item() == 1.0
    assert losses.lipo_lambda(made([[0.5, 1.0]], [[1.0, 1.0]])).item() == 0.0
    # A tie has temperature 0: log 2, and the weighted NLL of the first.
    assert losses.pro(made([[-4.0, -2.0]], [[1.0, 1.0]]), nll_weight=0.5).item() == pytest.approx(
        math.log(2) + 2
    )


def test_rrhf_by_hand():
    # Means -1, -3, -2 with scores 0, 2, 1: each of the three pairs is compared.
    group = made([[-4.0, -12.0, -8.0]], [[0.0, 2.0, 1.0]])
    hinges = 2 + 1 + 1
    assert losses.rrhf(group).item() == hinges + 3
    assert losses.rrhf(group, rank_weight=10.0, nll_weight=0.0).item() == 10 * hinges


def test_pro_by_hand():
    # Best first: means -2, -1, -3 with scores 3, 1, 0.
    group = made([[-4.0, -12.0, -8.0]], [[1.0, 0.0, 3.0]])
    first = math.log(math.exp(-2 * 3) + math.exp(-1 * 2) + math.exp(-3 * 3)) - (-2 * 3)
    second = math.log(math.exp(-1 * 1) + math.exp(-3 * 1)) - (-1 * 1)
    assert losses.pro(group, nll_weight=0.05).item() == pytest.approx(first + second + 0.05 * 4 * 8, rel=1e-6)


def test_lipo_by_hand():
    # By h the order is 2, 0, 1; by score 0, 1, 2.
    group = made([[0.5, -1.0, 1.5]], [[1.0, 0.5, 0.0]])
    discount = [1 / math.log(1 + rank) for rank in (2, 3, 1)]
    gain = [2.0, 2**0.5, 1.0]
    h = [0.5, -1.0, 1.5]
    wanted = sum(
        abs(gain[i] - gain[j]) * abs(discount[i] - discount[j]) * softplus(-0.1 * (h[i] - h[j]))
        for i, j in ((0, 1), (0, 2), (1, 2))
    )
    assert losses.lipo_lambda(group, beta=0.1).item() == pytest.approx(wanted, rel=1e-6)


def test_lipo_learns_from_equal_log_ratios():
    policy = torch.zeros(1, 3, requires_grad=True)
    losses.lipo_lambda(made(policy, [[1.0, 0.5, 0.0]])).sum().backward()
    assert policy.grad[0, 0] < 0 < policy.grad[0, 2]


def test_lipo_gain_is_clamped():
    assert losses.lipo_lambda(made([[0.5, 1.0]], [[500.0, 0.0]])).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_absent_completions_take_no_part(name):
    loss = prefloss.get(name)
    policy, scores = torch.randn(4, 3) - 8, torch.rand(4, 3)
    wanted = loss(made(policy, scores))
    nan = torch.full((4, 1), torch.nan)
    wide = torch.cat([policy[:, :1], nan, policy[:, 1:], nan], -1).requires_grad_()
    mask = torch.tensor([True, False, True, True, False]).expand(4, -1)
    group = made(wide, torch.cat([scores[:, :1], nan, scores[:, 1:], nan], -1), mask=mask)
    found = loss(group)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert wide.grad.isfinite().all()
    assert (wide.grad[:, [1, 4]] == 0).all()
    tokens = torch.where(mask, 4, 0)
    emptied = replace(group, completions=LogRatios(wide, torch.zeros(4, 5), tokens), mask=None)
    torch.testing.assert_close(loss(emptied), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_groups_with_nothing_to_compare_give_0(name):
    loss = prefloss.get(name)
    mask = torch.tensor([[False, True, False], [False, False, False], [True, True, True]])
    policy = torch.full((3, 3), -2.0, requires_grad=True)
    values = loss(made(policy, torch.zeros(3, 3), mask=mask))
    assert values[:2].tolist() == [0.0, 0.0]
    values.sum().backward()
    assert policy.grad.isfinite().all()
    assert (policy.grad[:2] == 0).all()
    for shape in ((0, 3), (2, 1), (2, 0)):
        alone = made(torch.zeros(shape), torch.zeros(shape))
        assert loss(alone).tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("name", ["dpo_pl", "s_dpo", "infonca", "exo", "pro", "lipo_lambda"])
def test_one_completion_gives_0_from_the_function_itself(name):
    policy = torch.full((1, 2), -2.0, requires_grad=True)
    value = getattr(losses, name)(made(policy, [[1.0, 0.0]], mask=torch.tensor([[True, False]])))
    value.sum().backward()
    assert value.item() == 0
    assert (policy.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_extremes(name):
    spread = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -1e4]])
    policy = (spread - 2e4 if name in ("rrhf", "pro") else spread).requires_grad_()
    scores = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    values = prefloss.get(name)(made(policy, scores))
    values.sum().backward()
    assert values.isfinite().all()
    assert policy.grad.isfinite().all()
    # What a naive form makes of the first group in the wrong order.
    assert torch.log(1 + torch.exp(0.1 * torch.tensor(2e4))).isinf()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_in_which_completions_are_given_does_not_matter(name):
    loss = prefloss.get(name)
    policy, scores = torch.randn(5, 4) - 6, torch.rand(5, 4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(made(policy[:, order], scores[:, order])), loss(made(policy, scores)))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_data(name):
    scores = torch.rand(2, 3, requires_grad=True)
    policy = (torch.randn(2, 3) - 6).requires_grad_()
    prefloss.get(name)(made(policy, scores)).sum().backward()
    assert scores.grad is None
    assert policy.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_double_precision_stays(name):
    assert (
        prefloss.get(name)(made(torch.randn(2, 3).double() - 6, torch.rand(2, 3).double())).dtype
        == torch.float64
    )


def test_exo_has_its_gradient_in_the_probabilities():
    policy = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: losses.exo(made(p, [[0.2, 0.1, 0.0]])), policy)
