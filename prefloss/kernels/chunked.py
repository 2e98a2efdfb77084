"""The ops of `naive` a slice of tokens at a time: no float32 [N, V] is ever stored, unless it is asked for.

Forward keeps a few numbers per token. What else it keeps is the scheme of the linear op (n tokens that count, a
head matmul is 2 n V H operations):

- "unscaled", for a frozen head: the gradient of each log-prob in its hidden state, [n, H]. It depends on that token
  alone, so backward only scales it. Two matmuls, one slice of memory, any loss.
- "keep": the logits of as many tokens as `kept_tokens` says, in float32, or for half precision their log-probs in 16
  bits (`rows.encode`). Backward writes the gradient over them. Three matmuls.
- "recompute": nothing; backward computes the logits of each slice again. Four matmuls.
- "score": nothing, for there is no gradient. One matmul.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prefloss.kernels import native
from prefloss.kernels import rows as row_ops
from prefloss.kernels.naive import LogitTransform, compute_dtype, no_autocast
from prefloss.kernels.rows import has_mixed_matmul, matmul, on_cpu, place_over, rows_of, slices

Gradients = tuple[Tensor | None, ...]
Scheme = Literal["score", "unscaled", "keep", "recompute"]

# Elements of the slice of logits between two matmuls, which must be large to keep a device busy: 2**26 are
# 256 MiB of float32, or 512 rows of a vocabulary of 128k.
_MATMUL_ELEMENTS = 2**26
# A CPU is busy with fewer: 32 MiB, but not under 256 rows.
_CPU_MATMUL_ELEMENTS, _CPU_MATMUL_ROWS = 2**23, 256
# Elements of the head, or of its gradient, that are converted at a time, 16 MiB.
_HEAD_ELEMENTS = 2**22
# Rows of hidden states that pass over the head together where no logits are stored: they stay in the cache.
_FUSED_ROWS = 2048
# Rows of the head that are left out of the backward pass together.
_SKIP_COLUMNS = 256


class Path(NamedTuple):
    """How the linear op goes about n tokens."""

    scheme: Scheme = "recompute"
    chunk_tokens: int = 1
    kept_tokens: int = 0
    skip_below: float = 0.0


def default_chunk(tokens: int, vocabulary: int, cpu: bool) -> int:
    """Tokens per slice of the linear op: the fewest slices within the limits, all of about one size."""
    if cpu:
        most = max(_CPU_MATMUL_ROWS, _CPU_MATMUL_ELEMENTS // max(1, vocabulary))
    else:
        most = max(1, _MATMUL_ELEMENTS // max(1, vocabulary))
    parts = max(1, -(-tokens // most))
    return max(1, -(-tokens // parts))


def token_stats(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    chunk_tokens: int | None = None,
    outputs: int = 1,
    inplace_backward: bool = False,
) -> Tensor:
    """Statistics of each target: [..., V] logits and [...] targets -> [outputs, ...], 0 at ignored targets.

    `outputs` is 1 for log-probs alone or 5 for all of `rows.STATS`.
    """
    if chunk_tokens is None:
        chunk_tokens = rows_of(logits, _MATMUL_ELEMENTS)
    flat = targets.reshape(-1)
    safe = torch.where(flat != ignore_index, flat, -1)
    stats = _TokenStats.apply(logits, safe, transform, chunk_tokens, outputs, inplace_backward)
    return stats.reshape(outputs, *targets.shape)


def token_logps(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-prob of each target: [..., V] logits and [...] targets -> [...], 0 at ignored targets."""
    return token_stats(logits, targets, transform, ignore_index, chunk_tokens)[0]


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    choose: Callable[[int], Path],
    outputs: int = 1,
) -> Tensor:
    """The same with logits = hidden @ weight.T + bias, for [..., H] hidden, [V, H] weight and [V] bias.

    `choose` is told how many tokens count.
    """
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    # the number of kept rows sizes the matmuls, so on an accelerator this waits for the targets, once
    kept = torch.nonzero(flat_targets != ignore_index).squeeze(-1)
    path = choose(len(kept))
    stats = _LinearTokenStats.apply(
        flat_hidden, weight, bias, flat_targets[kept], kept, transform, path, outputs
    )
    return stats.reshape(outputs, *targets.shape)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    chunk_tokens: int | None = None,
    scheme: Scheme = "recompute",
    kept_tokens: int = 0,
) -> Tensor:
    """Log-probs alone, by one scheme."""

    def choose(tokens: int) -> Path:
        chunk = default_chunk(tokens, len(weight), on_cpu(hidden)) if chunk_tokens is None else chunk_tokens
        return Path(scheme, chunk, kept_tokens)

    return linear_token_stats(hidden, weight, bias, targets, transform, ignore_index, choose)[0]


class _NoSecondGradient(torch.autograd.Function):
    """Passes a gradient on; an error for whoever differentiates it."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("impl: 'chunked' can be differentiated once; 'naive' gives second derivatives")


def _differentiable_once(backward: Callable[[Any, Tensor], Gradients]) -> Callable[[Any, Tensor], Gradients]:
    """Like torch's once_differentiable, which lets a second derivative be 0 where `grad` is a constant."""

    @functools.wraps(backward)
    def guarded(ctx: Any, grad: Tensor) -> Gradients:
        with torch.no_grad():
            gradients = backward(ctx, grad)
        if not torch.is_grad_enabled():
            return gradients
        depends_on = [x for x in (grad, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(None if g is None else _NoSecondGradient.apply(g, *depends_on) for g in gradients)

    return guarded


class _TokenStats(torch.autograd.Function):
    """Logits [..., V] and N targets, -1 at those to leave out -> [outputs, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        chunk_tokens: int,
        outputs: int,
        inplace_backward: bool,
    ) -> Tensor:
        stats = token_forward(logits, targets, transform, chunk_tokens, outputs)
        ctx.save_for_backward(logits, targets, stats)
        ctx.transform, ctx.chunk_tokens, ctx.inplace = transform, chunk_tokens, inplace_backward
        # a copy is returned, so that the caller may write over the result
        return stats[:outputs].clone()

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        logits, targets, stats = ctx.saved_tensors
        d_logits = token_backward(
            grad, logits, targets, stats, ctx.transform, ctx.chunk_tokens, over_logits=ctx.inplace
        )
        return (d_logits, *(None,) * 5)


def token_forward(
    logits: Tensor, targets: Tensor, transform: LogitTransform, chunk_tokens: int, outputs: int
) -> Tensor:
    """Statistics [2 or 5, N] of logits [..., V]."""
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
    chunk_tokens: int,
    over_logits: bool = False,
) -> Tensor:
    """Gradient of logits [..., V], written over them if that is wanted and their rows allow it."""
    over_logits = over_logits and logits.is_contiguous()
    d_logits = logits if over_logits else native.empty(logits.shape, logits.dtype, logits.device)
    d_rows = d_logits.view(-1, logits.shape[-1])
    rates = row_ops.coefficients(grad, stats)
    with no_autocast(logits.device):
        for part, rows in _row_slices(logits, chunk_tokens):
            out = d_rows[rows]
            if _known_to_be_ignored(targets[rows]):
                out.zero_()
                continue
            row_ops.differentiate(
                part, out, targets[rows], transform, stats[:, rows], rates[rows], len(grad) == 1
            )
    if not over_logits:
        return d_logits
    # whoever saved the logits for its own backward pass is told that they are gone
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


class _LinearTokenStats(torch.autograd.Function):
    """Hidden [N, H], weight [V, H], bias [V] and the n targets that count, at rows `kept` -> [outputs, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        kept: Tensor,
        transform: LogitTransform,
        path: Path,
        outputs: int,
    ) -> Tensor:
        x = hidden.index_select(0, kept)
        stats, saved = linear_forward(x, weight, bias, targets, transform, path, outputs)
        ctx.save_for_backward(hidden, weight, bias, targets, kept, stats)
        # not through save_for_backward: the backward pass writes over it
        ctx.saved, ctx.path, ctx.transform = saved, path, transform
        return stats.new_zeros(outputs, len(hidden)).index_copy_(1, kept, stats[:outputs])

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        hidden, weight, bias, targets, kept, stats = ctx.saved_tensors
        path, saved = ctx.path, ctx.saved
        if saved is None and path.scheme == "keep":
            # a second backward pass, after the first wrote over what was kept
            path = path._replace(scheme="recompute", kept_tokens=0)
        if path.scheme == "keep":
            ctx.saved = None
        x = hidden if path.scheme == "unscaled" else hidden.index_select(0, kept)
        d_x, d_weight, d_bias = linear_backward(
            grad[:, kept],
            x,
            weight,
            bias,
            targets,
            stats,
            saved,
            ctx.transform,
            path,
            ctx.needs_input_grad[:3],
        )
        d_hidden = None if d_x is None else torch.zeros_like(hidden).index_copy_(0, kept, d_x)
        return (d_hidden, d_weight, d_bias, *(None,) * 5)


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    path: Path,
    outputs: int,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [n, H] -> statistics [2 or 5, n], and what the scheme keeps for the backward pass, in `room`."""
    n, dtype = len(x), compute_dtype(x.dtype)
    stats = torch.zeros(max(2, outputs), n, dtype=dtype, device=x.device)
    kept_tokens = min(n, path.kept_tokens) if path.scheme == "keep" else 0
    unscaled = path.scheme == "unscaled"
    saved = _room_to_keep(x, weight, path.scheme, kept_tokens) if room is None or not len(room) else room
    fused = native.projects(x, weight)
    # what is kept is filled at once where nothing else of its size is needed
    raw = kept_tokens > 0 and (fused or kept_dtype(x.dtype) == dtype)
    chunk_tokens = max(path.chunk_tokens, _FUSED_ROWS) if fused and not unscaled else path.chunk_tokens
    needs_scratch = not raw or kept_tokens < n
    scratch = None
    if needs_scratch and (unscaled or not fused):
        scratch = _scratch(n, weight, chunk_tokens, fused)
    with torch.no_grad(), no_autocast(x.device):
        for rows in _parts(n, kept_tokens, chunk_tokens, whole=raw and on_cpu(x)):
            keep, m = rows.start < kept_tokens, rows.stop - rows.start
            z = saved[rows] if saved is not None and raw and keep else None if scratch is None else scratch[:m]
            y, part = targets[rows], stats[:, rows]
            if fused:
                row_ops.project(x[rows], weight, bias, y, transform, part, z)
            else:
                assert z is not None
                _project(x[rows], weight, bias, z)
                row_ops.score(z, y, transform, part, overwrite=not (keep or unscaled))
            if saved is None or z is None:
                continue
            if unscaled:
                dz = _differentiate(z, weight, y, transform, part)
                _times_head(dz, weight, saved[rows], _columns(dz, path.skip_below))
            elif keep and not raw:
                row_ops.encode(z, transform, part[1], saved[rows])
    return stats, saved


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Tensor,
    saved: Tensor | None,
    transform: LogitTransform,
    path: Path,
    needs: tuple[bool, ...],
    overwrite: bool = True,
    rounded: bool = True,
) -> Gradients:
    """Gradients of hidden states [n, H], weight and bias; the scheme "keep" may write over `saved`.

    `rounded` to the dtype of x is the first, or left in float32 for the sum over processes.
    """
    need_x, need_weight, need_bias = needs
    if path.scheme == "unscaled":
        if saved is None:
            # no token counts
            return torch.zeros_like(x), None, None
        return (saved * grad[0].unsqueeze(-1)).to(x.dtype), None, None
    n, dtype = len(x), compute_dtype(x.dtype)
    kept_tokens = 0 if saved is None else len(saved)
    # gradients as wide as what was kept are written over it, all at once
    whole = overwrite and saved is not None and saved.element_size() == _gradient_dtype(x).itemsize
    parts = list(_parts(n, kept_tokens, path.chunk_tokens, whole))
    fused = native.projects(x, weight)
    scratch = _scratch(n, weight, path.chunk_tokens, fused) if kept_tokens < n else None
    again = torch.empty(2, path.chunk_tokens, dtype=dtype, device=x.device)
    rates = row_ops.coefficients(grad, stats)
    d_x = torch.empty(x.shape, dtype=x.dtype if rounded else dtype, device=x.device) if need_x else None
    d_weight = _HeadGradient(weight, len(parts), path.skip_below > 0) if need_weight else None
    d_bias = torch.zeros(len(weight), dtype=dtype, device=x.device) if need_bias else None
    with no_autocast(x.device):
        for rows in parts:
            m = rows.stop - rows.start
            kept = saved is not None and rows.start < kept_tokens
            if saved is not None and kept:
                z = saved[rows] if overwrite else saved[rows].clone()
            else:
                assert scratch is not None
                z = scratch[:m]
                if fused:
                    row_ops.project(x[rows], weight, bias, targets[rows], transform, again[:, :m], z)
                else:
                    _project(x[rows], weight, bias, z)
            dz = _differentiate(
                z, weight, targets[rows], transform, stats[:, rows], rates[rows], len(grad) == 1
            )
            columns = _columns(dz, path.skip_below, grad[0, rows])
            if d_bias is not None:
                d_bias += dz.sum(0, dtype=dtype)
            if d_x is not None:
                d_rows = torch.empty(m, x.shape[1], dtype=dtype, device=x.device)
                d_x[rows] = _times_head(dz, weight, d_rows, columns)
            if d_weight is not None:
                d_weight.add(dz, x[rows], columns)
    return (
        d_x,
        None if d_weight is None else d_weight.rounded(),
        None if d_bias is None else d_bias.to(x.dtype),
    )


def _parts(n: int, kept_tokens: int, chunk_tokens: int, whole: bool) -> Iterator[slice]:
    """Slices of the tokens, none of which lies on both sides of `kept_tokens`."""
    yield from slices(kept_tokens, max(1, kept_tokens) if whole else chunk_tokens)
    yield from slices(n, chunk_tokens, kept_tokens)


def _room_to_keep(x: Tensor, weight: Tensor, scheme: Scheme, kept_tokens: int) -> Tensor | None:
    dtype = compute_dtype(x.dtype)
    if scheme == "unscaled":
        return torch.empty(len(x), weight.shape[1], dtype=dtype, device=x.device)
    if scheme != "keep" or kept_tokens == 0:
        return None
    return native.empty((kept_tokens, kept_columns(x.dtype, len(weight))), kept_dtype(x.dtype), x.device)


def kept_columns(dtype: torch.dtype, vocabulary: int) -> int:
    """Elements per token of what the scheme "keep" holds."""
    return row_ops.code_columns(vocabulary) if kept_dtype(dtype) == torch.int16 else vocabulary


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the scheme "keep" holds logits of that precision: as they are, or log-probs in 16 bits."""
    return torch.int16 if dtype.itemsize == 2 else dtype


def _gradient_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the gradient of the logits enters the matmuls of the backward pass."""
    # A float32 matmul takes 2 (CPU) to 10 (GPU) times as long, so one factor is rounded to bfloat16, once, and the
    # sums stay in float32. In float16 the small entries would vanish.
    rounds = x.dtype == torch.bfloat16 and _has_mixed_matmul(x)
    return torch.bfloat16 if rounds else compute_dtype(x.dtype)


def _differentiate(
    z: Tensor,
    weight: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    stats: Tensor,
    rates: Tensor | None = None,
    plain: bool = True,
) -> Tensor:
    """Gradient of the logits or codes in z, over them where it fits; of each log-prob itself without `rates`."""
    if rates is None:
        rates = row_ops.coefficients(torch.ones_like(stats[:1]), stats)
    wanted = _gradient_dtype(weight)
    out = place_over(z, wanted, len(weight))
    if z.dtype == torch.float32 and out.data_ptr() != z.data_ptr():
        # plain torch: in place first, or it would need a second float32 block
        row_ops.differentiate(z, z, targets, transform, stats, rates, plain)
        return out.copy_(z)
    return row_ops.differentiate(z, out, targets, transform, stats, rates, plain)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> Tensor:
    """Logits x @ weight.T + bias in the precision of z, which it fills and returns."""
    if x.dtype == z.dtype or _has_mixed_matmul(x):
        _matmul(x, weight.T, out=z)
    else:
        x = x.to(z.dtype)
        for part in slices(len(weight), rows_of(weight, _HEAD_ELEMENTS)):
            _matmul(x, weight[part].to(z.dtype).T, out=z[:, part])
    return z if bias is None else z.add_(bias)


def _columns(dz: Tensor, skip_below: float, grad: Tensor | None = None) -> list[slice] | None:
    """Runs of the vocabulary to multiply by; None for all of it.

    A block is left out if no gradient of a logit in it exceeds `skip_below` times the largest gradient of a log-prob
    in this slice (1 without `grad`). So what is left out of the gradient of a hidden state is at most that times the
    sum of the norms of the rows of the head left out, and likewise for a row of the head.
    """
    if skip_below == 0 or dz.numel() == 0:
        return None
    limit = skip_below * (1.0 if grad is None else grad.abs().max().item())
    largest = torch.maximum(dz.amax(0), -dz.amin(0))
    blocks = torch.nn.functional.pad(largest, (0, -len(largest) % _SKIP_COLUMNS)).view(-1, _SKIP_COLUMNS)
    runs: list[slice] = []
    for block in torch.nonzero(blocks.amax(-1) > limit).squeeze(-1).tolist():
        start, stop = block * _SKIP_COLUMNS, min((block + 1) * _SKIP_COLUMNS, dz.shape[1])
        if runs and runs[-1].stop == start:
            start = runs.pop().start
        runs.append(slice(start, stop))
    return runs


def _times_head(dz: Tensor, weight: Tensor, out: Tensor, columns: list[slice] | None = None) -> Tensor:
    """The gradient of a slice of hidden states, dz @ weight, summed in the precision of `out`."""
    if columns is None and dz.dtype == weight.dtype:
        return _matmul(dz, weight, out=out)
    out.zero_()
    for run in [slice(0, len(weight))] if columns is None else columns:
        if dz.dtype == weight.dtype:
            _matmul(dz[:, run], weight[run], out=out, add=True)
            continue
        for part in slices(run.stop, rows_of(weight, _HEAD_ELEMENTS), run.start):
            out.addmm_(dz[:, part], weight[part].to(dz.dtype))
    return out


class _HeadGradient:
    """Sums dz.T @ x over slices in float32; where there is one slice, it never holds the sum in float32."""

    def __init__(self, weight: Tensor, parts: int, skips: bool = False) -> None:
        self.dtype = compute_dtype(weight.dtype)
        self.weight_dtype = weight.dtype
        self.straight = parts == 1
        dtype = weight.dtype if self.straight else self.dtype
        self.sum = native.empty(weight.shape, dtype, weight.device)
        if skips or not self.straight:
            self.sum.zero_()

    def add(self, dz: Tensor, x: Tensor, columns: list[slice] | None = None) -> None:
        """Add a slice's share, of the rows of the head in `columns` (None for all)."""
        x = x if dz.dtype == x.dtype else x.to(dz.dtype)
        # a sum in float32 inside, rounded once
        rounds = on_cpu(dz) and _has_mixed_matmul(dz) and self.straight
        straight_in = self.sum.dtype == dz.dtype and (dz.dtype == self.dtype or rounds)
        rows = 0 if straight_in else min(len(self.sum), rows_of(self.sum, _HEAD_ELEMENTS))
        room = native.empty((rows, self.sum.shape[1]), self.dtype, dz.device)
        for run in [slice(0, len(self.sum))] if columns is None else columns:
            if straight_in:
                _matmul(dz[:, run].T, x, out=self.sum[run], add=not self.straight)
                continue
            for part in slices(run.stop, rows_of(self.sum, _HEAD_ELEMENTS), run.start):
                block = room[: part.stop - part.start]
                _matmul(dz[:, part].T, x, out=block)
                if self.straight:
                    self.sum[part] = block
                else:
                    self.sum[part] += block

    def rounded(self) -> Tensor:
        """The sum in the dtype of the head."""
        return self.sum.to(self.weight_dtype)


# looked up here, so that tests can put an emulation of the matmul of another device in their place
_matmul, _has_mixed_matmul = matmul, has_mixed_matmul


def _scratch(tokens: int, weight: Tensor, chunk_tokens: int, coded: bool = False) -> Tensor:
    """A slice of logits, or of their codes, to fill again and again: fresh memory costs more than passing over it."""
    rows, vocabulary = min(tokens, chunk_tokens), len(weight)
    if coded:
        return native.empty((rows, row_ops.code_columns(vocabulary)), torch.int16, weight.device)
    return native.empty((rows, vocabulary), compute_dtype(weight.dtype), weight.device)


def _known_to_be_ignored(targets: Tensor) -> bool:
    """Whether no row counts; where an accelerator would have to wait for the answer, False."""
    return on_cpu(targets) and not (targets >= 0).any()


def _row_slices(logits: Tensor, chunk_tokens: int) -> Iterator[tuple[Tensor, slice]]:
    """[..., V] as views [m, V] in order, with the slice of all rows that each is."""
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
