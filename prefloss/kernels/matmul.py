"""Products with the head, [V, H], and sums of its gradient: in float32, some rows of the head at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from prefloss.kernels import constant_when_compiled
from prefloss.kernels.cpu import native
from prefloss.kernels.naive import compute_dtype, no_autocast
from prefloss.kernels.tiles import Grid, on_cpu, rows_of, slices

HeadGradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# Elements of the head that are converted at a time, 16 MiB.
HEAD_ELEMENTS = 2**22
# torch.addmm takes out_dtype from here on; before, a mixed matmul could not add
_ADDS_MIXED = TorchVersion(torch.__version__) >= TorchVersion("2.10")
# Where torch's settings are, some of which a version may lack.
_CUDA: Any = torch.backends.cuda.matmul
_ONEDNN: Any = getattr(torch.backends.mkldnn, "matmul", None)
_INEXACT = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


def has_mixed_matmul(x: Tensor) -> bool:
    """Whether `matmul` multiplies x in half precision into float32."""
    if on_cpu(x):
        return native.multiplies(x.dtype)
    return _device_has_mixed_matmul(x.device.type, x.dtype)


@constant_when_compiled
def _device_has_mixed_matmul(device_type: str, dtype: torch.dtype) -> bool:
    # builds for AMD devices have the overload too, but some fail when it is called
    exists = (
        device_type == "cuda" and torch.version.hip is None and "dtype_out" in torch.ops.aten.mm.overloads()
    )
    return exists and dtype in (torch.float16, torch.bfloat16)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off, and on a GPU all products summed in float32 of factors as they are, whatever torch is set to.

    The settings belong to the process: products of other threads are as exact meanwhile.
    """
    # they take longer to set than a small product takes on a CPU, and a graph that is being compiled cannot set them
    if device.type in ("cpu", "meta") or torch.compiler.is_compiling():
        with no_autocast(device):
            yield
        return
    with no_autocast(device), _float32_products("highest"), _exact_sums():
        yield


@contextmanager
def _float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Multiply float32 as it is, or on a GPU with 10 bits of each factor ("high", TF32)."""
    places = [place for place in (_CUDA, _ONEDNN) if hasattr(place, "fp32_precision")]
    details, old = [place.fp32_precision for place in places], _old_setting()
    inexact = bool({"tf32", "bf16"} & {*details})
    if old == precision and inexact == (precision == "high" and bool(places)):
        yield
        return
    try:
        if old is not None:
            # this sets the new ones along with it
            torch.set_float32_matmul_precision(precision)
        else:
            for place in places:
                place.fp32_precision = "tf32" if precision == "high" else "ieee"
        yield
    finally:
        if old is not None:
            torch.set_float32_matmul_precision(old)
        for place, value in zip(places, details, strict=True):
            if place.fp32_precision != value:
                place.fp32_precision = value


def _old_setting() -> str | None:
    """None where it and the new ones differ, which torch allows but does not read."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def _exact_sums() -> Iterator[None]:
    """No sums in half precision, which torch allows by default where a product is cut into parts."""
    allowed = [name for name in _INEXACT if getattr(_CUDA, name, False)]
    try:
        for name in allowed:
            setattr(_CUDA, name, False)
        yield
    finally:
        for name in allowed:
            setattr(_CUDA, name, True)


def matmul(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Out = a @ b or out += a @ b, summed in the precision of `out`, or in float32 if a and b are half precision.

    `out` may be bfloat16 if nothing is added: with a mixed matmul on the CPU it is rounded once, after the sum.
    """
    if on_cpu(out) and has_mixed_matmul(a) and native.multiply(a, b, out, add):
        return out
    if a.dtype != out.dtype and (on_cpu(out) or not has_mixed_matmul(a)):
        return _matmul_of_copies(a, b, out, add)
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if not add:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    if _ADDS_MIXED:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.add_(torch.mm(a, b, out_dtype=out.dtype))


def _matmul_of_copies(a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
    """The same of half precision copied to the precision of `out`."""
    a, b = a.to(out.dtype), b.to(out.dtype)
    with _of_half_precision(out):
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def _of_half_precision(out: Tensor) -> AbstractContextManager[None]:
    """For products of float32 copies of half precision: 10 bits are all of each, and take a fraction of the time."""
    return nullcontext() if on_cpu(out) else _float32_products("high")


def project(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> Tensor:
    """Logits x @ weight.T + bias in the precision of z, [m, V], which is filled and returned."""
    if x.dtype == z.dtype or has_mixed_matmul(x):
        matmul(x, weight.T, out=z)
    else:
        x = x.to(z.dtype)
        with _of_half_precision(z):
            for part in slices(len(weight), rows_of(weight, HEAD_ELEMENTS)):
                matmul(x, weight[part].to(z.dtype).T, out=z[:, part])
    return z if bias is None else z.add_(bias)


def add_product(dz: Tensor, weight: Tensor, out: Tensor, add: bool = True) -> None:
    """Out += dz @ weight, a gradient of hidden states, summed in the precision of `out`; or = without `add`."""
    if dz.dtype == weight.dtype:
        matmul(dz, weight, out=out, add=add)
        return
    for part in slices(len(weight), rows_of(weight, HEAD_ELEMENTS)):
        matmul(dz[:, part], weight[part].to(dz.dtype), out=out, add=add or part.start > 0)


def gradient_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the gradient of the logits enters the matmuls of the backward pass."""
    # A float32 matmul takes 2 (CPU) to 10 (GPU) times as long, so one factor is rounded to bfloat16, once, and the
    # sums stay in float32. In float16 the small entries would vanish.
    rounds = x.dtype == torch.bfloat16 and has_mixed_matmul(x)
    return torch.bfloat16 if rounds else compute_dtype(x.dtype)


class Gradients:
    """Sums the gradients of hidden states x, [n, H], weight and bias from tiles of the gradient dz of the logits.

    Tiles come span by span of the vocabulary: `add` for each slice of tokens, then `finish` for the span. `needs`:
    which of the three are asked for. `unit`: what dz has been divided by. `factors`, [n] or None: what the rows of dz
    still have to be multiplied by, which x and the gradient of x are instead. `memory`: for the gradient of the weight,
    written to when a span is finished. Without `rounded` that of x stays float32, to be summed over processes.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        needs: tuple[bool, ...],
        grid: Grid,
        dz_dtype: torch.dtype,
        unit: Tensor | None = None,
        memory: Tensor | None = None,
        rounded: bool = True,
        factors: Tensor | None = None,
    ) -> None:
        need_x, need_weight, need_bias = needs
        dtype = compute_dtype(x.dtype)
        self.x, self.weight, self.unit, self.rounded, self.factors = x, weight, unit, rounded, factors
        self.d_x = self.d_weight = self.sum = None
        # A single product needs no sum: the device adds in float32 and rounds once. (A CPU does so for d_weight only.)
        exact = unit is None and dz_dtype == x.dtype
        self.direct = exact and factors is None and len(grid.spans) == 1
        self.direct = self.direct and (x.dtype == dtype or (rounded and not on_cpu(x)))
        if need_x:
            self.d_x = x.new_empty(x.shape, dtype=x.dtype if self.direct else dtype)
        self.d_bias = x.new_zeros(len(weight), dtype=dtype) if need_bias else None
        self.first = True
        if not need_weight:
            return
        if factors is not None:
            self.x = _scaled(x, factors)
        self.d_weight = weight.new_empty(weight.shape) if memory is None else memory
        self.width = grid.width
        if not (exact and len(grid.slabs) == 1) and (weight.dtype != dtype or memory is not None):
            self.sum = x.new_empty(grid.width, weight.shape[1], dtype=dtype)

    def add(self, rows: slice, span: slice, dz: Tensor) -> None:
        """Add the gradient of the logits of some rows and a span of columns, [m, w]."""
        if self.d_bias is not None and self.factors is None:
            self.d_bias[span] += dz.sum(0, dtype=self.d_bias.dtype)
        elif self.d_bias is not None and self.factors is not None:
            # in two terms, so that rounding the factors to half precision costs nothing
            factors = self.factors[rows]
            terms = torch.stack((factors.to(dz.dtype), (factors - factors.to(dz.dtype)).to(dz.dtype)), -1)
            sums = matmul(dz.T, terms, out=self.d_bias.new_empty(dz.shape[1], 2))
            self.d_bias[span] += sums.sum(-1)
        if self.d_x is not None:
            add_product(dz, self.weight[span], self.d_x[rows], add=span.start > 0)
        if self.d_weight is None:
            return
        if self.sum is None and _same_memory(dz, self.d_weight):
            self.sum = torch.empty_like(self.d_weight[: self.width])
        sums = self.d_weight[span] if self.sum is None else self.sum[: span.stop - span.start]
        matmul(dz.T, self.x[rows].to(dz.dtype), out=sums, add=not self.first)
        self.first = False

    def finish(self, span: slice) -> None:
        """Write the gradient of some rows of the weight, whose tiles have all been added."""
        if self.d_weight is not None and self.first:
            self.d_weight[span] = 0
        elif self.d_weight is not None and self.sum is not None:
            total = self.sum[: span.stop - span.start]
            self.d_weight[span] = total if self.unit is None else total.mul_(self.unit)
        self.first = True

    def gradients(self) -> HeadGradients:
        """Of hidden states, weight and bias; None for those that need none."""
        d_x, d_bias, by = self.d_x, self.d_bias, self.factors
        if self.unit is not None:
            by = None if by is None else by * self.unit
            d_x = d_x.mul_(self.unit) if d_x is not None and by is None else d_x
            d_bias = None if d_bias is None else d_bias.mul_(self.unit)
        if d_x is not None and by is not None:
            d_x = _scaled(d_x, by, self.x.dtype if self.rounded else None)
        elif d_x is not None and self.rounded:
            d_x = d_x.to(self.x.dtype)
        return d_x, self.d_weight, None if d_bias is None else d_bias.to(self.x.dtype)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0


def _scaled(x: Tensor, factors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of x, [n, H], times a factor each: multiplied in float32 and rounded once."""
    return torch.mul(x, factors[:, None], out=torch.empty_like(x, dtype=dtype))
