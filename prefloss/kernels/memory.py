"""Fresh memory for what is large: huge pages where Linux gives them on request.

Writing to fresh memory costs a page fault each 4 KiB, several times the pass itself: on a CPU the most of what an op
takes beyond its matmuls.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# From here on; smaller pieces come from what malloc has at hand.
_LARGE_BYTES = 2**22


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, in huge pages where that is possible."""
    out = torch.empty(shape, dtype=dtype, device=device)
    # no subclass that has no memory (a FakeTensor)
    if type(out) is Tensor and device.type == "cpu" and out.nbytes >= _LARGE_BYTES:
        advise = _advise()
        if advise is not None:
            start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            length = out.data_ptr() + out.nbytes - start
            # a wish: where it is refused, the pages are small
            advise(start, length // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return out


@functools.lru_cache(maxsize=1)
def _advise() -> Callable[[int, int, int], Any] | None:
    """The system's madvise, or None where it knows no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return advise
