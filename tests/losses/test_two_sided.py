"""Losses with a target for each side: published check values, points worked by hand, extremes, BCO's shift."""

import copy
import math
import pickle

import pytest
import torch

import prefloss
from prefloss import LogRatios, Pairs, losses
from prefloss.hyperparameters import RewardShift
from prefloss.losses import two_sided
from tests.losses.points import FAR, POINT, assert_empty_is_left_out, assert_finite, grid, losses_of

LOG_2 = math.log(2)

NAMES = losses_of(two_sided)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("apo_zero", 0.937591),
        ("apo_down", 0.975253),
        ("nca_pair(beta=0.1)", 1.328634),
        ("bco_pair(beta=0.1, shift=0.0)", 1.265354),
        ("sppo_hard(beta=0.1)", 28.25),
        ("dpop(beta=0.1, penalty=50)", 0.575939),
        ("bdpo(beta=0.1, mixture=0.5)", 0.603564),
        ("cal_dpo(beta=0.1)", 14.203890),
        ("dpo_shift(beta=0.1, rejected_weight=0.7)", 0.589185),
    ],
)
def test_check_values(name, value):
    assert prefloss.get(name)(POINT).item() == pytest.approx(value, abs=2e-6)


@pytest.mark.parametrize(
    ("name", "h_w", "h_l", "value"),
    [
        ("apo_zero(beta=1.0)", math.log(3), -math.log(3), 1 / 4 + 1 / 4),
        ("apo_zero(beta=1.0)", -math.log(3), 0.0, 3 / 4 + 1 / 2),
        # Both sides up: the chosen one is above the reference, the margin unchanged.
        ("apo_down(beta=1.0)", math.log(3), 0.0, 3 / 4 + 1 / 4),
        ("apo_down(beta=1.0)", 0.0, -math.log(3), 1 / 2 + 1 / 4),
        ("nca_pair(beta=1.0)", 0.0, 0.0, 2 * LOG_2),
        ("nca_pair(beta=1.0)", math.log(3), -math.log(3), 1.5 * math.log(4 / 3) + 0.5 * math.log(4)),
        ("bco_pair(beta=1.0, shift=1.0)", 1.0, 1.0, 2 * LOG_2),
        ("bco_pair(beta=2.0, shift=0.0)", math.log(3) / 2, -math.log(3) / 2, 2 * math.log(4 / 3)),
        ("sppo_hard(beta=0.25)", 2.0, -2.0, 0.0),
        ("sppo_hard(beta=0.25)", 0.0, 1.0, 13.0),
        # 1 - (-2) - 3 * 0 and -1 - (-2) - 3 * 1
        ("dpop(beta=1.0, penalty=3.0)", 1.0, -2.0, math.log1p(math.exp(-3))),
        ("dpop(beta=1.0, penalty=3.0)", -1.0, -2.0, math.log1p(math.exp(2))),
        # The mixture of 1/2 at h_l = log 3 has the log-ratio log 2.
        ("bdpo(beta=1.0, mixture=0.5)", LOG_2, math.log(3), LOG_2),
        # Far below the reference it stays at log(1 - 1/4).
        ("bdpo(beta=1.0, mixture=0.25)", 0.0, -1e4, math.log1p(3 / 4)),
        ("bdpo(beta=1.0, mixture=0.25)", 0.0, 1e4, 1e4 + math.log(1 / 4)),
        ("cal_dpo(beta=0.25, calibration_weight=2.0)", 1.0, 1.0, LOG_2 + 2 * (1 + 9)),
        ("dpo_shift(beta=1.0, rejected_weight=0.5)", 1.0, 2.0, LOG_2),
    ],
)
def test_points_worked_by_hand(name, h_w, h_l, value):
    assert prefloss.get(name)(Pairs.of([h_w], [h_l])).item() == pytest.approx(value, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["bdpo(mixture=1.0)", "dpo_shift(rejected_weight=1.0)", "dpop(penalty=0.0)"])
def test_the_end_of_the_range_is_dpo(name):
    pairs, policies = grid([-3.0, 0.5, 7.0])
    loss, dpo = prefloss.get(name), prefloss.get("dpo")
    assert torch.allclose(loss(pairs), dpo(pairs))
    ours = torch.autograd.grad(loss.mean(pairs), policies, retain_graph=True)
    theirs = torch.autograd.grad(dpo.mean(pairs), policies)
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_cal_dpo_calibrates_with_sppos_squares():
    pairs, _ = grid([-3.0, 0.5, 7.0])
    squares = prefloss.get("cal_dpo", beta=0.1)(pairs) - prefloss.get("dpo", beta=1.0)(pairs)
    assert torch.allclose(squares, 0.5 * prefloss.get("sppo_hard", beta=0.1)(pairs))


def test_nca_holds_the_chosen_side_at_odds_of_two():
    h = torch.tensor([math.log(2)], requires_grad=True)
    value = prefloss.get("nca_pair", beta=1.0)(Pairs(LogRatios(h, torch.zeros(1)), LogRatios.of([0.0])))
    (gradient,) = torch.autograd.grad(value, h)
    assert gradient.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [None, 1.0])
def test_extremes(name, beta):
    assert_finite(name, *grid(FAR), **({} if beta is None else {"beta": beta}))


def test_plain_forms_fail_where_these_do_not():
    h = torch.tensor(1e4)
    assert torch.log(0.5 * torch.exp(h) + 0.5) == math.inf
    assert 1 - torch.sigmoid(torch.tensor(20.0)) == 0
    far = Pairs.of([20.0], [-1e4])
    assert prefloss.get("apo_zero", beta=1.0)(far).item() == pytest.approx(math.exp(-20), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_completion_is_left_out(name):
    assert_empty_is_left_out(name)


def pairs_of(*log_ratios):
    return Pairs.of([w for w, _ in log_ratios], [rejected for _, rejected in log_ratios])


def test_the_running_shift_weighs_batches_alike_and_is_taken_in_before_use():
    loss = prefloss.get("bco_pair", beta=1.0)
    shift = loss.params["shift"]
    # Mean reward of the batch: 2.
    first = loss(pairs_of((3.0, 1.0)))
    assert shift.state_dict() == {"total": 2.0, "count": 1.0}
    assert first.item() == pytest.approx(2 * math.log1p(math.exp(-1)))
    # Mean reward 6 over three pairs, so the shift is (2 + 6) / 2.
    second = loss(pairs_of((6.0, 4.0), (7.0, 5.0), (8.0, 6.0)))
    assert shift.state_dict() == {"total": 8.0, "count": 2.0}
    expected = [math.log1p(math.exp(4 - w)) + math.log1p(math.exp(w - 2 - 4)) for w in (6.0, 7.0, 8.0)]
    assert second.tolist() == pytest.approx(expected)


def test_the_shift_holds_still_in_evaluation_and_for_batches_without_a_pair():
    loss = prefloss.get("bco_pair", beta=1.0)
    empty = Pairs(LogRatios.of([5.0], [0]), LogRatios.of([5.0], [3]))
    assert loss(empty).item() == 0
    assert loss.state_dict() == {"shift": {"total": 0.0, "count": 0.0}}
    loss.eval()(pairs_of((3.0, 1.0)))
    assert loss.state_dict() == {"shift": {"total": 0.0, "count": 0.0}}
    loss.train()(pairs_of((3.0, 1.0)))
    assert loss.state_dict() == {"shift": {"total": 2.0, "count": 1.0}}


def test_pairs_with_an_empty_side_do_not_move_the_shift():
    loss = prefloss.get("bco_pair", beta=1.0)
    loss(Pairs(LogRatios.of([3.0, 50.0], [4, 4]), LogRatios.of([1.0, 50.0], [4, 0])))
    assert loss.params["shift"].state_dict() == {"total": 2.0, "count": 1.0}


def test_the_shift_carries_no_gradient():
    h = torch.tensor([0.0], requires_grad=True)
    loss = prefloss.get("bco_pair", beta=1.0)
    (gradient,) = torch.autograd.grad(loss(Pairs(LogRatios(h, torch.zeros(1)), LogRatios.of([0.0]))), h)
    # -sigmoid(-0): with a gradient through the shift it would be half as much.
    assert gradient.item() == pytest.approx(-0.5)


def test_every_rank_counts_as_one():
    loss = prefloss.get("bco_pair", beta=1.0)
    # Another rank whose batch has the mean reward 10.
    loss.sync_with(lambda sums: sums + torch.tensor([1.0, 10.0, 100.0]).double())
    loss(pairs_of((3.0, 1.0), (3.0, 1.0)))
    assert loss.params["shift"].state_dict() == {"total": 12.0, "count": 2.0}


def test_every_get_keeps_its_own_shift():
    one, other = prefloss.get("bco_pair"), prefloss.get("bco_pair")
    one(pairs_of((3.0, 1.0)))
    assert other.state_dict() == {"shift": {"total": 0.0, "count": 0.0}}


def test_a_loss_with_a_shift_is_copied_pickled_and_written():
    loss = prefloss.get("bco_pair", beta=1.0)
    loss(pairs_of((3.0, 1.0)))
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.state_dict() == loss.state_dict()
        assert twin.params["shift"] is not loss.params["shift"]
    config = loss.config()
    for written in (prefloss.get(repr(loss)), prefloss.get(config.pop("name"), **config)):
        assert repr(written) == repr(loss) == "bco_pair(beta=1.0, shift=running_shift())"


def test_the_plain_function_keeps_no_hidden_state():
    with pytest.raises(ValueError, match=r"shift: got 'running', expected the object that keeps the state"):
        losses.bco_pair(POINT)
    shift = RewardShift()
    losses.bco_pair(POINT, beta=1.0, shift=shift)
    assert shift.state_dict() == {"total": 0.25, "count": 1.0}


@pytest.mark.parametrize("value", ["walking", float("nan"), float("inf")])
def test_shifts_that_are_none(value):
    with pytest.raises(
        ValueError, match=r"bco_pair: shift: got .*, expected 'running' or a finite number in nats"
    ):
        prefloss.get("bco_pair", shift=value)


@pytest.mark.parametrize("value", [True, None, [1.0]])
def test_shifts_of_another_type(value):
    with pytest.raises(TypeError, match="bco_pair: shift: got"):
        prefloss.get("bco_pair", shift=value)


def test_a_shift_is_bound_by_name_number_or_object():
    def bound(shift):
        return prefloss.get("bco_pair", shift=shift).params["shift"]

    kept = RewardShift()
    assert bound(kept) is kept
    assert bound(2) == 2.0
    assert bound("running") == bound({"name": "running_shift"}) == RewardShift()


@pytest.mark.parametrize(
    "alias", ["trl:bco_pair", "liger:bco_pair", "axolotl:bco_pair", "oxrl:bco_pair", "biasedNCA"]
)
def test_trainers_without_a_shift(alias):
    loss = prefloss.get(alias)
    assert (loss.name, loss.params["shift"]) == ("bco_pair", 0.0)
    assert not loss.state


def test_caldpo_is_oxrls_name():
    assert prefloss.get("caldpo").name == "cal_dpo"
