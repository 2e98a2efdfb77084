"""Losses that see the whole batch: hand-worked values, pairs that do not count, states, draws, extremes."""

import copy
import math
import statistics

import pytest
import torch
import torch.nn.functional as F

import prefloss
from prefloss import LogRatios, Pairs, losses
from prefloss.hyperparameters import Draws, Moments
from prefloss.losses import batch_coupled

NAMES = ("aot", "aot_unpaired", "dr_dpo", "kto_pair", "beta_dpo", "alpha_dpo")
POINT = Pairs(
    LogRatios(policy=[-20.0], reference=[-21.5], tokens=[10]),
    LogRatios(policy=[-24.0], reference=[-23.0], tokens=[8]),
)


def softplus(x):
    return math.log1p(math.exp(x))


def made(chosen, rejected, chosen_tokens=None, rejected_tokens=None):
    """Pairs with a reference of -1 on every chosen and -2 on every rejected completion; 4 tokens unless given."""
    sides = []
    for policy, reference, tokens in ((chosen, -1.0, chosen_tokens), (rejected, -2.0, rejected_tokens)):
        policy = torch.as_tensor(policy)
        counts = torch.full(policy.shape, 4) if tokens is None else torch.as_tensor(tokens)
        sides.append(LogRatios(policy, torch.full_like(policy, reference), counts))
    return Pairs(*sides)


def drawn(n, requires_grad=False):
    return made(*((torch.randn(n) * 3 - 9).requires_grad_(requires_grad) for _ in range(2)))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "dr_dpo"])
def test_a_batch_of_one_is_dpo(name):
    assert prefloss.get(name, beta=0.1)(POINT).item() == pytest.approx(0.575939, abs=1e-6)


def test_aot_sorts_the_margins_of_each_model_apart():
    # Policy margins 3, -1, 2 and reference margins 0, 5, 1.
    chosen = LogRatios(policy=[3.0, -1.0, 2.0], reference=[0.0, 5.0, 1.0])
    pairs = Pairs(chosen, LogRatios(policy=[0.0] * 3, reference=[0.0] * 3))
    wanted = [softplus(-0.5 * x) for x in (3 - 5, -1 - 0, 2 - 1)]
    assert losses.aot(pairs, beta=0.5).tolist() == pytest.approx(wanted)


def test_aot_unpaired_sorts_the_sides_apart():
    pairs = Pairs.of(chosen=[3.0, -1.0, 2.0], rejected=[0.0, 5.0, 1.0])
    wanted = [softplus(-0.5 * x) for x in (3 - 5, -1 - 0, 2 - 1)]
    found = losses.aot_unpaired(pairs, beta=0.5)
    assert found.tolist() == pytest.approx(wanted)
    # Which chosen completion stands beside which rejected one does not matter.
    order = torch.tensor([2, 0, 1])
    shuffled = Pairs(pairs.chosen[order], pairs.rejected)
    assert torch.equal(losses.aot_unpaired(shuffled, beta=0.5), found[order])
    assert prefloss.get("aot_pair").name == "aot_unpaired"


def test_dr_dpo_by_hand():
    pairs = Pairs.of(chosen=[1.0, -2.0], rejected=[0.0, 0.0])
    terms = [softplus(-0.5), softplus(1.0)]
    for beta_prime in (0.1, 1.0, 10.0):
        mean = sum(math.exp(-term / beta_prime) for term in terms) / 2
        values = losses.dr_dpo(pairs, beta=0.5, beta_prime=beta_prime)
        assert values.tolist() == pytest.approx([-beta_prime * math.log(mean)] * 2, rel=1e-5)


def test_dr_dpo_becomes_dpo_when_labels_are_trusted():
    pairs = drawn(6)
    torch.testing.assert_close(
        prefloss.get("dr_dpo", beta_prime=1e4).mean(pairs), prefloss.get("dpo").mean(pairs), rtol=1e-3, atol=0
    )


def test_kto_pair_by_hand():
    pairs = Pairs.of(chosen=[3.0, 1.0], rejected=[-1.0, 5.0])
    k_chosen, k_rejected = 2.0, 2.0
    wanted = [
        1 / (1 + math.exp(0.5 * (chosen - k_rejected))) + 1 / (1 + math.exp(0.5 * (k_chosen - rejected)))
        for chosen, rejected in ((3, -1), (1, 5))
    ]
    assert losses.kto_pair(pairs, beta=0.5).tolist() == pytest.approx(wanted)


def test_kto_pair_baselines_are_at_least_0_and_have_no_gradient():
    chosen = torch.tensor([-4.0, 1.0], requires_grad=True)
    pairs = Pairs.of(chosen=chosen, rejected=[-3.0, -1.0])
    wanted = torch.sigmoid(-chosen) + torch.sigmoid(torch.tensor([-3.0, -1.0]))
    found = losses.kto_pair(pairs, beta=1.0)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), chosen)[0], torch.autograd.grad(wanted.sum(), chosen)[0]
    )


def test_beta_dpo_by_hand():
    pairs = Pairs.of(chosen=[3.0, 1.0], rejected=[0.0, 0.0])
    strength = 0.1 * (1 + 0.6 * (2.0 - 0.5))
    wanted = [softplus(-3 * strength), softplus(-strength)]
    found = losses.beta_dpo(pairs, keep=1.0, moments=(0.5, 1.0))
    assert found.tolist() == pytest.approx(wanted)
    # Far below the usual margin the strength stops at 1e-3.
    low = losses.beta_dpo(pairs, keep=1.0, moments=(100.0, 1.0))
    assert low.tolist() == pytest.approx([softplus(-3e-3), softplus(-1e-3)])


def test_beta_dpo_moves_its_moments_before_use():
    loss = prefloss.get("beta_dpo", keep=1.0)
    pairs = Pairs.of(chosen=[3.0, 1.0], rejected=[0.0, 0.0])
    for location in (0.2, 0.9 * 0.2 + 0.2):
        strength = 0.1 * (1 + 0.6 * (2.0 - location))
        assert loss(pairs)[0].item() == pytest.approx(softplus(-3 * strength), rel=1e-5)
    assert loss.params["moments"].std == pytest.approx(0.19 * statistics.stdev([3, 1]))
    held = copy.deepcopy(loss.state_dict())
    loss.eval()
    loss(pairs)
    assert loss.state_dict() == held
    assert set(held) == {"moments", "draws"}


def test_beta_dpo_strength_and_filter_have_no_gradient():
    chosen = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    losses.beta_dpo(
        Pairs.of(chosen=chosen, rejected=[0.0, 0.0]), keep=1.0, moments=(2.0, 1.0)
    ).sum().backward()
    wanted = [-0.1 / (1 + math.exp(0.1 * h)) for h in (3, 1)]
    assert chosen.grad.tolist() == pytest.approx(wanted)


def test_beta_dpo_keeps_a_share_and_rescales():
    pairs = drawn(11)
    loss = prefloss.get("beta_dpo", keep=0.8)
    values = loss(pairs)
    assert (values > 0).sum() == 8
    # The mean over all pairs is the mean over those kept.
    strength = 0.1 * (1 + 0.6 * (pairs.margin()[values > 0].mean() - loss.params["moments"].mean))
    kept = -F.logsigmoid(strength.clamp(min=1e-3) * pairs.margin())[values > 0]
    torch.testing.assert_close(values.mean(), kept.mean())


def test_beta_dpo_prefers_pairs_near_the_usual_margin():
    log_weight = torch.log(torch.tensor([8.0, 1.0, 1.0, 0.0]))
    counted = torch.tensor([True, True, True, True])
    draws = Draws(0)
    counts = sum(batch_coupled._drawn(log_weight, counted, 0.5, draws()).float() for _ in range(2000)) / 2000
    # Two of weights 8, 1, 1 without replacement: the first is missed with chance 2 * (1/10) * (1/9).
    assert counts[0].item() == pytest.approx(1 - 2 / 90, abs=0.01)
    assert counts[1].item() == pytest.approx((1 + 1 / 45) / 2, abs=0.04)
    assert counts[3] == 0


def test_beta_dpo_keeps_at_least_one_and_nobody_who_does_not_count():
    one = losses.beta_dpo(Pairs.of([1.0], [0.0]), keep=0.1, moments=(0.0, 0.0))
    assert one.item() > 0
    counted = torch.tensor([True, False, True])
    for seed in range(20):
        # A weight that underflows entirely still beats one that does not count.
        kept = batch_coupled._drawn(torch.full((3,), -torch.inf), counted, 1.0, Draws(seed)())
        assert torch.equal(kept, counted)
    assert not batch_coupled._drawn(torch.zeros(2), torch.zeros(2, dtype=torch.bool), 0.5, Draws()()).any()
    assert (
        batch_coupled._drawn(torch.zeros(100), torch.ones(100, dtype=torch.bool), 0.29, Draws()()).sum() == 29
    )


def test_beta_dpo_draws_anew_in_training_and_the_same_in_evaluation():
    pairs, loss = drawn(40), prefloss.get("beta_dpo", keep=0.5)
    assert not torch.equal(loss(pairs) > 0, loss(pairs) > 0)
    loss.eval()
    assert torch.equal(loss(pairs), loss(pairs))
    first, second = prefloss.get("beta_dpo", draws=5), prefloss.get("beta_dpo", draws=5)
    assert torch.equal(first(pairs), second(pairs))
    assert losses.beta_dpo(pairs, moments=(0.0, 1.0)).equal(losses.beta_dpo(pairs, moments=(0.0, 1.0)))


def test_alpha_dpo_over_two_batches():
    loss = prefloss.get("alpha_dpo")
    pairs = made([-8.0, -4.0], [-16.0, -12.0])
    # Means: policy gaps 2 and 2; M = (gap of h) / 4 = (-7 - -14) / 4 and (-3 - -10) / 4.
    gaps, moved = [2.0, 2.0], [1.75, 1.75]
    assert loss(pairs).tolist() == pytest.approx([softplus(-(2.5 * gap - 1.5)) for gap in gaps])
    assert loss.params["moments"].state_dict() == {"mean": pytest.approx(0.175), "std": 0.0}
    wider = made([-8.0, -4.0], [-16.0, -20.0])
    gaps, moved = [2.0, 4.0], [1.75, 3.75]
    location = 0.9 * 0.175 + 0.1 * statistics.mean(moved)
    scale = 0.1 * statistics.stdev(moved)
    margins = [1.5 + 0.2 * 2.5 * (m - location) / scale for m in moved]
    wanted = [softplus(-(2.5 * gap - margin)) for gap, margin in zip(gaps, margins, strict=True)]
    assert loss(wider).tolist() == pytest.approx(wanted, rel=1e-5)


def test_alpha_dpo_margin_has_no_gradient():
    policy = torch.tensor([-8.0], dtype=torch.float64, requires_grad=True)
    losses.alpha_dpo(made(policy, [-16.0]), moments=(0.0, 1.0)).sum().backward()
    u = 2.5 * 2.0 - 1.5 - 0.2 * 2.5 * 1.75
    assert policy.grad.item() == pytest.approx(-2.5 / 4 / (1 + math.exp(u)))


def test_a_fixed_state_is_stateless():
    loss = prefloss.get("alpha_dpo", moments=[0.1, 0.2])
    assert loss.params["moments"] == (0.1, 0.2)
    assert loss.state_dict() == {}
    assert prefloss.get(repr(loss)).params == loss.params


@pytest.mark.parametrize("name", ["beta_dpo", "alpha_dpo"])
def test_the_raw_functions_keep_no_state(name):
    with pytest.raises(ValueError, match="moments: got 'running', expected the object that keeps the state"):
        getattr(losses, name)(POINT)
    with pytest.raises(TypeError, match=rf"{name}: moments: got 3, expected 'running', two numbers"):
        prefloss.get(name, moments=3)


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_on_where_it_was_saved(name):
    batches = [drawn(6) for _ in range(4)]
    loss, again = prefloss.get(name), prefloss.get(name)
    for batch in batches[:3]:
        loss(batch)
    again.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert torch.equal(loss(batches[3]), again(batches[3]))
    assert prefloss.specs[name].stateful == bool(loss.state)


@pytest.mark.filterwarnings("ignore:.*without tokens")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [0, 1, 4])
def test_pairs_with_an_empty_side_take_no_part(name, place):
    options = {"keep": 1.0} if name == "beta_dpo" else {}
    pairs = drawn(4)
    loss, padded_loss = (prefloss.get(name, **options) for _ in range(2))
    wanted = loss.mean(pairs)
    tokens = torch.full((5,), 4)
    columns = []
    for side in (pairs.chosen, pairs.rejected):
        policy = torch.cat([side.policy[:place], torch.tensor([500.0]), side.policy[place:]])
        columns.append(policy.requires_grad_())
    tokens[place] = 0
    padded = made(*columns, chosen_tokens=tokens)
    found = padded_loss(padded)
    assert found[place] == 0
    assert padded_loss.state_dict() == loss.state_dict()
    torch.testing.assert_close(found.sum() / 4, wanted)
    found.sum().backward()
    for column in columns:
        assert column.grad.isfinite().all()
        assert column.grad[place] == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_where_nothing_counts(name):
    chosen = torch.tensor([-3.0, -4.0], requires_grad=True)
    loss = prefloss.get(name)
    values = loss(made(chosen, [-5.0, -6.0], rejected_tokens=[0, 0]))
    assert values.tolist() == [0.0, 0.0]
    values.sum().backward()
    assert chosen.grad.tolist() == [0.0, 0.0]
    empty = made(torch.zeros(0), torch.zeros(0))
    assert loss(empty).shape == (0,)
    assert loss.mean(empty).item() == 0
    fresh = prefloss.get(name)
    assert {k: v for k, v in loss.state_dict().items() if k != "draws"} == {
        k: v for k, v in fresh.state_dict().items() if k != "draws"
    }


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_lost(name):
    pairs = made([-3.0, torch.nan, -4.0], [-5.0, -6.0, -7.0], chosen_tokens=[4, 4, 0])
    assert prefloss.get(name)(pairs).isnan().any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("h", [1e4, -1e4])
def test_extremes(name, h):
    chosen = torch.tensor([h, 0.0, h], requires_grad=True)
    rejected = torch.tensor([-h, 0.0, 0.0], requires_grad=True)
    loss = prefloss.get(name)
    for _ in range(2):
        values = loss(made(chosen, rejected))
        values.sum().backward()
        assert values.isfinite().all()
        assert chosen.grad.isfinite().all()
        assert rejected.grad.isfinite().all()


def test_dr_dpo_keeps_pairs_whose_weight_underflows():
    pairs = Pairs.of(chosen=[-1e4, -1e4], rejected=[0.0, 0.0])
    naive = -torch.log(torch.exp(-losses.dpo(pairs)).mean())
    assert naive.isinf()
    assert losses.dr_dpo(pairs).tolist() == pytest.approx([1000.0, 1000.0])


@pytest.mark.parametrize("name", NAMES)
def test_double_precision_and_shape_stay(name):
    chosen, rejected = torch.randn(2, 3).double() - 6, torch.randn(2, 3).double() - 6
    values = prefloss.get(name)(made(chosen, rejected))
    assert values.shape == (2, 3)
    assert values.dtype == torch.float64


def test_moments_of_many_ranks():
    moments = Moments()
    moments.all_sum = lambda sums: 2 * sums
    losses.alpha_dpo(POINT, moments=moments)
    # A batch of one on each of two ranks has a deviation: 0 here, as both hold the same pair.
    assert moments.mean == pytest.approx(0.0275)
    assert moments.std == 0.0
