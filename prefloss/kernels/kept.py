"""Memory for the logits that the scheme "keep" stores between forward and backward.

A trained head needs a [V, H] gradient buffer anyway. The logits of about the first H tokens are stored in it at no
extra cost: those of a span of the vocabulary lie where the gradient of those rows of the head is written once they have
been used. The logits of further tokens have memory of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prefloss.kernels.softmax import code_columns
from prefloss.kernels.tiles import MATMUL_BLOCK, padded, tile_columns


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits of a head of `dtype` are kept: the same, or codes of 16 bits for half precision."""
    return torch.int16 if dtype.itemsize == 2 else dtype


def kept_columns(dtype: torch.dtype, vocabulary: int, impl: str = "chunked") -> int:
    """Elements per token that keeping its logits takes."""
    if impl == "triton":
        # spans of one width, and a row of memory ends with the float32 scale of the token's numerators
        width = tile_columns(vocabulary)
        return -(-vocabulary // padded(width)) * padded(width) + 64
    return code_columns(vocabulary) if kept_dtype(dtype) == torch.int16 else vocabulary


def tokens_in_gradient(vocabulary: int, width: int) -> int:
    """Tokens for whose numerators, kept by Triton, the gradient of a head [V, H] has room; whole blocks of a matmul."""
    columns = tile_columns(vocabulary)
    last = vocabulary - (-(-vocabulary // columns) - 1) * columns
    tokens = last * width // padded(columns)
    return tokens - tokens % MATMUL_BLOCK if tokens >= MATMUL_BLOCK else tokens


class Kept(NamedTuple):
    """Logits of the first `tokens`.

    `parts`: slices of the tokens, each with their logits or codes, [tokens, columns], by the start of the span. `home`
    is the memory of the gradient of the head, [V, H], or None.
    """

    tokens: int = 0
    parts: tuple[tuple[slice, dict[int, Tensor]], ...] = ()
    home: Tensor | None = None

    def tiles(self, rows: slice, span: slice) -> Iterator[tuple[slice, Tensor | None]]:
        """Cut some rows, in order, into parts whose logits of a span are in one place; None where they are not kept."""
        for part, tiles in self.parts:
            start, stop = max(rows.start, part.start), min(rows.stop, part.stop)
            if start < stop:
                yield slice(start, stop), tiles[span.start][start - part.start : stop - part.start]
        if rows.stop > self.tokens:
            yield slice(max(rows.start, self.tokens), rows.stop), None


def allocate(x: Tensor, weight: Tensor, tokens: int, spans: list[slice]) -> Kept:
    """Memory for the logits of the first `tokens` of [n, H], in the gradient buffer of the head if it needs one."""
    if tokens == 0:
        return Kept()
    dtype, widths = kept_dtype(x.dtype), _widths(x.dtype, spans)
    if not weight.requires_grad:
        return kept_in(x.new_empty(tokens, sum(widths), dtype=dtype), tokens, spans, x.dtype)
    home = weight.new_empty(weight.shape, dtype=dtype)
    places = {span.start: home[span].view(-1) for span in spans}
    fit = min(tokens, *(len(place) // width for place, width in zip(places.values(), widths, strict=True)))
    tiles = {
        start: place[: fit * width].view(fit, width)
        for (start, place), width in zip(places.items(), widths, strict=True)
    }
    parts = [(slice(0, fit), tiles)]
    if fit < tokens:
        rest = x.new_empty(tokens - fit, sum(widths), dtype=dtype)
        parts.append((slice(fit, tokens), _cut(rest, spans, x.dtype)))
    return Kept(tokens, tuple(parts), home)


def kept_in(memory: Tensor, tokens: int, spans: list[slice], dtype: torch.dtype) -> Kept:
    """The first `tokens` in given memory, [at least `tokens`, columns]; `dtype` is that of the head."""
    return Kept(tokens, ((slice(0, tokens), _cut(memory, spans, dtype)),))


def _widths(dtype: torch.dtype, spans: list[slice]) -> list[int]:
    return [kept_columns(dtype, span.stop - span.start) for span in spans]


def _cut(memory: Tensor, spans: list[slice], dtype: torch.dtype) -> dict[int, Tensor]:
    """Memory as tiles one after another, each [all its rows, the columns of a span]."""
    rows, widths = len(memory), _widths(dtype, spans)
    tiles = memory.view(-1).split([rows * width for width in widths])
    return {
        span.start: tile.view(rows, width) for span, tile, width in zip(spans, tiles, widths, strict=True)
    }
