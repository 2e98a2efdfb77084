"""Losses of votes: check values, what counts in the mean, baselines and shifts, extremes."""

import math

import pytest
import torch

import prefloss
from prefloss import Labels, LogRatios, Pairs, losses
from prefloss.hyperparameters import RewardShift

# The two sides of LOSSES' example pair: h = 1.5 upvoted, h = -1 downvoted.
BOTH = LogRatios(policy=[-20.0, -24.0], reference=[-21.5, -23.0], tokens=[10, 8])
LABELS = Labels(BOTH, [True, False], scores=[1.0, 0.0], baseline=[0.3, 0.3], kl=0.2)
NAMES = ("kto", "kto_zero", "bco", "npo", "simnpo", "a2po")


@pytest.mark.parametrize(
    ("name", "parameters", "value"),
    [
        ("kto", {}, 0.937582),
        ("kto_zero", {}, 0.937591),
        ("bco", {"shift": 0.0}, 1.265354),
        ("npo", {}, 12.887933),
        ("simnpo", {}, 0.000442),
    ],
)
def test_check_values(name, parameters, value):
    """Sum over the two votes; the upvote of npo and simnpo adds 0."""
    assert prefloss.get(name, **parameters)(LABELS).sum().item() == pytest.approx(value, abs=1e-6)


def test_a2po_check_value():
    assert prefloss.get("a2po")(LABELS)[0].item() == pytest.approx(0.487902, abs=1e-6)


def test_kto_zero_on_a_pair_is_apo_zero():
    pairs = Pairs.of(chosen=torch.randn(20) * 9, rejected=torch.randn(20) * 9)
    votes = losses.kto_zero(pairs.to_labels(), beta=0.2).reshape(2, 20).sum(0)
    torch.testing.assert_close(votes, losses.apo_zero(pairs, beta=0.2))


def test_the_weights_of_votes():
    plain = losses.kto_zero(LABELS)
    weighted = losses.kto_zero(LABELS, desirable_weight=2.0, undesirable_weight=0.5)
    torch.testing.assert_close(weighted, plain * torch.tensor([2.0, 0.5]))


def test_other_trainers_names():
    assert prefloss.get("apo_zero_unpaired").name == "kto_zero"
    assert prefloss.get("KTOZero").name == "kto_zero"


def test_the_running_shift_is_the_mean_of_all_rewards():
    loss = prefloss.get("bco", beta=0.1)
    first = Labels(LogRatios.of([10.0, 30.0]), [True, False])
    # Rewards 1 and 3, taken in before use: shift 2.
    wanted = [math.log1p(math.exp(1.0)), math.log1p(math.exp(1.0))]
    assert loss(first).tolist() == pytest.approx(wanted)
    # One more reward of 8: shift 4, not a mean of batch means.
    second = Labels(LogRatios.of([80.0]), [True])
    assert loss(second).item() == pytest.approx(math.log1p(math.exp(-4.0)))
    loss.eval()
    loss(first)
    assert loss.state_dict() == {"shift": {"total": 12.0, "count": 3.0}}


def test_the_shift_has_no_gradient_and_skips_empty_completions():
    policy = torch.tensor([1.0, 50.0], requires_grad=True)
    labels = Labels(LogRatios(policy, torch.zeros(2), torch.tensor([3, 0])), [True, True])
    loss = prefloss.get("bco", beta=1.0)
    value = loss(labels).sum()
    value.backward()
    assert loss.params["shift"].total == 1.0
    # h - shift = 0, and d/dh -log sigma = -1/2: the shift is a constant.
    assert policy.grad.tolist() == [-0.5, 0.0]


def test_each_loss_has_a_shift_of_its_own():
    one, other = prefloss.get("bco"), prefloss.get("bco")
    one(LABELS)
    assert other.params["shift"] == RewardShift() != one.params["shift"]
    assert prefloss.get("bco(shift=0.5)").params["shift"] == 0.5
    assert prefloss.get(repr(one)).params["shift"] == RewardShift()
    config = one.config()
    assert prefloss.get(config.pop("name"), **config).params["shift"] == RewardShift()


@pytest.mark.parametrize("shift", ["always", True, float("nan"), [1.0]])
def test_what_is_no_shift(shift):
    with pytest.raises((TypeError, ValueError), match=r"bco: shift: got .* expected 'running'"):
        prefloss.get("bco", shift=shift)


def test_the_raw_function_keeps_no_state():
    with pytest.raises(ValueError, match=r"shift: got 'running', expected the object that keeps the state"):
        losses.bco(LABELS)


@pytest.mark.filterwarnings("ignore:.*without tokens")
@pytest.mark.parametrize("name", ["npo", "simnpo"])
def test_only_downvotes_count(name):
    policy = torch.tensor([-20.0, -24.0, -16.0, -1.0], requires_grad=True)
    made = LogRatios(policy, torch.tensor([-21.5, -23.0, -16.0, -1.0]), torch.tensor([10, 8, 8, 0]))
    loss = prefloss.get(name)
    labels = Labels(made, [True, False, False, False])
    values = loss(labels)
    assert values[0] == values[3] == 0
    assert loss.mean(labels).item() == pytest.approx(values.sum().item() / 2)
    values.sum().backward()
    assert policy.grad[0] == policy.grad[3] == 0
    # Both want the log-probs of downvoted completions lower.
    assert (policy.grad[1:3] > 0).all()
    upvotes = Labels(made, [True] * 4)
    assert loss.mean(upvotes).item() == 0


def test_simnpo_by_hand():
    # Mean NLL 3, so u = 2.5 * 3 - 1.
    value = losses.simnpo(LABELS, beta=2.5, gamma=1.0)[1].item()
    assert value == pytest.approx(2 / 2.5 * math.log1p(math.exp(-6.5)), rel=1e-5)
    assert not prefloss.specs["simnpo"].needs_reference


def test_a2po_regresses_on_given_numbers():
    scores, baseline = torch.rand(2, requires_grad=True), torch.rand(2, requires_grad=True)
    policy = torch.zeros(2, requires_grad=True)
    labels = Labels(LogRatios(policy, torch.zeros(2)), [True, False], scores=scores, baseline=baseline)
    prefloss.get("a2po", beta=1.0)(labels).sum().backward()
    assert scores.grad is baseline.grad is None
    torch.testing.assert_close(policy.grad, -2 * (scores - baseline).detach())


def test_a_missing_baseline_is_named():
    plain = Labels(BOTH, [True, False], scores=[1.0, 0.0])
    with pytest.raises(ValueError, match="a2po: baseline: got None"):
        prefloss.get("a2po")(plain)
    with pytest.raises(ValueError, match=r"Labels\.baseline: got None, expected value of the prompt"):
        losses.a2po(plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("h", [1e4, -1e4])
def test_extremes(name, h):
    policy = torch.tensor([h, h], requires_grad=True)
    made = LogRatios(policy, torch.zeros(2), torch.tensor([1, 1]))
    labels = Labels(made, [True, False], scores=[1.0, 0.0], baseline=[0.0, 0.0], kl=0.0)
    values = prefloss.get(name)(labels)
    values.sum().backward()
    assert values.isfinite().all()
    assert policy.grad.isfinite().all()
    assert torch.log(torch.sigmoid(torch.tensor(-1e3))).isinf()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name):
    none = LogRatios(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    desirable = torch.zeros(0, dtype=torch.bool)
    labels = Labels(none, desirable, scores=torch.zeros(0), baseline=torch.zeros(0), kl=0.0)
    loss = prefloss.get(name)
    assert loss(labels).shape == (0,)
    assert loss.mean(labels).item() == 0
