"""KL divergences between two models' next-token distributions, a slice of tokens at a time.

With p the policy's softmax and q the reference's, at one token,

    d KL(q || p) / dz = p - q,    d KL(p || q) / dz = p (log p - log q - KL(p || q)).

Both depend on that token alone. So with a frozen head their gradients in the hidden state, [2, n, H], are computed in
the forward pass, and the backward pass only scales and adds them; with a trainable one it computes the logits of both
models again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefloss.kernels import heads
from prefloss.kernels.functions import Gradients, differentiable_once
from prefloss.kernels.naive import LogitTransform, compute_dtype, divergences, no_autocast
from prefloss.kernels.paths import MATMUL_ELEMENTS
from prefloss.kernels.rows import on_cpu, slices


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    chunk_tokens: int | None = None,
) -> Tensor:
    """KL(reference || policy), KL(policy || reference), entropy of the reference over log V -> [3, ...]."""
    kept = torch.nonzero(targets.reshape(-1) != ignore_index).squeeze(-1)
    if chunk_tokens is None:
        chunk_tokens = _rows_at_a_time(len(weight), on_cpu(hidden))
    x = hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept)
    reference = reference_hidden.reshape(-1, reference_hidden.shape[-1]).index_select(0, kept)
    out = _LinearTokenKL.apply(
        x, weight, bias, reference, reference_weight, reference_bias, transform, chunk_tokens
    )
    return out.new_zeros(3, targets.numel()).index_copy(1, kept, out).reshape(3, *targets.shape)


def _rows_at_a_time(vocabulary: int, cpu: bool) -> int:
    """Tokens of a slice: there are the logits of both models and one more block of that size."""
    return max(128, 2**22 // vocabulary) if cpu else max(1, MATMUL_ELEMENTS // 2 // vocabulary)


class _LinearTokenKL(torch.autograd.Function):
    """Hidden states [n, H] of the policy and the reference, and their heads -> [3, n]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference: Tensor,
        reference_weight: Tensor,
        reference_bias: Tensor | None,
        transform: LogitTransform,
        chunk_tokens: int,
    ) -> Tensor:
        dtype = compute_dtype(x.dtype)
        out = torch.zeros(3, len(x), dtype=dtype, device=x.device)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        frozen = need_x and not need_weight and not need_bias
        saved = torch.zeros(2, len(x), x.shape[1], dtype=dtype, device=x.device) if frozen else None
        models = ((x, weight, bias), (reference, reference_weight, reference_bias))
        with no_autocast(x.device):
            for rows in slices(len(x), chunk_tokens):
                p, q, slope = _log_softmaxes(models, rows, transform)
                out[:, rows] = divergences(p, q)
                if saved is not None:
                    for which in (0, 1):
                        rate = out.new_zeros(2, len(p))
                        rate[which] = 1
                        dz = _differentiate(p, q, out[1, rows], rate) * slope
                        heads.add_product(dz.to(heads.gradient_dtype(x)), weight, saved[which, rows])
        ctx.save_for_backward(x, weight, bias, reference, reference_weight, reference_bias, out)
        ctx.saved, ctx.transform, ctx.chunk_tokens = saved, transform, chunk_tokens
        return out.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, weight, bias, reference, reference_weight, reference_bias, out = ctx.saved_tensors
        if ctx.saved is not None:
            return ((ctx.saved * grad[:2].unsqueeze(-1)).sum(0).to(x.dtype), *(None,) * 7)
        parts, whole = list(slices(len(x), ctx.chunk_tokens)), slice(0, len(weight))
        sums = heads.Gradients(x, weight, ctx.needs_input_grad[:3], len(weight), len(parts))
        models = ((x, weight, bias), (reference, reference_weight, reference_bias))
        with no_autocast(x.device):
            for rows in parts:
                p, q, slope = _log_softmaxes(models, rows, ctx.transform)
                dz = _differentiate(p, q, out[1, rows], grad[:2, rows]) * slope
                sums.add(rows, whole, dz.to(heads.gradient_dtype(x)))
        sums.finish(whole)
        return *sums.gradients(), *(None,) * 5


_Models = tuple[tuple[Tensor, Tensor, Tensor | None], ...]


def _log_softmaxes(
    models: _Models, rows: slice, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Log-probs of policy and reference over the vocabulary, [m, V] each, and the slope of the policy's logits."""
    logps, slope = [], 1.0
    for which, (x, weight, bias) in enumerate(models):
        z = torch.empty(rows.stop - rows.start, len(weight), dtype=compute_dtype(x.dtype), device=x.device)
        z = transform.apply_(heads.project(x[rows], weight, bias, z))
        if which == 0:
            slope = transform.slope(z)
        logps.append(z.sub_(z.logsumexp(-1, keepdim=True)))
    return logps[0], logps[1], slope


def _differentiate(p: Tensor, q: Tensor, reverse: Tensor, rates: Tensor) -> Tensor:
    """Gradient of the policy's logits, from those of the two divergences, [2, m]."""
    p_exp = p.exp()
    forward = (p_exp - q.exp()) * rates[0].unsqueeze(-1)
    back = torch.where(p_exp == 0, 0, p_exp * (p - q - reverse.unsqueeze(-1)))
    return forward + back * rates[1].unsqueeze(-1)
