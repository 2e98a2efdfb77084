"""Rows and figures from trained policies."""

import math

import pytest
import torch

from prefloss import Pairs
from prefloss.evidence.measures import at_kl, over_seeds, rows_of, shortfall
from prefloss.worlds import Judge, Tabular, bandit, draw, measure, optimum, reward, sweep, train

WORLD = bandit(completions=6)


def test_shortfall_is_nothing_on_the_frontier_and_all_of_a_wasted_step():
    best = optimum(WORLD, torch.tensor([0.3, 1.0, 5.0]))
    torch.testing.assert_close(shortfall(WORLD, best), torch.zeros(3).double(), atol=1e-4, rtol=0.0)
    # As far from the reference, the other way.
    worst = optimum(WORLD, 1.0, -WORLD.reward)
    assert shortfall(WORLD, worst) > reward(WORLD, WORLD.reference) - reward(WORLD, worst)


def test_values_at_a_kl_lie_between_those_of_the_sweep():
    kls, values = torch.tensor([[4.0, 1.0], [0.0, 0.0]]), torch.tensor([[8.0, 3.0], [0.0, 1.0]])
    got = at_kl(kls, values, 1.0)
    assert got.tolist() == [2.0, 3.0]
    assert at_kl(kls, values, 2.0)[0] == 4.0
    assert math.isnan(at_kl(kls, values, 2.0)[1])


def test_a_figure_over_seeds_has_the_interval_of_its_mean():
    figure = over_seeds("reward", torch.tensor([1.0, 2.0, 3.0]), expected=2.0)
    assert (figure.value, figure.expected) == (2.0, 2.0)
    assert figure.interval == pytest.approx((-0.484, 4.484), abs=1e-3)


def test_there_is_a_row_for_each_run():
    pairs = draw(WORLD, Judge(), Pairs, 20, seeds=[4, 9])
    runs = train(Tabular(WORLD), pairs, [*sweep("ipo", [0.5, 2.0]), "simpo"], steps=3)
    rows = rows_of(runs, pairs, arm="all")
    assert [(row["loss"], row["strength"], row["seed"]) for row in rows] == [
        *(("ipo", 0.5, 4), ("ipo", 0.5, 9), ("ipo", 2.0, 4), ("ipo", 2.0, 9)),
        *(("simpo", 2.5, 4), ("simpo", 2.5, 9)),
    ]
    expected = measure(WORLD, runs.log_probs(), pairs)
    assert rows[3]["reward"] == expected["reward"][1, 1]
    assert rows[3]["accuracy"] == expected["accuracy"][1, 1]
    assert all(row["arm"] == "all" and row.keys() == rows[0].keys() for row in rows)
