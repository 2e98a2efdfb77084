"""Losses with a wrong gradient, or that torch cannot transform: each is caught by its check."""

import pytest
import torch
import torch.nn.functional as F

from prefloss import Labels, Pairs
from prefloss.hyperparameters import Positive
from prefloss.testing import derivatives
from tests.testing.broken import LIKE_DPO, Broken

broken = Broken(derivatives)


@broken("data_gradient", "gradient of mismatched.policy: got", needs=["mismatched"], separable=False)
def trains_the_baseline(labels: Labels, *, beta: Positive = 0.1):
    gain = beta * (labels.completions.h - labels.mismatched.h.mean().clamp(min=0))
    return torch.where(labels.desirable, torch.sigmoid(-gain), torch.sigmoid(gain))


class WrongBackward(torch.autograd.Function):
    """Its gradient is half of what it should be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return -F.logsigmoid(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return -0.5 * torch.sigmoid(-x) * grad


class OldStyle(torch.autograd.Function):
    """Right, but in the form that torch.func cannot use."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return -F.logsigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return -torch.sigmoid(-x) * grad


@broken("gradients", "the slope of the values there", "backward()", **LIKE_DPO)
def wrong_backward(pairs: Pairs, *, beta: Positive = 0.1):
    return WrongBackward.apply(beta * pairs.margin())


@broken("torch_func", "torch.func.vmap: got RuntimeError", "setup_context", **LIKE_DPO)
def old_style_function(pairs: Pairs, *, beta: Positive = 0.1):
    return OldStyle.apply(beta * pairs.margin())


@broken("gradient_nonzero", "trains nothing", ".detach()", **LIKE_DPO)
def detaches_all(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin().detach())


@broken("gradient_nonzero", "trains nothing", monotone=True)
def counts_right_orders(pairs: Pairs, *, beta: Positive = 0.1):
    return (pairs.margin() < 1 / beta).to(pairs.margin())


@broken("torch_compile", "fullgraph=True", ".item()", **LIKE_DPO)
def asks_for_a_number(pairs: Pairs, *, beta: Positive = 0.1):
    margin = pairs.margin()
    return -F.logsigmoid(beta * margin) if margin.abs().max().item() < 1e9 else -beta * margin


@broken("torch_compile", "got 4 graphs, expected at most 3", **LIKE_DPO)
def compiles_for_every_size(pairs: Pairs, *, beta: Positive = 0.1):
    return torch.stack([-F.logsigmoid(beta * margin) for margin in pairs.margin()])


@pytest.mark.parametrize("name", broken.cases)
def test_broken_loss_is_caught_by_its_check(name):
    broken.assert_caught(name)


def test_every_check_has_a_broken_loss():
    broken.assert_every_check_catches_one()
