"""Policies: parameters -> log-probs of every completion. All of them start at the reference, at parameters of 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefloss.worlds.world import World


class Policy:
    """A family of policies in a world; leading dimensions of the parameters are runs.

    Attributes:
        world: Where it acts.
        shape: Shape of the parameters of one policy.
    """

    world: World
    shape: tuple[int, ...]

    def log_probs(self, theta: Tensor) -> Tensor:
        """Log-probs of all completions, [..., prompts, C], nats, from parameters [..., *shape]."""
        raise NotImplementedError

    def per_token(self, theta: Tensor) -> dict[str, Tensor]:
        """Fields of `PerToken` that depend on the policy, [..., prompts, C, T]; empty where there are no tokens."""
        return {}

    def per_token_reference(self) -> dict[str, Tensor]:
        """Fields of `PerToken` that do not, [prompts, C, T]; empty where there are no tokens."""
        return {}


class Tabular(Policy):
    r"""A free logit for each completion.

    .. math::
        \pi_\theta(y \mid x) \propto \pi_\mathrm{ref}(y \mid x) e^{\theta_{xy}}

    It can be any policy, and learns nothing of one completion from another.
    """

    def __init__(self, world: World) -> None:
        self.world, self.shape = world, tuple(world.reward.shape)

    def log_probs(self, theta: Tensor) -> Tensor:
        """Log-probs of all completions, [..., prompts, C], nats."""
        return torch.log_softmax(self.world.reference + theta, -1)


class LogLinear(Policy):
    r"""One weight for each feature, the same under all prompts.

    .. math::
        \pi_\theta(y \mid x) \propto \pi_\mathrm{ref}(y \mid x) e^{\theta \cdot \phi(x, y)}

    ValueError if the world has no features.
    """

    def __init__(self, world: World) -> None:
        if world.features is None:
            raise ValueError("world: got one without features, expected features [prompts, C, D]")
        self.world, self.shape, self._features = world, (world.features.shape[-1],), world.features

    def log_probs(self, theta: Tensor) -> Tensor:
        """Log-probs of all completions, [..., prompts, C], nats."""
        # A matrix product; with @ the features would be copied for each run.
        shift = torch.einsum("...d,pcd->...pc", theta, self._features)
        return torch.log_softmax(self.world.reference + shift, -1)


class TokenTable(Policy):
    r"""A free logit for each next token t after each prefix p of each prompt.

    .. math::
        \pi_\theta(t \mid x, p) \propto \pi_\mathrm{ref}(t \mid x, p) e^{\theta_{xpt}}

    Args:
        world: One with token sequences.
        shared: Let the parameters depend on the previous token alone, not on the whole prefix and the prompt; what is
            learnt of one completion then changes others. Without it the policy can be any policy.

    Raises:
        ValueError: If the completions of the world have no tokens.
    """

    def __init__(self, world: World, shared: bool = False) -> None:
        if world.sequences is None or world.table is None:
            raise ValueError(
                "world: got one whose completions have no tokens, expected sequences and a table"
            )
        self.world, self.shared = world, shared
        self._sequences, self._reference = world.sequences, world.table
        vocabulary = world.table.shape[-1]
        self.shape = (vocabulary, vocabulary) if shared else tuple(world.table.shape)

    def table(self, theta: Tensor) -> Tensor:
        """Next-token log-probs, [..., prompts, prefixes, vocabulary], nats."""
        shift = theta[..., None, self._sequences.previous, :] if self.shared else theta
        return torch.log_softmax(self._reference + shift, -1)

    def log_probs(self, theta: Tensor) -> Tensor:
        """Log-probs of all completions, [..., prompts, C], nats: sums over their tokens."""
        # Of changes, not of log-probs: where nothing changed, the sum is 0, however the product rounds.
        return self.world.reference + self._sequences.totals(self.table(theta) - self._reference)

    def per_token(self, theta: Tensor) -> dict[str, Tensor]:
        """Log-prob of each token, and the sums over the vocabulary that some losses read, [..., prompts, C, T]."""
        policy, reference = self.table(theta), self._reference
        over_vocabulary = {
            "log_sum_sq": torch.logsumexp(2 * policy, -1),
            "kl": (reference.exp() * (reference - policy)).sum(-1),
            "reverse_kl": (policy.exp() * (policy - reference)).sum(-1),
        }
        rows = {name: self._sequences.at_tokens(value) for name, value in over_vocabulary.items()}
        return {"policy": self._sequences.log_probs(policy), **rows}

    def per_token_reference(self) -> dict[str, Tensor]:
        """The reference's log-prob of each token and its entropy over log V, and the mask, [prompts, C, T]."""
        reference = self._reference
        entropy = -(reference.exp() * reference).sum(-1) / math.log(reference.shape[-1])
        log_probs = self._sequences.log_probs(reference)
        return {
            "reference": log_probs,
            "reference_entropy": self._sequences.at_tokens(entropy),
            "mask": self._sequences.mask.expand(log_probs.shape),
        }
