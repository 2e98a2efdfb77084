"""The folder of libraries that were compiled on this machine. They are loaded as code, so nothing in it is trusted.

A library is loaded from here if only this user can write to it and its bytes have the digest that was written when it
was built; a kill, a full disk or a failing one may have damaged it since.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prefloss.kernels.cpu.build import digest, digest_file

# of folders that libraries are built in; a killed process leaves its own behind
_PREFIX = "prefloss-build-"


def folder() -> Path:
    """The cache, created if need be; OSError if there is none that only this user can write to."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # a relative path would be another folder wherever a process starts
    made = (Path(base) if os.path.isabs(base) else _home() / ".cache") / "prefloss"
    made.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _private(made.stat()):
        raise OSError(f"{made} belongs to another user, or another user can write to it")
    return made


def _home() -> Path:
    named = os.environ.get("HOME", "")
    if os.path.isabs(named):
        return Path(named)
    import pwd

    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        raise OSError(f"HOME is not set, and user {os.getuid()} has no home folder") from None


def _private(status: os.stat_result) -> bool:
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def check_digest(library: Path) -> None:
    """Raise OSError unless the library has the bytes that were built."""
    if digest(library) != digest_file(library).read_text(errors="replace").strip():
        raise OSError(f"{library} is damaged: its digest is not that of the library that was built")


def check(library: Path) -> None:
    """Raise OSError unless a library of the cache may be loaded."""
    for file in (library, digest_file(library)):
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or not _private(status):
            raise OSError(f"{file} is not a file that only this user can write to")
    check_digest(library)


def store(built: Path, library: Path) -> None:
    """Move a library that was built in this folder to its place, and write its digest beside it."""
    value = digest_file(built)
    value.write_text(digest(built) + "\n")
    for source, place in ((built, library), (value, digest_file(library))):
        source.chmod(0o600)
        # on the disk before the name is, or a crash could leave an empty file under it
        _sync(source)
        os.replace(source, place)
    _sync(library.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def building_folder(parent: Path | None) -> Iterator[Path]:
    """A new folder below `parent`, or below that for temporary files, removed afterwards.

    Its process holds a lock on it, which ends with the process; folders that nobody holds are removed first.
    """
    place = Path(tempfile.gettempdir()) if parent is None else parent
    for left in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _lock(left):
            shutil.rmtree(left)
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place, ignore_cleanup_errors=True)
        made = Path(stack.enter_context(temporary))
        # a file system may have no locks
        with contextlib.suppress(OSError):
            stack.enter_context(_lock(made))
        yield made


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock on a folder of this user, or raise OSError if another process holds it."""
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise OSError(f"{path} belongs to another user")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
