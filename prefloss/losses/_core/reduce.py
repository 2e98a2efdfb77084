"""From one value per example to one number: weights, empty examples, mean."""

from __future__ import annotations

import torch
from torch import Tensor

from prefloss.feedback import Feedback


def weigh(values: Tensor, feedback: Feedback, counted: Tensor) -> Tensor:
    """Multiply by the examples' weights; an example that does not count gets 0 and no gradient.

    Args:
        values: Loss of each example, [n].
        feedback: Where the values came from.
        counted: True at the examples that count, [n]; those with an empty completion do not.

    Returns:
        Loss of each example, [n]. A NaN of an example that counts stays NaN.
    """
    if feedback.weight is not None:
        values = values * feedback.weight
    return torch.where(counted, values, 0.0)


def mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the examples that count: the sum of `weigh`'s values over their number.

    Weights are not normalised, so a weight means the same in every batch. A batch where none counts gives 0 with
    zero gradient.

    Args:
        values: What `weigh` returned, [n].
        counted: As given to `weigh`, [n].

    Returns:
        Scalar.
    """
    return values.sum() / counted.sum().clamp(min=1)
