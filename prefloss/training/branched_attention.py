"""Attention of completions that share a prompt, on a CPU, without a mask and with the prompt's keys in memory once.

Two calls of torch's own kernel: all completions over the prompt, and each completion over itself, causally. Their
results are joined by the log-sum-exp of the scores. The kernel's backward pass gives the exact gradient of each part
when it gets the joined result, as in ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch has the kernel for these queries, keys and values."""
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return same and query.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def branched_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """Attention of completions to their prompt and to what comes before in the completion.

    Args:
        query: Of all completions, one after another, [1, heads, N, D].
        key: The same, [1, key heads, N, D].
        value: The same.
        prompt: Keys and values of the prompt, [1, key heads, P, D] each.
        lengths: Tokens of each completion, the longest first.
        scale: Factor of the scores; None for 1 / sqrt(D).

    Returns:
        [1, heads, N, D].
    """
    groups = query.shape[1] // key.shape[1]
    keys = (item if groups == 1 else item.repeat_interleave(groups, 1) for item in (*prompt, key, value))
    return _Branched.apply(query, *keys, tuple(lengths), scale)


def stacked(item: Tensor, lengths: Sequence[int]) -> Tensor:
    """[1, heads, N, D] -> [sequences, heads, longest, D], filled up with zeros at the end.

    Args:
        item: Of all sequences, one after another.
        lengths: Tokens of each, the longest first.
    """
    width = lengths[0]
    if lengths[-1] == width:
        return item.unflatten(2, (len(lengths), width)).transpose(1, 2).squeeze(0)
    return torch.cat([pad(part, (0, 0, 0, width - part.shape[2])) for part in item.split(lengths, 2)])


def flat(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """The inverse of `stacked`."""
    if lengths[-1] == lengths[0]:
        return rows.transpose(0, 1).flatten(1, 2).unsqueeze(0)
    return torch.cat([row[:, :length] for row, length in zip(rows, lengths, strict=True)], 1).unsqueeze(0)


class _Branched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Any,
        scale: Any,
    ) -> Tensor:
        before, before_lse = _forward(query, prompt_key, prompt_value, scale=scale)
        rows = (stacked(item, lengths) for item in (query, key, value))
        within, within_lse = _forward(*rows, is_causal=True, scale=scale)
        within_lse = flat(within_lse.unsqueeze(-1), lengths)
        before_lse = before_lse.unsqueeze(-1)
        lse = torch.logaddexp(before_lse, within_lse)
        result = before * (before_lse - lse).exp().to(before.dtype)
        result += flat(within, lengths) * (within_lse - lse).exp().to(before.dtype)
        ctx.save_for_backward(query, prompt_key, prompt_value, key, value, result, lse)
        ctx.lengths, ctx.scale = lengths, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query, prompt_key, prompt_value, key, value, result, lse = ctx.saved_tensors
        query_grad, *prompt_grads = _backward(
            grad, query, prompt_key, prompt_value, result, lse.squeeze(-1), 0.0, False, scale=ctx.scale
        )
        *rows, row_lse = (stacked(item, ctx.lengths) for item in (grad, query, key, value, result, lse))
        own = _backward(*rows, row_lse.squeeze(-1), 0.0, True, scale=ctx.scale)
        own_query, *own_grads = (flat(item, ctx.lengths) for item in own)
        return query_grad + own_query, *prompt_grads, *own_grads, None, None
