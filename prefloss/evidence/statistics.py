"""Intervals and tests over seeds; scipy does the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# Resamples of a bootstrap; the standard error that they give is right to two parts in a hundred.
_RESAMPLES = 2000
# Share of repetitions that must find a difference which "could have been shown".
_POWER = 0.8


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


@dataclass(frozen=True)
class Difference:
    """A loss against the baseline on the same seeds and prompts.

    Attributes:
        mean: Mean difference.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p_value: Of no difference, two-sided, before any correction for many losses.
        smallest: True difference that 4 of 5 such comparisons would have shown.
        improved: Share of seeds and prompts at which the loss was better; equal ones count half.
    """

    mean: float
    low: float
    high: float
    p_value: float
    smallest: float
    improved: float


def paired_difference(loss: ArrayLike, baseline: ArrayLike, tests: int = 1, seed: int = 0) -> Difference:
    """Difference of two losses with a bootstrap over seeds, then prompts.

    A resample draws seeds, then prompts, with replacement. All seeds answer the same prompts, so a resample draws one
    set of prompts for all its seeds: drawn anew for each seed, prompts that favour a loss would average out. The
    interval is Student's with the bootstrap's standard error, which is enlarged as that of a few seeds has to be.

    Args:
        loss: One figure for each seed and prompt, [seeds, prompts].
        baseline: The same of the baseline.
        tests: Comparisons made beside each other; `smallest` allows for their correction.
        seed: Of the resamples.

    Raises:
        ValueError: If shapes differ, a value is not finite, or there are fewer than two seeds.

    Example:
        >>> paired_difference([[1.0, 3.0], [1.5, 2.5]], [[0.0, 2.0], [0.5, 1.5]]).mean
        1.0
    """
    one, other = np.asarray(loss, dtype=float), np.asarray(baseline, dtype=float)
    if one.ndim != 2 or one.shape != other.shape or len(one) < 2:
        raise ValueError(
            f"loss: got shape {list(one.shape)} against {list(other.shape)}, expected [seeds, prompts] of both, "
            "at least 2 seeds"
        )
    gaps = one - other
    if not np.isfinite(gaps).all():
        raise ValueError("loss: got a value that is not finite, expected finite ones")
    mean, seeds = float(gaps.mean()), len(gaps)
    error = _bootstrap_error(gaps, np.random.default_rng(seed))
    improved = float((0.5 * (1 + np.sign(gaps))).mean())
    if error < 1e-12:
        return Difference(mean, mean, mean, float(abs(mean) < 1e-12), 0.0, improved)
    student = stats.t(seeds - 1)
    reach = float(student.ppf(0.975)) * error
    smallest = float(student.ppf(1 - 0.025 / tests) + student.ppf(_POWER)) * error
    p_value = float(2 * student.sf(abs(mean) / error))
    return Difference(mean, mean - reach, mean + reach, p_value, smallest, improved)


def _bootstrap_error(gaps: NDArray[np.float64], random: np.random.Generator) -> float:
    """Standard error of the mean of gaps [seeds, prompts]."""
    seeds, prompts = gaps.shape
    drawn_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), _RESAMPLES) / seeds
    drawn_prompts = random.multinomial(prompts, np.full(prompts, 1 / prompts), _RESAMPLES) / prompts
    means = ((drawn_seeds @ gaps) * drawn_prompts).sum(-1)
    # Drawing rows and columns counts the noise of the single cells three times (Owen 2007, doi:10.1214/07-AOAS122).
    cells = gaps - gaps.mean(0) - gaps.mean(1, keepdims=True) + gaps.mean()
    noise = float((cells**2).sum()) / ((seeds - 1) * max(prompts - 1, 1)) / gaps.size
    variance = max(float(means.var()) - 2 * noise, float(gaps.mean(1).var()) / seeds)
    # A bootstrap of n values has the variance that divides by n, not by n - 1.
    return math.sqrt(variance * seeds / (seeds - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being many, by Holm's steps; below 0.05 stays shown.

    Example:
        >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03, 0.005])]
        [0.03, 0.06, 0.06, 0.02]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = worst
    return adjusted


def at_kl(kl: ArrayLike, reward: ArrayLike, target: float) -> float | None:
    """Reward at a KL, on straight lines between the runs of a sweep; None outside the KL that they reached.

    Example:
        >>> at_kl([0.5, 2.0, 1.0], [0.1, 0.4, 0.2], 1.5), at_kl([0.5, 2.0], [0.1, 0.4], 3.0)
        (0.30000000000000004, None)
    """
    x, y = np.asarray(kl, dtype=float), np.asarray(reward, dtype=float)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    if not (x.size and x[0] <= target <= x[-1]):
        return None
    return float(np.interp(target, x, y))
