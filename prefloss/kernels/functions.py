"""The ops as autograd sees them, the same for every implementation: shapes, ignored targets, who saves what.

An implementation is four passes over tokens that count: forward and backward, from logits and from hidden states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.paths import Path, Scheme, default_chunk
from prefloss.kernels.rows import on_cpu

Gradients = tuple[Tensor | None, ...]


class Implementation(NamedTuple):
    """The four passes, and the ops that they make; see `chunked` and `linear` for their arguments."""

    token_forward: Callable[..., Tensor]
    token_backward: Callable[..., Tensor]
    linear_forward: Callable[..., tuple[Tensor, Any]]
    linear_backward: Callable[..., Gradients]

    def token_stats(
        self,
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
        flat = targets.reshape(-1)
        safe = torch.where(flat != ignore_index, flat, -1)
        stats = _TokenStats.apply(self, logits, safe, transform, chunk_tokens, outputs, inplace_backward)
        return stats.reshape(outputs, *targets.shape)

    def token_logps(
        self,
        logits: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        ignore_index: int,
        chunk_tokens: int | None = None,
    ) -> Tensor:
        """Log-prob of each target: [..., V] logits and [...] targets -> [...], 0 at ignored targets."""
        return self.token_stats(logits, targets, transform, ignore_index, chunk_tokens)[0]

    def linear_token_stats(
        self,
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
        # the number of kept rows sizes the matmuls, so an accelerator waits for the targets here, once
        kept = torch.nonzero(flat_targets != ignore_index).squeeze(-1)
        stats = _LinearTokenStats.apply(
            self, flat_hidden, weight, bias, flat_targets[kept], kept, transform, choose(len(kept)), outputs
        )
        return stats.reshape(outputs, *targets.shape)

    def linear_token_logps(
        self,
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
            chunk = chunk_tokens or default_chunk(tokens, len(weight), on_cpu(hidden))
            return Path(scheme, chunk, kept_tokens)

        return self.linear_token_stats(hidden, weight, bias, targets, transform, ignore_index, choose)[0]


class _NoSecondGradient(torch.autograd.Function):
    """Passes a gradient on; an error for whoever differentiates it."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("impl: 'chunked' can be differentiated once; 'naive' gives second derivatives")


def differentiable_once(backward: Callable[[Any, Tensor], Gradients]) -> Callable[[Any, Tensor], Gradients]:
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
        passes: Implementation,
        logits: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        chunk_tokens: int | None,
        outputs: int,
        inplace_backward: bool,
    ) -> Tensor:
        stats = passes.token_forward(logits, targets, transform, chunk_tokens, outputs)
        ctx.save_for_backward(logits, targets, stats)
        ctx.backward_pass, ctx.options = passes.token_backward, (transform, chunk_tokens, inplace_backward)
        # a copy is returned, so that the caller may write over the result
        return stats[:outputs].clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        return None, ctx.backward_pass(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 5


class _LinearTokenStats(torch.autograd.Function):
    """Hidden [N, H], weight [V, H], bias [V] and the n targets that count, at rows `kept` -> [outputs, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        passes: Implementation,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        kept: Tensor,
        transform: LogitTransform,
        path: Path,
        outputs: int,
    ) -> Tensor:
        x = _selected(hidden, kept)
        stats, saved = passes.linear_forward(x, weight, bias, targets, transform, path, outputs)
        ctx.save_for_backward(hidden, weight, bias, targets, kept, stats)
        # not through save_for_backward: the backward pass writes over it
        ctx.saved, ctx.path, ctx.transform = saved, path, transform
        ctx.backward_pass = passes.linear_backward
        return stats.new_zeros(outputs, len(hidden)).index_copy_(1, kept, stats[:outputs])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        hidden, weight, bias, targets, kept, stats = ctx.saved_tensors
        path, saved = ctx.path, ctx.saved
        grad = grad if len(kept) == len(hidden) else grad[:, kept]
        if path.scheme == "unscaled":
            d_x, d_weight, d_bias = scaled(saved, grad, hidden.dtype), None, None
        else:
            # a second backward pass, after this one has written over what was kept, computes the logits again
            ctx.saved = None
            x = _selected(hidden, kept)
            d_x, d_weight, d_bias = ctx.backward_pass(
                grad, x, weight, bias, targets, stats, saved, ctx.transform, path, ctx.needs_input_grad[1:4]
            )
        # what was kept is the largest of all, and done with
        del saved
        if d_x is not None and len(kept) < len(hidden):
            d_x = torch.zeros_like(hidden).index_copy_(0, kept, d_x)
        return None, d_x, d_weight, d_bias, *(None,) * 5


def _selected(hidden: Tensor, kept: Tensor) -> Tensor:
    return hidden if len(kept) == len(hidden) else hidden.index_select(0, kept)


def scaled(saved: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of hidden states, [n, H], from what the scheme "unscaled" saved and the log-probs' own, [1, n]."""
    out = torch.empty(saved.shape, dtype=dtype, device=saved.device)
    return torch.mul(saved, grad[0].unsqueeze(-1), out=out)
