"""From hidden states to log-probs and back, a tile of logits at a time.

A tile is so many tokens by a span of the vocabulary, and stays in a CPU's cache from one matmul to the next. What
forward keeps for the backward pass its scheme says (`paths`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefloss.kernels import functions, heads, unscaled
from prefloss.kernels import rows as row_ops
from prefloss.kernels.kept import Kept, kept_in, room_to_keep
from prefloss.kernels.naive import LogitTransform, compute_dtype, no_autocast
from prefloss.kernels.native import PANEL
from prefloss.kernels.paths import Path, even
from prefloss.kernels.rows import slices

# Tokens of a tile at most, and columns at least where the vocabulary has them: enough for the matmuls.
_MOST_ROWS, _LEAST_COLUMNS = 2048, 1024


class _Tiling(NamedTuple):
    """How [n, V] is cut: rows of a tile at most, and the spans of the vocabulary."""

    height: int
    spans: list[slice]

    @property
    def columns(self) -> int:
        """Of the widest span."""
        return self.spans[0].stop

    def rows(self, n: int) -> list[slice]:
        """The slices of n tokens."""
        return list(slices(n, self.height))


def _tiling(n: int, weight: Tensor, path: Path) -> _Tiling:
    """The fewest tiles of as many logits as `path.chunk_tokens` tokens have, all of about one size."""
    vocabulary, width = weight.shape
    elements, least = path.chunk_tokens * vocabulary, min(vocabulary, _LEAST_COLUMNS)
    height = even(n, min(_MOST_ROWS, elements // least))
    # nor is a span of the head, or of its gradient, larger
    most = min(elements // height, max(least, elements // max(1, width)))
    columns = even(vocabulary, max(most, PANEL))
    # whole panels, as codes have them
    return _Tiling(height, list(slices(vocabulary, columns + -columns % PANEL)))


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    path: Path,
    outputs: int,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor | Kept | None]:
    """Hidden states [n, H] -> statistics [2 or 5, n], and what the scheme keeps for the backward pass, in `room`."""
    n, dtype = len(x), compute_dtype(x.dtype)
    tiling, head = _tiling(n, weight, path), _Head(weight, bias, transform)
    kept, product = Kept(), None
    if path.scheme == "keep":
        tokens = min(n, path.kept_tokens)
        if room is None or not len(room):
            kept = room_to_keep(x, weight, tokens, tiling.spans)
        else:
            kept = kept_in(room, tokens, tiling.spans, x.dtype)
    elif path.scheme == "unscaled":
        product = torch.zeros(x.shape, dtype=dtype, device=x.device) if room is None else room[:n].zero_()
    stats = torch.empty(max(2, outputs), n, dtype=dtype, device=x.device)
    scratch = _Scratch(x, head, tiling)
    with torch.no_grad(), no_autocast(x.device):
        for rows in tiling.rows(n):
            sums = row_ops.new_sums(rows.stop - rows.start, x)
            for index, span in enumerate(tiling.spans):
                for part, tile in kept.tiles(rows, index):
                    own = sums[part.start - rows.start : part.stop - rows.start]
                    before = own[:, 0].clone()
                    z = head.fold(
                        x[part], targets[part], span, own, len(stats) > 2, tile, scratch, product is not None
                    )
                    if product is not None and z is not None:
                        unscaled.add_numerators(
                            z, weight[span], targets[part], span, transform, before, own, product[part],
                            path.skip_below,
                        )  # fmt: skip
            row_ops.finish(sums, targets[rows], stats[:, rows])
            if product is not None:
                unscaled.finish(product[rows], weight, targets[rows], transform, sums, stats[0, rows])
    return stats, kept if product is None else product


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Tensor,
    saved: Tensor | Kept | None,
    transform: LogitTransform,
    path: Path,
    needs: tuple[bool, ...],
    overwrite: bool = True,
    rounded: bool = True,
) -> functions.Gradients:
    """Gradients of hidden states [n, H], weight and bias; the last may be written over what was kept.

    `rounded` to the dtype of x is the first, or left in float32 for the sum over processes.
    """
    n = len(x)
    tiling, head = _tiling(n, weight, path), _Head(weight, bias, transform)
    if isinstance(saved, Tensor):
        saved = kept_in(saved, min(n, path.kept_tokens), tiling.spans, x.dtype)
    kept = Kept() if saved is None else saved
    home = kept.home.view(weight.dtype) if overwrite and kept.home is not None else None
    rates, slabs = row_ops.coefficients(grad, stats), tiling.rows(n)
    out = heads.Gradients(x, weight, needs, tiling.columns, len(slabs), home, rounded)
    scratch = _Scratch(x, head, tiling) if kept.tokens < n else None
    room = torch.empty(tiling.height * tiling.columns, dtype=heads.gradient_dtype(x), device=x.device)
    with no_autocast(x.device):
        for index, span in enumerate(tiling.spans):
            for rows in slabs:
                dz = room[: (rows.stop - rows.start) * (span.stop - span.start)].view(
                    rows.stop - rows.start, -1
                )
                for part, tile in kept.tiles(rows, index):
                    here = dz[part.start - rows.start : part.stop - rows.start]
                    if tile is None:
                        assert scratch is not None
                        tile = head.logits(x[part], targets[part], span, scratch, here)
                    row_ops.differentiate(
                        tile, here, targets[part], span.start, transform, stats[:, part], rates[part],
                        len(grad) == 1,
                    )  # fmt: skip
                limit = path.skip_below * grad[0, rows].abs().max() if path.skip_below else None
                out.add(rows, span, dz, limit)
            out.finish(span)
    return out.gradients()


class _Head(NamedTuple):
    """A head and what happens to its logits."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform

    def fused(self, x: Tensor) -> bool:
        """Whether a projection is scored while it is in the cache, and leaves it in codes if at all."""
        return row_ops.projects(x, self.weight, self.transform)

    def fold(
        self,
        x: Tensor,
        targets: Tensor,
        span: slice,
        sums: Tensor,
        more: bool,
        tile: Tensor | None,
        scratch: _Scratch,
        needed: bool,
    ) -> Tensor | None:
        """The logits of a tile into the sums of its rows, and into `tile` to be kept, or into scratch.

        Returns:
            Them or their codes if they are `needed`, [m, columns].
        """
        weight, bias = self.weight[span], None if self.bias is None else self.bias[span]
        if self.fused(x):
            if tile is None and needed:
                tile = scratch.tile(len(x), row_ops.code_columns(len(weight)))
            row_ops.project(x, weight, bias, targets, span.start, self.transform, sums, more, tile)
            return tile
        as_it_is = tile is not None and tile.dtype == compute_dtype(x.dtype)
        z = tile if tile is not None and as_it_is else scratch.tile(len(x), len(weight))
        heads.project(x, weight, bias, z)
        row_ops.fold(
            z, targets, span.start, self.transform, sums, more, overwrite=tile is None and not needed
        )
        if tile is not None and not as_it_is:
            row_ops.encode(z, self.transform, row_ops.finite(sums[:, 0]).to(z.dtype), tile)
        return z

    def logits(self, x: Tensor, targets: Tensor, span: slice, scratch: _Scratch, out: Tensor) -> Tensor:
        """The logits of a tile computed again, raw or in codes, in `out` if they have its precision."""
        weight, bias = self.weight[span], None if self.bias is None else self.bias[span]
        if not self.fused(x):
            z = out if out.dtype == compute_dtype(x.dtype) else scratch.tile(len(x), len(weight))
            return heads.project(x, weight, bias, z)
        z = scratch.tile(len(x), row_ops.code_columns(len(weight)))
        # statistics that are known
        sums = row_ops.new_sums(len(x), x)
        row_ops.project(x, weight, bias, targets, span.start, self.transform, sums, False, z)
        return z


class _Scratch:
    """A tile of logits or codes to fill again and again, made when first asked for."""

    def __init__(self, x: Tensor, head: _Head, tiling: _Tiling) -> None:
        fused = head.fused(x)
        columns = row_ops.code_columns(tiling.columns) if fused else tiling.columns
        self.size, self.device = tiling.height * columns, x.device
        self.dtype = torch.int16 if fused else compute_dtype(x.dtype)
        self.memory: Tensor | None = None

    def tile(self, rows: int, columns: int) -> Tensor:
        """Its first elements, [rows, columns]."""
        if self.memory is None:
            self.memory = torch.empty(self.size, dtype=self.dtype, device=self.device)
        return self.memory[: rows * columns].view(rows, columns)
