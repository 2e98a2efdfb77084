"""Products with the head, [V, H], and its gradient: sums in float32, of a slice of the vocabulary where that helps."""

from __future__ import annotations

import torch
from torch import Tensor

from prefloss.kernels.naive import compute_dtype
from prefloss.kernels.rows import has_mixed_matmul, matmul, on_cpu, rows_of, slices

# Elements of the head, or of its gradient, that are converted at a time, 16 MiB.
_HEAD_ELEMENTS = 2**22
# Elements of the gradient of the hidden states that are summed in float32 at a time, 2 MiB: they stay in the cache.
_HIDDEN_ELEMENTS = 2**19
# Rows of the head that are left out of the backward pass together.
_SKIP_COLUMNS = 256


def project(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> Tensor:
    """Logits x @ weight.T + bias in the precision of z, [m, V], which it fills and returns."""
    if x.dtype == z.dtype or has_mixed_matmul(x):
        matmul(x, weight.T, out=z)
    else:
        x = x.to(z.dtype)
        for part in slices(len(weight), rows_of(weight, _HEAD_ELEMENTS)):
            matmul(x, weight[part].to(z.dtype).T, out=z[:, part])
    return z if bias is None else z.add_(bias)


def times_head(dz: Tensor, weight: Tensor, out: Tensor, columns: list[slice] | None = None) -> Tensor:
    """The gradient of a slice of hidden states, dz @ weight, summed in the precision of `out`."""
    if columns is None and dz.dtype == weight.dtype:
        return matmul(dz, weight, out=out)
    out.zero_()
    for run in [slice(0, len(weight))] if columns is None else columns:
        if dz.dtype == weight.dtype:
            matmul(dz[:, run], weight[run], out=out, add=True)
            continue
        for part in slices(run.stop, rows_of(weight, _HEAD_ELEMENTS), run.start):
            out.addmm_(dz[:, part], weight[part].to(dz.dtype))
    return out


def gradient_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the gradient of the logits enters the matmuls of the backward pass."""
    # A float32 matmul takes 2 (CPU) to 10 (GPU) times as long, so one factor is rounded to bfloat16, once, and the
    # sums stay in float32. In float16 the small entries would vanish.
    rounds = x.dtype == torch.bfloat16 and has_mixed_matmul(x)
    return torch.bfloat16 if rounds else compute_dtype(x.dtype)


def likely_columns(dz: Tensor, skip_below: float, grad: Tensor | None = None) -> list[slice] | None:
    """Runs of the vocabulary to multiply by; None for all of it.

    A block is left out if no gradient of a logit in it exceeds `skip_below` times the largest gradient of a log-prob
    in this slice (1 without `grad`). So what is left out of the gradient of a hidden state is at most that times the
    sum of the norms of the rows of the head left out, and likewise for a row of the head.
    """
    if skip_below == 0 or dz.numel() == 0:
        return None
    limit = skip_below * (1.0 if grad is None else grad.abs().max().item())
    largest = torch.maximum(dz.amax(0), -dz.amin(0))
    blocks = torch.nn.functional.pad(largest, (0, -len(largest) % _SKIP_COLUMNS)).view(-1, _SKIP_COLUMNS)
    runs: list[slice] = []
    for block in torch.nonzero(blocks.amax(-1) > limit).squeeze(-1).tolist():
        start, stop = block * _SKIP_COLUMNS, min((block + 1) * _SKIP_COLUMNS, dz.shape[1])
        if runs and runs[-1].stop == start:
            start = runs.pop().start
        runs.append(slice(start, stop))
    return runs


class Backward:
    """Gradients of hidden states [n, H], weight and bias, from those of the logits, a slice of tokens at a time."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        needs: tuple[bool, ...],
        parts: int,
        skips: bool = False,
        rounded: bool = True,
        over_x: bool = False,
    ) -> None:
        """`rounded` to the dtype of x is the gradient of x, or left in float32 for a sum over processes.

        `over_x`: it may take the place of x.
        """
        need_x, need_weight, need_bias = needs
        dtype = compute_dtype(x.dtype)
        self.hidden, self.weight, self.d_x = x, weight, None
        if need_x and over_x and rounded:
            self.d_x = x
        elif need_x:
            self.d_x = torch.empty(x.shape, dtype=x.dtype if rounded else dtype, device=x.device)
        self.d_weight = _HeadGradient(weight, parts, skips) if need_weight else None
        self.d_bias = torch.zeros(len(weight), dtype=dtype, device=x.device) if need_bias else None

    def add(self, rows: slice, dz: Tensor, columns: list[slice] | None = None) -> None:
        """Take the gradient of the logits of some rows, [m, V], in the dtype that `gradient_dtype` says."""
        x = self.hidden[rows]
        dtype = compute_dtype(x.dtype)
        if self.d_bias is not None:
            self.d_bias += dz.sum(0, dtype=dtype)
        # before d_x, which may take the place of x
        if self.d_weight is not None:
            self.d_weight.add(dz, x, columns)
        if self.d_x is None:
            return
        if self.d_x.dtype == dtype:
            times_head(dz, self.weight, self.d_x[rows], columns)
            return
        size = min(len(x), rows_of(x, _HIDDEN_ELEMENTS))
        buffer = torch.empty(size, x.shape[1], dtype=dtype, device=x.device)
        for part in slices(rows.stop, size, rows.start) if len(x) else ():
            here = slice(part.start - rows.start, part.stop - rows.start)
            self.d_x[part] = times_head(dz[here], self.weight, buffer[: part.stop - part.start], columns)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias; None where none was wanted."""
        return (
            self.d_x,
            None if self.d_weight is None else self.d_weight.rounded(),
            None if self.d_bias is None else self.d_bias.to(self.hidden.dtype),
        )


class HeadSums:
    """Gradients like those of `Backward`, of a tile of tokens and columns at a time; columns are outermost."""

    def __init__(self, x: Tensor, weight: Tensor, needs: tuple[bool, ...], rounded: bool, parts: int) -> None:
        """`parts`: how many tiles there are to a span of columns."""
        need_x, _, need_bias = needs
        dtype = compute_dtype(x.dtype)
        self.hidden, self.weight, self.rounded, self.parts = x, weight, rounded, parts
        self.d_x = torch.zeros(x.shape, dtype=dtype, device=x.device) if need_x else None
        self.d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        self.d_bias = torch.zeros(len(weight), dtype=dtype, device=x.device) if need_bias else None
        self.sum: Tensor | None = None

    def add(self, rows: slice, span: slice, dz: Tensor) -> None:
        """Take the gradient of the logits of some rows and a span of columns, [m, w]."""
        x, head = self.hidden[rows], self.weight[span]
        x = x if x.dtype == dz.dtype else x.to(dz.dtype)
        if self.d_bias is not None:
            self.d_bias[span] += dz.sum(0, dtype=self.d_bias.dtype)
        if self.d_x is not None:
            matmul(dz, head.to(dz.dtype), out=self.d_x[rows], add=True)
        if self.parts == 1 and on_cpu(dz) and has_mixed_matmul(dz):
            # a CPU's mixed matmul sums in float32 and rounds once
            matmul(dz.T, x, out=self.d_weight[span])
            return
        first = self.sum is None
        if self.sum is None:
            self.sum = torch.empty(head.shape, dtype=compute_dtype(x.dtype), device=x.device)
        matmul(dz.T, x, out=self.sum, add=not first)

    def finish(self, span: slice) -> None:
        """All of a span has been added."""
        if self.sum is not None:
            self.d_weight[span] = self.sum
            self.sum = None

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias; None where none was wanted."""
        dtype = self.hidden.dtype
        d_x = self.d_x.to(dtype) if self.rounded and self.d_x is not None else self.d_x
        return d_x, self.d_weight, None if self.d_bias is None else self.d_bias.to(dtype)


class _HeadGradient:
    """Sums dz.T @ x over slices in float32; where there is one slice, it never holds the sum in float32."""

    def __init__(self, weight: Tensor, parts: int, skips: bool) -> None:
        self.dtype = compute_dtype(weight.dtype)
        self.weight_dtype = weight.dtype
        self.straight = parts == 1
        self.sum = torch.empty(
            weight.shape, dtype=weight.dtype if self.straight else self.dtype, device=weight.device
        )
        if skips or not self.straight:
            self.sum.zero_()

    def add(self, dz: Tensor, x: Tensor, columns: list[slice] | None = None) -> None:
        """Add a slice's share, of the rows of the head in `columns` (None for all)."""
        x = x if dz.dtype == x.dtype else x.to(dz.dtype)
        # a CPU's mixed matmul sums in float32 and rounds once
        rounds = self.straight and on_cpu(dz) and has_mixed_matmul(dz)
        direct = self.sum.dtype == dz.dtype and (dz.dtype == self.dtype or rounds)
        rows = 0 if direct else min(len(self.sum), rows_of(self.sum, _HEAD_ELEMENTS))
        room = torch.empty((rows, self.sum.shape[1]), dtype=self.dtype, device=dz.device)
        for run in [slice(0, len(self.sum))] if columns is None else columns:
            if direct:
                matmul(dz[:, run].T, x, out=self.sum[run], add=not self.straight)
                continue
            for part in slices(run.stop, rows_of(self.sum, _HEAD_ELEMENTS), run.start):
                block = matmul(dz[:, part].T, x, out=room[: part.stop - part.start])
                if self.straight:
                    self.sum[part] = block
                else:
                    self.sum[part] += block

    def rounded(self) -> Tensor:
        """The sum in the dtype of the head."""
        return self.sum.to(self.weight_dtype)
