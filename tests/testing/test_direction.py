"""Losses that declare a wrong direction or difference: each is caught by its check."""

import pytest
import torch
import torch.nn.functional as F

from prefloss import Pairs
from prefloss.hyperparameters import Positive
from prefloss.testing import direction
from tests.testing.broken import LIKE_DPO, Broken

broken = Broken(direction)


@broken(
    "difference_only", "added to the log-ratios of both sides", "declare difference_only=False", **LIKE_DPO
)
def falsely_of_the_difference(pairs: Pairs, *, beta: Positive = 0.1):
    return torch.sigmoid(-beta * pairs.chosen.h) + torch.sigmoid(beta * pairs.rejected.h)


@broken("difference_only", "added to policy and reference", "declare difference_only=False", **LIKE_DPO)
def reads_the_policy_alone(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin()) - 0.01 * (pairs.chosen.policy - pairs.rejected.policy)


@broken("difference_only", "difference_only=False: got", "declare difference_only=True", monotone=True)
def hides_its_difference(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@broken("monotone", "got a rise from", "declare monotone=False", **LIKE_DPO)
def falsely_monotone(pairs: Pairs, *, tau: Positive = 0.1):
    return (pairs.margin() - 1 / (2 * tau)) ** 2


@broken("monotone", "got a rise from", **LIKE_DPO)
def wrong_sign(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(-beta * pairs.margin())


@broken("monotone", "monotone=False: got", "declare monotone=True", difference_only=True)
def hides_that_it_is_monotone(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@pytest.mark.parametrize("name", broken.cases)
def test_broken_loss_is_caught_by_its_check(name):
    broken.assert_caught(name)


def test_every_check_has_a_broken_loss():
    broken.assert_every_check_catches_one()
