"""What there is to know of a policy in a world, by sums over all completions. Nothing here is sampled.

Log-probs are [..., prompts, C], nats, as `Policy.log_probs` gives them; results are [...], one number a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefloss.worlds.data import Data, taken
from prefloss.worlds.world import World


def expected(log_probs: Tensor, values: Tensor) -> Tensor:
    """Mean over prompts of the expectation of values [..., prompts, C] under a policy, [...]."""
    probs = log_probs.exp()
    # A completion of probability 0 adds 0, even where its value is infinite.
    return torch.where(probs > 0, probs * values, 0.0).sum(-1).mean(-1)


def reward(world: World, log_probs: Tensor) -> Tensor:
    """Expected true reward, [...]."""
    return expected(log_probs, world.reward)


def kl(world: World, log_probs: Tensor) -> Tensor:
    """KL(policy || reference), mean over prompts, [...], nats."""
    return expected(log_probs, log_probs - world.reference)


def length(world: World, log_probs: Tensor) -> Tensor:
    """Expected number of tokens, [...]."""
    return expected(log_probs, world.lengths.double())  # type: ignore[union-attr]


def win_rate(world: World, log_probs: Tensor) -> Tensor:
    """Probability that a sample has a higher true reward than one of the reference, [...]; ties count half."""
    rows = []
    for values, reference in zip(world.reward, world.reference.exp(), strict=True):
        levels, level = values.unique(return_inverse=True)
        mass = reference.new_zeros(len(levels)).index_add(0, level, reference)
        rows.append((mass.cumsum(0) - 0.5 * mass)[level])
    return expected(log_probs, torch.stack(rows))


def optimum(world: World, beta: float | Tensor, worth: Tensor | None = None) -> Tensor:
    r"""Log-probs of the policy that maximises the expected worth minus beta KL, [*beta, prompts, C], nats.

    .. math::
        \pi^* = \frac{1}{Z} \pi_\mathrm{ref}(y \mid x) e^{r(x, y) / \beta}

    Args:
        world: Gives the reference.
        beta: Cost of a nat of KL, > 0, in units of reward; a number or a tensor of them.
        worth: What to maximise, [prompts, C]; the true reward if it is None.
    """
    worth = world.reward if worth is None else worth
    beta = torch.as_tensor(beta, dtype=torch.float64)
    if not (beta > 0).all():
        raise ValueError(f"beta: got {beta.min().item()}, expected numbers > 0")
    return torch.log_softmax(world.reference + worth / beta[..., None, None], -1)


def frontier(world: World, betas: Tensor) -> tuple[Tensor, Tensor]:
    """KL and expected true reward of the optimum at each beta, [betas]: no policy has more reward at that KL."""
    best = optimum(world, betas)
    return kl(world, best), reward(world, best)


def accuracy(world: World, log_probs: Tensor, pairs: Data) -> Tensor:
    """Share of pairs whose chosen side has the higher log-ratio, by weight, [...]; ties count half.

    Args:
        world: Gives the reference.
        log_probs: Of the policies, [..., seeds, prompts, C], nats.
        pairs: Of as many seeds, or of one; a judge without noise (`Judge(temperature=0)`) compares with the truth.
    """
    chosen, rejected = _log_ratios(world, log_probs, pairs)
    # Log-ratios that differ by rounding alone are a tie.
    gap = chosen - rejected
    gap = torch.where(gap.abs() < 1e-12, 0.0, gap)
    return _weighted_mean(0.5 * (1 + gap.sign()), pairs)


def drift(world: World, log_probs: Tensor, pairs: Data) -> tuple[Tensor, Tensor]:
    """Mean change of the log-prob of the chosen and of the rejected completions, by weight, [...] each, nats."""
    chosen, rejected = _log_ratios(world, log_probs, pairs)
    return _weighted_mean(chosen, pairs), _weighted_mean(rejected, pairs)


def measure(world: World, log_probs: Tensor, pairs: Data | None = None) -> dict[str, Tensor]:
    """All of the above by name; accuracy and drift where there are pairs to look at.

    Example:
        >>> from prefloss.worlds import bandit
        >>> world = bandit(seed=0)
        >>> measure(world, world.reference)["win_rate"]
        tensor(0.5000, dtype=torch.float64)
    """
    figures = {
        "reward": reward(world, log_probs),
        "kl": kl(world, log_probs),
        "length": length(world, log_probs),
        "win_rate": win_rate(world, log_probs),
    }
    if pairs is not None:
        chosen, rejected = drift(world, log_probs, pairs)
        figures |= {"accuracy": accuracy(world, log_probs, pairs), "chosen": chosen, "rejected": rejected}
    return figures


def _log_ratios(world: World, log_probs: Tensor, pairs: Data) -> tuple[Tensor, Tensor]:
    h = taken(log_probs - world.reference, pairs)
    return h[..., 0], h[..., 1]


def _weighted_mean(values: Tensor, pairs: Data) -> Tensor:
    weight = pairs.fields.get("weight")
    return values.mean(-1) if weight is None else (values * weight).sum(-1) / weight.sum(-1)
