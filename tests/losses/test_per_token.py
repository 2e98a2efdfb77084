"""Losses that read each token: hand-worked values, draws, what has a gradient, extremes."""

import math
from dataclasses import replace

import pytest
import torch

import prefloss
from prefloss import LogRatios, Pairs, losses
from prefloss.logratios import PerToken

NAMES = ("ld_dpo", "sampo", "wpo", "tdpo1", "tdpo2", "humanline_dpo")
COLUMNS = ("policy", "reference", "log_sum_sq", "kl")


def softplus(x):
    return math.log1p(math.exp(x))


def side(rows, **columns):
    """One completion from its tokens' log-ratios against a reference of -3, and further columns, each as long."""
    policy = torch.as_tensor(rows) - 3
    mask = torch.ones(policy.shape, dtype=torch.bool)
    others = {name: torch.as_tensor(values) for name, values in columns.items()}
    return PerToken(policy, torch.full_like(policy, -3.0), mask, **others).log_ratios()


def drawn(n, width, generator=None):
    """Pairs of random tokens, lengths from 1 to the width, padded with what must not be read."""

    def one():
        mask = torch.arange(width) < torch.randint(1, width + 1, (n, 1), generator=generator)
        values = {name: -torch.rand(n, width, generator=generator) * 3 for name in COLUMNS}
        values["kl"] = -values["kl"]
        # Nothing outside the mask counts; log-probs are 0 there.
        hidden = {"policy": 0.0, "reference": 0.0, "log_sum_sq": torch.nan, "kl": torch.nan}
        values = {name: torch.where(mask, value, hidden[name]) for name, value in values.items()}
        return PerToken(mask=mask, **values).log_ratios()

    return Pairs(one(), one())


def widened(ratios, left, right):
    """The same completions with padding on both sides."""

    def pad(value):
        return torch.nn.functional.pad(value, (left, right))

    return ratios.per_token._map(pad).log_ratios()


def test_ld_dpo_by_hand():
    pairs = Pairs(side([[1.0, -2.0, 4.0, 8.0]]), side([[0.5, 0.25]]))
    for alpha in (0.0, 0.25, 1.0):
        h = 1 - 2 + alpha * 12 - 0.75
        assert losses.ld_dpo(pairs, beta=0.1, alpha=alpha).item() == pytest.approx(softplus(-0.1 * h))
    assert losses.ld_dpo(pairs, alpha=1.0).equal(losses.dpo(pairs))
    assert prefloss.get("dpo", ld_alpha=0.5)(pairs).equal(prefloss.get("ld_dpo")(pairs))


def test_wpo_by_hand():
    # Means of log p - log sum p^2: (-1 + -2) / 2 - (-1.5) = 0 and -3 + 1 = -2.
    chosen = side([[2.0, 1.0]], log_sum_sq=[[-1.0, -2.0]])
    rejected = side([[0.0]], log_sum_sq=[[-1.0]])
    found = losses.wpo(Pairs(chosen, rejected), beta=0.1)
    assert found.item() == pytest.approx(math.exp(-2) * softplus(-0.3))
    assert prefloss.get("dpo", beta=0.01, wpo=True)(Pairs(chosen, rejected)).equal(
        prefloss.get("wpo")(Pairs(chosen, rejected))
    )


def test_wpo_clamps_the_product_and_has_no_gradient_in_it():
    policy = torch.tensor([[-1.0]], requires_grad=True)
    mask = torch.tensor([[True]])

    def pairs(chosen, rejected):
        rows = [
            PerToken(policy, policy.detach(), mask, log_sum_sq=policy.detach() - a).log_ratios()
            for a in (chosen, rejected)
        ]
        return Pairs(rows[0], rows[1].detach())

    # e^2 and e^-1: each alone would give min(1, e^2) * e^-1, the product gives 1.
    for chosen, rejected, weight in ((2.0, -1.0, 1.0), (1.0, -3.0, math.exp(-2))):
        value = losses.wpo(pairs(chosen, rejected), beta=1.0)
        assert value.item() == pytest.approx(weight * math.log(2), rel=1e-6)
        (gradient,) = torch.autograd.grad(value.sum(), policy)
        assert gradient.item() == pytest.approx(-0.5 * weight, rel=1e-6)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_by_hand(name):
    kl_chosen = torch.tensor([[0.25, 0.5]], requires_grad=True)
    kl_rejected = torch.tensor([[2.0]], requires_grad=True)
    pairs = Pairs(side([[1.0, 2.0]], kl=kl_chosen), side([[0.5]], kl=kl_rejected))
    value = prefloss.get(name, beta=0.1)(pairs)
    alpha = 1.0 if name == "tdpo1" else 0.5
    u = 0.1 * (2.5 - alpha * (2.0 - 0.75))
    assert value.item() == pytest.approx(softplus(-u))
    value.sum().backward()
    slope = 0.1 * alpha / (1 + math.exp(u))
    assert kl_rejected.grad.tolist() == [pytest.approx([slope])]
    if name == "tdpo1":
        assert kl_chosen.grad.tolist() == [pytest.approx([-slope, -slope])]
    else:
        assert kl_chosen.grad is None or not kl_chosen.grad.any()


def test_humanline_by_hand():
    pairs = Pairs(side([[4.0, -0.5]]), side([[-3.0, 1.0]]))
    assert losses.humanline_dpo(pairs).item() == pytest.approx(softplus(-0.1 * (1.5 - 0.5 - (-1 + 1))))
    wide = losses.humanline_dpo(pairs, log_epsilon_p=-9.0, log_epsilon_r=9.0)
    torch.testing.assert_close(wide, losses.dpo(pairs))
    assert prefloss.get("dpo", humanline=True)(pairs).equal(prefloss.get("humanline_dpo")(pairs))
    with pytest.raises(ValueError, match="log_epsilon_r: got -1"):
        prefloss.get("humanline_dpo", log_epsilon_r=-1.0)


def test_sampo_keeps_the_shorter_side_whole_and_draws_as_many_of_the_longer():
    # Tokens worth powers of two: the margin says which were drawn.
    long, short = side([[1.0, 2.0, 4.0, 8.0, 16.0]]), side([[32.0, 64.0]])
    loss = prefloss.get("sampo", beta=1e-3)
    seen = set()
    for _ in range(200):
        h = round(-math.log(math.expm1(loss(Pairs(long, short)).item())) * 1e3) + 96
        assert bin(h).count("1") == 2
        seen.add(h)
        assert 0 < h < 32
    # All ten subsets of two come up.
    assert len(seen) == 10
    equal = Pairs(side([[1.0, -2.0]]), short)
    assert loss(equal).equal(losses.dpo(equal, beta=1e-3))


def test_sampo_draws_each_token_equally_often():
    long, short = side([[1.0, 0.0, 0.0, 0.0]]), side([[0.0]])
    loss = prefloss.get("sampo", beta=1.0)
    hits = sum(loss(Pairs(long, short)).item() < 0.5 for _ in range(2000)) / 2000
    assert hits == pytest.approx(0.25, abs=0.04)


def test_sampo_draws_anew_in_training_and_the_same_in_evaluation():
    pairs, loss = drawn(20, 9), prefloss.get("sampo")
    first = loss(pairs)
    assert not loss(pairs).equal(first)
    assert prefloss.get("sampo")(pairs).equal(first)
    assert not prefloss.get("sampo", subset=1)(pairs).equal(first)
    again = prefloss.get("sampo")
    again.load_state_dict(loss.state_dict())
    assert again(pairs).equal(loss(pairs))
    loss.eval()
    assert loss(pairs).equal(loss(pairs))
    # The raw function has a seed and no memory.
    assert losses.sampo(pairs, subset=3).equal(losses.sampo(pairs, subset=3))
    assert prefloss.get(repr(prefloss.get("sampo", subset=3)))(pairs).equal(losses.sampo(pairs, subset=3))


def test_sampo_with_equal_models_is_log_2():
    pairs = drawn(8, 7)
    equal = Pairs(
        *(
            replace(side.per_token, reference=side.per_token.policy).log_ratios()
            for side in (pairs.chosen, pairs.rejected)
        )
    )
    torch.testing.assert_close(losses.sampo(equal), torch.full((8,), math.log(2)))


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_depends_on_no_other_and_on_no_padding(name):
    pairs = drawn(6, 20)
    wanted = prefloss.get(name)(pairs)
    picked = torch.tensor([4, 1])
    some = Pairs(pairs.chosen[picked], pairs.rejected[picked])
    torch.testing.assert_close(prefloss.get(name)(some), wanted[picked])
    padded = Pairs(widened(pairs.chosen, 3, 0), widened(pairs.rejected, 0, 7))
    torch.testing.assert_close(prefloss.get(name)(padded), wanted)


@pytest.mark.filterwarnings("ignore:.*without tokens")
@pytest.mark.parametrize("name", NAMES)
def test_empty_completions_and_batches(name):
    pairs = drawn(3, 5)
    rows = pairs.rejected.per_token
    mask = rows.mask & torch.tensor([[True], [False], [True]])
    policy = torch.where(mask, rows.policy, 0.0).requires_grad_()
    hollow = replace(rows, policy=policy, reference=torch.where(mask, rows.reference, 0.0), mask=mask)
    loss = prefloss.get(name)
    values = loss(Pairs(pairs.chosen, hollow.log_ratios()))
    assert values[1] == 0
    values.sum().backward()
    assert policy.grad.isfinite().all()
    assert (policy.grad[1] == 0).all()
    nothing = Pairs(pairs.chosen[:0], pairs.rejected[:0])
    assert loss(nothing).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_column_is_named(name):
    plain = Pairs.of([1.0], [0.0])
    with pytest.raises(ValueError, match=rf"{name}: per_token"):
        prefloss.get(name)(plain)
    with pytest.raises(ValueError, match=r"per_token: got None"):
        getattr(losses, name)(plain)
    if name in ("wpo", "tdpo1", "tdpo2"):
        with pytest.raises(ValueError, match=r"PerToken\.\w+: got None"):
            getattr(losses, name)(Pairs(side([[1.0]]), side([[1.0]])))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("h", [1e4, -1e4])
def test_extremes(name, h):
    mask = torch.tensor([[True, True], [True, False]])
    policy = torch.tensor([[h, 0.0], [h, 0.0]], requires_grad=True)
    kl = torch.tensor([[1e4, 0.0], [0.0, 0.0]])
    rows = PerToken(policy, torch.zeros(2, 2), mask, log_sum_sq=torch.zeros(2, 2), kl=kl).log_ratios()
    values = prefloss.get(name)(Pairs(rows, rows[torch.tensor([1, 0])].detach()))
    values.sum().backward()
    assert values.isfinite().all()
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_double_precision_stays(name):
    rows = [
        side.per_token._map(lambda x: x if x.dtype == torch.bool else x.double())
        for side in drawn(3, 4).parts
    ]
    assert prefloss.get(name)(Pairs(*(row.log_ratios() for row in rows))).dtype == torch.float64


def test_the_reference_has_no_gradient():
    pairs = drawn(3, 4)
    for name in NAMES:
        reference = pairs.chosen.per_token.reference.clone().requires_grad_()
        chosen = replace(pairs.chosen.per_token, reference=reference).log_ratios()
        policy = pairs.rejected.per_token.policy.clone().requires_grad_()
        rejected = replace(pairs.rejected.per_token, policy=policy).log_ratios()
        prefloss.get(name)(Pairs(chosen, rejected)).sum().backward()
        assert policy.grad.any()
        assert reference.grad is None or not reference.grad.any()


def test_one_side_without_rows():
    with pytest.raises(ValueError, match=r"LogRatios\.per_token: got None"):
        losses.sampo(Pairs(side([[1.0]]), LogRatios.of([1.0])))


def test_the_note_of_ld_dpo_says_which_trl_agrees():
    """AUDIT A1: TRL up to 0.28 weights the policy alone."""
    note = " ".join(prefloss.specs["ld_dpo"].note.split())
    assert "as in TRL since 0.29" in note
    assert "TRL up to 0.28" in note
