"""Memory and traffic of the linear op by Triton, as arithmetic on sizes; `plan` chooses by it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from prefloss.kernels.kept import kept_columns, kept_dtype, tokens_in_gradient
from prefloss.kernels.tiles import padded


class Choice(NamedTuple):
    """A scheme, how many tokens it keeps, and how many of these in the memory of the gradient of the head."""

    scheme: Literal["score", "unscaled", "keep", "recompute"]
    kept: int = 0
    head: int = 0


class Sizes(NamedTuple):
    """n tokens, a head [V, H], and tiles of logits, [rows, columns]; the other attributes are those of a plan."""

    dtype: torch.dtype
    tokens: int
    vocabulary: int
    width: int
    rows: int
    columns: int
    trained: bool
    scale_inputs: bool
    upcast: bool

    def kept(self, choice: Choice) -> int:
        """Bytes held between forward and backward besides the memory of the gradient of the head."""
        if choice.scheme == "unscaled":
            return self.tokens * self.width * 4
        return (choice.kept - choice.head) * self.kept_row

    @property
    def kept_row(self) -> int:
        """Bytes of the kept numerators of a token."""
        return kept_columns(self.dtype, self.vocabulary, "triton") * kept_dtype(self.dtype).itemsize

    def in_gradient(self) -> int:
        """Tokens that fit the memory of the gradient of the head."""
        return min(self.tokens, tokens_in_gradient(self.vocabulary, self.width))

    def scratch(self, choice: Choice) -> int:
        """Bytes of tiles and sums in forward or in backward, whichever has more."""
        tile = self.rows * padded(self.columns)
        copies = 4 * self.width * (self.rows + self.columns) if self.upcast else 0
        forward = 4 * tile + copies
        if choice.scheme == "unscaled":
            return forward + self.dtype.itemsize * tile
        return max(forward, self._backward(choice, tile) + copies)

    def _backward(self, choice: Choice, tile: int) -> int:
        if choice.scheme == "score":
            return 0
        half, again = self.dtype.itemsize == 2, choice.kept < self.tokens
        hidden = self.tokens * self.width
        size = 4 * tile + 2 * tile * half if again else 0
        size += hidden * self.dtype.itemsize if self.trained and self._scaled(choice) else 0
        size += 4 * hidden if half and not self._single(choice) else 0
        sums = self.trained and (choice.head > 0 or (half and not self._one_slab(choice)))
        return size + (4 * self.columns * self.width if sums else 0)

    def _scaled(self, choice: Choice) -> bool:
        return self.scale_inputs and choice.kept > 0

    def _one_slab(self, choice: Choice) -> bool:
        """Whether each gradient of the head is one product of bfloat16, which needs no float32 sum."""
        return choice.kept == self.tokens and choice.head == 0 and self.dtype != torch.float16

    def _single(self, choice: Choice) -> bool:
        """Whether the gradient of the hidden states is one product, and nothing is to be multiplied into it."""
        return self._one_slab(choice) and not self._scaled(choice)

    def bytes_per_logit(self, choice: Choice) -> float:
        """Bytes of each logit that kernels read or write, of the launches of forward and backward together."""
        size = self.dtype.itemsize
        if choice.scheme in ("score", "unscaled"):
            return 4 + size * (choice.scheme == "unscaled")
        kept = 4 + size if self.scale_inputs else 4 + 3 * size
        share = choice.kept / self.tokens if self.tokens else 1
        return share * kept + (1 - share) * (8 + size)

    def bytes_per_hidden(self, choice: Choice) -> float:
        """The same of each element of hidden states: sums over spans, factors multiplied in, one rounding."""
        size, spans = self.dtype.itemsize, -(-self.vocabulary // self.columns)
        if choice.scheme == "score":
            return 0
        if choice.scheme == "unscaled":
            return 8 * (spans - 1) + 12 + 2 * size
        total = 0 if self._single(choice) else 4 + size
        total += 0 if self._one_slab(choice) else 8 * (spans - 1)
        return total + (2 * size if self.trained and self._scaled(choice) else 0)
