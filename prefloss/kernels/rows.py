"""Row operations: what the ops do with a slice of logits before and after a matmul, and the matmuls themselves.

Each is one pass of `native` over rows on a CPU with a compiler, and plain torch elsewhere, on a CPU in blocks that
fit its cache. Numbers of m tokens are the rows of one tensor, [2 or 5, m], in the order `STATS`. A target < 0 marks a
row to leave out; one >= V, as in another shard of the vocabulary, has log-prob -inf and no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from prefloss.kernels import native
from prefloss.kernels.constant import constant_when_compiled
from prefloss.kernels.naive import LogitTransform, compute_dtype

STATS = ("logps", "logsumexp", "entropy", "log_sum_sq", "top1")

# What a row's statistics are made of, a tile of columns at a time: the largest logit, the sums of e, e (z - peak) and
# e^2 with e = exp(z - peak), and the logit of the target.
SUMS = ("peak", "sum", "weighted", "squares", "picked")

# A kept logit is an int16 in steps of 1/2048 nat below the reference of its panel of columns, which is no less than any
# in the panel and no more than the logsumexp of the row. So p is off by 2.4e-4 of itself at most, a tenth of what
# rounding it to bfloat16 does, and 0 where the reference is e^32 times as likely, the lowest code.
_CODE_STEPS, _CODE_TOP, _CODE_ZERO = 2048.0, 32767.0, -32768

# Under a softcap the slope of a logit comes from its code, and errs by 4.9e-4 over the cap: 6e-5 at this cap, in nats
# after the temperature. Lower ones (no model has one) are not kept so.
LOW_SOFTCAP = 8.0

# Elements that a CPU passes over at a time, 8 MiB, so that all but the first pass find them in its cache.
_CACHE_ELEMENTS = 2**21
# ... and an accelerator, which has the memory and no such cache.
_DEVICE_ELEMENTS = 2**26


def new_sums(rows: int, like: Tensor) -> Tensor:
    """The `SUMS` of rows of which no logit has come yet, [rows, 5], for logits like these."""
    dtype = torch.float64 if on_cpu(like) else compute_dtype(like.dtype)
    return torch.tensor((-torch.inf, 0, 0, 0, -torch.inf), dtype=dtype, device=like.device).repeat(rows, 1)


def score(z: Tensor, targets: Tensor, transform: LogitTransform, stats: Tensor) -> None:
    """Raw logits [m, V] and targets [m], negative at rows to leave out -> `stats`, [2 or 5, m], 0 in those rows."""
    sums = new_sums(len(z), z)
    fold(z, targets, 0, transform, sums, len(stats) > 2)
    finish(sums, targets, stats)


def fold(
    z: Tensor,
    targets: Tensor,
    first: int,
    transform: LogitTransform,
    sums: Tensor,
    more: bool,
    overwrite: bool = False,
) -> None:
    """Raw logits [m, w], columns `first` and so on of all, into the `SUMS` of their rows, [m, 5].

    `more` than the logsumexp is what the sums "weighted" and "squares" are for. `overwrite` lets plain torch work in
    z, which then holds nothing of use.
    """
    if native.available(z):
        native.fold(z, targets, first, transform, sums, more)
        return
    for part, block in _blocks(z, overwrite):
        transform.apply_(block)
        y, here = _within(targets[part], first, block)
        peak, total, weighted, squares, picked = sums[part].unbind(-1)
        picked.copy_(torch.where(here, block.gather(-1, y[:, None]).squeeze(-1), picked))
        high = torch.maximum(peak, block.amax(-1))
        # a row so far of -inf only has no sums to rescale, and -inf - -inf is NaN
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
    """The largest logits of rows, 0 where a row is of -inf only: -inf - -inf is NaN."""
    return torch.where(peak == -torch.inf, 0, peak)


def finish(sums: Tensor, targets: Tensor, stats: Tensor) -> None:
    """The sums of whole rows, [m, 5] -> `stats`, [2 or 5, m]."""
    peak, total, weighted, squares, picked = sums.unbind(-1)
    log_sum = total.log()
    # in this order: of two large logits the difference is exact, and small against the logsumexp
    stats[0] = (picked - peak) - log_sum
    stats[1] = peak + log_sum
    if len(stats) > 2:
        stats[2] = log_sum - weighted / total
        stats[3] = squares.log() - 2 * log_sum
        stats[4] = picked == peak
    stats.masked_fill_(targets < 0, 0)


def _within(targets: Tensor, first: int, block: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of targets among those of a block, which begin at `first`, and whether they are among them."""
    y = targets - first
    here = (targets >= 0) & (y >= 0) & (y < block.shape[-1])
    return torch.where(here, y, 0), here


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
    x: Tensor,
    out: Tensor,
    targets: Tensor,
    first: int,
    transform: LogitTransform,
    stats: Tensor,
    rates: Tensor,
    plain: bool,
    fresh: bool = False,
) -> Tensor:
    """Gradient of raw logits [m, w], from those or their codes in x, by the `coefficients` in `rates`; 0 if left out.

    Columns `first` and so on of all. Codes come with the columns of their references. Written to `out`, which may be
    `place_over(x)`, and returned. `plain`: the last two coefficients are all 0; `fresh`: nobody has written to `out`.
    """
    coded = x.dtype == torch.int16
    references = references_of(x, out.shape[1]) if coded else None
    x = x[:, : out.shape[1]]
    if native.available(x) and native.available(out):
        native.differentiate(x, out, targets, first, transform, stats, rates, plain, references, fresh)
        return out
    for part, block in _blocks(x, x.data_ptr() == out.data_ptr()):
        g, a, b, c = (column.unsqueeze(-1) for column in rates[part].unbind(-1))
        logp, lse = stats[0, part, None], stats[1, part, None]
        y, here = (column.unsqueeze(-1) for column in _within(targets[part], first, block))
        if references is not None:
            _decode_(block, references[part])
        else:
            transform.apply_(block)
        slope = transform.slope(block)
        block.sub_(lse)
        # 1 - p of the target from its log-prob: where p is near 1, exp(z - lse) lacks the digits
        at_target = -g * torch.expm1(logp) + _rate(logp, a + g, b, c, plain)
        block.copy_(_rate(block, a, b, c, plain)) if not plain else block.exp_().mul_(a)
        block.scatter_(-1, y, torch.where(here, at_target, block.gather(-1, y)))
        if not (isinstance(slope, float) and slope == 1):
            block.mul_(slope)
        _clear_(block, targets[part] < 0)
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


def _divided(codes: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """References and codes to write, [m, panels] and [m, V]; nothing is left unwritten between them."""
    codes[:, vocabulary : _code_end(vocabulary)] = 0
    return references_of(codes, vocabulary), codes[:, :vocabulary]


def encode(z: Tensor, transform: LogitTransform, above: Tensor, codes: Tensor) -> None:
    """Raw logits [m, w], to int16 [m, code_columns(w)]; z then holds nothing of use.

    `above` is for each row a number that none of its logits exceeds, and that its logsumexp is no less than.
    """
    references, codes = _divided(codes, z.shape[1])
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


def projects(x: Tensor, weight: Tensor, transform: LogitTransform) -> bool:
    """Whether `project` can take hidden states [m, H] and a head [V, H], and its codes do for the transform."""
    low = transform.softcap is not None and transform.softcap / transform.temperature < LOW_SOFTCAP
    return not low and native.projects(x, weight)


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    first: int,
    transform: LogitTransform,
    sums: Tensor,
    more: bool,
    codes: Tensor | None,
) -> None:
    """`fold` of x @ weight.T + bias, where `projects` says so; codes go to [m, code_columns(w)] if given."""
    if codes is None:
        native.project(x, weight, bias, targets, first, transform, sums, more)
        return
    references, codes = _divided(codes, len(weight))
    native.project(x, weight, bias, targets, first, transform, sums, more, codes, references)


def place_over(x: Tensor, dtype: torch.dtype, vocabulary: int) -> Tensor:
    """Room for the gradient in `dtype`, [m, V], of the logits or codes in x: over them where that is possible."""
    if x.element_size() == dtype.itemsize or (x.element_size() > dtype.itemsize and native.available(x)):
        return x.view(dtype)[:, :vocabulary]
    return torch.empty(len(x), vocabulary, dtype=dtype, device=x.device)


def has_mixed_matmul(x: Tensor) -> bool:
    """Whether `matmul` multiplies x in half precision into float32."""
    return (
        native.multiplies(x.dtype)
        if x.device.type == "cpu"
        else _device_has_mixed_matmul(x.device.type, x.dtype)
    )


@constant_when_compiled
def _device_has_mixed_matmul(device_type: str, dtype: torch.dtype) -> bool:
    # the builds for AMD devices know the overload, and some refuse to run it
    known = (
        device_type == "cuda" and torch.version.hip is None and "dtype_out" in torch.ops.aten.mm.overloads()
    )
    return known and dtype in (torch.float16, torch.bfloat16)


# the sum of a mixed matmul, too, had to be half precision before
_ADDS_MIXED = TorchVersion(torch.__version__) >= TorchVersion("2.10")


def matmul(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Out = a @ b or out += a @ b, summed in the precision of `out`, float32 where a and b are half precision.

    `out` may be bfloat16 if nothing is added to: on a CPU that has a mixed matmul it is rounded once, after the sum.
    """
    if on_cpu(out) and has_mixed_matmul(a) and native.multiply(a, b, out, add):
        return out
    if a.dtype != out.dtype and (on_cpu(out) or not has_mixed_matmul(a)):
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if not add:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    if _ADDS_MIXED:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.add_(torch.mm(a, b, out_dtype=out.dtype))


def slices(n: int, size: int, start: int = 0) -> Iterator[slice]:
    """start..n in steps of `size`."""
    for first in range(start, n, size):
        yield slice(first, min(first + size, n))


def rows_of(x: Tensor, elements: int) -> int:
    """How many rows of x hold that many elements, at least 1."""
    return max(1, elements // max(1, x.shape[-1]))


def on_cpu(x: Tensor) -> bool:
    """Whether its values can be asked for without waiting for a device."""
    return x.device.type == "cpu"


def _blocks(x: Tensor, overwrite: bool) -> Iterator[tuple[slice, Tensor]]:
    """Slices of [m, V], each with its values in the precision to compute in: x itself, or one buffer refilled."""
    dtype = torch.float32 if x.dtype == torch.int16 else compute_dtype(x.dtype)
    size = rows_of(x, _CACHE_ELEMENTS if on_cpu(x) else _DEVICE_ELEMENTS)
    if overwrite and x.dtype == dtype:
        for part in slices(len(x), size):
            yield part, x[part]
        return
    buffer = torch.empty(min(size, len(x)), x.shape[-1], dtype=dtype, device=x.device)
    for part in slices(len(x), size):
        yield part, buffer[: part.stop - part.start].copy_(x[part])


def _clear_(z: Tensor, ignored: Tensor) -> Tensor:
    """Zeros in the ignored rows of z; written, not multiplied in, for those rows may hold inf or NaN."""
    if on_cpu(z):
        return z.index_fill_(0, torch.nonzero(ignored).squeeze(-1), 0)
    # an accelerator would have to wait for the indices
    return z.masked_fill_(ignored[:, None], 0)
