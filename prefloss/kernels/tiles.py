"""The ops by the Triton kernels of `logprob_gather`, whose arguments and results are those of `chunked`.

From hidden states, matmuls fill one tile of float32 logits at a time, and a kernel folds the tile into running sums
(forward) or turns it into its gradient (backward).
"""

from math import e, log2

import torch
from torch import Tensor

from prefloss.kernels.functions import Gradients, Implementation
from prefloss.kernels.logprob_gather import (
    KEPT_SCALE,
    differentiate_tile,
    factors,
    fold_tile,
    token_backward,
    token_forward,
)
from prefloss.kernels.naive import LogitTransform, no_autocast
from prefloss.kernels.paths import Path, Scheme, even, kept_dtype
from prefloss.kernels.rows import coefficients, finite, matmul, slices

# Rows of a tile in the forward pass: enough for the matmuls, few enough for long rows.
_FORWARD_ROWS = 2048
# Columns below which a tile of the backward pass has fewer rows instead.
_BACKWARD_COLUMNS = 2048


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
    """Hidden states [n, H] and targets [n] -> statistics [2 or 5, n], and what the scheme keeps, in `room`.

    One tile of logits is in memory at a time, of as many as `path.chunk_tokens` rows of the vocabulary have. The
    scheme "keep" keeps the softmax itself, 2 bytes per logit of a half-precision head. A target outside [0, V), as in
    another shard of the vocabulary, has log-prob -inf and no gradient of its own.
    """
    n, vocabulary, device = len(x), len(weight), x.device
    elements = path.chunk_tokens * vocabulary
    unscaled = path.scheme == "unscaled"
    kept_tokens = min(n, path.kept_tokens) if path.scheme == "keep" else 0
    saved = room if room is not None and len(room) else _room(x, weight, path.scheme, kept_tokens)
    height = max(1, min(n, _FORWARD_ROWS))
    width = _even(vocabulary, elements // height)
    # to be normalised at once, kept rows are whole
    tiles = [(rows, vocabulary) for rows in slices(kept_tokens, path.chunk_tokens)]
    tiles += [(rows, width) for rows in slices(n, height, kept_tokens)]
    sums = torch.zeros(5, n, dtype=torch.float32, device=device)
    # the maximum, and the target's logit as long as no tile has it
    sums[0], sums[2] = -torch.inf, -torch.inf
    stats = torch.empty(max(2, outputs), n, dtype=torch.float32, device=device)
    size = max((rows.stop - rows.start) * _padded(columns) for rows, columns in tiles) if tiles else 0
    scratch = torch.empty(size, dtype=torch.float32, device=device)
    factors = torch.empty(size if unscaled else 0, dtype=weight.dtype, device=device)
    with torch.no_grad(), no_autocast(device):
        if saved is not None and unscaled:
            saved.zero_()
        for rows, columns in tiles:
            part = sums[:, rows]
            for span in slices(vocabulary, columns):
                head = weight[span]
                logits = _matrix(scratch, rows.stop - rows.start, len(head))
                matmul(x[rows], head.T, out=logits)
                numerators, before = None, None
                if unscaled:
                    numerators, before = _matrix(factors, *logits.shape), part[0].clone()
                elif saved is not None and rows.start < kept_tokens:
                    # float16 rather than bfloat16: backward multiplies and rounds once more
                    numerators = (
                        saved[rows] if saved.dtype == torch.float32 else saved[rows].view(torch.float16)
                    )
                fold_tile(
                    logits, bias, targets[rows], part, numerators, span.start, transform, outputs, unscaled
                )
                if saved is not None and numerators is not None and before is not None:
                    _add_product(numerators, head, saved[rows], before, part[0], transform)
            _finish(part, stats[:, rows], transform)
            if saved is not None and unscaled:
                _scale_product(saved[rows], weight, targets[rows], stats[:, rows], part, transform)
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
) -> Gradients:
    """Gradients of hidden states [n, H], weight and bias; the scheme "keep" may write over `saved`."""
    n, vocabulary, device, dtype = len(x), len(weight), x.device, weight.dtype
    need_x, need_weight, need_bias = needs
    d_x = torch.empty(x.shape, dtype=x.dtype, device=device) if need_x else None
    saved = None if saved is None else saved[: min(n, path.kept_tokens)]
    kept_tokens = 0 if saved is None else len(saved)
    over_saved = overwrite and kept_tokens > 0
    elements = path.chunk_tokens * vocabulary
    height = max(
        1, min(n - (kept_tokens if over_saved else 0), elements // min(vocabulary, _BACKWARD_COLUMNS))
    )
    # Columns outermost, all rows within: the gradient of the head is done tile by tile, in few additions, and never
    # all of it is in float32.
    parts = [
        *slices(kept_tokens, max(1, kept_tokens) if over_saved else height),
        *slices(n, height, kept_tokens),
    ]
    unit = _unit(grad, transform) if dtype == torch.float16 else None
    straight = unit is None and len(parts) == 1
    width = vocabulary if over_saved and kept_tokens == n else _even(vocabulary, elements // height)
    if need_weight and not straight:
        width = _even(vocabulary, min(width, elements // max(1, x.shape[1])))
    with torch.no_grad(), no_autocast(device):
        rates = coefficients(grad if unit is None else grad / unit, stats)
        d_saved = None
        if saved is not None and over_saved:
            d_saved = saved.view(dtype)
            differentiate_tile(
                saved, d_saved, None, targets, stats, rates, 0, transform, len(grad) == 1, kept=True
            )
        size = 0 if over_saved and kept_tokens == n else height * _padded(width)
        scratch = torch.empty(size, dtype=torch.float32, device=device)
        factors = scratch if dtype == torch.float32 else torch.empty(size, dtype=dtype, device=device)
        d_weight = torch.empty(weight.shape, dtype=dtype, device=device) if need_weight else None
        d_bias = torch.zeros(vocabulary, dtype=torch.float32, device=device) if need_bias else None
        x_sum = d_x
        if need_x and (unit is not None or width < vocabulary):
            x_sum = torch.zeros(x.shape, dtype=torch.float32, device=device)
        for span in slices(vocabulary, width):
            head = weight[span]
            w_sum = None
            if d_weight is not None:
                w_sum = d_weight[span]
                if not straight:
                    w_sum = torch.zeros(head.shape, dtype=torch.float32, device=device)
            for rows in parts:
                if d_saved is not None and rows.start < kept_tokens:
                    dz = d_saved[rows, span]
                else:
                    dz = _matrix(factors, rows.stop - rows.start, len(head))
                    kept = saved is not None and rows.start < kept_tokens
                    if saved is not None and kept:
                        tile = saved[rows, span]
                    else:
                        tile = _matrix(scratch, *dz.shape)
                        matmul(x[rows], head.T, out=tile)
                    differentiate_tile(
                        tile, dz, bias, targets[rows], stats[:, rows], rates[rows], span.start, transform,
                        len(grad) == 1, kept,
                    )  # fmt: skip
                if d_bias is not None:
                    d_bias[span] += dz.sum(0, dtype=torch.float32)
                if x_sum is not None:
                    matmul(dz, head, out=x_sum[rows], add=x_sum is not d_x)
                if w_sum is not None:
                    matmul(dz.T, x[rows], out=w_sum, add=not straight)
            if d_weight is not None and w_sum is not None and not straight:
                d_weight[span] = w_sum if unit is None else w_sum.mul_(unit)
        if d_x is not None and x_sum is not None and x_sum is not d_x:
            torch.mul(x_sum, 1 if unit is None else unit, out=d_x)
        if d_bias is not None:
            d_bias = (d_bias if unit is None else d_bias * unit).to(dtype)
    return d_x, d_weight, d_bias


def _room(x: Tensor, weight: Tensor, scheme: Scheme, kept_tokens: int) -> Tensor | None:
    if scheme == "unscaled":
        return torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if kept_tokens == 0:
        return None
    memory = torch.empty(
        kept_tokens * _padded(len(weight)), dtype=kept_dtype(weight.dtype), device=weight.device
    )
    return _matrix(memory, kept_tokens, len(weight))


def _finish(sums: Tensor, stats: Tensor, transform: LogitTransform) -> None:
    """Sums of whole rows -> their statistics."""
    outer = factors(transform)[1]
    m, s, picked, a, q = sums
    top, log_s = finite(m), s.log()
    # in this order, as in _store_stats
    stats[0] = (picked - top) * outer - log_s
    stats[1] = top * outer + log_s
    if len(stats) > 2:
        stats[2] = log_s - a / s / log2(e)
        stats[3] = q.log() - 2 * log_s
        stats[4] = picked >= m


def _add_product(
    numerators: Tensor, head: Tensor, total: Tensor, before: Tensor, after: Tensor, transform: LogitTransform
) -> None:
    """Add numerators @ head to the total [m, H], whose numerators were against the maxima `before`."""
    # -inf - -inf: nothing so far, so nothing to rescale
    shift = (before - after).masked_fill_(before == -torch.inf, 0) * factors(transform)[1]
    matmul(numerators, head, out=total.mul_(torch.exp(shift)[:, None]), add=True)


def _scale_product(
    total: Tensor, weight: Tensor, targets: Tensor, stats: Tensor, sums: Tensor, transform: LogitTransform
) -> None:
    """Numerators @ head, [m, H], the targets left out -> d logp / d hidden, in its place."""
    slope = factors(transform)[2]
    _, s, picked, *_ = sums
    owned = (targets >= 0) & (targets < len(weight))
    d_y = -torch.expm1(stats[0]) * slope
    if transform.softcap is not None:
        d_y *= 1 - picked.clamp_min(-1).square()
    heads = weight.index_select(0, torch.where(owned, targets, 0)).to(total.dtype)
    total.mul_((-slope / KEPT_SCALE.value / s)[:, None])
    total.addcmul_(heads, torch.where(owned, d_y, 0)[:, None])


def _unit(grad: Tensor, transform: LogitTransform) -> Tensor:
    """What to divide gradients of float16 logits by, so that the largest nears 2**15 and the small do not vanish."""
    # |p (log p + H)| < 16 for any vocabulary that fits a memory, |2 (p**2 / sum p**2 - p)| <= 2
    most = grad.new_tensor((1, 1, 16, 2, 0))[: len(grad), None]
    bound = torch.nn.functional.pad((grad.abs() * most).sum(0), (0, 1)).amax()
    return (bound * (factors(transform)[2] / 2**15)).clamp_min(1e-30)


def _matrix(memory: Tensor, rows: int, columns: int) -> Tensor:
    """The first elements of `memory` as a matrix with aligned rows, as wide loads and fast matmuls ask."""
    return memory[: rows * _padded(columns)].view(rows, _padded(columns))[:, :columns]


def _padded(columns: int) -> int:
    return -(-columns // 64) * 64


def _even(columns: int, most: int) -> int:
    """Width of the fewest equal tiles of about `most` columns, a multiple of 128 unless there is but one."""
    width = even(columns, max(most, 128))
    return min(columns, -(-width // 128) * 128)


_implementation = Implementation(token_forward, token_backward, linear_forward, linear_backward)
token_stats, token_logps = _implementation.token_stats, _implementation.token_logps
linear_token_stats = _implementation.linear_token_stats
linear_token_logps = _implementation.linear_token_logps
