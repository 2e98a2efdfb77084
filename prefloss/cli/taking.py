"""Take a folder for a run: made if need be, and held so that no other run writes there."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from prefloss.cli.console import CliError, first_line
from prefloss.cli.processes import together
from prefloss.cli.run_folder import LOCK, RunFolder, unwritable
from prefloss.data.atomic import hold
from prefloss.training import distributed


@contextmanager
def taken(output: Path | None, slug: str) -> Iterator[RunFolder]:
    """A folder that no other run writes to while the block runs, made if need be.

    The first process of a run takes it; the others read what it has written.

    Args:
        output: The folder; None for the first free prefloss-runs/<slug>-<number>.
        slug: Start of the name of a numbered folder.

    Raises:
        CliError: If it cannot be made or written to, or another run is at work there.
    """
    with contextlib.ExitStack() as stack:
        folder = None
        with together():
            if distributed.rank() == 0:
                folder = stack.enter_context(_taken(output, slug))
        path = distributed.gather(None if folder is None else folder.path)[0]
        yield folder or RunFolder(path, writes=False)


@contextmanager
def _taken(output: Path | None, slug: str) -> Iterator[RunFolder]:
    path, made = _made(output, slug)
    try:
        lock = _locked(path)
        try:
            folder = _opened(path)
            try:
                yield folder
            finally:
                with contextlib.suppress(OSError):
                    folder.remove_if_nothing_was_kept()
        finally:
            # While it is held: whoever opened it already finds that it is gone, and opens another.
            with contextlib.suppress(OSError):
                (path / LOCK).unlink()
            lock.close()
    finally:
        for folder_made in made:
            with contextlib.suppress(OSError):
                folder_made.rmdir()


def _opened(path: Path) -> RunFolder:
    try:
        return RunFolder(path)
    except OSError as error:
        raise unwritable(path, error) from error


def _made(output: Path | None, slug: str) -> tuple[Path, list[Path]]:
    """The folder, and which folders were made for it, innermost first."""
    first = Path("prefloss-runs") / f"{slug}-1" if output is None else output
    try:
        made = [path for path in (first, *first.parents) if not path.exists()]
        if first.exists() and not first.is_dir():
            raise CliError(f"--output: {first} is a file; expected a folder")
        first.parent.mkdir(parents=True, exist_ok=True)
        if output is not None:
            output.mkdir(exist_ok=True)
            return output, made
        for number in itertools.count(1):
            path = first.with_name(f"{slug}-{number}")
            # Whoever makes a folder has its number.
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path, [path, *(folder for folder in made if folder != first)]
    except (OSError, ValueError) as error:
        raise (
            unwritable(first, error)
            if isinstance(error, OSError)
            else CliError(f"--output: got {str(first)!r}, expected a path: {first_line(error)}")
        ) from error
    raise AssertionError("numbers do not end")


def _locked(path: Path) -> IO[str]:
    """Hold the folder's lock, and show that the folder can be written to."""
    try:
        lock = hold(path / LOCK)
    except OSError as error:
        raise unwritable(path, error) from error
    if lock is None:
        raise CliError(
            f"--output: another process is at work in {path}; wait for it, end it, or choose another"
        )
    try:
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        os.fsync(lock.fileno())
    except OSError as error:
        raise unwritable(path, error) from error
    return lock
