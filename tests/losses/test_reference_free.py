"""Losses without a reference: published check values, points worked by hand, extremes, what counts."""

import math

import pytest
import torch

import prefloss
from prefloss import LogRatios, Pairs
from prefloss.losses import reference_free
from tests.losses.points import FAR, POINT, assert_empty_is_left_out, assert_finite, grid, losses_of

LOG_2 = math.log(2)

NAMES = losses_of(reference_free)

BARE = Pairs(LogRatios([-20.0], tokens=[10]), LogRatios([-24.0], tokens=[8]))


def softplus(x):
    return math.log1p(math.exp(x))


def pairs_of(mean_w, mean_l, n_w=4, n_l=2, gold=None):
    """Pairs from log-probs per token."""
    return Pairs(LogRatios([n_w * mean_w], tokens=[n_w]), LogRatios([n_l * mean_l], tokens=[n_l]), gold=gold)


@pytest.mark.parametrize("name", NAMES)
def test_no_reference_is_needed(name):
    assert not prefloss.specs[name].needs_reference


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slic_hf(delta=1.0, nll_weight=0.1)", 2.0),
        ("simpo(beta=2.0, gamma=1.0)", 0.313262),
        ("cpo(nll_weight=1.0)", 2.513015),
        ("cpo_simpo(beta=2.0, gamma=1.0, nll_weight=1.0)", 2.313262),
        ("orpo(odds_weight=0.1)", 2.028875),
        ("alphapo(alpha=0.25, beta=2.5, gamma=0.1)", 0.010174),
        ("simper", -0.085548),
        ("nll", 2.0),
        ("nll(average='sum')", 20.0),
        ("nll(average='batch')", 2.0),
    ],
)
def test_check_values(name, value):
    assert prefloss.get(name)(BARE).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tpo(beta=0.01, nll_weight=1.0)", 2.473347),
        ("tpo_l(beta=2.0, gamma=0.5, nll_weight=1.0)", 2.001413),
    ],
)
def test_check_values_with_a_gold_completion(name, value):
    assert prefloss.get(name)(POINT).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "mean_w", "mean_l", "value"),
    [
        # Sums are -4 and -8.
        ("slic_hf(delta=5.0, nll_weight=0.5)", -1.0, -4.0, 1.0 + 2.0),
        ("slic_hf(delta=1.0, nll_weight=0.0)", -1.0, -4.0, 0.0),
        ("simpo(beta=2.0, gamma=1.0)", -1.0, -2.0, softplus(-1.0)),
        ("cpo(beta=0.5, nll_weight=3.0)", -1.0, -3.0, softplus(-1.0) + 3.0),
        ("cpo_simpo(beta=2.0, gamma=1.0, nll_weight=3.0)", -1.0, -2.0, softplus(-1.0) + 3.0),
        # Odds of 3 against 1.
        ("orpo(odds_weight=2.0)", math.log(3 / 4), math.log(1 / 2), math.log(4 / 3) + 2 * math.log(4 / 3)),
        # r = 1 - 2 and 1 - 4
        ("alphapo(alpha=1.0, beta=1.0, gamma=1.0)", -LOG_2, -2 * LOG_2, softplus(-1.0)),
        # r = 1/2 - 1 and 1/4 - 1
        ("alphapo(alpha=-1.0, beta=4.0, gamma=0.0)", -LOG_2, -2 * LOG_2, softplus(-1.0)),
        ("alphapo(alpha=0, beta=2.0, gamma=1.0)", -1.0, -2.0, softplus(-1.0)),
        ("simper", -LOG_2, -2 * LOG_2, -1 / 4),
        ("simper", 0.0, -1e4, -1.0),
    ],
)
def test_points_worked_by_hand(name, mean_w, mean_l, value):
    assert prefloss.get(name)(pairs_of(mean_w, mean_l)).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # Sums of -4 and -6, and a gold NLL of 2 per token.
        ("tpo(beta=0.5, nll_weight=3.0)", softplus(-1.0) + 6.0),
        ("tpo_l(beta=1.0, gamma=1.0, nll_weight=3.0)", softplus(-1.0) + 6.0),
    ],
)
def test_gold_points_worked_by_hand(name, value):
    pairs = pairs_of(-1.0, -3.0, gold=LogRatios([-6.0], tokens=[3]))
    assert prefloss.get(name)(pairs).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", ["tpo", "tpo_l"])
def test_a_gold_completion_is_needed(name):
    with pytest.raises(
        ValueError, match=f"{name}: gold: got None, expected log-ratios of a third completion"
    ):
        prefloss.get(name)(BARE)
    with pytest.raises(ValueError, match="gold: got None"):
        prefloss.specs[name].function(BARE)


def test_slic_regularises_towards_gold_if_there_is_one():
    chosen = LogRatios(torch.tensor([-20.0], requires_grad=True))
    gold = LogRatios(torch.tensor([-30.0], requires_grad=True))
    pairs = Pairs(chosen, LogRatios([-24.0]), gold=gold)
    value = prefloss.get("slic_hf", delta=1.0, nll_weight=0.1)(pairs)
    assert value.item() == pytest.approx(3.0)
    chosen_gradient, gold_gradient = torch.autograd.grad(value, [chosen.policy, gold.policy])
    assert (chosen_gradient.item(), gold_gradient.item()) == (0.0, pytest.approx(-0.1))


def test_cpo_simpo_is_simpo_and_nll():
    pairs, _ = grid([-3.0, 0.5, 7.0])
    total = prefloss.get("1.0*simpo(beta=2.0, gamma=1.0) + 0.3*nll").mean(pairs)
    assert torch.allclose(prefloss.get("cpo_simpo", beta=2.0, gamma=1.0, nll_weight=0.3).mean(pairs), total)


def test_alphapo_tends_to_simpo():
    pairs = pairs_of(-1.5, -2.0)
    simpo = prefloss.get("simpo", beta=2.5, gamma=0.1)(pairs).item()
    near = prefloss.get("alphapo", alpha=1e-7)(pairs).item()
    assert near == pytest.approx(simpo, rel=1e-5)
    # The power itself has lost its digits there.
    power = (1 - torch.exp(torch.tensor(-1.5)) ** -1e-7) / 1e-7
    assert abs(power.item() + 1.5) > 0.3


@pytest.mark.parametrize("name", NAMES)
def test_extremes(name):
    assert_finite(name, *grid(FAR))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [(1, 1), (1, 4000)])
def test_extremes_per_token(name, tokens):
    assert_finite(name, *grid([-1e4, -1.0, 0.0], tokens=tokens))


@pytest.mark.parametrize("name", NAMES)
def test_certain_completions(name):
    """A mean probability of 1 to rounding, and log-probs that rounding put above 0."""
    log_probs = torch.tensor([0.0, -1e-45, -1e-30, -1e-9, -1e-7, 1e-7, -5.0])
    grids = torch.meshgrid(log_probs, log_probs, indexing="ij")
    policies = [side.reshape(-1).clone().requires_grad_() for side in grids]
    count = torch.ones(len(policies[0]), dtype=torch.long)
    gold = LogRatios(torch.zeros(len(count)), tokens=count)
    pairs = Pairs(*(LogRatios(policy, tokens=count) for policy in policies), gold=gold)
    assert_finite(name, pairs, policies)


def test_plain_log_odds_fail_there():
    mean = torch.tensor(-1e-9, requires_grad=True)
    odds = mean - torch.log1p(-torch.exp(mean))
    assert odds == math.inf
    pairs = Pairs(LogRatios([-1e-9], tokens=[1]), LogRatios([-1e-9], tokens=[1]))
    assert prefloss.get("orpo")(pairs).item() == pytest.approx(0.1 * LOG_2)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_completion_is_left_out(name):
    assert_empty_is_left_out(name)


@pytest.mark.filterwarnings("ignore:.*without tokens")
def test_nll_counts_pairs_by_their_chosen_side():
    pairs = Pairs(
        LogRatios([-20.0, -6.0, 0.0], tokens=[10, 2, 0]), LogRatios([-24.0, 0.0, -9.0], tokens=[8, 0, 3])
    )
    loss = prefloss.get("nll")
    assert loss.counted(pairs).tolist() == [True, True, False]
    assert loss(pairs).tolist() == [2.0, 3.0, 0.0]
    assert loss.mean(pairs).item() == 2.5
    assert prefloss.get("sft").mean(pairs).item() == pytest.approx(26 / 12)
    assert prefloss.get("nll", average="sum").mean(pairs).item() == 13.0


def test_nll_over_a_batch_is_one_mean_over_its_tokens():
    pairs = Pairs(LogRatios([-20.0, -5.0], tokens=[10, 5]), LogRatios([-24.0, -6.0], tokens=[8, 4]))
    values = prefloss.get("nll", average="batch")(pairs)
    assert values.tolist() == pytest.approx([20 / 7.5, 5 / 7.5])
    assert values.mean().item() == pytest.approx(25 / 15)


def test_nll_of_a_batch_without_tokens():
    pairs = Pairs(LogRatios([0.0], tokens=[0]), LogRatios([-1.0], tokens=[1]))
    for average in ("sequence", "sum", "batch"):
        assert prefloss.get("nll", average=average)(pairs).tolist() == [0.0]


@pytest.mark.parametrize(
    ("alias", "name", "params"),
    [
        ("slic", "slic_hf", {}),
        ("trl:simpo", "cpo_simpo", {"nll_weight": 1.0}),
        ("liger:simpo", "cpo_simpo", {"nll_weight": 1.0}),
        ("ms-swift:simpo", "cpo_simpo", {"nll_weight": 1.0}),
        ("tpo-l", "tpo_l", {}),
        ("sft", "nll", {"average": "batch"}),
    ],
)
def test_aliases(alias, name, params):
    loss = prefloss.get(alias)
    assert loss.name == name
    assert loss.params == {**prefloss.get(name).params, **params}


def test_gold_is_read_but_by_two_not_needed():
    needs = {name for name in NAMES if "gold" in prefloss.specs[name].needs}
    assert needs == {"tpo", "tpo_l"}
    assert prefloss.specs["slic_hf"].reads == {"gold"}
