"""The ops of `naive` a tile of logits at a time: no float32 [N, V] is ever stored, unless it is asked for.

Forward keeps a few numbers per token, and of the linear op what its scheme says (`paths`). A tile is so many tokens
by a span of the vocabulary, and stays in a CPU's cache from one matmul to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prefloss.kernels import functions, heads
from prefloss.kernels import rows as row_ops
from prefloss.kernels.functions import Implementation
from prefloss.kernels.kept import Kept, kept_in, room_to_keep
from prefloss.kernels.naive import LogitTransform, compute_dtype, no_autocast
from prefloss.kernels.paths import MATMUL_ELEMENTS, Path
from prefloss.kernels.rows import on_cpu, place_over, rows_of, slices

# Tokens of a tile at most, and columns at least where the vocabulary has them: enough for the matmuls.
_MOST_ROWS, _LEAST_COLUMNS = 2048, 1024
# Columns of a tile are a multiple of this, as `rows.code_columns` wants.
_COLUMN_STEP = 64
# Elements of the rows of the head of targets that are looked up at a time.
_TARGET_ELEMENTS = 2**20


def token_forward(
    logits: Tensor, targets: Tensor, transform: LogitTransform, chunk_tokens: int | None, outputs: int
) -> Tensor:
    """Statistics [2 or 5, N] of logits [..., V] and N targets, negative at those to leave out."""
    stats = torch.zeros(
        max(2, outputs), len(targets), dtype=compute_dtype(logits.dtype), device=logits.device
    )
    # autograd is off in here already, but torch.compile of older torch traces this with it on
    with torch.no_grad(), no_autocast(logits.device):
        for part, rows in _row_slices(logits, chunk_tokens):
            if not _known_to_be_ignored(targets[rows]):
                row_ops.score(part, targets[rows], transform, stats[:, rows])
    return stats


def token_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    transform: LogitTransform,
    chunk_tokens: int | None,
    over_logits: bool = False,
) -> Tensor:
    """Gradient of logits [..., V], written over them if that is wanted and their rows allow it."""
    over_logits = over_logits and logits.is_contiguous()
    d_logits = logits if over_logits else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    d_rows = d_logits.view(-1, logits.shape[-1])
    rates = row_ops.coefficients(grad, stats)
    with no_autocast(logits.device):
        for part, rows in _row_slices(logits, chunk_tokens):
            out = d_rows[rows]
            if _known_to_be_ignored(targets[rows]):
                out.zero_()
                continue
            row_ops.differentiate(
                part, out, targets[rows], 0, transform, stats[:, rows], rates[rows], len(grad) == 1
            )
    if not over_logits:
        return d_logits
    # whoever saved the logits for its own backward pass is told that they are gone
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


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
    height = max(1, min(n, _MOST_ROWS, elements // least))
    height = -(-n // max(1, -(-n // height)))
    # a span of the head, or of its gradient, is no larger
    most = min(elements // max(1, height), max(least, elements // max(1, width)))
    parts = -(-vocabulary // max(most, _COLUMN_STEP))
    columns = -(-vocabulary // parts)
    columns += -columns % _COLUMN_STEP
    return _Tiling(max(1, height), list(slices(vocabulary, columns)))


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
                        _add_numerators(
                            z, head, targets[part], span, before, own, product[part], path.skip_below
                        )
            row_ops.finish(sums, targets[rows], stats[:, rows])
            if product is not None:
                _finish_product(product[rows], head, targets[rows], sums, stats[0, rows])
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
            row_ops.encode(z, self.transform, _finite(sums[:, 0]).to(z.dtype), tile)
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


def _add_numerators(
    z: Tensor,
    head: _Head,
    targets: Tensor,
    span: slice,
    before: Tensor,
    sums: Tensor,
    product: Tensor,
    skip_below: float,
) -> None:
    """Add exp(z - peak) @ weight, without the target's, to the product [m, H], which was against the peaks `before`."""
    peak = _finite(sums[:, 0])
    moved = torch.nonzero((sums[:, 0] != before) & (before != -torch.inf)).squeeze(-1)
    if len(moved):
        rescale = (before[moved] - peak[moved]).exp().to(product.dtype)
        product.index_copy_(0, moved, product[moved].mul_(rescale[:, None]))
    # of each row 1 for p, and for the target -expm1(0)
    rates = torch.tensor((-1, 1, 0, 0), dtype=product.dtype, device=z.device).expand(len(z), 4)
    stats = torch.stack((torch.zeros_like(peak), peak)).to(product.dtype)
    dz = place_over(z, heads.gradient_dtype(head.weight), span.stop - span.start)
    row_ops.differentiate(z, dz, targets, span.start, head.transform, stats, rates, True)
    weight = head.weight[span]
    if skip_below:
        # of the probability, which is no larger than by the sum so far
        limit = (skip_below * sums[:, 1]).to(product.dtype)
        likely = heads.likely_columns(dz / limit[:, None], 1.0)
        if likely is not None:
            dz, weight = dz.index_select(1, likely), weight.index_select(0, likely)
    heads.add_product(dz, weight, product)


def _finish_product(product: Tensor, head: _Head, targets: Tensor, sums: Tensor, logps: Tensor) -> None:
    """The sum of all numerators @ weight, [m, H] -> d logp / d hidden, in its place."""
    slope = head.transform.slope(sums[:, 4].to(product.dtype))
    product.mul_((-1 / sums[:, 1]).to(product.dtype)[:, None])
    # 1 - p of the target from its log-prob: where p is near 1, 1 - exp(z - lse) lacks the digits
    d_y = -torch.expm1(logps) * slope
    for part in slices(len(product), rows_of(product, _TARGET_ELEMENTS)):
        product[part].addcmul_(head.weight[targets[part]].to(product.dtype), d_y[part, None])


def _finite(peak: Tensor) -> Tensor:
    """0 for a row so far of -inf only: -inf - -inf is NaN."""
    return torch.where(peak == -torch.inf, 0, peak)


def _known_to_be_ignored(targets: Tensor) -> bool:
    """Whether no row counts; where an accelerator would have to wait for the answer, False."""
    return on_cpu(targets) and not (targets >= 0).any()


def _row_slices(logits: Tensor, chunk_tokens: int | None) -> Iterator[tuple[Tensor, slice]]:
    """[..., V] as views [m, V] in order, with the slice of all rows that each is."""
    chunk_tokens = rows_of(logits, MATMUL_ELEMENTS) if chunk_tokens is None else chunk_tokens
    start = 0
    for matrix in _matrices(logits):
        for part in slices(len(matrix), chunk_tokens):
            yield matrix[part], slice(start + part.start, start + part.stop)
        start += len(matrix)


def _matrices(x: Tensor) -> list[Tensor]:
    """[..., V] as [n, V] views in order of rows: one, or several where the strides (a shift) allow no one."""
    try:
        return [x.view(-1, x.shape[-1])]
    except RuntimeError:
        return [matrix for part in x.unbind() for matrix in _matrices(part)]


_implementation = Implementation(token_forward, token_backward, linear_forward, linear_backward)
token_stats, token_logps = _implementation.token_stats, _implementation.token_logps
linear_token_stats = _implementation.linear_token_stats
linear_token_logps = _implementation.linear_token_logps
