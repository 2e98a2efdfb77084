"""Exact figures, by hand and against one another."""

import pytest
import torch

from prefloss import Pairs
from prefloss.worlds import (
    Judge,
    World,
    accuracy,
    bandit,
    draw,
    drift,
    frontier,
    kl,
    length,
    listed,
    measure,
    optimum,
    population,
    reward,
    win_rate,
)

TWO = World(reward=torch.tensor([[1.0, -1.0]]), reference=torch.zeros(1, 2), lengths=torch.tensor([2, 6]))
SURE = torch.tensor([[0.75, 0.25]]).double().log()


def test_figures_of_two_actions_by_hand():
    assert reward(TWO, SURE).item() == pytest.approx(0.5)
    assert kl(TWO, SURE).item() == pytest.approx(0.75 * 0.4054651 - 0.25 * 0.6931472)
    assert length(TWO, SURE).item() == pytest.approx(3.0)
    # Both the better: a tie, 3/8; the first alone the better: 3/8; both the worse: 1/8.
    assert win_rate(TWO, SURE).item() == pytest.approx(0.375 + 0.5 * (0.375 + 0.125))
    chosen, rejected = drift(TWO, SURE, listed([(0, 1)]))
    assert (chosen.item(), rejected.item()) == pytest.approx((0.4054651, -0.6931472))


def test_a_completion_of_no_probability_costs_nothing():
    assert kl(TWO, torch.tensor([[0.0, -torch.inf]]).double()).item() == pytest.approx(0.6931472)


def test_the_optimum_has_the_closed_form_and_nothing_beats_it():
    world, beta = bandit(prompts=2), 0.7
    best = optimum(world, beta)
    value = reward(world, best) - beta * kl(world, best)
    # The maximum is beta log Z.
    log_z = torch.logsumexp(world.reference + world.reward / beta, -1).mean()
    torch.testing.assert_close(value, beta * log_z)
    others = torch.log_softmax(best + 0.3 * torch.randn(200, *best.shape).double(), -1)
    assert (reward(world, others) - beta * kl(world, others) < value).all()


def test_a_strength_of_zero_has_no_optimum():
    with pytest.raises(ValueError, match=r"beta: got 0.0, expected numbers > 0"):
        frontier(TWO, torch.tensor([1.0, 0.0]))


def test_the_frontier_goes_from_the_reference_to_the_best_completion():
    world = bandit()
    distance, earned = frontier(world, torch.tensor([1e6, 1.0, 0.3, 1e-3]))
    assert (distance.diff() > 0).all()
    assert (earned.diff() > 0).all()
    torch.testing.assert_close(earned[0], reward(world, world.reference), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(earned[-1], world.reward.max())


def test_accuracy_of_the_optimum_is_one_and_of_the_reference_a_half():
    world = bandit()
    truth = draw(world, Judge(temperature=0.0), Pairs, 100, seeds=[1, 2])
    assert accuracy(world, optimum(world, 0.5), truth).tolist() == [1.0, 1.0]
    assert accuracy(world, world.reference, truth).tolist() == [0.5, 0.5]
    # By weight: how often the judge itself is right.
    judged = population(world, Judge(), Pairs)
    right = (
        judged.fields["weight"] * (judged.fields["score_chosen"] > judged.fields["score_rejected"])
    ).mean()
    torch.testing.assert_close(accuracy(world, optimum(world, 0.5), judged).squeeze(), right)


def test_measure_gives_every_figure_for_every_run():
    world = bandit()
    runs = optimum(world, torch.rand(3, 2) + 0.1)
    figures = measure(world, runs, draw(world, Judge(), Pairs, 30, seeds=[0, 1]))
    assert list(figures) == ["reward", "kl", "length", "win_rate", "accuracy", "chosen", "rejected"]
    assert {tuple(value.shape) for value in figures.values()} == {(3, 2)}
