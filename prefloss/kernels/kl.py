"""KL divergences between two models' next-token distributions, a slice of tokens at a time.

With p the policy's softmax and q the reference's, at one token,

    d KL(q || p) / dz = p - q,    d KL(p || q) / dz = p (log p - log q - KL(p || q)).

Both depend on that token alone. So with a frozen head the forward pass saves their gradients in the hidden state,
[2, n, H], and the backward pass only scales and adds them. With a trainable head the backward pass computes the logits
of both models again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefloss.kernels.autograd import InputGradients, differentiable_once
from prefloss.kernels.matmul import Gradients, add_product, full_precision, gradient_dtype, project
from prefloss.kernels.naive import LogitTransform, Model, compute_dtype, divergences
from prefloss.kernels.tiles import MATMUL_ELEMENTS, Grid, on_cpu, select_targets, slices


def linear_token_kl(
    policy: Model,
    reference: Model,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    chunk_tokens: int | None = None,
) -> Tensor:
    """KL(reference || policy), KL(policy || reference), entropy of the reference over log V -> [3, ...]."""
    selected = select_targets(targets, ignore_index)
    if chunk_tokens is None:
        # the logits of both models are in memory, and one more block of that size
        elements, least = (2**22, 128) if on_cpu(policy.hidden) else (MATMUL_ELEMENTS // 2, 1)
        chunk_tokens = max(least, elements // len(policy.weight))
    tensors = (*_select(policy, selected), *_select(reference, selected))
    out = _LinearTokenKL.apply(*tensors, transform, chunk_tokens)
    return out.new_zeros(3, targets.numel()).index_copy(1, selected, out).reshape(3, *targets.shape)


def _select(model: Model, positions: Tensor) -> Model:
    hidden = model.hidden.reshape(-1, model.hidden.shape[-1]).index_select(0, positions)
    return model._replace(hidden=hidden)


class _LinearTokenKL(torch.autograd.Function):
    """Policy and reference with hidden states [n, H] -> [3, n]; autograd needs the six tensors one by one."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, transform, chunk_tokens = arguments
        policy, reference = Model(*tensors[:3]), Model(*tensors[3:])
        x, weight, _ = policy
        dtype = compute_dtype(x.dtype)
        out = torch.zeros(3, len(x), dtype=dtype, device=x.device)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        frozen = need_x and not need_weight and not need_bias
        saved = torch.zeros(2, len(x), x.shape[1], dtype=dtype, device=x.device) if frozen else None
        with full_precision(x.device):
            for rows in slices(len(x), chunk_tokens):
                p, q, slope = _log_softmaxes(policy, reference, rows, transform)
                out[:, rows] = divergences(p, q)
                if saved is not None:
                    for rates, place in zip(torch.eye(2, dtype=dtype, device=x.device), saved, strict=True):
                        dz = _differentiate(p, q, out[1, rows], rates[:, None]) * slope
                        add_product(dz.to(gradient_dtype(x)), weight, place[rows])
        ctx.save_for_backward(*tensors, out)
        ctx.saved, ctx.transform, ctx.chunk_tokens = saved, transform, chunk_tokens
        return out.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> InputGradients:
        *tensors, out = ctx.saved_tensors
        policy, reference = Model(*tensors[:3]), Model(*tensors[3:])
        x, weight, _ = policy
        if ctx.saved is not None:
            return ((ctx.saved * grad[:2].unsqueeze(-1)).sum(0).to(x.dtype), *(None,) * 7)
        span = slice(0, len(weight))
        grid = Grid(list(slices(len(x), ctx.chunk_tokens)), [span])
        sums = Gradients(x, weight, ctx.needs_input_grad[:3], grid, gradient_dtype(x))
        with full_precision(x.device):
            for rows in grid.slabs:
                p, q, slope = _log_softmaxes(policy, reference, rows, ctx.transform)
                dz = _differentiate(p, q, out[1, rows], grad[:2, rows]) * slope
                sums.add(rows, span, dz.to(gradient_dtype(x)))
        sums.finish(span)
        return *sums.gradients(), *(None,) * 5


def _log_softmaxes(
    policy: Model, reference: Model, rows: slice, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Log-probs of policy and reference over the vocabulary, [m, V] each, and the slope of the policy's logits."""

    def logits(model: Model) -> Tensor:
        x, weight, bias = model
        z = torch.empty(rows.stop - rows.start, len(weight), dtype=compute_dtype(x.dtype), device=x.device)
        return transform.apply_(project(x[rows], weight, bias, z))

    p = logits(policy)
    slope = transform.slope(p)
    p.sub_(p.logsumexp(-1, keepdim=True))
    q = logits(reference)
    return p, q.sub_(q.logsumexp(-1, keepdim=True)), slope


def _differentiate(p: Tensor, q: Tensor, reverse: Tensor, rates: Tensor) -> Tensor:
    """Gradient of the policy's logits, from those of the two divergences, [2, m]."""
    p_exp = p.exp()
    forward = (p_exp - q.exp()) * rates[0].unsqueeze(-1)
    back = torch.where(p_exp == 0, 0, p_exp * (p - q - reverse.unsqueeze(-1)))
    return forward + back * rates[1].unsqueeze(-1)
