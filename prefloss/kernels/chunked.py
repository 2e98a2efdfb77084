"""The ops of `naive` a slice of tokens at a time: no float32 [N, V] is ever stored, unless it is asked for.

Forward keeps a few numbers per token, and of the linear op what its scheme says (`paths`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prefloss.kernels import rows as row_ops
from prefloss.kernels.functions import Gradients, Implementation
from prefloss.kernels.heads import Backward, HeadSums, gradient_dtype, likely_columns, project, times_head
from prefloss.kernels.naive import LogitTransform, compute_dtype, no_autocast
from prefloss.kernels.paths import MATMUL_ELEMENTS, Path, kept_columns, kept_dtype
from prefloss.kernels.rows import on_cpu, place_over, rows_of, slices

# Rows of hidden states that pass over the head together where no logits are stored: they stay in the cache.
_FUSED_ROWS = 2048
# Columns of a tile of the backward pass that goes by columns: enough for the matmuls.
_LEAST_COLUMNS = 1024


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
                part, out, targets[rows], transform, stats[:, rows], rates[rows], len(grad) == 1
            )
    if not over_logits:
        return d_logits
    # whoever saved the logits for its own backward pass is told that they are gone
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    path: Path,
    outputs: int,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [n, H] -> statistics [2 or 5, n], and what the scheme keeps for the backward pass, in `room`."""
    n, dtype = len(x), compute_dtype(x.dtype)
    unscaled = path.scheme == "unscaled"
    kept_tokens = min(n, path.kept_tokens) if path.scheme == "keep" else 0
    stats = torch.zeros(max(2, outputs), n, dtype=dtype, device=x.device)
    saved = _room_to_keep(x, weight, unscaled, kept_tokens) if room is None or not len(room) else room
    fused = row_ops.projects(x, weight, transform)
    # whether logits are kept as they are computed, and so all at once
    directly = fused or kept_dtype(x.dtype) == dtype
    chunk_tokens = max(path.chunk_tokens, _FUSED_ROWS) if fused and not unscaled else path.chunk_tokens
    scratch = None
    if unscaled or (not fused and not (directly and kept_tokens == n)):
        scratch = _scratch(n, weight, chunk_tokens, fused)
    with torch.no_grad(), no_autocast(x.device):
        for rows in _parts(n, kept_tokens, chunk_tokens, whole=directly and on_cpu(x)):
            keep = rows.start < kept_tokens
            z = None if scratch is None else scratch[: rows.stop - rows.start]
            if keep and directly and saved is not None:
                z = saved[rows]
            y, part = targets[rows], stats[:, rows]
            _score(x[rows], weight, bias, y, transform, part, z, overwrite=not (keep or unscaled))
            if saved is None or z is None:
                continue
            if unscaled:
                dz = _differentiate(z, weight, y, transform, part)
                times_head(dz, weight, saved[rows], likely_columns(dz, path.skip_below))
            elif keep and not directly:
                row_ops.encode(z, transform, part[1], saved[rows])
    return stats, saved


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Tensor,
    saved: Tensor | None,
    transform: LogitTransform,
    path: Path,
    needs: tuple[bool, ...],
    overwrite: bool = True,
    rounded: bool = True,
    over_x: bool = False,
) -> Gradients:
    """Gradients of hidden states [n, H], weight and bias; the scheme "keep" may write over `saved`.

    `rounded` to the dtype of x is the first, or left in float32 for the sum over processes; `over_x` lets it take the
    place of x.
    """
    n, kept_tokens = len(x), 0 if saved is None else len(saved)
    # gradients as wide as what was kept are written over it, all at once
    whole = overwrite and saved is not None and saved.element_size() == gradient_dtype(x).itemsize
    fewer = 0 < n - kept_tokens < len(weight) and (whole or kept_tokens == 0)
    if needs[1] and x.dtype.itemsize == 2 and fewer and path.skip_below == 0:
        return _backward_by_columns(
            grad, x, weight, bias, targets, stats, saved, transform, path, needs, rounded
        )
    parts = list(_parts(n, kept_tokens, path.chunk_tokens, whole))
    scratch = None
    if kept_tokens < n:
        scratch = _scratch(n, weight, path.chunk_tokens, row_ops.projects(x, weight, transform))
    rates = row_ops.coefficients(grad, stats)
    backward = Backward(x, weight, needs, len(parts), path.skip_below > 0, rounded, over_x)
    with no_autocast(x.device):
        for rows in parts:
            y = targets[rows]
            if saved is not None and rows.start < kept_tokens:
                z = saved[rows] if overwrite else saved[rows].clone()
            else:
                assert scratch is not None
                z = _logits(x[rows], weight, bias, y, transform, scratch)
            dz = _differentiate(z, weight, y, transform, stats[:, rows], rates[rows], len(grad) == 1)
            backward.add(rows, dz, likely_columns(dz, path.skip_below, grad[0, rows]))
    return backward.gradients()


def _backward_by_columns(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Tensor,
    saved: Tensor | None,
    transform: LogitTransform,
    path: Path,
    needs: tuple[bool, ...],
    rounded: bool,
) -> Gradients:
    """`linear_backward` with columns outermost: no sum of the whole gradient of the head, [V, H], is in float32.

    Where there are fewer tokens to compute again than rows of the head, their sum, [n, H], is the smaller one.
    """
    n, vocabulary = len(x), len(weight)
    rates, plain = row_ops.coefficients(grad, stats), len(grad) == 1
    kept = slice(0, 0 if saved is None else len(saved))
    elements = path.chunk_tokens * vocabulary
    height = max(1, min(n - kept.stop, elements // min(vocabulary, _LEAST_COLUMNS)))
    rest, width = list(slices(n, height, kept.stop)), min(vocabulary, elements // height)
    sums = HeadSums(x, weight, needs, rounded, len(rest) + (kept.stop > 0))
    with no_autocast(x.device):
        dz_kept = None
        if saved is not None:
            dz_kept = _differentiate(
                saved, weight, targets[kept], transform, stats[:, kept], rates[kept], plain
            )
        scratch = _scratch(height, weight[:width], height, row_ops.projects(x, weight, transform))
        for span in slices(vocabulary, width):
            head = weight[span]
            if dz_kept is not None:
                sums.add(kept, span, dz_kept[:, span])
            for rows in rest:
                # what another span holds is beyond this one
                here = targets[rows] - span.start
                y = torch.where((here >= 0) & (here < len(head)), here, len(head))
                z = _logits(x[rows], head, None if bias is None else bias[span], y, transform, scratch)
                dz = _differentiate(z, head, y, transform, stats[:, rows], rates[rows], plain)
                sums.add(rows, span, dz)
            sums.finish(span)
    return sums.gradients()


def _logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    scratch: Tensor,
) -> Tensor:
    """The logits of a slice computed again, raw or in codes, in the first rows and columns of `scratch`."""
    if not row_ops.projects(x, weight, transform):
        return project(x, weight, bias, scratch[: len(x), : len(weight)])
    z = scratch[: len(x), : row_ops.code_columns(len(weight))]
    # statistics that are known, and of a part of the vocabulary of no use
    row_ops.project(x, weight, bias, targets, transform, x.new_empty(2, len(x), dtype=torch.float32), z)
    return z


def _score(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    stats: Tensor,
    z: Tensor | None,
    overwrite: bool,
) -> None:
    """Statistics [2 or 5, m] of the logits of a slice, which go to z: raw, or in codes, which may be left out."""
    if row_ops.projects(x, weight, transform):
        row_ops.project(x, weight, bias, targets, transform, stats, z)
        return
    assert z is not None
    row_ops.score(project(x, weight, bias, z), targets, transform, stats, overwrite)


def _parts(n: int, kept_tokens: int, chunk_tokens: int, whole: bool) -> Iterator[slice]:
    """Slices of the tokens, none of which lies on both sides of `kept_tokens`."""
    yield from slices(kept_tokens, max(1, kept_tokens) if whole else chunk_tokens)
    yield from slices(n, chunk_tokens, kept_tokens)


def _room_to_keep(x: Tensor, weight: Tensor, unscaled: bool, kept_tokens: int) -> Tensor | None:
    if unscaled:
        return torch.empty(x.shape, dtype=compute_dtype(x.dtype), device=x.device)
    if kept_tokens == 0:
        return None
    columns = kept_columns(x.dtype, len(weight))
    return torch.empty(kept_tokens, columns, dtype=kept_dtype(x.dtype), device=x.device)


def _differentiate(
    z: Tensor,
    weight: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    stats: Tensor,
    rates: Tensor | None = None,
    plain: bool = True,
) -> Tensor:
    """Gradient of the logits or codes in z, over them where it fits; of each log-prob itself without `rates`."""
    if rates is None:
        rates = row_ops.coefficients(torch.ones_like(stats[:1]), stats)
    wanted = gradient_dtype(weight)
    out = place_over(z, wanted, len(weight))
    if z.dtype == torch.float32 and out.data_ptr() != z.data_ptr():
        # plain torch: in place first, or it would need a second float32 block
        row_ops.differentiate(z, z, targets, transform, stats, rates, plain)
        return out.copy_(z)
    return row_ops.differentiate(z, out, targets, transform, stats, rates, plain)


def _scratch(tokens: int, weight: Tensor, chunk_tokens: int, coded: bool = False) -> Tensor:
    """A slice of logits, or of their codes, to fill again and again: fresh memory costs more than passing over it."""
    rows, vocabulary = min(tokens, chunk_tokens), len(weight)
    if coded:
        columns = row_ops.code_columns(vocabulary)
        return torch.empty(rows, columns, dtype=torch.int16, device=weight.device)
    return torch.empty(rows, vocabulary, dtype=compute_dtype(weight.dtype), device=weight.device)


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
