"""The ops of `naive` some tokens at a time: no float32 [N, V] is ever stored, unless it is asked for.

Here are the passes from logits; those from hidden states are in `linear`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prefloss.kernels import rows as row_ops
from prefloss.kernels.functions import Implementation
from prefloss.kernels.linear import linear_backward, linear_forward
from prefloss.kernels.naive import LogitTransform, compute_dtype, no_autocast
from prefloss.kernels.paths import MATMUL_ELEMENTS
from prefloss.kernels.rows import on_cpu, rows_of, slices


def token_forward(
    logits: Tensor, targets: Tensor, transform: LogitTransform, chunk_tokens: int | None, outputs: int
) -> Tensor:
    """Statistics [2 or 5, N] of logits [..., V] and N targets, negative at those to leave out."""
    stats = torch.zeros(
        max(2, outputs), len(targets), dtype=compute_dtype(logits.dtype), device=logits.device
    )
    # autograd is off in here already, but torch.compile of older torch traces this with it on
    with torch.no_grad(), no_autocast(logits.device):
        for part, rows in _row_slices(logits, chunk_tokens):
            if not _known_to_be_ignored(targets[rows]):
                row_ops.score(part, targets[rows], transform, stats[:, rows])
    return stats


def token_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    transform: LogitTransform,
    chunk_tokens: int | None,
    over_logits: bool = False,
) -> Tensor:
    """Gradient of logits [..., V], written over them if that is wanted and their rows allow it."""
    over_logits = over_logits and logits.is_contiguous()
    d_logits = logits if over_logits else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    d_rows = d_logits.view(-1, logits.shape[-1])
    rates = row_ops.coefficients(grad, stats)
    with no_autocast(logits.device):
        for part, rows in _row_slices(logits, chunk_tokens):
            out = d_rows[rows]
            if _known_to_be_ignored(targets[rows]):
                out.zero_()
                continue
            row_ops.differentiate(
                part,
                out,
                targets[rows],
                0,
                transform,
                stats[:, rows],
                rates[rows],
                len(grad) == 1,
                not over_logits,
            )
    if not over_logits:
        return d_logits
    # whoever saved the logits for its own backward pass is told that they are gone
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def _known_to_be_ignored(targets: Tensor) -> bool:
    """Whether no row counts; where an accelerator would have to wait for the answer, False."""
    return on_cpu(targets) and not (targets >= 0).any()


def _row_slices(logits: Tensor, chunk_tokens: int | None) -> Iterator[tuple[Tensor, slice]]:
    """[..., V] as views [m, V] in order, with the slice of all rows that each is."""
    chunk_tokens = rows_of(logits, MATMUL_ELEMENTS) if chunk_tokens is None else chunk_tokens
    start = 0
    for matrix in _matrices(logits):
        for part in slices(len(matrix), chunk_tokens):
            yield matrix[part], slice(start + part.start, start + part.stop)
        start += len(matrix)


def _matrices(x: Tensor) -> list[Tensor]:
    """[..., V] as [n, V] views in order of rows: one, or several where the strides (a shift) allow no one."""
    try:
        return [x.view(-1, x.shape[-1])]
    except RuntimeError:
        return [matrix for part in x.unbind() for matrix in _matrices(part)]


_implementation = Implementation(token_forward, token_backward, linear_forward, linear_backward)
token_stats, token_logps = _implementation.token_stats, _implementation.token_logps
linear_token_stats = _implementation.linear_token_stats
linear_token_logps = _implementation.linear_token_logps
