"""The op from hidden states: one loop over tiles for both kernels.

A tile is a slab of tokens by a span of the vocabulary. `chunked` and `triton` each provide `ForwardTiles` and
`BackwardTiles`. They cut the logits differently because they keep different things: `chunked` keeps raw logits or codes
of them, span by span in the gradient buffer of the head; Triton keeps the finished softmax, whole rows at a time.
What does not depend on that is here: the order of tiles, the scheme "unscaled" and the sums of gradients.

With p the softmax of a row, d logp_y / d h = W_y - sum_v p_v W_v. For "unscaled" the sum is one of exp(z_v - peak) W_v
over v other than y, where the peak is the largest logit so far, and is divided in the end, as in flash attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefloss.kernels import chunked
from prefloss.kernels.kept import kept_columns, kept_dtype
from prefloss.kernels.matmul import Gradients, HeadGradients, add_product
from prefloss.kernels.naive import compute_dtype, no_autocast
from prefloss.kernels.plan import Plan
from prefloss.kernels.softmax import finite
from prefloss.kernels.tiles import LinearInputs, RowSums, on_cpu, rows_of, slices

# Elements of the rows of the head that are looked up for targets at a time, on a CPU and on an accelerator.
_TARGET_ELEMENTS, _DEVICE_TARGET_ELEMENTS = 2**20, 2**26


def backend_of(impl: str) -> Any:
    """`chunked` or `triton`; Triton is imported where it is used."""
    if impl != "triton":
        return chunked
    from prefloss.kernels import triton

    return triton


def linear_forward(
    inputs: LinearInputs, plan: Plan, outputs: int, memory: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Statistics of the targets, [2 or 5, n], and what `linear_backward` or `scale` gets of the scheme, or None.

    `outputs` is 1 for log-probs alone, or 5 for all `softmax.STATS`. `memory`: where to keep it, see `empty_memory`;
    None to allocate.
    """
    x, weight = inputs.x, inputs.weight
    dtype = compute_dtype(x.dtype)
    stats = torch.empty(max(2, outputs), len(x), dtype=dtype, device=x.device)
    product = None
    with torch.no_grad(), no_autocast(x.device):
        if plan.scheme == "unscaled":
            product = x.new_empty(x.shape, dtype=dtype) if memory is None else memory[: len(x)]
            product.zero_()
        tiles = backend_of(plan.impl).ForwardTiles(inputs, plan, outputs, memory)
        for rows, spans in tiles.order:
            sums = tiles.new_sums(rows)
            for span in spans:
                if product is None:
                    tiles.fold(rows, span, sums)
                    continue
                before = sums.peak.clone()
                numerators = tiles.fold(rows, span, sums)
                _rescale(product[rows], before, sums.peak, sums.nats)
                add_product(numerators, weight[span], product[rows])
            tiles.finish(rows, sums, stats[:, rows])
            if product is not None:
                _finish_unscaled(product[rows], inputs, rows, sums, stats[0, rows])
        if not on_cpu(x):
            # mistakes, which a CPU has reported before
            stats[0].masked_fill_((inputs.targets < 0) | (inputs.targets > len(weight)), torch.nan)
    return stats, tiles.kept if product is None else product


def _rescale(product: Tensor, before: Tensor, after: Tensor, nats: float) -> None:
    """Rows of the sum of numerators @ head, which were against the peaks `before`, to the peaks `after`."""
    # the sum is 0 before the first finite logit, and -inf - -inf is NaN
    factors = torch.where(before == -torch.inf, 0, ((before - finite(after)) * nats).exp()).to(product.dtype)
    if not on_cpu(product):
        # an accelerator would have to wait for the indices
        product.mul_(factors[:, None])
        return
    index = torch.nonzero(after != before).squeeze(-1)
    product.index_copy_(0, index, product[index].mul_(factors[index, None]))


def _finish_unscaled(
    product: Tensor, inputs: LinearInputs, rows: slice, sums: RowSums, logps: Tensor
) -> None:
    """The sum of numerators @ head over the whole vocabulary, [m, H] -> d logp / d h, in place."""
    weight, targets, dtype = inputs.weight, inputs.targets[rows], product.dtype
    product.mul_((-sums.numerator_unit / sums.total).to(dtype)[:, None])
    # 1 - p of the target from its log-prob: where p is near 1, 1 - exp(z - lse) lacks the digits
    d_y = -torch.expm1(logps) * inputs.transform.slope((sums.picked * sums.nats).to(dtype))
    owned = (targets >= 0) & (targets < len(weight))
    targets, d_y = torch.where(owned, targets, 0), torch.where(owned, d_y, 0)
    size = rows_of(product, _TARGET_ELEMENTS if on_cpu(product) else _DEVICE_TARGET_ELEMENTS)
    for part in slices(len(product), size):
        product[part].addcmul_(weight[targets[part]].to(dtype), d_y[part, None])


def linear_backward(
    grad: Tensor,
    inputs: LinearInputs,
    stats: Tensor,
    kept: Any,
    plan: Plan,
    needs: tuple[bool, ...],
    overwrite: bool = True,
    rounded: bool = True,
) -> HeadGradients:
    """Gradients of hidden states [n, H], weight and bias, None where not in `needs`; for "unscaled" see `scale`.

    From `grad`, those of the statistics, [1 or 5, n], and what `linear_forward` returned; without `kept` the logits are
    computed again. `overwrite`: whether the gradients may be written over `kept`. `rounded`: see `Gradients`.
    """
    with torch.no_grad(), no_autocast(inputs.x.device):
        tiles = backend_of(plan.impl).BackwardTiles(grad, inputs, stats, kept, plan, needs, overwrite)
        sums = Gradients(
            inputs.x, inputs.weight, needs, tiles.grid, tiles.dtype, tiles.unit, tiles.home, rounded
        )
        for span in tiles.grid.spans:
            for rows in tiles.grid.slabs:
                sums.add(rows, span, tiles.gradient(rows, span))
            sums.finish(span)
        return sums.gradients()


def scale(saved: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of hidden states, [n, H], from what "unscaled" saved and the gradient of the log-probs, [1, n]."""
    return torch.mul(saved, grad[0].unsqueeze(-1), out=torch.empty_like(saved, dtype=dtype))


def empty_memory(hidden: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Memory of a size known beforehand for what the scheme keeps, as a compiled graph needs it."""
    if plan.scheme == "unscaled":
        return hidden.new_empty(hidden.shape, dtype=compute_dtype(hidden.dtype))
    columns = len(weight) if plan.impl == "triton" else kept_columns(hidden.dtype, len(weight))
    rows = plan.kept_tokens if plan.scheme == "keep" else 0
    return hidden.new_empty(rows, columns, dtype=kept_dtype(hidden.dtype))
