"""From one value per example to one number: weights, empty examples, mean."""

from __future__ import annotations

import torch
from torch import Tensor

from prefloss.feedback import Feedback


def weigh(values: Tensor, feedback: Feedback) -> Tensor:
    """Multiply by the examples' weights; an example with an empty completion gets 0 and no gradient.

    Args:
        values: Loss of each example, [n].
        feedback: Where the values came from.

    Returns:
        Loss of each example, [n]. A NaN of an example that counts stays NaN.
    """
    if feedback.weight is not None:
        values = values * feedback.weight
    return torch.where(feedback.valid, values, 0.0)


def mean(values: Tensor, feedback: Feedback) -> Tensor:
    """Mean over the examples that count: the sum of `weigh`'s values over the number of valid examples.

    Weights are not normalised, so a weight means the same in every batch. No valid example gives 0 with
    zero gradient.

    Args:
        values: What `weigh` returned, [n].
        feedback: Where the values came from.

    Returns:
        Scalar.
    """
    return values.sum() / feedback.valid.sum().clamp(min=1)
