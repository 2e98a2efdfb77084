"""Single-pass CPU forms of the row operations and the bfloat16 matmul: `native.c`, compiled when first needed.

PyTorch has no CPU form of three things that the ops need: a softmax that reads a row of half precision once and
keeps nothing in float32; a product of bfloat16 matrices that is summed and returned in float32; and the two together,
a projection whose logits are scored while they are in the cache and leave it in 16 bits, if at all. A C compiler on the
machine (the one that torch.compile uses: ``CXX``, ``CC`` or ``cc``) builds them within a second or two into
the user's cache folder. Without one, or with ``PREFLOSS_NATIVE=0``, plain torch does the same more slowly, to
the same accuracy.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefloss.kernels.constant import constant_when_compiled
from prefloss.kernels.naive import LogitTransform

_log = logging.getLogger("prefloss")
_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_CODE = 3
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int16: _CODE}

# no subclass that computes elsewhere or not at all (a DTensor, a FakeTensor)
_PLAIN = (Tensor, torch.nn.Parameter)


# Columns of the logits that share a reference in the 16-bit form of them.
PANEL = 64


class _Transform(ctypes.Structure):
    _fields_ = (("factor", ctypes.c_float), ("cap_in", ctypes.c_float), ("cap_out", ctypes.c_float))


def available(x: Tensor) -> bool:
    """Whether the row operations here can take `x`: CPU, rows of adjacent elements, a dtype that C knows."""
    return x.device.type == "cpu" and x.stride(-1) == 1 and type(x) in _PLAIN and passes_over(x.dtype)


# a compiled graph takes both answers as they are when it is traced
@constant_when_compiled
def passes_over(dtype: torch.dtype) -> bool:
    """Whether the row operations here know `dtype`."""
    lib = _library() if dtype in _KINDS else None
    return lib is not None and (dtype != torch.float16 or bool(lib.prefloss_has_float16()))


@constant_when_compiled
def multiplies(dtype: torch.dtype) -> bool:
    """Whether `multiply` can take `dtype`: bfloat16, and a processor that multiplies it."""
    lib = _library() if dtype == torch.bfloat16 else None
    return lib is not None and bool(lib.prefloss_multiplies())


def fold(
    logits: Tensor, targets: Tensor, first: int, transform: LogitTransform, sums: Tensor, more: bool
) -> None:
    """Raw logits [m, w], columns `first` and so on of all, into the sums of their rows, [m, 5]; reads a row once.

    The sums are float64 and contiguous, see `rows.SUMS`; `more` than the logsumexp is what all of them are for.
    """
    rows, columns = logits.shape
    targets = targets.contiguous()
    _call().prefloss_fold(
        _address(logits), _KINDS[logits.dtype], rows, columns, logits.stride(0), _address(targets), first,
        _struct(transform), _address(sums), more, _threads(rows * columns),
    )  # fmt: skip


def encode(
    logits: Tensor, transform: LogitTransform, above: Tensor, codes: Tensor, references: Tensor
) -> None:
    """Raw float32 logits [m, w] -> int16 codes of them [m, w] and their references, see `rows.code_columns`."""
    rows, columns = logits.shape
    _call().prefloss_encode(
        _address(logits), rows, columns, logits.stride(0), _struct(transform), _address(above.contiguous()),
        _address(codes), codes.stride(0), _address(references), references.stride(0), _threads(rows * columns),
    )  # fmt: skip


def differentiate(
    x: Tensor,
    out: Tensor,
    targets: Tensor,
    first: int,
    transform: LogitTransform,
    stats: Tensor,
    coefficients: Tensor,
    plain: bool,
    references: Tensor | None = None,
    fresh: bool = False,
) -> None:
    """Raw logits, or codes with their references, -> gradient of the logits, [m, w], to `out`, which may be over x.

    `stats` begins with logps and logsumexps; `plain` says that the last two of the 4 coefficients are all 0, `fresh`
    that nobody has written to `out` before.
    """
    rows, columns = x.shape
    targets, coefficients = targets.contiguous(), coefficients.contiguous()
    logps, lses = (row.contiguous() for row in stats[:2])
    _call().prefloss_differentiate(
        _address(x), _KINDS[x.dtype], x.stride(0), _address(out), _KINDS[out.dtype], out.stride(0), rows, columns,
        _address(targets), first, _struct(transform), _address(logps), _address(lses), _address(coefficients), plain,
        _address(references), 0 if references is None else references.stride(0), fresh, _threads(rows * columns),
    )  # fmt: skip


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> bool:
    """Out (+)= a @ b for bfloat16 [m, k] and [k, n] and float32 [m, n]; False where it cannot.

    `out` may be bfloat16 where the columns of a adjoin and nothing is added to: rounded once, after the sum.
    """
    if out.stride(1) != 1 or out.dtype not in (torch.float32, torch.bfloat16):
        return False
    if 0 in (*a.shape, *b.shape):
        return False
    status = _call().prefloss_multiply(
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
    targets: Tensor,
    first: int,
    transform: LogitTransform,
    sums: Tensor,
    more: bool,
    codes: Tensor | None = None,
    references: Tensor | None = None,
) -> None:
    """`fold` of the logits x @ weight.T + bias, which are stored nowhere but as codes, if these are wanted.

    The sums do not depend on how many rows come at once, nor on the number of threads.
    """
    if 0 in x.shape:
        return
    bias = None if bias is None else bias.float().contiguous()
    targets = targets.contiguous()
    status = _call().prefloss_project(
        len(x), len(weight), x.shape[1], _address(x), x.stride(0), _address(weight), weight.stride(0),
        _address(bias), _address(targets), first, _struct(transform), _address(sums), more, _address(codes),
        0 if codes is None else codes.stride(0), _address(references),
        0 if references is None else references.stride(0), _threads(len(x) * len(weight) * x.shape[1] // 64),
    )  # fmt: skip
    if status != 0:
        raise MemoryError("prefloss: no memory for the workspace of a projection")


def _threads(elements: int) -> int:
    """Small jobs are done before another thread is awake."""
    return torch.get_num_threads() if elements > 2**15 else 1


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _struct(transform: LogitTransform) -> _Transform:
    factor = transform.logit_scale / transform.temperature
    if transform.softcap is None:
        return _Transform(factor, 0.0, 0.0)
    cap_in, cap_out = transform.logit_scale / transform.softcap, transform.softcap / transform.temperature
    return _Transform(factor, cap_in, cap_out)


def _call() -> Any:
    lib = _library()
    assert lib is not None
    return lib


@functools.lru_cache(maxsize=1)
def _library() -> Any:
    """The compiled functions, or None with one line in the log that says why."""
    if os.environ.get("PREFLOSS_NATIVE", "1") == "0":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform == "win32":
        _log.info("prefloss: no C compiler found, so CPU log-probs run in plain torch, which takes longer")
        return None
    try:
        lib = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or error
        _log.info(
            "prefloss: CPU log-probs run in plain torch, which takes longer, for want of native.c: %s", detail
        )
        return None
    return _declared(lib)


def _declared(lib: Any) -> Any:
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    # fmt: off
    arguments = {
        "fold": (pointer, number, size, size, size, pointer, size, _Transform, pointer, number, number),
        "encode": (pointer, size, size, size, _Transform, pointer, pointer, size, pointer, size, number),
        "differentiate": (
            pointer, number, size, pointer, number, size, size, size, pointer, size, _Transform, pointer, pointer,
            pointer, number, pointer, size, number, number,
        ),
        "multiply": (
            size, size, size, pointer, size, size, pointer, size, size, pointer, number, size, number, number,
        ),
        "project": (
            size, size, size, pointer, size, pointer, size, pointer, pointer, size, _Transform, pointer, number,
            pointer, size, pointer, size, number,
        ),
    }
    # fmt: on
    for name, types in arguments.items():
        function = getattr(lib, f"prefloss_{name}")
        function.argtypes = types
        # the others cannot fail
        function.restype = number if name in ("multiply", "project") else None
    return lib


def _built(compiler: str) -> Path:
    """The shared library for this source, compiler and processor, built if it is not in the cache."""
    key = hashlib.sha256(
        "\0".join((_SOURCE.read_text(), compiler, *_FLAGS, platform.machine(), _processor())).encode()
    ).hexdigest()[:16]
    folder = _cache_folder()
    path = folder / f"native-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary, "native.so")
            subprocess.run(
                [compiler, *_FLAGS, "-o", str(built), str(_SOURCE), "-lm"],
                check=True,
                capture_output=True,
                text=True,
                timeout=120,
            )
            # at once, so that another process finds the whole file or none
            os.replace(built, path)
    return path


def _cache_folder() -> Path:
    """A folder of the user's that no other user can write to: what lies in it is loaded as code."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "prefloss"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} belongs to or can be written by another user")
    return folder


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
