"""Single-pass CPU forms of the row operations and the bfloat16 matmul: the functions of `native.c`.

PyTorch lacks three things on a CPU: a softmax that reads a half-precision row once and stores nothing in float32; a
product of bfloat16 matrices that is summed and returned in float32; and both in one, a projection whose logits are
scored while they are in the cache and leave it in 16 bits, if at all. Wheels bring them compiled; elsewhere a C
compiler (``CC``, or else ``cc``, ``gcc`` or ``clang``) builds them within seconds into the user's cache folder. Without
either, or with ``PREFLOSS_NATIVE=0``, plain torch does the same to the same accuracy, but more slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefloss.kernels import constant_when_compiled
from prefloss.kernels.cpu.library import Library, Transform, library
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.tiles import TileSpec

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int16: 3}

# subclasses (a DTensor, a FakeTensor) may have no memory here
_PLAIN = (Tensor, torch.nn.Parameter)

# Columns of 16-bit logits that share a reference.
PANEL = 64


def available(x: Tensor) -> bool:
    """Whether the row operations here can take `x`: on the CPU, elements of a row adjacent, a dtype that C has."""
    return x.device.type == "cpu" and x.stride(-1) == 1 and type(x) in _PLAIN and passes_over(x.dtype)


@constant_when_compiled
def passes_over(dtype: torch.dtype) -> bool:
    """Whether the row operations here can take `dtype`."""
    lib = library() if dtype in _KINDS else None
    return lib is not None and (dtype != torch.float16 or bool(lib.has_float16()))


@constant_when_compiled
def multiplies(dtype: torch.dtype) -> bool:
    """Whether `multiply` can take `dtype`: bfloat16, on a processor with instructions for it."""
    lib = library() if dtype == torch.bfloat16 else None
    return lib is not None and bool(lib.multiplies())


def fold(logits: Tensor, spec: TileSpec, sums: Tensor, more: bool) -> None:
    """Add raw logits [m, w] to the sums of their rows, [m, 5]; reads each row once.

    The sums are float64 and contiguous, see `softmax.SUMS`; `more` asks for all of them, else for the logsumexp alone.
    """
    rows, columns = logits.shape
    targets = spec.targets.contiguous()
    _library().fold(
        _address(logits), _KINDS[logits.dtype], rows, columns, logits.stride(0), _address(targets), spec.first,
        _struct(spec.transform), _address(sums), more, _threads(rows * columns),
    )  # fmt: skip


def encode(
    logits: Tensor, transform: LogitTransform, above: Tensor, codes: Tensor, references: Tensor
) -> None:
    """Raw float32 logits [m, w] -> int16 codes of them [m, w] and their references, see `kept`."""
    rows, columns = logits.shape
    _library().encode(
        _address(logits), rows, columns, logits.stride(0), _struct(transform), _address(above.contiguous()),
        _address(codes), codes.stride(0), _address(references), references.stride(0), _threads(rows * columns),
    )  # fmt: skip


def differentiate(
    x: Tensor,
    out: Tensor,
    spec: TileSpec,
    stats: Tensor,
    coefficients: Tensor,
    plain: bool,
    references: Tensor | None = None,
    fresh: bool = False,
) -> None:
    """Raw logits, or codes with their references, -> gradient of the logits, [m, w], to `out`, which may be over x.

    `stats` begins with logps and logsumexps. `plain`: the last two of the 4 coefficients are 0 everywhere. `fresh`:
    `out` is memory that has not been written to before.
    """
    rows, columns = x.shape
    targets, coefficients = spec.targets.contiguous(), coefficients.contiguous()
    logps, lses = (row.contiguous() for row in stats[:2])
    _library().differentiate(
        _address(x), _KINDS[x.dtype], x.stride(0), _address(out), _KINDS[out.dtype], out.stride(0), rows, columns,
        _address(targets), spec.first, _struct(spec.transform), _address(logps), _address(lses),
        _address(coefficients), plain, _address(references), _stride(references), fresh, _threads(rows * columns),
    )  # fmt: skip


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> bool:
    """Out (+)= a @ b for bfloat16 [m, k] and [k, n] and float32 [m, n]; False if it cannot, and nothing is done.

    `out` may be bfloat16 if the columns of a are contiguous and nothing is added: rounded once, after the sum.
    """
    if out.stride(1) != 1 or out.dtype not in (torch.float32, torch.bfloat16) or 0 in (*a.shape, *b.shape):
        return False
    status = _library().multiply(
        a.shape[0], b.shape[1], a.shape[1], _address(a), *a.stride(), _address(b), *b.stride(), _address(out),
        _KINDS[out.dtype], out.stride(0), add, _threads(a.shape[0] * b.shape[1] * a.shape[1] // 64),
    )  # fmt: skip
    return status == 0


def projects(x: Tensor, weight: Tensor) -> bool:
    """Whether `project` can take hidden states [m, H] and a head [V, H]."""
    plain = all(type(z) in _PLAIN and z.device.type == "cpu" and z.stride(-1) == 1 for z in (x, weight))
    pairs = x.shape[-1] > 0 and x.shape[-1] % 2 == 0
    return plain and pairs and x.dtype == weight.dtype and multiplies(x.dtype)


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: TileSpec,
    sums: Tensor,
    more: bool,
    codes: Tensor | None = None,
    references: Tensor | None = None,
) -> None:
    """`fold` of the logits x @ weight.T + bias, which are stored as codes if there is memory for these, else nowhere.

    The sums depend neither on how many rows come at once nor on the number of threads.
    """
    if 0 in x.shape:
        return
    bias = None if bias is None else bias.float().contiguous()
    targets = spec.targets.contiguous()
    status = _library().project(
        len(x), len(weight), x.shape[1], _address(x), x.stride(0), _address(weight), weight.stride(0),
        _address(bias), _address(targets), spec.first, _struct(spec.transform), _address(sums), more,
        _address(codes), _stride(codes), _address(references), _stride(references),
        _threads(len(x) * len(weight) * x.shape[1] // 64),
    )  # fmt: skip
    if status != 0:
        raise MemoryError("prefloss: not enough memory for the workspace of a projection")


def _library() -> Library:
    found = library()
    assert found is not None
    return found


def _threads(elements: int) -> int:
    """One for a small job: it is done before a second thread has started."""
    return torch.get_num_threads() if elements > 2**15 else 1


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _struct(transform: LogitTransform) -> Transform:
    if transform.softcap is None:
        return Transform(transform.factor, 0.0, 0.0)
    cap_in, cap_out = transform.logit_scale / transform.softcap, transform.softcap / transform.temperature
    return Transform(transform.factor, cap_in, cap_out)
