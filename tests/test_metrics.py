"""Figures for logging: sums and counts that add up over micro-batches and ranks."""

import math

import pytest
import torch

from prefloss import Labels, LogRatios, Pairs, Rankings
from prefloss.metrics import Stat, implicit_rewards, metrics


def side(h, tokens):
    h = torch.tensor(h, requires_grad=True)
    return LogRatios(h - 10, torch.full_like(h, -10.0), torch.tensor(tokens))


def test_pairs_by_hand():
    found = metrics(Pairs(side([1.5, -1.0], [3, 2]), side([-1.0, 0.0], [4, 1])), beta=0.1)
    means = {name: stat.mean for name, stat in found.items()}
    assert means == pytest.approx(
        {
            "rewards/chosen": 0.025,
            "rewards/rejected": -0.05,
            "rewards/margins": 0.075,
            "rewards/accuracies": 0.5,
            "logps/chosen": -9.75,
            "logps/rejected": -10.5,
            "logratios/chosen": 0.25,
            "logratios/rejected": -0.5,
            "chosen_falling": 0.5,
            "empty": 0.0,
        },
        abs=1e-6,
    )
    assert not any(stat.sum.requires_grad for stat in found.values())


def test_empty_completions_are_counted_and_left_out():
    found = metrics(Pairs(side([1.0, 5.0], [3, 2]), side([0.0, 0.0], [4, 0])))
    assert found["empty"].mean == 0.5
    assert found["rewards/margins"] == Stat(torch.tensor(1.0), torch.tensor(1))


def test_votes():
    labels = Labels(side([1.0, -3.0, 2.0], [3, 2, 1]), desirable=[True, False, True])
    found = metrics(labels, beta=0.5)
    assert found["rewards/chosen"].mean == 0.75
    assert found["rewards/rejected"].mean == -1.5
    assert found["chosen_falling"].mean == 0
    one_sided = metrics(Labels(side([1.0], [3]), desirable=[True]))
    assert math.isnan(one_sided["rewards/rejected"].mean)


def test_rankings_are_read_as_best_against_worst():
    groups = Rankings(LogRatios.of([[0.0, 2.0, 1.0]]), [[0.0, 2.0, 1.0]])
    assert metrics(groups)["rewards/margins"].mean == 2.0


def test_without_a_reference_there_are_no_rewards():
    bare = LogRatios([-1.0])
    assert set(metrics(Pairs(bare, bare))) == {"logps/chosen", "logps/rejected", "empty"}


def test_stats_add_up():
    whole = side([1.0, 2.0, 6.0], [1, 1, 1])
    parts = [
        metrics(Pairs(whole[:1], whole[:1]))["logratios/chosen"],
        metrics(Pairs(whole[1:], whole[1:]))["logratios/chosen"],
    ]
    assert (parts[0] + parts[1]).mean == pytest.approx(3.0)
    torch.testing.assert_close(implicit_rewards(whole, 0.5), torch.tensor([0.5, 1.0, 3.0]))
