"""The ops of `naive` a slice of tokens at a time: no float32 [N, V] is ever stored.

Forward keeps one logsumexp and one log-prob per token; backward computes the logits of each slice again. The
peak is one slice in float32 (two with a softcap) besides the gradients themselves.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prefloss.kernels.naive import LogitTransform, compute_dtype, no_autocast

Gradients = tuple[Tensor | None, ...]

# Elements of the slice of logits between two matmuls, which must be large to keep a device busy: 2**26 are
# 256 MiB of float32, or 512 rows of a vocabulary of 128k.
_MATMUL_ELEMENTS = 2**26
# Elements that a CPU passes over at a time, 8 MiB, so that all but the first pass find them in its cache.
_CACHE_ELEMENTS = 2**21
# Elements of the head, or of its gradient, that are converted at a time, 16 MiB.
_HEAD_ELEMENTS = 2**22


def token_logps(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-prob of each target: [..., V] logits and [...] targets -> [...], 0 at ignored targets."""
    if chunk_tokens is None:
        chunk_tokens = _cache_rows(logits) if _on_cpu(logits) else _rows_of(logits, _MATMUL_ELEMENTS)
    flat_targets = targets.reshape(-1)
    keep = flat_targets != ignore_index
    logps = _TokenLogps.apply(logits, torch.where(keep, flat_targets, 0), keep, transform, chunk_tokens)
    return logps.reshape(targets.shape)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The same with logits = hidden @ weight.T + bias, for [..., H] hidden, [V, H] weight and [V] bias."""
    if chunk_tokens is None:
        chunk_tokens = max(1, _MATMUL_ELEMENTS // weight.shape[0])
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    # the number of kept rows sizes the matmuls, so on an accelerator this waits for the targets, once
    kept = torch.nonzero(flat_targets != ignore_index).squeeze(-1)
    logps = _LinearTokenLogps.apply(
        flat_hidden, weight, bias, flat_targets[kept], kept, transform, chunk_tokens
    )
    return logps.reshape(targets.shape)


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


class _TokenLogps(torch.autograd.Function):
    """Logits [..., V], N targets and whether each counts -> [N]."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, keep: Tensor, transform: LogitTransform, chunk_tokens: int
    ) -> Tensor:
        logps = torch.zeros(targets.shape, dtype=compute_dtype(logits.dtype), device=logits.device)
        lse = torch.zeros_like(logps)
        scratch = _scratch(min(len(keep), chunk_tokens), logits.shape[-1], logits)
        # autograd is off in here already, but torch.compile of older torch traces this with it on
        with torch.no_grad(), no_autocast(logits.device):
            for part, rows in _row_slices(logits, chunk_tokens):
                if not _known_to_be_ignored(keep[rows]):
                    z = scratch[: len(part)].copy_(part)
                    _score_(z, targets[rows], transform, logps[rows], lse[rows])
            logps.masked_fill_(~keep, 0)
        # a copy is saved, so that the caller may write over the result
        ctx.save_for_backward(logits, targets, keep, lse, logps.clone())
        ctx.transform, ctx.chunk_tokens = transform, chunk_tokens
        return logps

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        logits, targets, keep, lse, logps = ctx.saved_tensors
        d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        d_rows = d_logits.view(-1, logits.shape[-1])
        scratch = _scratch(min(len(keep), ctx.chunk_tokens), logits.shape[-1], logits)
        with no_autocast(logits.device):
            for part, rows in _row_slices(logits, ctx.chunk_tokens):
                if _known_to_be_ignored(keep[rows]):
                    d_rows[rows] = 0
                    continue
                z = scratch[: len(part)].copy_(part)
                _differentiate_(z, targets[rows], ctx.transform, logps[rows], lse[rows], grad[rows])
                d_rows[rows] = _clear_(z, ~keep[rows])
        return d_logits, None, None, None, None


class _LinearTokenLogps(torch.autograd.Function):
    """Hidden [N, H], weight [V, H], bias [V] and the n targets that count, at rows `kept` -> [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        kept: Tensor,
        transform: LogitTransform,
        chunk_tokens: int,
    ) -> Tensor:
        logps = torch.zeros(kept.shape, dtype=compute_dtype(hidden.dtype), device=hidden.device)
        lse = torch.zeros_like(logps)
        scratch = _scratch(min(len(kept), chunk_tokens), len(weight), weight)
        with torch.no_grad(), no_autocast(hidden.device):
            for rows in _slices(len(kept), chunk_tokens):
                z = _project(hidden.index_select(0, kept[rows]), weight, bias, scratch)
                _score_(z, targets[rows], transform, logps[rows], lse[rows])
        ctx.save_for_backward(hidden, weight, bias, targets, kept, lse, logps)
        ctx.transform, ctx.chunk_tokens = transform, chunk_tokens
        return logps.new_zeros(len(hidden)).index_copy_(0, kept, logps)

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        hidden, weight, bias, targets, kept, lse, logps = ctx.saved_tensors
        dtype = compute_dtype(hidden.dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # sums over all slices, hence float32; a row of hidden belongs to one slice and is rounded there
        d_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        scratch = _scratch(min(len(kept), ctx.chunk_tokens), len(weight), weight)
        with no_autocast(hidden.device):
            for rows in _slices(len(kept), ctx.chunk_tokens):
                x = hidden.index_select(0, kept[rows])
                z = _project(x, weight, bias, scratch)
                _differentiate_(z, targets[rows], ctx.transform, logps[rows], lse[rows], grad[kept[rows]])
                if d_bias is not None:
                    d_bias += z.sum(0)
                dz = _factor_of_gradients(z, weight)
                if d_hidden is not None:
                    d_hidden.index_copy_(0, kept[rows], _times_head(dz, weight).to(hidden.dtype))
                if d_weight is not None:
                    _add_head_gradient(d_weight, dz, x)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _score_(z: Tensor, targets: Tensor, transform: LogitTransform, logps: Tensor, lse: Tensor) -> None:
    """Raw logits [m, V] -> log-probs and logsumexps [m], written to `logps` and `lse`; overwrites z."""
    for part in _slices(len(z), _cache_rows(z)):
        block = transform.apply_(z[part])
        picked = block.gather(-1, targets[part, None])
        peak = block.amax(-1, keepdim=True)
        log_sum = block.sub_(peak).exp_().sum(-1, keepdim=True).log_()
        # in this order: of two large logits the difference is exact, and small against lse
        logps[part] = picked.sub_(peak).sub_(log_sum).squeeze(-1)
        lse[part] = peak.add_(log_sum).squeeze(-1)


def _differentiate_(
    z: Tensor, targets: Tensor, transform: LogitTransform, logps: Tensor, lse: Tensor, grad: Tensor
) -> None:
    """Raw logits [m, V] -> the gradient of (grad * logps).sum() with respect to them, written over z."""
    for part in _slices(len(z), _cache_rows(z)):
        block, y, g = transform.apply_(z[part]), targets[part, None], grad[part, None]
        slope = transform.slope(block)
        block.sub_(lse[part, None]).exp_().mul_(-g)
        # 1 - p of the target from its log-prob: where p is near 1, exp(z - lse) lacks the digits
        block.scatter_(-1, y, -g * torch.expm1(logps[part, None]))
        if not (isinstance(slope, float) and slope == 1):
            block.mul_(slope)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    """Logits x @ weight.T + bias in the precision of `scratch`, whose first rows it fills and returns."""
    z = scratch[: len(x)]
    if x.dtype == z.dtype or _has_mixed_matmul(x):
        _matmul(x, weight.T, out=z)
    else:
        x = x.to(z.dtype)
        for part in _slices(len(weight), _rows_of(weight, _HEAD_ELEMENTS)):
            _matmul(x, weight[part].to(z.dtype).T, out=z[:, part])
    return z if bias is None else z.add_(bias)


def _factor_of_gradients(z: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the logits in the dtype in which it enters the matmuls of the backward pass."""
    # A float32 matmul on CUDA takes some ten times as long, so one factor is rounded to bfloat16 and the sums
    # stay in float32. In float16 the small entries would vanish.
    rounds = weight.dtype == torch.bfloat16 and _has_mixed_matmul(weight)
    return z.to(weight.dtype) if rounds else z


def _times_head(dz: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a slice of hidden states, dz @ weight, summed in float32 or float64."""
    dx = torch.zeros(len(dz), weight.shape[1], dtype=compute_dtype(weight.dtype), device=dz.device)
    if dz.dtype == weight.dtype:
        return _matmul(dz, weight, out=dx)
    for part in _slices(len(weight), _rows_of(weight, _HEAD_ELEMENTS)):
        dx.addmm_(dz[:, part], weight[part].to(dz.dtype))
    return dx


def _add_head_gradient(d_weight: Tensor, dz: Tensor, x: Tensor) -> None:
    """d_weight += dz.T @ x."""
    if dz.dtype == d_weight.dtype:
        d_weight.addmm_(dz.T, x.to(dz.dtype))
        return
    for part in _slices(len(d_weight), _rows_of(d_weight, _HEAD_ELEMENTS)):
        d_part = d_weight[part]
        d_part += _matmul(dz[:, part].T, x, out=torch.empty_like(d_part))


def _has_mixed_matmul(x: Tensor) -> bool:
    """Whether `_matmul` multiplies x in half precision into float32."""
    # the builds for AMD devices know the overload, and some refuse to run it
    return x.is_cuda and torch.version.hip is None and "dtype_out" in torch.ops.aten.mm.overloads()


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Product a @ b, summed in the precision of `out`, which may be float32 where a and b are half precision."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _clear_(z: Tensor, ignored: Tensor) -> Tensor:
    """Zeros in the ignored rows of z; written, not multiplied in, for those rows may hold inf or NaN."""
    if _on_cpu(z):
        return z.index_fill_(0, torch.nonzero(ignored).squeeze(-1), 0)
    # an accelerator would have to wait for the indices
    return z.masked_fill_(ignored[:, None], 0)


def _known_to_be_ignored(keep: Tensor) -> bool:
    """Whether no row counts; where an accelerator would have to wait for the answer, False."""
    return _on_cpu(keep) and not keep.any()


def _row_slices(logits: Tensor, chunk_tokens: int) -> Iterator[tuple[Tensor, slice]]:
    """[..., V] as views [m, V] in order, with the slice of all rows that each is."""
    start = 0
    for matrix in _matrices(logits):
        for part in _slices(len(matrix), chunk_tokens):
            yield matrix[part], slice(start + part.start, start + part.stop)
        start += len(matrix)


def _matrices(x: Tensor) -> list[Tensor]:
    """[..., V] as [n, V] views in order of rows: one, or several where the strides (a shift) allow no one."""
    try:
        return [x.view(-1, x.shape[-1])]
    except RuntimeError:
        return [matrix for part in x.unbind() for matrix in _matrices(part)]


def _scratch(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """A slice of logits to fill again and again: fresh memory costs more than the passes over it."""
    return torch.empty(rows, vocabulary, dtype=compute_dtype(like.dtype), device=like.device)


def _slices(n: int, size: int) -> Iterator[slice]:
    """0..n in steps of `size`."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _rows_of(x: Tensor, elements: int) -> int:
    """How many rows of x hold that many elements, at least 1."""
    return max(1, elements // max(1, x.shape[-1]))


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _cache_rows(x: Tensor) -> int:
    """Rows of x to pass over at a time."""
    return _rows_of(x, _CACHE_ELEMENTS) if _on_cpu(x) else max(1, len(x))
