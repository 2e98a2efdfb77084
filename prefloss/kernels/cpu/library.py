"""The CPU library: the one that the wheel brought, or else native.c compiled on this machine when first needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from prefloss.kernels.cpu import build, cache
from prefloss.kernels.cpu.build import CannotBuild

_log = logging.getLogger("prefloss")
_one_at_a_time = threading.Lock()
_OPENMP = ("libgomp", "libiomp", "libomp")


class Transform(ctypes.Structure):
    """`transform_t` of native.c."""

    _fields_ = (("factor", ctypes.c_float), ("cap_in", ctypes.c_float), ("cap_out", ctypes.c_float))


# arguments as letters, see `_TYPES`
_ARGUMENTS = {
    "fold": "p i l l l p l T p i i",
    "encode": "p l l l T p p l p l i",
    "differentiate": "p i l p i l l l p l T p p p i p l i i",
    "multiply": "l l l p l l p l l p i l i i",
    "project": "l l l p l p l p p l T p i p l p l i",
    "multiplies": "",
    "has_float16": "",
}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "T": Transform}
# the others cannot fail
_RETURN_INT = ("multiply", "project", "multiplies", "has_float16")


class Library(NamedTuple):
    """The functions of native.c, and where they are from: the file, and their level of instructions."""

    file: Path
    level: str
    fold: Callable[..., None]
    encode: Callable[..., None]
    differentiate: Callable[..., None]
    multiply: Callable[..., int]
    project: Callable[..., int]
    multiplies: Callable[[], int]
    has_float16: Callable[[], int]


def library() -> Library | None:
    """The CPU library, or None, with one line in the log that says why, once."""
    with _one_at_a_time:
        return _library()


@functools.lru_cache(maxsize=1)
def _library() -> Library | None:
    wanted = os.environ.get("PREFLOSS_NATIVE", "").strip() or "1"
    if wanted not in ("0", "1"):
        raise ValueError(f"PREFLOSS_NATIVE: got {wanted!r}, expected 0 (plain PyTorch) or 1")
    if wanted == "0":
        return None
    reasons = []
    for source in (prebuilt, compiled):
        try:
            return source()
        except (OSError, CannotBuild) as error:
            reasons.append(str(error))
    _log.warning(
        "prefloss: CPU log-probs run in plain PyTorch, which takes longer: %s. Install a C compiler such as gcc, or a "
        "wheel of prefloss for this platform; PREFLOSS_NATIVE=0 accepts the slow way",
        "; ".join(filter(None, reasons)),
    )
    return None


def prebuilt() -> Library:
    """The library that the wheel brought; OSError if there is none, or none that works here."""
    if not build.PREBUILT.exists():
        raise OSError("")
    cache.check_digest(build.PREBUILT)
    _show_openmp()
    return opened(build.PREBUILT)


def compiled() -> Library:
    """The library compiled for this processor, from the cache or built now; CannotBuild or OSError if it cannot be."""
    if sys.platform == "win32":
        raise CannotBuild("native.c is not compiled on Windows")
    command = build.compiler()
    folder = None
    try:
        folder = cache.folder()
        return _cached(folder / f"native-{_key(command)}.so")
    except OSError as error:
        _log.info("prefloss: no library for CPU log-probs in the cache, so it is compiled now: %s", error)
    if folder is not None:
        try:
            return _build(command, folder)
        except (OSError, CannotBuild) as error:
            # its disk may be full or read-only
            _log.info("prefloss: the library for CPU log-probs cannot be built in %s: %s", folder, error)
    return _build(command, None)


def _cached(path: Path) -> Library:
    cache.check(path)
    return opened(path)


def _build(command: list[str], folder: Path | None) -> Library:
    """Build, load and, given the folder of the cache, store the library."""
    with cache.building_folder(folder) as temporary:
        built = temporary / "libprefloss.so"
        build.build_here(command, built)
        loaded = opened(built)
        if folder is None:
            return loaded
        stored = folder / f"native-{_key(command)}.so"
        try:
            # only now that it has been loaded
            cache.store(built, stored)
            return loaded._replace(file=stored)
        except OSError as error:
            _log.info("prefloss: the library for CPU log-probs cannot be stored in %s: %s", folder, error)
        return loaded


def opened(file: Path) -> Library:
    """Load a library; OSError if it is none, or not ours."""
    loaded = _load(file)
    try:
        level = build.NATIVE
        if hasattr(loaded, "prefloss_level"):
            loaded.prefloss_level.restype = ctypes.c_char_p
            level = loaded.prefloss_level().decode()
        return declared(loaded, file, level)
    except AttributeError as error:
        raise OSError(f"{file} lacks a function: {error}") from None


def declared(loaded: ctypes.CDLL, file: Path, level: str) -> Library:
    """The functions of one level of a loaded library, with the types of their arguments."""
    functions = {name: getattr(loaded, f"prefloss_{name}_{level}") for name in _ARGUMENTS}
    for name, function in functions.items():
        function.argtypes = [_TYPES[letter] for letter in _ARGUMENTS[name].split()]
        function.restype = ctypes.c_int if name in _RETURN_INT else None
    return Library(file, level, **functions)


def _load(file: Path) -> ctypes.CDLL:
    forbidden = os.statvfs(file).f_flag & getattr(os, "ST_NOEXEC", 0)
    if not forbidden or not hasattr(os, "memfd_create"):
        return ctypes.CDLL(str(file))
    # its file system is mounted without permission to run code; memory has no such option
    descriptor = os.memfd_create("prefloss")
    with os.fdopen(descriptor, "wb", closefd=False) as memory:
        memory.write(file.read_bytes())
    # left open: the loader takes a path that it has seen before for the same library
    return ctypes.CDLL(f"/proc/self/fd/{descriptor}")


def _show_openmp() -> None:
    """Make an OpenMP runtime visible to the wheel's library, which links none.

    It is the one that torch has loaded: a second one would have threads of its own on the same cores.
    """
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines}
    loaded = sorted(path for path in paths if Path(path).name.startswith(_OPENMP))
    for name in (*loaded, "libgomp.so.1"):
        if hasattr(ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL), "GOMP_parallel"):
            return


def _key(command: list[str]) -> str:
    """Of all that a compiled library depends on: source, compiler, flags and processor."""
    parts = (*command, *build.HERE_FLAGS, platform.machine(), _processor())
    return hashlib.sha256(build.SOURCE.read_bytes() + os.fsencode("\0".join(parts))).hexdigest()[:16]


def _processor() -> str:
    """The processor's features, which -march=native depends on: machines of several kinds may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
