"""Every sequence over a small vocabulary, as a tree of prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """All sequences that end at the end token or at T tokens. They are the leaves of a tree, so they sum to 1.

    Attributes:
        tokens: Token ids, [C, T], 0 outside the mask; the highest id is the end token.
        mask: True at the tokens of a sequence, [C, T].
        prefix: Number of the prefix before each token, [C, T], 0 outside the mask.
        previous: Last token of each prefix, [prefixes]; that of the empty prefix is the end token.
    """

    tokens: Tensor
    mask: Tensor
    prefix: Tensor
    previous: Tensor

    @property
    def prefixes(self) -> int:
        """Number of prefixes after which a token can follow."""
        return len(self.previous)

    def at_tokens(self, rows: Tensor) -> Tensor:
        """What stands in the row of the prefix before each token: [..., prefixes] -> [..., C, T]."""
        return rows[..., self.prefix]

    def log_probs(self, table: Tensor) -> Tensor:
        """Log-prob of each token: next-token log-probs [..., prefixes, V] -> [..., C, T], 0 outside the mask."""
        return torch.where(self.mask, table[..., self.prefix, self.tokens], 0.0)

    def totals(self, table: Tensor) -> Tensor:
        """Sum over the tokens of each sequence: one number for each next token [..., prefixes, V] -> [..., C].

        For log-probs these are the sums of `log_probs`, as one matrix product; an infinite number makes NaN of others.
        """
        vocabulary = table.shape[-1]
        rows = torch.arange(len(self.tokens)).unsqueeze(-1).expand_as(self.tokens)[self.mask]
        counts = table.new_zeros(len(self.tokens), self.prefixes * vocabulary)
        counts[rows, (self.prefix * vocabulary + self.tokens)[self.mask]] = 1.0
        return table.flatten(-2) @ counts.T


def enumerate_sequences(words: int, longest: int) -> Sequences:
    """All sequences of at most `longest` tokens over this many words and an end token.

    Raises:
        ValueError: If there is no word or no token.

    Example:
        >>> enumerate_sequences(words=1, longest=2).tokens  # end; word end; word word
        tensor([[1, 0],
                [0, 0],
                [0, 1]])
    """
    for name, value in (("words", words), ("longest", longest)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    end = words
    prefixes = [prefix for length in range(longest) for prefix in product(range(words), repeat=length)]
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    ended = [(*prefix, end) for prefix in prefixes]
    cut = list(product(range(words), repeat=longest))
    sequences = sorted(ended + cut, key=lambda sequence: (len(sequence), sequence))
    tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    prefix = torch.zeros(len(sequences), longest, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = True
        prefix[i, : len(sequence)] = torch.tensor([number[sequence[:t]] for t in range(len(sequence))])
    previous = torch.tensor([prefix_[-1] if prefix_ else end for prefix_ in prefixes])
    return Sequences(tokens, mask, prefix, previous)
