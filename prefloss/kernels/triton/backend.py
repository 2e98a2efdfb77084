"""Tiles of `linear` for Triton: matmuls fill a tile of float32 logits, and a kernel reads it once.

The scheme "keep" keeps softmax numerators, in 16 bits for half precision. If only log-probs have a gradient, they are
kept as the matmuls of the backward pass need them, with p - 1 at the target, and no kernel passes over them again: what
a row has still to be multiplied by, of forward and backward, is multiplied into hidden states and their gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefloss.kernels.kept import kept_columns, kept_dtype, tokens_in_gradient
from prefloss.kernels.matmul import matmul
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.plan import Plan
from prefloss.kernels.softmax import coefficients, finite
from prefloss.kernels.tiles import (
    Finished,
    Grid,
    LinearInputs,
    Numerators,
    TileSpec,
    padded,
    slices,
    tile_columns,
    tile_shape,
)
from prefloss.kernels.triton import launch


class Part(NamedTuple):
    """Softmax numerators of some tokens, [spans, m, width], and what makes each row the softmax, [m]."""

    rows: slice
    tiles: Tensor
    scales: Tensor

    def within(self, rows: slice) -> slice:
        """Rows of all tokens as rows of this part."""
        return slice(rows.start - self.rows.start, rows.stop - self.rows.start)

    def tile(self, rows: slice, span: slice) -> Tensor:
        """Some rows of one span, or of all spans where these lie side by side, [m, w]."""
        within, width = self.within(rows), self.tiles.shape[2]
        if span.stop - span.start <= width:
            return self.tiles[span.start // width, within, : span.stop - span.start]
        shape, stride = (within.stop - within.start, span.stop), self.tiles.stride(1)
        return self.tiles[0, within].as_strided(shape, (stride, 1))

    def in_whole_rows(self) -> bool:
        """Whether the spans of a row lie side by side."""
        return self.tiles.stride(0) == self.tiles.shape[2]


class Kept(NamedTuple):
    """What "keep" stores. `home`: memory for the gradient of the head, where the first part lies, or None."""

    parts: tuple[Part, ...] = ()
    home: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens, from the first on."""
        return self.parts[-1].rows.stop if self.parts else 0

    def part(self, rows: slice) -> Part | None:
        """The part that has these rows."""
        return next((part for part in self.parts if rows.start < part.rows.stop), None)


class ForwardTiles:
    """Forward pass of `linear` over some tokens and a head; see `chunked.ForwardTiles`, also for the attributes."""

    def __init__(self, inputs: LinearInputs, plan: Plan, outputs: int, memory: Tensor | None) -> None:
        x, weight = inputs.x, inputs.weight
        n, vocabulary = len(x), len(weight)
        self._inputs, self._more, self._direct = inputs, outputs > 2, plan.scale_inputs
        self._unscaled = plan.scheme == "unscaled"
        self.kept = Kept()
        if plan.scheme == "keep":
            self.kept = _allocate(weight, min(n, plan.kept_tokens), plan, memory)
        height, self._width = tile_shape(n, vocabulary, plan.chunk_tokens * vocabulary)
        spans = list(slices(vocabulary, self._width))
        starts = [*(part.rows for part in self.kept.parts), slice(self.kept.tokens, n)]
        self.order = [(rows, spans) for part in starts for rows in slices(part.stop, height, part.start)]
        # as long for any number of tokens in a block, so that pointers stay aligned and kernels are not compiled again
        length = padded(n)
        self._sums = x.new_zeros(5, length, dtype=torch.float32)
        # the maximum, and the target's logit until a tile has it
        self._sums[0], self._sums[2] = -torch.inf, -torch.inf
        self._references = x.new_full((len(spans) + 1, length), -torch.inf, dtype=torch.float32)
        size = height * padded(self._width)
        self._scratch = x.new_empty(size, dtype=torch.float32)
        self._numerators = x.new_empty(size if self._unscaled else 0)
        self._scales = x.new_empty(height if self._unscaled else 0, dtype=torch.float32)

    def new_sums(self, rows: slice) -> Tensor:
        """The sums of a slab before its first tile."""
        return self._sums[:, rows]

    def fold(self, rows: slice, span: slice, sums: Tensor) -> Numerators | None:
        """Add a tile to the sums of its rows; "keep" stores its numerators, "unscaled" returns them."""
        x, weight, bias, targets, transform = self._inputs
        logits = _matrix(self._scratch, rows.stop - rows.start, span.stop - span.start)
        matmul(x[rows], weight[span].T, out=logits)
        index = span.start // self._width
        before, after = self._references[index, rows], self._references[index + 1, rows]
        values, sloped = None, True
        if self._unscaled:
            values = _matrix(self._numerators, *logits.shape)
        elif (part := self.kept.part(rows)) is not None:
            values, sloped = part.tile(rows, span), self._direct
        out = None if values is None else launch.Numerators(values, before, after, sloped)
        launch.fold_tile(logits, bias, TileSpec(targets[rows], span.start, transform), sums, self._more, out)
        if values is None or not self._unscaled:
            return None
        _, outer, _ = launch.factors(transform)
        return Numerators(values, ((before - finite(after)) * outer).exp() if index else None)

    def finish(self, rows: slice, sums: Tensor, stats: Tensor) -> Finished | None:
        """Statistics of a slab whose tiles have all been added."""
        _, weight, _, targets, transform = self._inputs
        part = self.kept.part(rows)
        scales = kept = None
        if self._unscaled:
            scales = self._scales[: rows.stop - rows.start]
        elif part is not None:
            within = part.within(rows)
            scales = part.scales[within]
            kept = launch.Kept(part.tiles[:, within], self._width, len(weight), self._direct)
        spec = TileSpec(targets[rows], 0, transform)
        launch.finish_tiles(sums, spec, stats, self._references[:, rows], scales, kept)
        if not self._unscaled or scales is None:
            return None
        _, outer, slope = launch.factors(transform)
        return Finished(scales * slope, sums[2] * outer)


class BackwardTiles:
    """Backward pass of `linear`; see `chunked.BackwardTiles`, also for the attributes.

    Where kept numerators need a pass, their gradients are written over them if that is allowed.
    """

    def __init__(
        self,
        grad: Tensor,
        inputs: LinearInputs,
        stats: Tensor,
        saved: Kept | Tensor | None,
        plan: Plan,
        needs: tuple[bool, ...],
        overwrite: bool,
    ) -> None:
        x, weight, _, _, transform = inputs
        n, vocabulary = len(x), len(weight)
        if isinstance(saved, Tensor):
            saved = _allocate(weight, min(n, plan.kept_tokens), plan, saved)
        self._kept = saved or Kept()
        self.home = self._kept.home if overwrite else None
        self._direct = plan.scale_inputs and self._kept.tokens > 0
        self._overwrite = overwrite and not self._direct
        grad = grad[:1] if plan.scale_inputs else grad
        self.dtype, self._inputs, self._stats, self._plain = weight.dtype, inputs, stats, len(grad) == 1
        self.unit = _unit(grad, transform) if weight.dtype == torch.float16 else None
        self._rates = coefficients(grad if self.unit is None else grad / self.unit, stats)
        self.factors = self._row_factors() if self._direct else None
        height, width = tile_shape(n, vocabulary, plan.chunk_tokens * vocabulary)
        self.grid = self._grid(n, vocabulary, height, width)
        # tiles of logits to compute again, and of gradients that cannot be written where numerators are
        again = n > self._kept.tokens
        size = height * padded(width)
        self._scratch = x.new_empty(size if again else 0, dtype=torch.float32)
        self._gradients = self._scratch
        if self.dtype != torch.float32 or not again:
            self._gradients = x.new_empty(size if again or not (self._direct or overwrite) else 0)

    def _row_factors(self) -> Tensor:
        """What is still to be multiplied into each row of numerators, [n]; rows computed again are complete."""
        _, _, slope = launch.factors(self._inputs.transform)
        factors = torch.ones_like(self._stats[0])
        for part in self._kept.parts:
            torch.mul(self._rates[part.rows, 1] * slope, part.scales, out=factors[part.rows])
        return factors

    def _grid(self, n: int, vocabulary: int, height: int, width: int) -> Grid:
        parts, in_place = self._kept.parts, self._direct or self._overwrite
        whole = in_place and self._kept.tokens == n and len(parts) == 1 and parts[0].in_whole_rows()
        # with a unit each gradient of the head is summed in float32, which should take no more than a span of it
        if whole and self.unit is None:
            return Grid([slice(0, n)], [slice(0, vocabulary)])
        slabs = [
            rows
            for part in parts
            for rows in slices(
                part.rows.stop, max(1, part.rows.stop) if in_place else height, part.rows.start
            )
        ]
        slabs += slices(n, height, self._kept.tokens)
        return Grid(slabs, list(slices(vocabulary, width)))

    def gradient(self, rows: slice, span: slice) -> Tensor:
        """Of the raw logits of a tile, divided by `unit` and for kept ones by `factors`; valid until the next call."""
        x, weight, bias, targets, transform = self._inputs
        part, shape = self._kept.part(rows), (rows.stop - rows.start, span.stop - span.start)
        scales = None
        if part is None:
            tile = _matrix(self._scratch, *shape)
            matmul(x[rows], weight[span].T, out=tile)
        else:
            tile, scales = part.tile(rows, span), part.scales[part.within(rows)]
            if self._direct:
                return tile
        out = tile.view(self.dtype) if part and self._overwrite else _matrix(self._gradients, *shape)
        stats, rates = self._stats[:, rows], self._rates[rows]
        spec = TileSpec(targets[rows], span.start, transform)
        launch.differentiate_tile(tile, out, bias, spec, stats, rates, self._plain, scales)
        return out


def _allocate(weight: Tensor, tokens: int, plan: Plan, memory: Tensor | None) -> Kept:
    """Memory for the numerators of so many tokens: `memory`, [at least so many, columns], if it has any, or new."""
    if tokens == 0:
        return Kept()
    (vocabulary, width), dtype = weight.shape, kept_dtype(weight.dtype)
    if memory is not None and len(memory):
        return Kept((_whole_rows(memory[:tokens], slice(0, tokens), weight, plan),))
    parts, home, first = [], None, 0
    if plan.head_tokens and weight.requires_grad:
        first = min(tokens, plan.head_tokens, tokens_in_gradient(vocabulary, width))
        home = torch.empty_like(weight, memory_format=torch.contiguous_format)
        columns = tile_columns(vocabulary)
        shape = (-(-vocabulary // columns), first, padded(columns))
        tiles = home.view(_numerator_dtype(weight, plan)).as_strided(shape, (columns * width, shape[2], 1))
        parts.append(Part(slice(0, first), tiles, weight.new_empty(first, dtype=torch.float32)))
    if first < tokens:
        columns = kept_columns(weight.dtype, vocabulary, "triton")
        memory = weight.new_empty(tokens - first, columns, dtype=dtype)
        parts.append(_whole_rows(memory, slice(first, tokens), weight, plan))
    return Kept(tuple(parts), home)


def _whole_rows(memory: Tensor, rows: slice, weight: Tensor, plan: Plan) -> Part:
    """Memory [m, columns] as rows of numerators, each with its scale behind."""
    width = tile_columns(len(weight))
    shape = (-(-len(weight) // width), len(memory), padded(width))
    end = shape[0] * shape[2]
    scales = memory[:, end : end + 4 // memory.element_size()].view(torch.float32)[:, 0]
    tiles = memory.view(_numerator_dtype(weight, plan)).as_strided(shape, (shape[2], memory.stride(0), 1))
    return Part(rows, tiles, scales)


def _numerator_dtype(weight: Tensor, plan: Plan) -> torch.dtype:
    # float16 rather than bfloat16 where a pass follows, which multiplies and rounds once more
    return torch.float16 if weight.dtype == torch.bfloat16 and not plan.scale_inputs else weight.dtype


def _unit(grad: Tensor, transform: LogitTransform) -> Tensor:
    """Divisor of the gradients of float16 logits: the largest comes near 2**15, and small ones do not vanish."""
    # |p (log p + H)| < 16 for any vocabulary that fits into memory, |2 (p**2 / sum p**2 - p)| <= 2
    most = (1, 1, 16, 2, 0)[: len(grad)]
    # added one by one: a tensor of the factors would have to be copied to the device
    bound = sum((row * factor for row, factor in zip(grad.abs(), most, strict=True)), grad.new_zeros(1))
    bound = torch.nn.functional.pad(bound, (0, 1)).amax()
    return (bound * (transform.factor / 2**15)).clamp_min(1e-30)


def _matrix(memory: Tensor, rows: int, columns: int) -> Tensor:
    """The first elements of `memory` as a matrix with aligned rows, which wide loads and fast matmuls need."""
    return memory[: rows * padded(columns)].view(rows, padded(columns))[:, :columns]
