"""Losses that fail in float32 or hide NaN: each is caught by its check."""

import pytest
import torch
import torch.nn.functional as F

from prefloss import Pairs
from prefloss.hyperparameters import Positive
from prefloss.testing import numerics
from tests.testing.broken import LIKE_DPO, Broken

broken = Broken(numerics)


@broken("extremes", "F.logsigmoid", **LIKE_DPO)
def log_of_sigmoid(pairs: Pairs, *, beta: Positive = 0.1):
    return -torch.log(torch.sigmoid(beta * pairs.margin()))


@broken("extremes", "clamp the argument", **LIKE_DPO)
def overflows(pairs: Pairs, *, beta: Positive = 0.1):
    return torch.exp(-beta * pairs.margin())


@broken(
    "extremes",
    "gradient of chosen.policy in float32: got [nan]",
    "the branch that it does not select",
    **LIKE_DPO,
)
def single_where(pairs: Pairs, *, beta: Positive = 0.1):
    z = beta * pairs.margin()
    return torch.where(z > 0, torch.log1p(torch.exp(-z)), torch.log1p(torch.exp(z)) - z)


@broken("precision", "in float64", "sigmoid(-x)", **LIKE_DPO)
def one_minus_sigmoid(pairs: Pairs, *, beta: Positive = 0.1):
    return 1 - torch.sigmoid(beta * pairs.margin())


@broken("nan", "chosen.policy[", "nan_to_num", **LIKE_DPO)
def hides_nan(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin()).nan_to_num()


@pytest.mark.parametrize("name", broken.cases)
def test_broken_loss_is_caught_by_its_check(name):
    broken.assert_caught(name)


def test_every_check_has_a_broken_loss():
    broken.assert_every_check_catches_one()
