"""States that losses keep: their update rules by hand, frozen in evaluation, saved, reduced over ranks."""

import copy
import json
import math
import statistics

import pytest
import torch

import prefloss
from prefloss import Pairs
from prefloss.hyperparameters import Cosine, Draws, Linear, Moments, Recent, RewardShift
from prefloss.losses._authoring import resolve, running

ALL = torch.tensor([True, True, True])
VALUES = torch.tensor([1.0, 3.0, 8.0])


def fed(state, values=VALUES, keep=ALL):
    state(values, keep)
    return state


def rebuilt(loss):
    config = loss.config()
    return prefloss.get(config.pop("name"), **config)


STATES = [RewardShift, Moments, Recent]


def test_the_reward_shift_counts_each_reward_once():
    shift = RewardShift()
    assert shift(VALUES, ALL).item() == 4.0
    assert shift(torch.tensor([8.0, 100.0]), torch.tensor([True, False])).item() == 5.0


def test_moments_move_a_tenth_of_the_way_each_batch():
    moments = Moments()
    assert moments(VALUES, ALL) == pytest.approx((0.4, 0.1 * statistics.stdev([1, 3, 8])))
    mean, std = moments(torch.tensor([2.0, 4.0]), ALL[:2])
    assert mean == pytest.approx(0.9 * 0.4 + 0.1 * 3)
    assert std == pytest.approx(0.9 * 0.1 * statistics.stdev([1, 3, 8]) + 0.1 * statistics.stdev([2, 4]))
    assert Moments(decay=0.5)(VALUES, ALL)[0] == 2.0


def test_one_value_has_no_deviation():
    moments = fed(Moments())
    std = moments.std
    assert moments(torch.tensor([10.0]), ALL[:1]) == (pytest.approx(0.9 * 0.4 + 1.0), std)


def test_equal_values_have_none_either():
    assert Moments()(torch.full((3,), 0.1), ALL)[1] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("kind", STATES)
def test_a_batch_without_counted_values_changes_nothing(kind):
    state = fed(kind())
    before = state.state_dict()
    state(VALUES, ~ALL)
    state(torch.zeros(0), ALL[:0])
    after = state.state_dict()
    # A queue draws, but takes nothing in.
    assert {**after, "drawn": None} == {**before, "drawn": None}
    assert kind()(torch.zeros(0), ALL[:0]) is not None


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_overflow_does_not_stay(kind, bad):
    state, clean = kind(), kind()
    state(torch.tensor([1.0, bad, 8.0]), ALL)
    clean(torch.tensor([1.0, 8.0]), ALL[:2])
    assert state.state_dict() == clean.state_dict()


@pytest.mark.parametrize("kind", STATES)
def test_evaluation_holds_still(kind):
    state = fed(kind())
    before = copy.deepcopy(state.state_dict())
    state.train(False)
    first, second = state(VALUES + 1, ALL), state(VALUES + 1, ALL)
    assert state.state_dict() == before
    assert first == second
    state.train()
    state(VALUES + 1, ALL)
    assert state.state_dict() != before


@pytest.mark.parametrize("kind", [*STATES, Draws])
def test_saved_and_restored(kind):
    state = kind()
    state() if kind is Draws else fed(state)
    written = json.loads(json.dumps(state.state_dict()))
    restored = kind()
    assert restored != state
    restored.load_state_dict(written)
    assert restored == state
    if kind is Draws:
        assert torch.equal(torch.rand(3, generator=restored()), torch.rand(3, generator=state()))
    else:
        assert restored(VALUES, ALL) == state(VALUES, ALL)
    assert restored.state_dict() == state.state_dict()
    with pytest.raises(ValueError, match=r"state: got .* expected"):
        restored.load_state_dict({"other": 1})


@pytest.mark.parametrize("kind", [RewardShift, Moments])
def test_ranks_are_added_up(kind):
    """Two ranks with a sum over both keep the state of one rank with the whole batch."""
    parts = [(VALUES, ALL), (torch.tensor([2.0, 100.0]), torch.tensor([True, False]))]
    # What the other rank contributes, recorded by running it alone.
    sums = []
    for values, keep in parts:
        state = kind()
        state.all_sum = lambda tensor: sums.append(tensor) or tensor
        state(values, keep)
    whole = fed(kind(), torch.tensor([1.0, 3.0, 8.0, 2.0]), torch.ones(4, dtype=torch.bool))
    for rank, (values, keep) in enumerate(parts):
        state = kind()
        state.all_sum = lambda tensor, other=sums[1 - rank]: tensor + other
        state(values, keep)
        assert list(state.state_dict().values()) == pytest.approx(list(whole.state_dict().values()))


def test_a_loss_hands_the_sum_to_its_states():
    loss = prefloss.get("bco")
    loss.sync_with(lambda tensor: 2 * tensor)
    loss(Pairs.of(chosen=[1.0], rejected=[-1.0]).to_labels())
    assert loss.params["shift"].count == 4


def test_draws_are_the_same_from_a_seed_and_differ_by_call():
    first, second, other = Draws(3), Draws(3), Draws(4)
    numbers = [torch.rand(4, generator=first()) for _ in range(3)]
    assert torch.equal(numbers[0], torch.rand(4, generator=second()))
    assert not torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers[0], torch.rand(4, generator=other()))
    first.train(False)
    assert torch.equal(torch.rand(4, generator=first()), torch.rand(4, generator=first()))


@pytest.mark.parametrize("seed", [1.5, "1", True, None])
def test_what_is_no_seed(seed):
    for kind in (Draws, Recent):
        with pytest.raises(TypeError, match="seed"):
            kind(seed=seed)


def test_recent_keeps_the_last_values_and_fills_a_batch():
    queue = Recent(size=4, batch=5)
    assert queue(VALUES, ALL) == []
    drawn = queue(torch.tensor([20.0, 30.0]), ALL[:2])
    assert sorted(drawn) == [1.0, 3.0, 8.0]
    assert queue.values == [3.0, 8.0, 20.0, 30.0]
    # Room for two beside three of its own, drawn without replacement from those kept.
    drawn = queue(VALUES, ALL)
    assert len(set(drawn)) == 2
    assert set(drawn) < {3.0, 8.0, 20.0, 30.0}
    assert Recent(size=0)(VALUES, ALL) == []


@pytest.mark.parametrize("settings", [{"size": -1}, {"batch": 1.5}, {"size": True}])
def test_what_is_no_size(settings):
    with pytest.raises(ValueError, match="expected a whole number"):
        Recent(**settings)


@pytest.mark.parametrize("decay", [1.0, -0.1, True, "0.9", float("nan")])
def test_what_is_no_decay(decay):
    with pytest.raises(ValueError, match="decay: got"):
        Moments(decay=decay)


@pytest.mark.parametrize(
    "state", [Moments(decay=0.8), Draws(7), Recent(size=9, batch=3, seed=2), RewardShift()]
)
def test_written_as_configuration(state):
    config = state.config()
    assert config["name"] == state.name
    assert type(state)(**{key: value for key, value in config.items() if key != "name"}) == state
    assert repr(state).startswith(f"{state.name}(")


def test_coercion():
    def bound(loss, parameter, value):
        return prefloss.get(loss, **{parameter: value}).params[parameter]

    assert bound("alpha_dpo", "moments", "running") == Moments()
    assert bound("alpha_dpo", "moments", {"name": "moments", "decay": 0.5}) == Moments(decay=0.5)
    assert bound("alpha_dpo", "moments", [1, 2]) == (1.0, 2.0)
    assert bound("sampo", "subset", 3) == Draws(3) == bound("sampo", "subset", {"name": "draws", "seed": 3})
    assert bound("gamma_po", "queue", [1, 2.5]) == (1.0, 2.5)
    kept = Moments()
    assert bound("alpha_dpo", "moments", kept) is kept
    assert prefloss.get("alpha_dpo").params["moments"] is not prefloss.get("alpha_dpo").params["moments"]
    for wrong in (
        "always",
        1.0,
        [1.0],
        [0.0, -1.0],
        [0.0, math.inf],
        Draws(),
        {"name": "moments", "decay": 2},
    ):
        with pytest.raises((TypeError, ValueError), match="expected 'running', two numbers"):
            bound("alpha_dpo", "moments", wrong)


def test_a_state_in_a_loss_survives_text_configuration_and_copies():
    loss = prefloss.get("alpha_dpo", moments=Moments(decay=0.5))
    for twin in (prefloss.get(repr(loss)), rebuilt(loss)):
        assert twin.params["moments"] == Moments(decay=0.5)
        assert twin.params["moments"] is not loss.params["moments"]
    loss.params["moments"].mean = 2.0
    assert copy.deepcopy(loss).params["moments"].mean == 2.0


def test_linear_and_cosine_schedules():
    linear, cosine = Linear(0.5, 0.1, steps=4), Cosine(0.0, 2.0, steps=4)
    seen = []
    for _ in range(6):
        seen.append((linear.value, cosine.value))
        linear.step()
        cosine.step()
    assert [a for a, _ in seen] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    assert [b for _, b in seen] == pytest.approx([0, 1 - math.sqrt(0.5), 1, 1 + math.sqrt(0.5), 2, 2])


def test_schedules_hold_still_in_evaluation_and_are_saved():
    loss = prefloss.get("dpo", beta=Linear(0.5, 0.1, steps=4))
    loss.step()
    loss.eval().step()
    assert loss.beta == pytest.approx(0.4)
    twin = rebuilt(loss)
    assert twin.beta == 0.5
    twin.load_state_dict(json.loads(json.dumps(loss.state_dict())))
    assert twin.beta == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ((0.5, 0.1, 0), ValueError),
        ((0.5, 0.1, 1.5), ValueError),
        ((0.5, "0.1", 3), TypeError),
        ((math.inf, 0.1, 3), ValueError),
    ],
)
def test_what_is_no_schedule(settings, error):
    with pytest.raises(error):
        Linear(*settings)


def test_label_smoothing_takes_a_batch_into_the_state_once():
    """AUDIT A2: the reversed pairs were taken in too, which left a total of 0.0 and a count of 4."""

    @prefloss.register(name="shifted_margin", difference_only=True, stateful=True)
    def shifted_margin(pairs: Pairs, *, beta: float = 0.1, shift: running.Shift = "running") -> torch.Tensor:
        margins = beta * pairs.margin()
        moved = resolve("shift", shift, margins, pairs.valid)
        return torch.nn.functional.softplus(moved - margins)

    try:
        pairs = Pairs.of([1.0, 2.0], [0.0, 0.0])
        plain, smoothed = (prefloss.get("shifted_margin", label_smoothing=p) for p in (0.0, 0.2))
        flipped = prefloss.get("shifted_margin", shift=plain(pairs).new_tensor(0.15).item())
        values = smoothed(pairs)
        assert smoothed.state_dict() == {"shift": {"total": pytest.approx(0.3), "count": 2.0}}
        assert all(state.training for state in smoothed.state.values())
        # Both sides are measured against the same shift.
        torch.testing.assert_close(values, 0.8 * flipped(pairs) + 0.2 * flipped(pairs.swapped()))
    finally:
        prefloss.registry.unregister("shifted_margin")


def test_a_sum_does_not_move_one_state_twice():
    """AUDIT A2: the other way to evaluate a loss twice."""
    loss = prefloss.get("bco_pair")
    with pytest.raises(ValueError, match="terms: got two with one state, which would move twice"):
        prefloss.registry.WeightedSum([(0.5, loss), (0.5, loss)])
