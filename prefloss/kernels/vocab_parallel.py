"""Log-probs from a head whose vocabulary is divided among the processes of a group.

Every process has all hidden states and targets and its own rows of the head, in order of rank. Two numbers per token
cross the group in the forward pass (maximum and sum make the logsumexp; the target's log-prob comes from the process
that holds its row), and the gradient of the hidden states in the backward pass.

Gradient convention (Megatron's): every process computes the same loss from the same log-probs, so all come with the
same gradient of it. Each gets the whole gradient of the hidden states, and that of its own rows of the head. Nothing
is to be averaged over the group afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prefloss.kernels.autograd import InputGradients, differentiable_once
from prefloss.kernels.linear import linear_backward, linear_forward
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.plan import Plan
from prefloss.kernels.tiles import LinearInputs, default_chunk, on_cpu, select_targets


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-prob of each target token, [...], the same on every process.

    `hidden`, [..., H], and `targets`, [...], in the whole vocabulary, are the same on every process. `weight`,
    [V of this rank, H], and `bias`, [V of this rank] or None, are this process's part of the head, or DTensors sharded
    in their first dimension. `group`: the processes that share the head, in order of its rows; None for all; a
    DTensor's is its mesh. The other options are those of `prefloss.linear_token_logps`.
    """
    weight, group = _local(weight, group)
    bias = None if bias is None else _local(bias, group)[0]
    first, vocabulary = _place(len(weight), group, hidden.device)
    selected = select_targets(targets, ignore_index)
    y = targets.reshape(-1)[selected]
    outside = (y < 0) | (y >= vocabulary)
    if on_cpu(y) and outside.any():
        raise IndexError(
            f"targets: got {y[outside][0].item()}, expected 0 <= target < {vocabulary} (V over all processes)"
        )
    y = y - first
    # a target of another process gets the index just past this vocabulary
    y = torch.where((y >= 0) & (y < len(weight)), y, len(weight))
    if chunk_tokens is None:
        # by the mean length of a shard, so that all processes take slices alike
        shard = -(-vocabulary // dist.get_world_size(group))
        chunk_tokens = default_chunk(len(selected), shard, on_cpu(hidden))
    x = hidden.reshape(-1, hidden.shape[-1]).index_select(0, selected)
    transform = LogitTransform(logit_scale, softcap, temperature)
    logps = _VocabParallel.apply(x, weight, bias, y, transform, Plan("recompute", chunk_tokens), group)
    if not on_cpu(y):
        # a device cannot report a mistake without being waited for
        logps = logps.masked_fill(outside, torch.nan)
    return logps.new_zeros(targets.numel()).index_copy(0, selected, logps).reshape(targets.shape)


def _local(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, dist.ProcessGroup | None]:
    """This process's part of x, and the group that shares it."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(x, DTensor):
        return x, group
    if x.placements != (Shard(0),):
        raise ValueError(
            f"weight: got a DTensor placed {x.placements}, expected (Shard(0),) on a mesh of one dimension"
        )
    return x.to_local(), x.device_mesh.get_group()


def _place(rows: int, group: dist.ProcessGroup | None, device: torch.device) -> tuple[int, int]:
    """First row of this process's shard, and the number of all rows."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([rows], device=device), group=group)
    lengths = torch.cat(sizes).tolist()
    return sum(lengths[: dist.get_rank(group)]), sum(lengths)


class _VocabParallel(torch.autograd.Function):
    """Hidden [n, H], rows of the head [V, H] and [V], and the n targets, V if in another process -> [n]."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, targets, transform, plan, group = arguments
        stats, _ = linear_forward(LinearInputs(x, weight, bias, targets, transform), plan, 1)
        logps, lse = _join(stats[0], stats[1], targets < len(weight), group)
        ctx.save_for_backward(x, weight, bias, targets, torch.stack((logps, lse)))
        ctx.transform, ctx.plan, ctx.group = transform, plan, group
        return logps

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> InputGradients:
        x, weight, bias, targets, stats = ctx.saved_tensors
        inputs, needs = LinearInputs(x, weight, bias, targets, ctx.transform), ctx.needs_input_grad[:3]
        d_x, d_weight, d_bias = linear_backward(
            grad[None], inputs, stats, None, ctx.plan, needs, rounded=False
        )
        if d_x is not None:
            dist.all_reduce(d_x, group=ctx.group)
            d_x = d_x.to(x.dtype)
        return d_x, d_weight, d_bias, *(None,) * 4


def _join(
    logps: Tensor, lse: Tensor, owned: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and logsumexps over the whole vocabulary from those over this process's part."""
    peak = lse.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    total = (lse - peak).exp_()
    dist.all_reduce(total, group=group)
    joint_lse = peak + total.log_()
    joined = torch.where(owned, logps + (lse - joint_lse), 0)
    dist.all_reduce(joined, group=group)
    return joined, joint_lse
