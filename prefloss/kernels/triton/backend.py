"""Tiles of `linear` for Triton: matmuls fill a tile of float32 logits, and a kernel passes over it.

The scheme "keep" keeps the softmax itself, whole rows at a time so that it can be normalised at once; in 16 bits for
half precision.
"""

from __future__ import annotations

from math import e, log2

import torch
from torch import Tensor

from prefloss.kernels.kept import kept_dtype
from prefloss.kernels.matmul import matmul
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.plan import Plan
from prefloss.kernels.softmax import coefficients, finite
from prefloss.kernels.tiles import Grid, LinearInputs, RowSums, TileSpec, even, slices
from prefloss.kernels.triton.kernels import KEPT_SCALE
from prefloss.kernels.triton.launch import differentiate_tile, factors, fold_tile

# Rows of a tile in the forward pass: enough for the matmuls, few enough for long rows.
FORWARD_ROWS = 2048
# If a tile of the backward pass would have fewer columns, it gets fewer rows instead.
BACKWARD_COLUMNS = 2048


class ForwardTiles:
    """Forward pass of `linear` over some tokens and a head; see `chunked.ForwardTiles`, also for the attributes."""

    def __init__(self, inputs: LinearInputs, plan: Plan, outputs: int, memory: Tensor | None) -> None:
        x, weight = inputs.x, inputs.weight
        n, vocabulary, device = len(x), len(weight), x.device
        self._inputs, self._more, self._unscaled = inputs, outputs > 2, plan.scheme == "unscaled"
        self._kept_tokens = min(n, plan.kept_tokens) if plan.scheme == "keep" else 0
        self.kept = memory if memory is not None and len(memory) else _allocate(weight, self._kept_tokens)
        height = max(1, min(n, FORWARD_ROWS))
        width = _even(vocabulary, plan.chunk_tokens * vocabulary // height)
        spans = list(slices(vocabulary, width))
        self.order = [(rows, [slice(0, vocabulary)]) for rows in slices(self._kept_tokens, plan.chunk_tokens)]
        self.order += [(rows, spans) for rows in slices(n, height, self._kept_tokens)]
        self._sums = torch.zeros(5, n, dtype=torch.float32, device=device)
        # the maximum, and the target's logit until a tile has it
        self._sums[0], self._sums[2] = -torch.inf, -torch.inf
        size = max(
            ((rows.stop - rows.start) * _padded(spans[0].stop) for rows, spans in self.order), default=0
        )
        self._scratch = torch.empty(size, dtype=torch.float32, device=device)
        self._factors = torch.empty(size if self._unscaled else 0, dtype=weight.dtype, device=device)

    def new_sums(self, rows: slice) -> RowSums:
        """The sums of a slab before its first tile."""
        _, outer, slope = factors(self._inputs.transform)
        sums = self._sums[:, rows]
        return RowSums(sums, sums[0], sums[1], sums[2], outer, slope / KEPT_SCALE.value)

    def fold(self, rows: slice, span: slice, sums: RowSums) -> Tensor | None:
        """Add a tile to the sums of its rows; "keep" stores its softmax.

        "unscaled" returns the softmax numerators of the tile, 0 at the target, [m, w].
        """
        x, weight, bias, targets, transform = self._inputs
        logits = _matrix(self._scratch, rows.stop - rows.start, span.stop - span.start)
        matmul(x[rows], weight[span].T, out=logits)
        numerators = None
        if self._unscaled:
            numerators = _matrix(self._factors, *logits.shape)
        elif self.kept is not None and rows.start < self._kept_tokens:
            numerators = self.kept[rows]
            # float16 rather than bfloat16, because backward multiplies and rounds once more
            numerators = numerators if numerators.dtype == torch.float32 else numerators.view(torch.float16)
        spec = TileSpec(targets[rows], span.start, transform)
        fold_tile(logits, bias, spec, sums.memory, self._more, numerators, whole=not self._unscaled)
        return numerators if self._unscaled else None

    def finish(self, rows: slice, sums: RowSums, stats: Tensor) -> None:
        """Statistics of a slab whose tiles have all been added."""
        m, s, picked, a, q = sums.memory
        top, log_s = finite(m), s.log()
        # in this order, as in `kernels._store_stats`
        stats[0] = (picked - top) * sums.nats - log_s
        stats[1] = top * sums.nats + log_s
        if len(stats) > 2:
            stats[2] = log_s - a / s / log2(e)
            stats[3] = q.log() - 2 * log_s
            stats[4] = picked >= m


class BackwardTiles:
    """Backward pass of `linear`; see `chunked.BackwardTiles`, also for the attributes.

    The gradients of all kept logits are written over the kept softmax at once if that is allowed.
    """

    home = None

    def __init__(
        self,
        grad: Tensor,
        inputs: LinearInputs,
        stats: Tensor,
        saved: Tensor | None,
        plan: Plan,
        needs: tuple[bool, ...],
        overwrite: bool,
    ) -> None:
        x, weight, _, targets, transform = inputs
        n, vocabulary, device = len(x), len(weight), x.device
        self.dtype, self._inputs, self._stats, self._plain = weight.dtype, inputs, stats, len(grad) == 1
        self._kept = None if saved is None else saved[: min(n, plan.kept_tokens)]
        self._kept_tokens = kept = 0 if self._kept is None else len(self._kept)
        over_kept = overwrite and kept > 0
        self.unit = _unit(grad, transform) if weight.dtype == torch.float16 else None
        self._rates = coefficients(grad if self.unit is None else grad / self.unit, stats)
        self._d_kept = None
        if self._kept is not None and over_kept:
            self._d_kept = self._kept.view(self.dtype)
            spec = TileSpec(targets, 0, transform)
            differentiate_tile(
                self._kept, self._d_kept, None, spec, stats, self._rates, self._plain, kept=True
            )
        elements = plan.chunk_tokens * vocabulary
        height = max(1, min(n - (kept if over_kept else 0), elements // min(vocabulary, BACKWARD_COLUMNS)))
        slabs = [*slices(kept, max(1, kept) if over_kept else height), *slices(n, height, kept)]
        all_over_kept = over_kept and kept == n
        width = vocabulary if all_over_kept else _even(vocabulary, elements // height)
        if needs[1] and (self.unit is not None or len(slabs) != 1):
            # so that the float32 sum of the gradient of a span is no larger than a tile
            width = _even(vocabulary, min(width, elements // max(1, x.shape[1])))
        self.grid = Grid(slabs, list(slices(vocabulary, width)))
        size = 0 if all_over_kept else height * _padded(width)
        self._scratch = torch.empty(size, dtype=torch.float32, device=device)
        self._factors = self._scratch
        if self.dtype != torch.float32:
            self._factors = torch.empty(size, dtype=self.dtype, device=device)

    def gradient(self, rows: slice, span: slice) -> Tensor:
        """Of the raw logits of a tile, divided by `unit`, [m, w]; valid until the next call."""
        x, weight, bias, targets, transform = self._inputs
        kept = rows.start < self._kept_tokens
        if kept and self._d_kept is not None:
            return self._d_kept[rows, span]
        dz = _matrix(self._factors, rows.stop - rows.start, span.stop - span.start)
        if kept and self._kept is not None:
            tile = self._kept[rows, span]
        else:
            tile = _matrix(self._scratch, *dz.shape)
            matmul(x[rows], weight[span].T, out=tile)
        spec = TileSpec(targets[rows], span.start, transform)
        differentiate_tile(tile, dz, bias, spec, self._stats[:, rows], self._rates[rows], self._plain, kept)
        return dz


def _allocate(weight: Tensor, kept_tokens: int) -> Tensor | None:
    """Memory for the softmaxes of so many tokens, [kept_tokens, V]."""
    if kept_tokens == 0:
        return None
    size, dtype = kept_tokens * _padded(len(weight)), kept_dtype(weight.dtype)
    return _matrix(torch.empty(size, dtype=dtype, device=weight.device), kept_tokens, len(weight))


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
    return memory[: rows * _padded(columns)].view(rows, _padded(columns))[:, :columns]


def _padded(columns: int) -> int:
    return -(-columns // 64) * 64


def _even(columns: int, most: int) -> int:
    """Width of the fewest equal tiles of about `most` columns, a multiple of 128 unless there is but one."""
    width = even(columns, max(most, 128))
    return min(columns, -(-width // 128) * 128)
