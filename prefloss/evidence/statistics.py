"""Intervals and tests over seeds; scipy does the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean over the seeds with its Student interval: mean, low, high.

    Raises:
        ValueError: With fewer than two values.

    Example:
        >>> mean, low, high = mean_interval([1.0, 2.0, 3.0])
        >>> round(mean, 2), round(low, 2), round(high, 2)
        (2.0, -0.48, 4.48)
    """
    array = np.asarray(values, dtype=float)
    if array.size < 2:
        raise ValueError(f"values: got {array.size}, expected one a seed, at least 2")
    mean, error = float(array.mean()), float(stats.sem(array))
    if error == 0:
        return mean, mean, mean
    low, high = stats.t.interval(level, array.size - 1, loc=mean, scale=error)
    return mean, float(low), float(high)
