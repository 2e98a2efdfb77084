"""The chunked ops as PyTorch custom ops, ``torch.ops.prefloss.*``: what torch.compile puts into its graphs.

Eager code calls `chunked` itself, which costs less per call and can write gradients in place. These keep a fixed
layout, whatever number of tokens counts, so that a graph knows every shape: [2 or 5, N] statistics, and room for N
(or `kept_tokens`) rows of what the scheme keeps, with zeros where ignored tokens leave some over.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from prefloss.kernels import chunked
from prefloss.kernels.functions import scaled
from prefloss.kernels.naive import LogitTransform, compute_dtype
from prefloss.kernels.paths import Path, Scheme, kept_columns, kept_dtype

# torch's schema inference knows neither `X | None` (before 2.6) nor string annotations
# ruff: noqa: UP045


@torch.library.custom_op("prefloss::token_stats", mutates_args=())
def token_stats(
    logits: Tensor,
    targets: Tensor,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    chunk_tokens: int,
    outputs: int,
    impl: str,
) -> Tensor:
    """Logits [..., V] and targets [N], -1 at those to leave out -> [2 or 5, N], see `rows.STATS`."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    return _kernels(impl).token_forward(logits, targets, transform, chunk_tokens, outputs)


@token_stats.register_fake
def _(logits: Tensor, targets: Tensor, *options: Any) -> Tensor:
    return _stats_like(logits, targets, options[-2])


@torch.library.custom_op("prefloss::token_stats_backward", mutates_args=())
def token_stats_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    chunk_tokens: int,
    outputs: int,
    impl: str,
) -> Tensor:
    """Gradient of the logits from that of the first `outputs` statistics."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    return _kernels(impl).token_backward(grad[:outputs], logits, targets, stats, transform, chunk_tokens)


@token_stats_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_token_stats(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], output)
    ctx.options = inputs[2:]


def _token_stats_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (token_stats_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 7)


token_stats.register_autograd(_token_stats_grad, setup_context=_save_token_stats)


@torch.library.custom_op("prefloss::linear_token_stats", mutates_args=())
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    targets: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    scheme: str,
    chunk_tokens: int,
    kept_tokens: int,
    outputs: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Hidden [N, H], weight [V, H], bias [V] and targets [N] -> statistics [2 or 5, N] and what the scheme keeps."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    path = Path(_scheme(scheme), chunk_tokens, kept_tokens)
    kept = torch.nonzero(targets != ignore_index).squeeze(-1)
    room = _room(hidden, weight, scheme, kept_tokens, impl)
    if len(kept) < len(room):
        # an output of an op is a function of its inputs, and not what the memory held before
        room.zero_()
    stats, _ = _kernels(impl).linear_forward(
        hidden.index_select(0, kept), weight, bias, targets[kept], transform, path, outputs, room
    )
    return stats.new_zeros(len(stats), len(hidden)).index_copy_(1, kept, stats), room


@linear_token_stats.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], targets: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    *_, scheme, _, kept_tokens, outputs, impl = options
    return _stats_like(hidden, targets, outputs), _room(hidden, weight, scheme, kept_tokens, impl)


@torch.library.custom_op("prefloss::linear_token_stats_backward", mutates_args=())
def linear_token_stats_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    targets: Tensor,
    stats: Tensor,
    room: Tensor,
    needs: list[bool],
    ignore_index: int,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    scheme: str,
    chunk_tokens: int,
    kept_tokens: int,
    outputs: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, of no elements where `needs` says that none is wanted."""
    kept = torch.nonzero(targets != ignore_index).squeeze(-1)
    grad, d_weight, d_bias = grad[:outputs, kept], None, None
    if scheme == "unscaled":
        d_x = scaled(room[: len(kept)], grad, hidden.dtype)
    else:
        transform = LogitTransform(logit_scale, softcap, temperature)
        path = Path(_scheme(scheme), chunk_tokens, kept_tokens)
        d_x, d_weight, d_bias = _kernels(impl).linear_backward(
            grad, hidden.index_select(0, kept), weight, bias, targets[kept], stats[:, kept],
            room if min(len(kept), kept_tokens) else None, transform, path, tuple(needs), overwrite=False,
        )  # fmt: skip
    d_hidden = hidden.new_zeros(hidden.shape if needs[0] else (0,))
    if d_x is not None:
        d_hidden.index_copy_(0, kept, d_x)
    none = hidden.new_zeros(0)
    return d_hidden, none if d_weight is None else d_weight, none.clone() if d_bias is None else d_bias


@linear_token_stats_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    targets: Tensor,
    stats: Tensor,
    room: Tensor,
    needs: list[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, (weight.shape[0],))
    d_hidden, d_weight, d_bias = (
        torch.empty(shape if need else (0,), dtype=hidden.dtype, device=hidden.device)
        for shape, need in zip(shapes, needs, strict=True)
    )
    return d_hidden, d_weight, d_bias


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _linear_grad(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads = linear_token_stats_backward(grad, *ctx.saved_tensors, needs, *ctx.options)
    wanted = (g if need else None for g, need in zip(grads, needs, strict=True))
    return (*wanted, *(None,) * 10)


linear_token_stats.register_autograd(_linear_grad, setup_context=_save_linear)


def _kernels(impl: str) -> Any:
    if impl != "triton":
        return chunked
    from prefloss.kernels import tiles

    return tiles


def _stats_like(x: Tensor, targets: Tensor, outputs: int) -> Tensor:
    shape = (max(2, outputs), targets.shape[0])
    return torch.empty(shape, dtype=compute_dtype(x.dtype), device=x.device)


def _room(hidden: Tensor, weight: Tensor, scheme: str, kept_tokens: int, impl: str) -> Tensor:
    if scheme == "unscaled":
        return torch.empty(hidden.shape, dtype=compute_dtype(hidden.dtype), device=hidden.device)
    columns = weight.shape[0] if impl == "triton" else kept_columns(hidden.dtype, weight.shape[0])
    rows = kept_tokens if scheme == "keep" else 0
    return torch.empty(rows, columns, dtype=kept_dtype(hidden.dtype), device=hidden.device)


def _scheme(name: str) -> Scheme:
    assert name in ("score", "unscaled", "keep", "recompute")
    return name
