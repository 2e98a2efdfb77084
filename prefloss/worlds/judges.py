"""Judges: what they make of completions, as noisy scores for draws and as exact probabilities for the population."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefloss.worlds.world import World

# The mean of a standard Gumbel variable.
_EULER = 0.5772156649015329
# Noise that decides between equals alone, for a judge without any.
_TIE = 1e-9


@dataclass(frozen=True, eq=False)
class Judge:
    r"""Scores each completion with noise, and says what follows from the order of its scores.

    .. math::
        s(y) = u(y) + T g, \quad u(y) = r(y) + b |y|, \quad g \text{ Gumbel, shifted to mean } 0

    The better of two then wins with probability :math:`\sigma((u_1 - u_2) / T)` (Bradley-Terry), a ranking follows
    Plackett and Luce, and an upvote, where s beats the score of the bar, has probability
    :math:`\sigma((u - \text{bar}) / T)`. The scores of graded feedback are these s, so they never contradict the order.

    Attributes:
        temperature: T, >= 0, in units of reward; 0 is a judge without noise.
        flips: Probability that what it says comes back reversed.
        length_bias: b, reward for each token.
        bar: Worth of the completion that it compares a single one with.
        taste: What it likes in place of the true reward, [prompts, C].
    """

    temperature: float = 1.0
    flips: float = 0.0
    length_bias: float = 0.0
    bar: float = 0.0
    taste: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature: got {self.temperature}, expected a number >= 0")
        if not 0 <= self.flips <= 1:
            raise ValueError(f"flips: got {self.flips}, expected a probability")

    def utility(self, world: World) -> Tensor:
        """What it would score without noise, u, [prompts, C]."""
        taste = world.reward if self.taste is None else self.taste.double()
        return taste + self.length_bias * world.lengths  # type: ignore[operator]

    def prefers(self, world: World) -> Tensor:
        """Probability that it says the first is better than the second, [prompts, C, C]."""
        utility = self.utility(world)
        return self._said(utility.unsqueeze(-1) - utility.unsqueeze(-2))

    def upvotes(self, world: World) -> Tensor:
        """Probability of an upvote, [prompts, C]."""
        return self._said(self.utility(world) - self.bar)

    def scores(
        self, world: World, prompt: Tensor, completions: Tensor, generator: torch.Generator, bar: bool = False
    ) -> Tensor:
        """Noisy scores of completions [n, K] of prompts [n]: [n, K], with one more column for the bar if `bar`.

        A flip turns the order of a row round: the best gets the lowest score, and so on.
        """
        utility = self.utility(world)[prompt.unsqueeze(-1), completions]
        if bar:
            utility = torch.cat([utility, torch.full_like(utility[:, :1], self.bar)], -1)
        uniform = torch.rand(utility.shape, generator=generator, dtype=torch.float64)
        scores = utility + max(self.temperature, _TIE) * (-torch.log(-torch.log(uniform)) - _EULER)
        order = scores.argsort(-1)
        reversed_ = torch.empty_like(scores).scatter(-1, order, scores.gather(-1, order.flip(-1)))
        flipped = torch.rand(len(scores), 1, generator=generator, dtype=torch.float64) < self.flips
        return torch.where(flipped, reversed_, scores)

    def _said(self, gap: Tensor) -> Tensor:
        # Without noise the better one always wins; of two equal ones either does.
        better = torch.sigmoid(gap / self.temperature) if self.temperature else 0.5 * (1 + gap.sign())
        return (1 - self.flips) * better + self.flips * (1 - better)


class Panel:
    """Several judges; each example is judged by one of them, drawn by its share.

    Args:
        judges: Judges with tastes of their own.
        shares: How often each one judges, >= 0; divided by their sum.

    Raises:
        ValueError: If there is no judge, or not one share for each.
    """

    def __init__(self, judges: Sequence[Judge], shares: Sequence[float]) -> None:
        if not judges or len(judges) != len(shares) or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(
                f"shares: got {list(shares)}, expected a number >= 0 for each of {len(judges)} judges"
            )
        self.judges = tuple(judges)
        self.shares = torch.tensor(shares, dtype=torch.float64) / sum(shares)

    def utility(self, world: World) -> Tensor:
        """Mean over the judges of what they would score without noise, [prompts, C]."""
        return self._mean([judge.utility(world) for judge in self.judges])

    def prefers(self, world: World) -> Tensor:
        """Probability that a judge says the first is better than the second, [prompts, C, C]."""
        return self._mean([judge.prefers(world) for judge in self.judges])

    def upvotes(self, world: World) -> Tensor:
        """Probability of an upvote, [prompts, C]."""
        return self._mean([judge.upvotes(world) for judge in self.judges])

    def scores(
        self, world: World, prompt: Tensor, completions: Tensor, generator: torch.Generator, bar: bool = False
    ) -> Tensor:
        """Noisy scores, each row by one judge; as `Judge.scores`."""
        scores = torch.stack(
            [judge.scores(world, prompt, completions, generator, bar) for judge in self.judges]
        )
        drawn = torch.multinomial(self.shares, len(prompt), replacement=True, generator=generator)
        return scores[drawn, torch.arange(len(prompt))]

    def _mean(self, values: list[Tensor]) -> Tensor:
        return torch.tensordot(self.shares, torch.stack(values), dims=1)
