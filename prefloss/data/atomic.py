"""Files that are replaced as a whole, and files that one process at a time holds."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_ENDING = ".unfinished"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, with its suffix, to write to; it takes the path's place at the end.

    A reader of `path` sees the old file or the new one. After an error, `path` is as it was.
    """
    # In the same folder, because a file can be renamed only within its file system; by mkstemp, because a name
    # that can be guessed could be a link that somebody else put there.
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=_ENDING + path.suffix, dir=path.parent
    )
    os.close(descriptor)
    unfinished = Path(name)
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp's files are private; what the user's umask allows is what a plain open would have given.
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o666 & ~mask)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a killed process left beside `path`; no other process may be writing it."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*{_ENDING}{path.suffix}"):
        stale.unlink(missing_ok=True)


def hold(path: Path) -> IO[str] | None:
    """Open a file that one process may hold at a time; None if another holds it.

    Closing it frees it. So does the end of the process, however it ends.
    """
    file = path.open("a")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that held it before may have removed it meanwhile.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except ModuleNotFoundError:
        # Windows has no such locks: every process gets the file.
        return file
    except BlockingIOError:
        pass
    file.close()
    return None
