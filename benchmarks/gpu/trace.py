"""What an op does on a GPU, found without one: its matrix products, its Triton launches, its other torch ops.

The op runs on tensors of the meta device, which have shapes and no memory, so production sizes take no time. What is
counted is what the code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import sass
from prefloss import kernels, logprobs
from prefloss.kernels import matmul, plan

PRODUCTS = ("mm", "addmm", "addmm_")
# They make a tensor without touching memory.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "arange", "detach", "lift_fresh")


@dataclass(frozen=True)
class Product:
    """[rows, inner] @ [inner, columns]; `half` precision factors, and the bytes of factors and result."""

    rows: int
    inner: int
    columns: int
    half: bool
    moved: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Pass:
    """An op of torch that reads and writes so many bytes."""

    name: str
    moved: int


Event = Product | Pass | sass.Launch


class _Recorder(TorchDispatchMode):
    def __init__(self, events: list[Event]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            return self._product(name, args, kwargs)
        out = func(*args, **kwargs)
        if name not in FREE and not _is_view(func):
            self._events.append(Pass(name, _bytes(name, args, kwargs, out)))
        return out

    def _product(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # the meta device has no product of half precision with a float32 result, and needs none
        *_, a, b = (x for x in args if isinstance(x, Tensor))
        out = kwargs.get("out", args[0] if name == "addmm_" else None)
        if out is None:
            wide = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), a.dtype)
            out = torch.empty(a.shape[0], b.shape[1], dtype=wide, device=a.device)
        read = sum(_size(x) for x in (a, b)) + (_size(out) if name != "mm" else 0)
        half = a.dtype in (torch.bfloat16, torch.float16)
        self._events.append(Product(a.shape[0], a.shape[1], b.shape[1], half, read + _size(out)))
        return out


def _is_view(func: Any) -> bool:
    """Whether the result shares memory with an argument that is not written."""
    return any(
        info is not None and not info.is_write for info in (r.alias_info for r in func._schema.returns)
    )


def _size(x: Tensor) -> int:
    """Bytes of memory of a tensor; a dimension of stride 0 repeats them."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0)
    return x.element_size() * int(torch.Size(sizes).numel())


def _bytes(name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes of the tensors that an op reads, and of its result; an op that only writes reads nothing of it."""
    flat = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    results = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
    if name in ("zero_", "fill_", "copy_"):
        flat = flat[1:]
    given = kwargs.get("out")
    read = sum(_size(x) for x in flat if x is not given)
    if name == "index" and flat:
        # rows that are looked up, not all that there are
        read = sum(_size(x) for x in results)
    return read + sum(_size(x) for x in results)


@contextmanager
def tracing(free_memory: float) -> Iterator[list[Event]]:
    """Everything that ops on meta tensors do meanwhile, as on a CUDA device with so much free memory."""
    events: list[Event] = []

    def all_count(targets: Tensor, ignore_index: int) -> Tensor:
        return torch.arange(targets.numel(), device=targets.device)

    with ExitStack() as stack:
        stack.enter_context(patch.object(kernels, "available", lambda: True))
        stack.enter_context(patch.object(logprobs, "select_targets", all_count))
        half = (torch.bfloat16, torch.float16)
        stack.enter_context(
            patch.object(matmul, "_device_has_mixed_matmul", lambda device, dtype: dtype in half)
        )
        if hasattr(plan, "free_bytes"):
            stack.enter_context(patch.object(plan, "free_bytes", lambda *_: int(free_memory)))
        launches = stack.enter_context(sass.recorded())
        stack.enter_context(_Recorder(events))
        yield events
        events += launches


def trace(op: Callable[[], object], free_memory: float) -> list[Event]:
    with tracing(free_memory) as events:
        op()
    return events
