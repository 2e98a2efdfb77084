"""Products with the head, [V, H], and its gradient: sums in float32, of a slice of the vocabulary where that helps."""

from __future__ import annotations

import torch
from torch import Tensor

from prefloss.kernels.naive import compute_dtype
from prefloss.kernels.rows import has_mixed_matmul, matmul, on_cpu, rows_of, slices

# Elements of the head, or of its gradient, that are converted at a time, 16 MiB.
_HEAD_ELEMENTS = 2**22
# Columns of a tile that are likely enough, of all, above which all are taken: copying them costs, too.
_WORTH_COPYING = 0.5


def project(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> Tensor:
    """Logits x @ weight.T + bias in the precision of z, [m, V], which it fills and returns."""
    if x.dtype == z.dtype or has_mixed_matmul(x):
        matmul(x, weight.T, out=z)
    else:
        x = x.to(z.dtype)
        for part in slices(len(weight), rows_of(weight, _HEAD_ELEMENTS)):
            matmul(x, weight[part].to(z.dtype).T, out=z[:, part])
    return z if bias is None else z.add_(bias)


def add_product(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """Out += dz @ weight, a gradient of hidden states, summed in the precision of `out`."""
    if dz.dtype == weight.dtype:
        matmul(dz, weight, out=out, add=True)
        return
    for part in slices(len(weight), rows_of(weight, _HEAD_ELEMENTS)):
        out.addmm_(dz[:, part], weight[part].to(dz.dtype))


def gradient_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the gradient of the logits enters the matmuls of the backward pass."""
    # A float32 matmul takes 2 (CPU) to 10 (GPU) times as long, so one factor is rounded to bfloat16, once, and the
    # sums stay in float32. In float16 the small entries would vanish.
    rounds = x.dtype == torch.bfloat16 and has_mixed_matmul(x)
    return torch.bfloat16 if rounds else compute_dtype(x.dtype)


def likely_columns(dz: Tensor, limit: Tensor | float) -> Tensor | None:
    """The columns of a tile to multiply by, in which some gradient of a logit exceeds `limit`; None for all of them."""
    if dz.numel() == 0:
        return None
    found = torch.nonzero(torch.maximum(dz.amax(0), -dz.amin(0)) > limit).squeeze(-1)
    return None if len(found) > _WORTH_COPYING * dz.shape[1] else found


class Gradients:
    """Sums of the gradients of hidden states [n, H], weight and bias, from tiles of those of the logits.

    All tiles of a span of the vocabulary come one after another, and `finish` says that it is done.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        needs: tuple[bool, ...],
        columns: int,
        tiles: int,
        home: Tensor | None = None,
        rounded: bool = True,
    ) -> None:
        """`columns` of the widest span, each in so many `tiles`.

        `home` is memory for the gradient of the head, to be written to when a span is done. `rounded` to the dtype of
        x is the gradient of x, or left in float32 for a sum over processes.
        """
        need_x, need_weight, need_bias = needs
        dtype = compute_dtype(x.dtype)
        self.hidden, self.weight, self.rounded = x, weight, rounded
        self.d_x = torch.zeros(x.shape, dtype=dtype, device=x.device) if need_x else None
        self.d_bias = torch.zeros(len(weight), dtype=dtype, device=x.device) if need_bias else None
        self.d_weight = self.sum = None
        self.first = True
        if not need_weight:
            return
        self.d_weight = (
            torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if home is None else home
        )
        # a CPU's mixed matmul sums in float32 and rounds once
        straight = tiles == 1 and (weight.dtype == dtype or (on_cpu(x) and gradient_dtype(x) == x.dtype))
        if not straight and (weight.dtype != dtype or home is not None):
            self.sum = torch.empty(min(columns, len(weight)), weight.shape[1], dtype=dtype, device=x.device)

    def add(self, rows: slice, span: slice, dz: Tensor, limit: Tensor | float | None = None) -> None:
        """Take the gradient of the logits of some rows and a span of columns, [m, w], of dtype `gradient_dtype`.

        Columns in which none exceeds a `limit` are left out of the products.
        """
        x, head, likely = self.hidden[rows], self.weight[span], None
        if self.d_bias is not None:
            self.d_bias[span] += dz.sum(0, dtype=self.d_bias.dtype)
        if limit is not None:
            likely = likely_columns(dz, limit)
        if likely is not None:
            dz, head = dz.index_select(1, likely), head.index_select(0, likely)
        if self.d_x is not None:
            add_product(dz, head, self.d_x[rows])
        if self.d_weight is None:
            return
        x = x if x.dtype == dz.dtype else x.to(dz.dtype)
        sums = self.d_weight[span] if self.sum is None else self.sum[: span.stop - span.start]
        if likely is None:
            matmul(dz.T, x, out=sums, add=not self.first)
        else:
            sums = sums.zero_() if self.first else sums
            product = torch.empty(len(likely), x.shape[1], dtype=compute_dtype(x.dtype), device=x.device)
            sums.index_add_(0, likely, matmul(dz.T, x, out=product).to(sums.dtype))
        self.first = False

    def finish(self, span: slice) -> None:
        """All of a span has been added."""
        if self.d_weight is not None and self.first:
            self.d_weight[span] = 0
        elif self.d_weight is not None and self.sum is not None:
            self.d_weight[span] = self.sum[: span.stop - span.start]
        self.first = True

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias; None where none was wanted."""
        dtype = self.hidden.dtype
        d_x = self.d_x.to(dtype) if self.rounded and self.d_x is not None else self.d_x
        return d_x, self.d_weight, None if self.d_bias is None else self.d_bias.to(dtype)
