"""Single-pass CPU forms of the row operations and the bfloat16 matmul: `native.c`, compiled when first needed.

PyTorch has no CPU form of two things that the ops need: a softmax that reads a row of half precision once and
keeps nothing in float32, and a product of bfloat16 matrices that is summed and returned in float32. A C compiler on
the machine (the one that torch.compile uses: ``CXX``, ``CC`` or ``cc``) builds them within a second or two into
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
_LARGE_BYTES = 2**22

# no subclass that computes elsewhere or not at all (a DTensor, a FakeTensor)
_PLAIN = (Tensor, torch.nn.Parameter)


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


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, on a CPU in large pages where the system has some: handing out small ones takes most of the time."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and type(x) is Tensor and x.nbytes >= _LARGE_BYTES:
        lib = _library()
        if lib is not None:
            lib.prefloss_use_large_pages(x.data_ptr(), x.nbytes)
    return x


def score(logits: Tensor, targets: Tensor, transform: LogitTransform, stats: Tensor) -> None:
    """Raw logits [m, V] and targets [m], -1 to leave a row out -> `stats`, [2 or 5, m]; reads a row once."""
    rows, vocabulary = logits.shape
    targets = targets.contiguous()
    outputs = [_address(row) for row in stats] + [None] * (5 - len(stats))
    _call().prefloss_score(
        _address(logits), _KINDS[logits.dtype], rows, vocabulary, logits.stride(0), _address(targets),
        _struct(transform), *outputs, _threads(rows * vocabulary),
    )  # fmt: skip


def encode(logits: Tensor, transform: LogitTransform, lses: Tensor, codes: Tensor) -> None:
    """Raw float32 logits [m, V] -> their log-probs as int16, see `rows.CODE_STEPS`."""
    rows, vocabulary = logits.shape
    _call().prefloss_encode(
        _address(logits), rows, vocabulary, logits.stride(0), _struct(transform), _address(lses), _address(codes),
        codes.stride(0), _threads(rows * vocabulary),
    )  # fmt: skip


def differentiate(
    x: Tensor,
    out: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    stats: Tensor,
    coefficients: Tensor,
    plain: bool,
) -> None:
    """Raw logits or codes [m, V] -> gradient of the logits, to `out`, which may start where x does.

    `stats` begins with logps and logsumexps; `plain` says that the last two of the 4 coefficients are all 0.
    """
    rows, vocabulary = x.shape
    targets, coefficients = targets.contiguous(), coefficients.contiguous()
    _call().prefloss_differentiate(
        _address(x), _KINDS[x.dtype], x.stride(0), _address(out), _KINDS[out.dtype], out.stride(0), rows, vocabulary,
        _address(targets), _struct(transform), _address(stats[0]), _address(stats[1]),
        _address(coefficients), plain, _threads(rows * vocabulary),
    )  # fmt: skip


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> bool:
    """Out (+)= a @ b for bfloat16 [m, k] and [k, n] and float32 [m, n]; False where it cannot."""
    if out.stride(1) != 1:
        return False
    if 0 in (*a.shape, *b.shape):
        return False
    status = _call().prefloss_multiply(
        a.shape[0], b.shape[1], a.shape[1], _address(a), *a.stride(), _address(b), *b.stride(), _address(out),
        out.stride(0), add, _threads(a.shape[0] * b.shape[1] * a.shape[1] // 64),
    )  # fmt: skip
    return status == 0


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
    pointer, number, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, _Transform
    lib.prefloss_score.argtypes = [pointer, number, size, size, size, pointer, real, *[pointer] * 5, number]
    lib.prefloss_encode.argtypes = [pointer, size, size, size, real, pointer, pointer, size, number]
    lib.prefloss_differentiate.argtypes = [
        *(
            pointer,
            number,
            size,
            pointer,
            number,
            size,
            size,
            size,
            pointer,
            real,
            *[pointer] * 3,
            number,
            number,
        )
    ]
    lib.prefloss_multiply.argtypes = [
        *(size, size, size, pointer, size, size, pointer, size, size, pointer, size, number, number)
    ]
    lib.prefloss_use_large_pages.argtypes = [pointer, size]
    for name in ("use_large_pages", "score", "encode", "differentiate"):
        getattr(lib, f"prefloss_{name}").restype = None
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
