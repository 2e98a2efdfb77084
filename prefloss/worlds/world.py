"""A world: prompts, every completion that there is, the reference's log-probs and the true reward of each.

A world is small enough to enumerate, so nothing about a policy has to be estimated: its expected reward, its distance
from the reference and the best policy at a given strength are sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefloss.worlds.sequences import Sequences, enumerate_sequences


@dataclass(frozen=True, eq=False)
class World:
    """Prompts, equally likely, each with C completions. Everything is float64.

    Attributes:
        reward: True reward of each completion, [prompts, C]; only measurements and judges see it.
        reference: Log-probs of the completions under the reference, [prompts, C], nats; each row sums to 1. Logits are
            taken too, and normalised.
        lengths: Tokens of each completion, [prompts, C] or [C], integers >= 1; None is 1 each.
        features: What a `LogLinear` policy sees of each completion, [prompts, C, D]; None if there are none.
        sequences: The tokens of the completions, the same under every prompt; None if they have none.
        table: Log-probs of the reference's next token, [prompts, prefixes, vocabulary], where there are tokens.

    Raises:
        ValueError: If shapes differ, a completion has no token, or the table does not add up to the reference.

    Example:
        >>> World(reward=torch.tensor([[1.0, 0.0]]), reference=torch.zeros(1, 2)).reference.exp()
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """

    reward: Tensor
    reference: Tensor
    lengths: Tensor | None = None
    features: Tensor | None = None
    sequences: Sequences | None = None
    table: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes, normalise the reference and fill in the lengths."""
        shape = self.reward.shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"reward: got shape {list(shape)}, expected [prompts, completions]")
        lengths = torch.ones(shape, dtype=torch.long) if self.lengths is None else self.lengths
        lengths = lengths.expand(shape) if lengths.shape == shape[1:] else lengths
        features = self.features
        checked = {"reference": self.reference, "lengths": lengths}
        if features is not None:
            checked["features"] = features[..., 0] if features.ndim == 3 else features
        for name, value in checked.items():
            if value.shape != shape:
                raise ValueError(
                    f"{name}: got shape {list(value.shape)}, expected {list(shape)} as reward has"
                )
        if lengths.is_floating_point() or lengths.min() < 1:
            raise ValueError(f"lengths: got {lengths.min().item()} as the least, expected integers >= 1")
        object.__setattr__(self, "reward", self.reward.double())
        object.__setattr__(self, "reference", torch.log_softmax(self.reference.double(), -1))
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "features", None if features is None else features.double())
        if self.sequences is not None and self.table is not None:
            object.__setattr__(self, "table", torch.log_softmax(self.table.double(), -1))
            spelled_out = self.sequences.log_probs(self.table).sum(-1)
            if spelled_out.shape != shape or not torch.allclose(spelled_out, self.reference, atol=1e-6):
                raise ValueError("reference: got other log-probs than the sums over tokens of the table")

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return self.reward.shape[0]

    @property
    def completions(self) -> int:
        """How many completions each prompt has."""
        return self.reward.shape[1]


def bandit(prompts: int = 1, completions: int = 50, longest: int = 8, seed: int = 0) -> World:
    """Completions that have nothing in common: normal rewards, lengths from 1 to `longest`.

    The reference is the softmax of normal logits. It knows nothing of the reward.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, completions)
    return World(
        reward=_normal(shape, generator),
        reference=_normal(shape, generator),
        lengths=torch.randint(1, longest + 1, shape, generator=generator),
    )


def featured(
    prompts: int = 4,
    completions: int = 50,
    dimensions: int = 8,
    hump: float = 0.0,
    longest: int = 8,
    seed: int = 0,
) -> World:
    r"""Completions with shared features :math:`\phi`, normal; what is learnt of one says something of the others.

    .. math::
        r(y) = a \cdot \phi(y) - c |\phi(y)|^2, \quad |a| = 1

    Args:
        prompts: Number of prompts.
        completions: Completions of each.
        dimensions: Number of features D.
        hump: c; above 0 the reward falls again far out, while a linear implicit reward keeps rising.
        longest: Lengths are drawn from 1 to this.
        seed: Of the features, the direction a, the reference and the lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    features = _normal((prompts, completions, dimensions), generator)
    direction = _normal((dimensions,), generator)
    direction = direction / direction.norm()
    return World(
        reward=features @ direction - hump * (features**2).sum(-1),
        reference=_normal((prompts, completions), generator),
        lengths=torch.randint(1, longest + 1, (prompts, completions), generator=generator),
        features=features,
    )


def spelled(prompts: int = 2, words: int = 2, longest: int = 5, seed: int = 0) -> World:
    """Every sequence of at most `longest` tokens over a few words and an end token, under a random next-token table.

    A word has a normal worth under each prompt, and a sequence half a normal surprise of its own on top of the sum of
    its words. 2 words and 5 tokens make 63 completions.
    """
    generator = torch.Generator().manual_seed(seed)
    sequences = enumerate_sequences(words, longest)
    table = torch.log_softmax(_normal((prompts, sequences.prefixes, words + 1), generator), -1)
    # The end token is worth nothing.
    worth = torch.cat([_normal((prompts, words), generator), torch.zeros(prompts, 1).double()], -1)
    surprise = _normal((prompts, len(sequences.tokens)), generator)
    return World(
        reward=(worth[:, sequences.tokens] * sequences.mask).sum(-1) + 0.5 * surprise,
        reference=sequences.log_probs(table).sum(-1),
        lengths=sequences.mask.sum(-1),
        sequences=sequences,
        table=table,
    )


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
