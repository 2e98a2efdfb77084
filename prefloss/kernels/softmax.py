"""Passes over rows of logits: the softmax statistics of their targets, their gradient, and logits in 16 bits.

Each is one pass of `native` over the rows on a CPU that has its library, and plain torch elsewhere, on a CPU in blocks
that fit its cache. The statistics of m tokens are the rows of one tensor, [2 or 5, m], in the order `STATS`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prefloss.kernels.cpu import native
from prefloss.kernels.naive import LogitTransform, compute_dtype
from prefloss.kernels.tiles import TileSpec, on_cpu, rows_of, slices

STATS = ("logps", "logsumexp", "entropy", "log_sum_sq", "top1")

# What the statistics of a row are computed from, summed tile by tile: the largest logit, the sums of e, e (z - peak)
# and e^2 with e = exp(z - peak), and the logit of the target.
SUMS = ("peak", "sum", "weighted", "squares", "picked")

# A code is a logit in 16 bits: steps of 1/2048 nat below the reference of its panel of columns, which is no less than
# any logit of the panel and no more than the logsumexp of the row. So the relative error of p is at most 2.4e-4, a
# tenth of that of bfloat16. The lowest code means p = 0; the reference is then e^32 times as likely.
_CODE_STEPS, _CODE_TOP, _CODE_ZERO = 2048.0, 32767.0, -32768

# Under a softcap the slope of a logit is computed from its code, with an error of 4.9e-4 over the cap: 6e-5 at this
# cap, which is in nats after the temperature. Logits under lower caps (no model has one) are not stored as codes.
_LOW_SOFTCAP = 8.0

# Elements that a CPU passes over at a time, 8 MiB, so that all but the first pass find them in its cache.
_CACHE_ELEMENTS = 2**21
# ... and an accelerator, which has the memory and no such cache.
_DEVICE_ELEMENTS = 2**26


def new_sums(rows: int, like: Tensor) -> Tensor:
    """The `SUMS` of rows before the first logit, [rows, 5]."""
    dtype = torch.float64 if on_cpu(like) else compute_dtype(like.dtype)
    return torch.tensor((-torch.inf, 0, 0, 0, -torch.inf), dtype=dtype, device=like.device).repeat(rows, 1)


def fold(z: Tensor, spec: TileSpec, sums: Tensor, more: bool, overwrite: bool = False) -> None:
    """Add raw logits [m, w] to the `SUMS` of their rows, [m, 5].

    The sums "weighted" and "squares" are left alone without `more`. `overwrite` lets plain torch use z as scratch.
    """
    if native.available(z):
        native.fold(z, spec, sums, more)
        return
    for part, block in _blocks(z, overwrite):
        spec.transform.apply_(block)
        y, inside = _columns_of(spec, part, block)
        peak, total, weighted, squares, picked = sums[part].unbind(-1)
        picked.copy_(torch.where(inside, block.gather(-1, y[:, None]).squeeze(-1), picked))
        high = torch.maximum(peak, block.amax(-1))
        # the sums of a row of -inf only need no rescaling, and -inf - -inf is NaN
        moved = torch.where(peak == high, 0, peak - high)
        rescale = torch.where(peak == -torch.inf, 0, moved.exp())
        block.sub_(finite(high).to(block.dtype)[:, None])
        if more:
            exps = block.exp()
            # 0 log 0 is 0
            share = torch.where(exps == 0, 0, exps * block).sum(-1)
            weighted.copy_(rescale * (weighted + torch.where(total == 0, 0, moved * total)) + share)
            squares.copy_(rescale.square() * squares + exps.square_().sum(-1))
        total.mul_(rescale).add_(block.exp_().sum(-1))
        peak.copy_(high)


def finite(peak: Tensor) -> Tensor:
    """The largest logits of rows, or 0 in a row of -inf only, because -inf - -inf is NaN."""
    return torch.where(peak == -torch.inf, 0, peak)


def finish(sums: Tensor, targets: Tensor, stats: Tensor) -> None:
    """The sums of complete rows, [m, 5] -> `stats`, [2 or 5, m], 0 at negative targets."""
    peak, total, weighted, squares, picked = sums.unbind(-1)
    log_sum = total.log()
    # in this order: the difference of two large logits is exact, and small against the logsumexp
    stats[0] = (picked - peak) - log_sum
    stats[1] = peak + log_sum
    if len(stats) > 2:
        stats[2] = log_sum - weighted / total
        stats[3] = squares.log() - 2 * log_sum
        stats[4] = picked == peak
    stats.masked_fill_(targets < 0, 0)


def _columns_of(spec: TileSpec, rows: slice, block: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of some rows' targets within a block, 0 where outside it, and whether they are inside."""
    targets = spec.targets[rows]
    y = targets - spec.first
    inside = (targets >= 0) & (y >= 0) & (y < block.shape[-1])
    return torch.where(inside, y, 0), inside


def coefficients(grads: Tensor, stats: Tensor) -> Tensor:
    r"""Gradients of the statistics, [1 or 5, m], -> (g, a, b, c) of each row, [m, 4].

    With p the softmax of a row, d logp_y = 1[y] - p, d logsumexp = p, d entropy = -p (log p + entropy) and
    d log_sum_sq = 2 (p^2 / sum p^2 - p), so the gradient of a logit is g 1[y] + p (a + b log p + c p).
    """
    g = grads[0]
    zero = torch.zeros_like(g)
    if len(grads) == 1:
        return torch.stack((g, -g, zero, zero), -1)
    _, to_lse, to_entropy, to_squares, _ = grads
    _, _, entropy, log_sum_sq, _ = stats
    a = -g + to_lse - to_entropy * entropy - 2 * to_squares
    return torch.stack((g, a, -to_entropy, 2 * to_squares * torch.exp(-log_sum_sq)), -1)


def differentiate(
    x: Tensor, out: Tensor, spec: TileSpec, stats: Tensor, rates: Tensor, plain: bool, fresh: bool = False
) -> Tensor:
    """Gradient of raw logits [m, w], from these or their codes in x, by `coefficients` in `rates`; 0 if left out.

    Written to `out`, which may be `place_over(x)`, and returned. `plain`: the last two coefficients are 0 everywhere.
    `fresh`: `out` is memory that has not been written to before.
    """
    references = references_of(x, out.shape[1]) if x.dtype == torch.int16 else None
    x = x[:, : out.shape[1]]
    if native.available(x) and native.available(out):
        native.differentiate(x, out, spec, stats, rates, plain, references, fresh)
        return out
    for part, block in _blocks(x, x.data_ptr() == out.data_ptr()):
        g, a, b, c = (column.unsqueeze(-1) for column in rates[part].unbind(-1))
        logp, lse = stats[0, part, None], stats[1, part, None]
        y, inside = (column.unsqueeze(-1) for column in _columns_of(spec, part, block))
        if references is not None:
            _decode_(block, references[part])
        else:
            spec.transform.apply_(block)
        slope = spec.transform.slope(block)
        block.sub_(lse)
        # 1 - p of the target from its log-prob: where p is near 1, exp(z - lse) lacks the digits
        at_target = -g * torch.expm1(logp) + _rate(logp, a + g, b, c, plain)
        block.copy_(_rate(block, a, b, c, plain)) if not plain else block.exp_().mul_(a)
        block.scatter_(-1, y, torch.where(inside, at_target, block.gather(-1, y)))
        if not (isinstance(slope, float) and slope == 1):
            block.mul_(slope)
        # written, not multiplied in, because rows to leave out may hold inf or NaN
        ignored = spec.targets[part] < 0
        if on_cpu(block):
            block.index_fill_(0, torch.nonzero(ignored).squeeze(-1), 0)
        else:
            # an accelerator would have to wait for the indices
            block.masked_fill_(ignored[:, None], 0)
        if block.data_ptr() != out[part].data_ptr():
            out[part] = block
    return out


def _rate(logp: Tensor, a: Tensor, b: Tensor, c: Tensor, plain: bool) -> Tensor:
    p = logp.exp()
    return p * a if plain else p * (a + b * torch.where(p == 0, 0, logp) + c * p)


def code_columns(vocabulary: int) -> int:
    """Columns of an int16 row that holds the codes of so many logits and, in float32, a reference for each panel."""
    return _code_end(vocabulary) + 2 * -(-vocabulary // native.PANEL)


def _code_end(vocabulary: int) -> int:
    return vocabulary + vocabulary % 2


def references_of(codes: Tensor, vocabulary: int) -> Tensor:
    """The references among [m, code_columns(V)], a view [m, panels]."""
    return codes[:, _code_end(vocabulary) :].view(torch.float32)


def _split(codes: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """References [m, panels] and codes [m, V] to write to; the padding between them is zeroed."""
    codes[:, vocabulary : _code_end(vocabulary)] = 0
    return references_of(codes, vocabulary), codes[:, :vocabulary]


def encode(z: Tensor, transform: LogitTransform, above: Tensor, codes: Tensor) -> None:
    """Raw logits [m, w] -> int16 [m, code_columns(w)]. z is scratch afterwards.

    `above` has a number for each row: none of its logits is higher, and its logsumexp is no lower.
    """
    references, codes = _split(codes, z.shape[1])
    if native.available(z):
        native.encode(z, transform, above, codes, references)
        return
    references.copy_(above.unsqueeze(-1).expand_as(references))
    for part, block in _blocks(z, overwrite=True):
        transform.apply_(block).sub_(above[part, None]).mul_(_CODE_STEPS).add_(_CODE_TOP).round_()
        codes[part] = block.clamp_(_CODE_ZERO, _CODE_TOP)


def _decode_(block: Tensor, references: Tensor) -> Tensor:
    """The logits after the transform."""
    lowest = block == _CODE_ZERO
    block.sub_(_CODE_TOP).mul_(1 / _CODE_STEPS).masked_fill_(lowest, -torch.inf)
    return block.add_(references.repeat_interleave(native.PANEL, -1)[:, : block.shape[1]])


def too_low_for_codes(transform: LogitTransform) -> bool:
    """Whether the softcap is so low that codes are not precise enough."""
    return transform.softcap is not None and transform.softcap / transform.temperature < _LOW_SOFTCAP


def projects(x: Tensor, weight: Tensor, transform: LogitTransform) -> bool:
    """Whether `project` can take hidden states [m, H] and a head [V, H]: it is there, and codes are precise enough."""
    return not too_low_for_codes(transform) and native.projects(x, weight)


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: TileSpec,
    sums: Tensor,
    more: bool,
    codes: Tensor | None,
) -> None:
    """`fold` of x @ weight.T + bias, where `projects` allows it; codes go to [m, code_columns(w)] if given."""
    references, codes = (None, None) if codes is None else _split(codes, len(weight))
    native.project(x, weight, bias, spec, sums, more, codes, references)


def place_over(x: Tensor, dtype: torch.dtype, vocabulary: int) -> Tensor:
    """Memory for the gradient of logits or codes x, [m, V] in `dtype`; reuses that of x if element sizes allow."""
    if x.element_size() == dtype.itemsize or (x.element_size() > dtype.itemsize and native.available(x)):
        return x.view(dtype)[:, :vocabulary]
    return torch.empty(len(x), vocabulary, dtype=dtype, device=x.device)


def _blocks(x: Tensor, overwrite: bool) -> Iterator[tuple[slice, Tensor]]:
    """Slices of [m, V], each with its values in the precision to compute in: x itself, or one buffer refilled."""
    dtype = torch.float32 if x.dtype == torch.int16 else compute_dtype(x.dtype)
    size = rows_of(x, _CACHE_ELEMENTS if on_cpu(x) else _DEVICE_ELEMENTS)
    if overwrite and x.dtype == dtype:
        for part in slices(len(x), size):
            yield part, x[part]
        return
    buffer = x.new_empty(min(size, len(x)), x.shape[-1], dtype=dtype)
    for part in slices(len(x), size):
        yield part, buffer[: part.stop - part.start].copy_(x[part])
