"""The ops of `naive` some tokens at a time, in plain torch or C: no float32 [N, V] is ever stored.

`token_forward` and `token_backward` start from logits. The two classes of tiles are for `linear`: a tile stays in a
CPU's cache from one matmul to the next.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prefloss.kernels import kept, matmul, softmax
from prefloss.kernels.cpu.native import PANEL
from prefloss.kernels.kept import Kept
from prefloss.kernels.naive import LogitTransform, compute_dtype, no_autocast
from prefloss.kernels.plan import Plan
from prefloss.kernels.tiles import (
    CPU_MATMUL_ELEMENTS,
    Finished,
    Grid,
    LinearInputs,
    Numerators,
    TileSpec,
    even,
    on_cpu,
    rows_of,
    slices,
)

# Tokens of a tile at most, and columns at least where the vocabulary has them: enough for the matmuls.
MOST_ROWS, LEAST_COLUMNS = 2048, 1024
# Elements of the rows of the head that are looked up for targets at a time, on a CPU and on an accelerator.
_TARGET_ELEMENTS, _DEVICE_TARGET_ELEMENTS = 2**20, 2**26


def token_forward(
    logits: Tensor, targets: Tensor, transform: LogitTransform, chunk_tokens: int, outputs: int
) -> Tensor:
    """Statistics [2 or 5, N] of logits [..., V] and N targets, negative at those to leave out."""
    dtype = compute_dtype(logits.dtype)
    stats = torch.zeros(max(2, outputs), len(targets), dtype=dtype, device=logits.device)
    # autograd is off in here already, but torch.compile of older torch traces this with it on
    with torch.no_grad(), no_autocast(logits.device):
        for part, rows in _row_slices(logits, chunk_tokens):
            if not _all_ignored(targets[rows]):
                sums = softmax.new_sums(len(part), part)
                softmax.fold(part, TileSpec(targets[rows], 0, transform), sums, outputs > 2)
                softmax.finish(sums, targets[rows], stats[:, rows])
        if not on_cpu(logits):
            # mistakes, which a CPU has reported before
            stats[0].masked_fill_(targets > logits.shape[-1], torch.nan)
    return stats


def token_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    transform: LogitTransform,
    chunk_tokens: int,
    over_logits: bool = False,
) -> Tensor:
    """Gradient of logits [..., V]; `over_logits` writes it over them if their rows allow it."""
    over_logits = over_logits and logits.is_contiguous()
    d_logits = logits if over_logits else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    d_rows = d_logits.view(-1, logits.shape[-1])
    rates, plain = softmax.coefficients(grad, stats), len(grad) == 1
    with no_autocast(logits.device):
        for part, rows in _row_slices(logits, chunk_tokens):
            if _all_ignored(targets[rows]):
                d_rows[rows].zero_()
                continue
            spec = TileSpec(targets[rows], 0, transform)
            softmax.differentiate(
                part, d_rows[rows], spec, stats[:, rows], rates[rows], plain, fresh=not over_logits
            )
    if not over_logits:
        return d_logits
    # autograd then raises for any op that saved the logits for its own backward pass
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def _all_ignored(targets: Tensor) -> bool:
    """Whether no row counts; False where an accelerator would have to wait for the answer."""
    return on_cpu(targets) and not (targets >= 0).any()


def _row_slices(logits: Tensor, chunk_tokens: int) -> Iterator[tuple[Tensor, slice]]:
    """[..., V] as views [m, V] in order, with the slice of all rows that each is."""
    start = 0
    for matrix in _matrices(logits):
        for part in slices(len(matrix), chunk_tokens):
            yield matrix[part], slice(start + part.start, start + part.stop)
        start += len(matrix)


def _matrices(x: Tensor) -> list[Tensor]:
    """[..., V] as [n, V] views in order of rows: one, or several if the strides (a shift) do not allow one."""
    try:
        return [x.view(-1, x.shape[-1])]
    except RuntimeError:
        return [matrix for part in x.unbind() for matrix in _matrices(part)]


class _Tiles:
    """What both passes share: the tiles, and a buffer for the logits or codes of one, allocated at first use."""

    def __init__(self, inputs: LinearInputs, plan: Plan) -> None:
        self.grid = _grid(len(inputs.x), inputs.weight, plan)
        # whether projections are scored in the cache and stored as codes if at all
        self._fused = softmax.projects(inputs.x, inputs.weight, inputs.transform)
        self._inputs = inputs
        self._scratch: Tensor | None = None

    def _part(self, rows: slice, span: slice) -> tuple[Tensor, Tensor, Tensor | None, TileSpec]:
        """Hidden states, weight and bias of a tile, and its spec."""
        x, weight, bias, targets, transform = self._inputs
        spec = TileSpec(targets[rows], span.start, transform)
        return x[rows], weight[span], None if bias is None else bias[span], spec

    def _tile(self, rows: int, columns: int) -> Tensor:
        """The scratch of a tile's logits, [rows, columns], or of its codes."""
        if self._fused:
            columns = softmax.code_columns(columns)
        if self._scratch is None:
            x, (height, width) = self._inputs.x, (self.grid.height, self.grid.width)
            size = height * (softmax.code_columns(width) if self._fused else width)
            self._scratch = x.new_empty(size, dtype=torch.int16 if self._fused else compute_dtype(x.dtype))
        return self._scratch[: rows * columns].view(rows, columns)


class ForwardTiles(_Tiles):
    """Forward pass of `linear`: `order` has slabs of tokens with their spans, `kept` logits for the backward pass."""

    def __init__(self, inputs: LinearInputs, plan: Plan, outputs: int, memory: Tensor | None) -> None:
        super().__init__(inputs, plan)
        spans, x = self.grid.spans, inputs.x
        self.order = [(slab, spans) for slab in self.grid.slabs]
        self.kept = Kept()
        if plan.scheme == "keep":
            tokens = min(len(x), plan.kept_tokens)
            if memory is None or not len(memory):
                self.kept = kept.allocate(x, inputs.weight, tokens, spans)
            else:
                self.kept = kept.kept_in(memory, tokens, spans, x.dtype)
        self._more, self._unscaled = outputs > 2, plan.scheme == "unscaled"

    def new_sums(self, rows: slice) -> Tensor:
        """The sums of a slab before its first tile."""
        return softmax.new_sums(rows.stop - rows.start, self._inputs.x)

    def fold(self, rows: slice, span: slice, sums: Tensor) -> Numerators | None:
        """Add a tile to the sums of its rows; "keep" stores it, "unscaled" returns its numerators."""
        z, before = None, sums[:, 0].clone() if self._unscaled else sums
        for part, tile in self.kept.tiles(rows, span):
            z = self._fold(part, span, sums[part.start - rows.start : part.stop - rows.start], tile)
        if z is None or not self._unscaled:
            return None
        values = self._numerators(z, rows, span, sums)
        if span.start == 0:
            return Numerators(values, None)
        # the sum is 0 before the first finite logit, and -inf - -inf is NaN
        factors = torch.where(before == -torch.inf, 0, (before - softmax.finite(sums[:, 0])).exp())
        return Numerators(values, factors.to(compute_dtype(self._inputs.x.dtype)))

    def _fold(self, rows: slice, span: slice, sums: Tensor, tile: Tensor | None) -> Tensor | None:
        """The logits or codes of a tile, in `tile` to be kept, or in scratch; None if they are stored nowhere."""
        x, weight, bias, spec = self._part(rows, span)
        if self._fused:
            if tile is None and self._unscaled:
                tile = self._tile(len(x), len(weight))
            softmax.project(x, weight, bias, spec, sums, self._more, tile)
            return tile
        raw = tile is not None and tile.dtype == compute_dtype(x.dtype)
        z = tile if tile is not None and raw else self._tile(len(x), len(weight))
        matmul.project(x, weight, bias, z)
        softmax.fold(z, spec, sums, self._more, overwrite=tile is None and not self._unscaled)
        if tile is not None and not raw:
            softmax.encode(z, spec.transform, softmax.finite(sums[:, 0]).to(z.dtype), tile)
        return z

    def _numerators(self, z: Tensor, rows: slice, span: slice, sums: Tensor) -> Tensor:
        _, weight, _, spec = self._part(rows, span)
        dtype = compute_dtype(weight.dtype)
        # of each row 1 for p, and for the target -expm1(0)
        rates = torch.tensor((-1, 1, 0, 0), dtype=dtype, device=z.device).expand(len(z), 4)
        peak = softmax.finite(sums[:, 0])
        stats = torch.stack((torch.zeros_like(peak), peak)).to(dtype)
        out = softmax.place_over(z, matmul.gradient_dtype(weight), len(weight))
        return softmax.differentiate(z, out, spec, stats, rates, True)

    def finish(self, rows: slice, sums: Tensor, stats: Tensor) -> Finished:
        """Statistics of a slab whose tiles have all been added."""
        softmax.finish(sums, self._inputs.targets[rows], stats)
        return Finished(1 / sums[:, 1], sums[:, 4])


class BackwardTiles(_Tiles):
    """Backward pass of `linear`: gradients of the logits in `dtype`, a tile of `grid` at a time.

    `home` is memory for the gradient of the weight, or None; for `unit` and `factors` see `Gradients`.
    """

    unit = factors = None

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
        super().__init__(inputs, plan)
        x, spans = inputs.x, self.grid.spans
        self.dtype = matmul.gradient_dtype(x)
        if isinstance(saved, Tensor):
            saved = kept.kept_in(saved, min(len(x), plan.kept_tokens), spans, x.dtype)
        self._kept = Kept() if saved is None else saved
        home = self._kept.home
        self.home = home.view(x.dtype) if overwrite and home is not None else None
        self._stats, self._rates, self._plain = stats, softmax.coefficients(grad, stats), len(grad) == 1
        self._memory = x.new_empty(self.grid.height * self.grid.width, dtype=self.dtype)

    def gradient(self, rows: slice, span: slice) -> Tensor:
        """Of the raw logits of a tile, [m, w]; valid until the next call."""
        m, w = rows.stop - rows.start, span.stop - span.start
        dz = self._memory[: m * w].view(m, w)
        for part, tile in self._kept.tiles(rows, span):
            out = dz[part.start - rows.start : part.stop - rows.start]
            z = self._logits(part, span, out) if tile is None else tile
            spec = TileSpec(self._inputs.targets[part], span.start, self._inputs.transform)
            softmax.differentiate(z, out, spec, self._stats[:, part], self._rates[part], self._plain)
        return dz

    def _logits(self, rows: slice, span: slice, out: Tensor) -> Tensor:
        """Computed again, raw or as codes; in `out` if that has their precision."""
        x, weight, bias, spec = self._part(rows, span)
        if not self._fused:
            raw = out.dtype == compute_dtype(x.dtype)
            return matmul.project(x, weight, bias, out if raw else self._tile(len(x), len(weight)))
        z = self._tile(len(x), len(weight))
        # the statistics are known, so these sums are not read
        softmax.project(x, weight, bias, spec, softmax.new_sums(len(x), x), False, z)
        return z


def scale_rows(rows: Tensor, by: Tensor) -> None:
    """Multiply rows [m, H] by a number each."""
    if not on_cpu(rows):
        # an accelerator would have to wait for the indices
        rows.mul_(by[:, None])
        return
    index = torch.nonzero(by != 1).squeeze(-1)
    rows.index_copy_(0, index, rows[index].mul_(by[index, None]))


def scale_and_add_targets(rows: Tensor, by: Tensor, weight: Tensor, targets: Tensor, rates: Tensor) -> None:
    """The same, and add the rows of the weight [V, H] of the targets, [m], times `rates`; nothing for others."""
    rows.mul_(by[:, None])
    owned = (targets >= 0) & (targets < len(weight))
    targets, rates = torch.where(owned, targets, 0), torch.where(owned, rates, 0)
    size = rows_of(rows, _TARGET_ELEMENTS if on_cpu(rows) else _DEVICE_TARGET_ELEMENTS)
    for part in slices(len(rows), size):
        rows[part].addcmul_(weight[targets[part]].to(rows.dtype), rates[part, None])


def _grid(n: int, weight: Tensor, plan: Plan) -> Grid:
    """The fewest tiles of as many logits as `plan.chunk_tokens` tokens have, all of about one size."""
    vocabulary, width = weight.shape
    elements, least = plan.chunk_tokens * vocabulary, min(vocabulary, LEAST_COLUMNS)
    height = even(n, min(MOST_ROWS, elements // least))
    # A span of the head, or of its gradient, is no larger than a tile may be either. Few tokens do not fill a tile, and
    # many narrow spans would take longer, except of a head that is converted and should then be in the cache.
    converted = weight.dtype != compute_dtype(weight.dtype) and not matmul.has_mixed_matmul(weight)
    span = elements if converted else max(elements, CPU_MATMUL_ELEMENTS)
    most = min(elements // height, max(least, span // max(1, width)))
    columns = even(vocabulary, max(most, PANEL))
    # a multiple of a panel of codes
    return Grid(list(slices(n, height)), list(slices(vocabulary, columns + -columns % PANEL)))
