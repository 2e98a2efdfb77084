"""The op from hidden states: one loop over tiles for both kernels.

A tile is a slab of tokens by a span of the vocabulary. `chunked` and `triton` each provide `ForwardTiles` and
`BackwardTiles`, which keep different things: `chunked` raw logits or codes of them, Triton softmax numerators. Both can
keep them where the gradient of the head will be. What does not depend on that is here: the order of tiles, the scheme
"unscaled" and the sums of gradients.

With p the softmax of a row, d logp_y / d h = W_y - sum_v p_v W_v. For "unscaled" the sum is one of exp(z_v - peak) W_v
over v other than y, where the peak is the largest logit so far (Triton: a number near the logsumexp so far), and is
divided in the end, as in flash attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefloss.kernels import chunked
from prefloss.kernels.kept import kept_columns, kept_dtype
from prefloss.kernels.matmul import Gradients, HeadGradients, add_product, full_precision
from prefloss.kernels.naive import compute_dtype
from prefloss.kernels.plan import Plan
from prefloss.kernels.tiles import Finished, LinearInputs, on_cpu


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
    with torch.no_grad(), full_precision(x.device):
        if plan.scheme == "unscaled":
            product = x.new_empty(x.shape, dtype=dtype) if memory is None else memory[: len(x)]
        backend = backend_of(plan.impl)
        tiles = backend.ForwardTiles(inputs, plan, outputs, memory)
        for rows, spans in tiles.order:
            sums = tiles.new_sums(rows)
            for span in spans:
                numerators = tiles.fold(rows, span, sums)
                if product is None or numerators is None:
                    continue
                values, rescale = numerators
                if rescale is not None:
                    backend.scale_rows(product[rows], rescale)
                add_product(values, weight[span], product[rows], add=rescale is not None)
            done = tiles.finish(rows, sums, stats[:, rows])
            if product is not None:
                part = inputs._replace(targets=inputs.targets[rows])
                _finish_unscaled(product[rows], part, done, stats[0, rows], backend)
        if not on_cpu(x):
            # mistakes, which a CPU has reported before
            stats[0].masked_fill_((inputs.targets < 0) | (inputs.targets > len(weight)), torch.nan)
    return stats, tiles.kept if product is None else product


def _finish_unscaled(
    product: Tensor, inputs: LinearInputs, done: Finished, logps: Tensor, backend: Any
) -> None:
    """The sum of numerators @ head over the whole vocabulary, [m, H] -> d logp / d h, in place."""
    # 1 - p of the target from its log-prob: where p is near 1, 1 - exp(z - lse) lacks the digits
    d_y = -torch.expm1(logps) * inputs.transform.slope(done.picked.to(product.dtype))
    scale = -done.scale.to(product.dtype)
    backend.scale_and_add_targets(product, scale, inputs.weight, inputs.targets, d_y)


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
    with torch.no_grad(), full_precision(inputs.x.device):
        tiles = backend_of(plan.impl).BackwardTiles(grad, inputs, stats, kept, plan, needs, overwrite)
        sums = Gradients(
            inputs.x, inputs.weight, needs, tiles.grid, tiles.dtype, tiles.unit, tiles.home, rounded, tiles.factors
        )  # fmt: skip
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
    columns = kept_columns(hidden.dtype, len(weight), plan.impl)
    rows = plan.kept_tokens if plan.scheme == "keep" else 0
    memory = hidden.new_empty(rows, columns, dtype=kept_dtype(hidden.dtype))
    if plan.impl == "triton":
        # the end of a row, most of which nothing writes to: the output of an op depends on its inputs only
        memory[:, len(weight) :].zero_()
    return memory
