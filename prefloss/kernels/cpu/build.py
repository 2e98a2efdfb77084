"""Build the CPU library from native.c: on a user's machine for its processor, or for a wheel, for all of its kind.

hatch_build.py runs this file where a wheel is built. There is no torch there, so it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
DISPATCH = Path(__file__).with_name("dispatch.c")
# the library that a wheel brings; by the name of a module of this package it would be imported as one
PREBUILT = Path(__file__).with_name("libprefloss.so")
# the level of a library that is compiled for this processor
NATIVE = "native"
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
HERE_FLAGS = (*FLAGS, "-march=native", "-shared")
# by `sysconfig.get_platform()`; dispatch.c chooses among the levels of one platform
LEVELS = {
    "linux-x86_64": {
        "baseline": ("-march=x86-64",),
        "avx2": ("-march=x86-64-v3",),
        "avx512": ("-march=x86-64-v4",),
        "avx512bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    },
    "linux-aarch64": {"baseline": ("-march=armv8-a",)},
}
_SECONDS = 120


class CannotBuild(Exception):
    """There is no compiler, or it failed; the message is one line that says why."""


def compiler() -> list[str]:
    """The command that `CC` has, or else `cc`, `gcc` or `clang`."""
    named = os.environ.get("CC", "").strip()
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise CannotBuild(f"CC: got {named!r}, expected a command: {error}") from None
    found = command or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not found:
        raise CannotBuild("no C compiler (cc, gcc or clang) was found")
    return found


def build_here(command: Sequence[str], library: Path) -> None:
    """Compile `library` for this machine, which links the compiler's own OpenMP runtime."""
    _run([*command, *HERE_FLAGS, "-o", str(library), str(SOURCE), "-lm"])


def build_for_wheel(command: Sequence[str], library: Path, platform: str) -> None:
    """Compile `library`, with all `LEVELS` of a platform, in a folder of its own."""
    if platform not in LEVELS:
        raise CannotBuild(f"{platform} is none of {', '.join(LEVELS)}")
    parts = {"dispatch": [str(DISPATCH)]}
    for level, flags in LEVELS[platform].items():
        parts[level] = [*flags, f"-DLEVEL={level}", str(SOURCE)]
    for name, arguments in parts.items():
        _run([*command, *FLAGS, "-c", "-o", str(library.with_name(f"{name}.o")), *arguments])
    # without -fopenmp: no runtime is linked
    objects = [str(library.with_name(f"{name}.o")) for name in parts]
    _run([*command, "-shared", "-o", str(library), *objects, "-lm"])


def digest(library: Path) -> str:
    """SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(library.read_bytes()).hexdigest()


def digest_file(library: Path) -> Path:
    """Where the digest of a library is written when it is built."""
    return library.with_name(library.name + ".sha256")


def _run(command: list[str]) -> None:
    # messages in English, where the compiler has them in several languages
    env = {**os.environ, "LC_ALL": "C"}
    try:
        subprocess.run(
            command, check=True, capture_output=True, stdin=subprocess.DEVNULL, env=env, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"{command[0]} took more than {_SECONDS} seconds") from None
    except subprocess.CalledProcessError as error:
        # a compiler writes in any encoding
        lines = error.stderr.decode(errors="replace").split("\n")
        line = next((line for line in lines if "error" in line), lines[0])
        raise CannotBuild(
            f"{command[0]} failed with status {error.returncode}: {line.strip()[:300]}"
        ) from None
    except (OSError, ValueError) as error:
        raise CannotBuild(f"{command[0]} could not be run: {error}") from None
