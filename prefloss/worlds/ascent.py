"""Reinforcement learning: climb the expected worth of what a policy says, less its KL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Adam

from prefloss.worlds.exact import expected, kl
from prefloss.worlds.policies import Policy


def climb(
    policy: Policy,
    worth: Tensor,
    betas: Sequence[float],
    *,
    samples: int | None = None,
    seeds: Sequence[int] = (0,),
    steps: int = 300,
    learning_rate: float = 0.05,
) -> Tensor:
    r"""Policies after gradient ascent from the reference, [betas, seeds, prompts, C] as log-probs, nats.

    .. math::
        \max_\theta \; \mathbb{E}_{y \sim \pi_\theta} [\, w(x, y) \,]
        - \beta \, \mathrm{KL}(\pi_\theta \| \pi_\mathrm{ref})

    Within a family that cannot be every policy this is the best of the family, where `optimum` is the best of all.

    Args:
        policy: Family to stay in.
        worth: What to maximise, as a reward model's scores, [prompts, C] or [seeds, prompts, C].
        betas: Costs of a nat of KL, > 0, in units of the worth.
        samples: Completions drawn for each prompt at each step, at least 2, each one compared with the mean of the
            others (REINFORCE, leave one out); None sums over all completions.
        seeds: Of the samples; one for each of the seeds of the worth, if it has some.
        steps: Of Adam.
        learning_rate: Its step size.

    Raises:
        ValueError: If there is a single sample, a beta is not above 0, or the worth is of other seeds.
    """
    if worth.ndim == 3 and len(worth) != len(seeds):
        raise ValueError(f"worth: got {len(worth)} seeds, expected {len(seeds)}, as seeds says")
    if samples is not None and samples < 2:
        raise ValueError(f"samples: got {samples}, expected at least 2, or None for all completions")
    if min(betas) <= 0:
        raise ValueError(f"betas: got {min(betas)}, expected numbers > 0")
    cost = torch.tensor(betas, dtype=torch.float64)[:, None]
    theta = torch.zeros(len(betas), len(seeds), *policy.shape, dtype=torch.float64).requires_grad_()
    adjust = Adam([theta], lr=learning_rate)
    noise = None if samples is None else _uniform(seeds, (steps, policy.world.prompts, samples))
    for step in range(steps):
        log_probs = policy.log_probs(theta)
        if noise is None:
            gain = expected(log_probs, worth) - cost * kl(policy.world, log_probs)
        else:
            value = worth - cost[..., None, None] * (log_probs.detach() - policy.world.reference)
            gain = _sampled_gain(log_probs, value, noise[:, step])
        adjust.zero_grad()
        (-gain).sum().backward()
        adjust.step()
    return policy.log_probs(theta.detach())


def _sampled_gain(log_probs: Tensor, value: Tensor, uniform: Tensor) -> Tensor:
    """A number for each run whose gradient is, on average, that of the expected value."""
    cumulative = log_probs.detach().exp().cumsum(-1)
    # Rounding may leave the last sum below a number near 1.
    drawn = torch.searchsorted(cumulative, uniform.expand(*cumulative.shape[:-1], -1).contiguous())
    drawn = drawn.clamp_max(log_probs.shape[-1] - 1)
    got = value.gather(-1, drawn)
    others = (got.sum(-1, keepdim=True) - got) / (got.shape[-1] - 1)
    return ((got - others) * log_probs.gather(-1, drawn)).mean((-2, -1))


def _uniform(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Numbers of each seed, whatever other seeds there are, [seeds, *shape]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(shape, generator=each, dtype=torch.float64) for each in generators])
