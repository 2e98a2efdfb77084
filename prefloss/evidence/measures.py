"""From trained policies to rows and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefloss.evidence import statistics
from prefloss.evidence.experiment import Figure
from prefloss.worlds import Data, Runs, World, frontier, kl, measure, reward

# From nearly the best completion alone to nearly the reference.
_BETAS = torch.logspace(-2.5, 2.5, 400, dtype=torch.float64)


def rows_of(runs: Runs, pairs: Data | None = None, **setting: Any) -> list[dict[str, Any]]:
    """A row for each run: the setting, loss, KL strength and seed, and what `measure` gives, with the shortfall."""
    log_probs = runs.log_probs()
    measured = measure(runs.policy.world, log_probs, pairs)
    measured["shortfall"] = shortfall(runs.policy.world, log_probs)
    return [
        {
            **setting,
            "loss": loss.name,
            "strength": loss.params.get(loss.spec.beta or ""),
            "seed": seed,
            **{name: values[row, column].item() for name, values in measured.items()},
        }
        for row, loss in enumerate(runs.losses)
        for column, seed in enumerate(runs.seeds)
    ]


def rows_over(
    name: str, points: Sequence[float], seeds: Sequence[int], values: Mapping[str, Tensor], **setting: Any
) -> list[dict[str, Any]]:
    """A row for each point of a sweep and each seed: the setting, the point, the seed, and the values.

    Args:
        name: What is swept.
        points: Its values.
        seeds: Of the runs.
        values: What was measured, [points, seeds] each.
        **setting: What all rows have in common.
    """
    return [
        {**setting, name: point, "seed": seed, **{key: value[i, j].item() for key, value in values.items()}}
        for i, point in enumerate(points)
        for j, seed in enumerate(seeds)
    ]


def shortfall(world: World, log_probs: Tensor) -> Tensor:
    """True reward of the best policy at the same KL minus that of the policy, [...], >= 0 but for interpolation.

    Log-probs are [..., prompts, C], nats. Policies of any strength can be compared by it.
    """
    distances, rewards = (values.flip(0).numpy() for values in frontier(world, _BETAS))
    best = np.interp(kl(world, log_probs).numpy(), distances, rewards)
    return torch.from_numpy(np.asarray(best)) - reward(world, log_probs)


def numbers(values: Sequence[float]) -> str:
    """As a set-up lists them: "0.1, 0.2 and 1"."""
    *first, last = (f"{value:g}" for value in values)
    return f"{', '.join(first)} and {last}"


def at_kl(kls: Tensor, values: Tensor, target: float) -> Tensor:
    """Values of each seed at a KL, between its neighbours in a sweep: [strengths, seeds] -> [seeds].

    NaN where a seed's sweep does not reach so far.
    """
    found = (statistics.at_kl(x, y, target) for x, y in zip(kls.T.numpy(), values.T.numpy(), strict=True))
    return torch.tensor([math.nan if value is None else value for value in found], dtype=torch.float64)


def runs_at_kl(runs: Runs, target: float, what: Callable[[World, Tensor], Tensor] = reward) -> Tensor:
    """True reward, or another figure, of each seed at a KL: `at_kl` over the strengths of one loss, [seeds]."""
    world, log_probs = runs.policy.world, runs.log_probs()
    return at_kl(kl(world, log_probs), what(world, log_probs), target)


def over_seeds(name: str, values: Tensor | Sequence[float], expected: float | None = None) -> Figure:
    """The mean over the seeds, with its 95 % interval."""
    mean, low, high = statistics.mean_interval([float(value) for value in values])
    return Figure(name, mean, (low, high), expected)
