"""Where the scheme "keep" holds logits between forward and backward: span by span of the vocabulary.

A gradient of the head, [V, H], will be wanted, and of as many tokens as about H the logits fit into its memory: those
of a span lie where the gradient of those rows of the head is written once they are done with. So they cost nothing.
What is left has memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from prefloss.kernels.paths import kept_columns, kept_dtype


class _Part(NamedTuple):
    """Tokens, and for each span their logits or codes, [tokens, columns]."""

    rows: slice
    tiles: list[Tensor]


class Kept(NamedTuple):
    """Logits of the first tokens.

    Attributes:
        tokens: How many tokens.
        parts: Their logits, in order.
        home: The memory of the gradient of the head, [V, H], or None.
    """

    tokens: int = 0
    parts: tuple[_Part, ...] = ()
    home: Tensor | None = None

    def tiles(self, rows: slice, span: int) -> Iterator[tuple[slice, Tensor | None]]:
        """Some rows in order, cut where their logits of that span lie in different places, None where nowhere."""
        for part in self.parts:
            start, stop = max(rows.start, part.rows.start), min(rows.stop, part.rows.stop)
            if start < stop:
                yield slice(start, stop), part.tiles[span][start - part.rows.start : stop - part.rows.start]
        if rows.stop > self.tokens:
            yield slice(max(rows.start, self.tokens), rows.stop), None


def room_to_keep(x: Tensor, weight: Tensor, tokens: int, spans: list[slice]) -> Kept:
    """Room for the logits of so many tokens of [n, H], in that of the gradient of the head where it is wanted."""
    if tokens == 0:
        return Kept()
    dtype, columns = kept_dtype(x.dtype), _columns(x.dtype, spans)
    if not weight.requires_grad:
        return kept_in(
            torch.empty(tokens, sum(columns), dtype=dtype, device=x.device), tokens, spans, x.dtype
        )
    home = torch.empty(weight.shape, dtype=dtype, device=x.device)
    places = [home[span].view(-1) for span in spans]
    fit = min(tokens, *(len(place) // width for place, width in zip(places, columns, strict=True)))
    tiles = [place[: fit * width].view(fit, width) for place, width in zip(places, columns, strict=True)]
    parts = [_Part(slice(0, fit), tiles)]
    if fit < tokens:
        rest = torch.empty(tokens - fit, sum(columns), dtype=dtype, device=x.device)
        parts.append(_Part(slice(fit, tokens), _cut(rest, tokens - fit, columns)))
    return Kept(tokens, tuple(parts), home)


def kept_in(room: Tensor, tokens: int, spans: list[slice], dtype: torch.dtype) -> Kept:
    """The first tokens of those for which a memory, [at least so many, columns], has room; `dtype` is of the head."""
    tiles = _cut(room, len(room), _columns(dtype, spans))
    return Kept(tokens, (_Part(slice(0, tokens), [tile[:tokens] for tile in tiles]),))


def _columns(dtype: torch.dtype, spans: list[slice]) -> list[int]:
    return [kept_columns(dtype, span.stop - span.start) for span in spans]


def _cut(room: Tensor, rows: int, columns: list[int]) -> list[Tensor]:
    """Memory as tiles one after another, each [rows, its columns]."""
    flat = room.view(-1)
    ends = list(accumulate(rows * width for width in columns))
    return [
        flat[end - rows * width : end].view(rows, width) for end, width in zip(ends, columns, strict=True)
    ]
