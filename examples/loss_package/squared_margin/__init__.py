"""A preference loss published by another package, found by prefloss through an entry point."""

import torch

import prefloss
from prefloss.hyperparameters import Positive


@prefloss.register(difference_only=True)
def squared_margin(pairs: prefloss.Pairs, *, beta: Positive = 0.1) -> torch.Tensor:
    r"""Squared distance of the scaled margin from one.

    .. math::
        \ell = (\beta (h_w - h_l) - 1)^2

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats.
        beta: Strength of the pull towards the reference.

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Note:
        GPO's squared loss; `ipo` at tau = beta / 2 times beta squared.

    Reference: Tang et al. 2024, arXiv:2402.05749.
    """
    return (beta * pairs.margin() - 1) ** 2
