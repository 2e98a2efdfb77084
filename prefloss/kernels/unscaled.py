"""The gradient of each log-prob in its hidden state, [n, H], from tiles of logits: for a frozen head.

With p the softmax of a row, d logp_y / d h = W_y - sum_v p_v W_v. The sum is one of exp(z_v - peak) W_v over v other
than y, with the largest logit so far for a peak, and is divided in the end, as in flash attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefloss.kernels import heads
from prefloss.kernels import rows as row_ops
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.rows import on_cpu, place_over, rows_of, slices

# Elements of the rows of the head of targets that are looked up at a time.
_TARGET_ELEMENTS = 2**20


def add_numerators(
    z: Tensor,
    weight: Tensor,
    targets: Tensor,
    span: slice,
    transform: LogitTransform,
    before: Tensor,
    sums: Tensor,
    out: Tensor,
    skip_below: float,
) -> None:
    """Add e @ weight of a span of the head, the targets' left out, to `out`, [m, H], which was against peaks `before`.

    Args:
        z: The logits or codes of the tile, [m, columns]; then of no use.
        weight: The span of the head, [w, H].
        targets: [m].
        span: Which columns they are.
        transform: What happens to the logits.
        before: The peaks without this tile, [m].
        sums: The `rows.SUMS` with it, [m, 5].
        out: What it is added to.
        skip_below: Columns whose p does not exceed that are left out; 0 for none.
    """
    peak = row_ops.finite(sums[:, 0])
    # nothing so far, so nothing to rescale, and -inf - -inf is NaN
    factors = torch.where(before == -torch.inf, 0, (before - peak).exp())
    _rescale(out, factors.to(out.dtype), sums[:, 0] != before)
    # of each row 1 for p, and for the target -expm1(0)
    rates = torch.tensor((-1, 1, 0, 0), dtype=out.dtype, device=z.device).expand(len(z), 4)
    stats = torch.stack((torch.zeros_like(peak), peak)).to(out.dtype)
    e = place_over(z, heads.gradient_dtype(weight), span.stop - span.start)
    row_ops.differentiate(z, e, targets, span.start, transform, stats, rates, True)
    if skip_below:
        # of the probability, which is no larger than by the sum so far
        limit = (skip_below * sums[:, 1]).to(out.dtype)
        likely = heads.likely_columns(e / limit[:, None], 1.0)
        if likely is not None:
            e, weight = e.index_select(1, likely), weight.index_select(0, likely)
    heads.add_product(e, weight, out)


def _rescale(out: Tensor, factors: Tensor, moved: Tensor) -> None:
    """Rows of `out` by factors, of which all that have not `moved` are 1."""
    if not on_cpu(out):
        # an accelerator would have to wait for the indices
        out.mul_(factors[:, None])
        return
    index = torch.nonzero(moved).squeeze(-1)
    out.index_copy_(0, index, out[index].mul_(factors[index, None]))


def finish(
    out: Tensor, weight: Tensor, targets: Tensor, transform: LogitTransform, sums: Tensor, logps: Tensor
) -> None:
    """The sum of all e @ weight, [m, H], of whole rows -> d logp / d h, in its place; `weight` is all of the head."""
    out.mul_((-1 / sums[:, 1]).to(out.dtype)[:, None])
    # 1 - p of the target from its log-prob: where p is near 1, 1 - exp(z - lse) lacks the digits
    d_y = -torch.expm1(logps) * transform.slope(sums[:, 4].to(out.dtype))
    for part in slices(len(out), rows_of(out, _TARGET_ELEMENTS)):
        out[part].addcmul_(weight[targets[part]].to(out.dtype), d_y[part, None])
