"""The folder of one training run: one process writes there, and every file and folder in it is complete.

    .lock           held by the process that writes
    run.json        settings of the run, and whether it is finished
    warm-up.pt      state of the warm-up; removed when the warm-up is over
    warm-start/     the model after its warm-up: where training begins, and the reference
    checkpoint-N/   state of the training after N steps, as transformers' Trainer writes it
    config.json, model.safetensors, tokenizer.json, ..., curves.png, metrics.json   the finished run

A folder is written in `.unfinished/`, flushed to the disk and renamed; before it is removed, it is renamed back. So a
folder under its own name is complete. The files of the finished run are written to `.finished/` in the same way, and
then moved over those of an older run, one by one. If a process is killed while it moves them, the next process that
takes the folder moves the rest.

A run that overwrites an older one keeps the older record and checkpoints until it has saved something itself, and the
older model, picture and numbers until it is finished.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import prefloss
from prefloss.cli.console import CliError, first_line
from prefloss.cli.processes import together
from prefloss.data.atomic import hold, remove_unfinished, written_whole
from prefloss.training import distributed

RECORD, WARM_UP, WARM_START = "run.json", "warm-up.pt", "warm-start"
_LOCK, _UNFINISHED, _FINISHED = ".lock", ".unfinished", ".finished"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

# Weights that another run may have left: shards of a larger model, or an adapter, would be loaded together with ours.
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
    "adapter_config.json",
)


def unwritable(path: Path, error: Exception, advice: str = "") -> CliError:
    """The error of an output that cannot be written to, from the error of Python, safetensors or torch."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    # Torch's own words for a full disk name a line of its source.
    words = "a file could not be written to its end" if "inline_container" in words else words
    full = ""
    with contextlib.suppress(OSError):
        full = " (the disk is full)" if shutil.disk_usage(path).free < 1 << 20 else ""
    return CliError(f"--output: {path} cannot be written to: {words}{full}{advice}")


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
        yield folder or RunFolder(path)


@contextmanager
def _taken(output: Path | None, slug: str) -> Iterator[RunFolder]:
    first = output or Path("prefloss-runs", f"{slug}-1")
    with contextlib.ExitStack() as stack:
        at_end = partial(stack.callback, _try)
        try:
            path = _made(first, None if output else slug, at_end)
            lock = hold(path / _LOCK)
            if lock is None:
                raise CliError(
                    f"--output: another process is at work in {path}; wait for it, end it, or choose another folder"
                )
            at_end(lock.close)
            # Before it is closed: a process that opened it already sees that it is gone, and does not hold it.
            at_end((path / _LOCK).unlink)
            # This shows that the folder can be written to.
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            os.fsync(lock.fileno())
            folder = RunFolder(path)
        except OSError as error:
            raise unwritable(first, error) from error
        # A null character.
        except ValueError as error:
            raise CliError(f"--output: got {str(first)!r}, expected a path: {first_line(error)}") from error
        at_end(folder.remove_if_nothing_was_kept)
        yield folder


def _made(first: Path, slug: str | None, at_end: Callable[..., Any]) -> Path:
    """Make the folder, or with a slug the first free one of its number; at the end, remove those that are empty."""
    if slug is None and first.exists() and not first.is_dir():
        raise CliError(f"--output: {first} is a file; expected a folder")
    for parent in reversed(first.parents):
        if not parent.exists():
            parent.mkdir(exist_ok=True)
            at_end(parent.rmdir)
    for number in itertools.count(1):
        path = first if slug is None else first.with_name(f"{slug}-{number}")
        # The process that makes a folder has its number.
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            at_end(path.rmdir)
            return path
        if slug is None:
            return path
    raise AssertionError("numbers do not end")


def _try(function: Callable[[], Any]) -> None:
    """Call it; a file or folder that cannot be removed stays."""
    with contextlib.suppress(OSError):
        function()


class RunFolder:
    """What a run keeps; made by `taken`.

    Attributes:
        path: The folder.
        record: What run.json holds, or None: `settings` of the run, and whether it is `finished`.
    """

    def __init__(self, path: Path) -> None:
        # One process writes for all.
        self.path, self._writes = path, distributed.rank() == 0
        self.record = self._read_record()
        # The record of a run that overwrites an older one and has nothing complete yet.
        self._next: dict[str, Any] | None = None
        self._settings: dict[str, Any] = {}
        self._resume = False
        if self._writes:
            self._settle()
        self._before = self._content()

    @property
    def unfinished(self) -> Path:
        """Where folders are written; `complete` gives them their place."""
        path = self.path / _UNFINISHED
        path.mkdir(exist_ok=True)
        return path

    @property
    def finished(self) -> bool:
        """Whether the run here is finished."""
        return self.record is not None and bool(self.record.get("finished"))

    def admit(self, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Raise a `CliError` if what the folder holds does not go with these options.

        Args:
            settings: What the run is asked for, as far as it changes what is trained.
            resume: Whether to go on with the run here, if there is one.
            overwrite: Whether to begin another though something is here.
        """
        self._settings, self._resume = settings, resume
        if overwrite or not self._content():
            return
        if self.record is None and resume:
            raise CliError(
                f"--resume: {self.path} holds no run of prefloss train; expected the folder of one"
            )
        if self.record is None:
            raise CliError(
                f"--output: {self.path} exists and is not empty; choose another folder, or add --overwrite"
            )
        if not resume:
            steps = [step for step, _ in self._checkpoints()]
            where = f"stopped after step {steps[-1]}" if steps else "stopped before its first checkpoint"
            where = "finished" if self.finished else where
            raise CliError(
                f"--output: {self.path} holds a run, {where}; add --resume to go on with it or --overwrite to start "
                "anew, or choose another folder"
            )
        self.check_same(settings)

    def check_same(self, settings: dict[str, Any]) -> None:
        """Raise a `CliError` if the run here was started with other settings."""
        then = {} if self.record is None else self.record["settings"]
        apart = [name for name, value in settings.items() if name in then and then[name] != value]
        if apart:
            name = apart[0]
            also = f" (other differences: {', '.join(apart[1:])})" if len(apart) > 1 else ""
            raise CliError(
                f"{name}: got {settings[name]}, expected {then[name]}, as the run in {self.path} was started with{also}"
                "; go on with the same options, or start anew in another --output"
            )

    def begin(self, found: dict[str, Any]) -> None:
        """Go on with the run here, or record a new one; `found` are settings that were not known before."""
        settings = {**self._settings, **found}
        if self.record is not None and self._resume:
            self.check_same(settings)
            return
        self._next = {"prefloss": prefloss.__version__, "settings": settings, "finished": False}
        if self.record is None:
            self.become_current()

    def become_current(self) -> None:
        """Write this run's record; the checkpoints of an older run are removed."""
        if self._next is None:
            return
        if self._writes:
            for name in (WARM_START, *(path.name for _, path in self._checkpoints())):
                self._remove(name)
            self.discard(WARM_UP)
        self._write_record(self._next)
        self._next = None

    def complete(self, name: str) -> None:
        """Give `unfinished / name` its place; what was there is removed. All processes wait for it."""
        distributed.barrier()
        if self._writes:
            _flush(self.unfinished / name)
        self.become_current()
        if self._writes:
            self._remove(name)
            os.rename(self.unfinished / name, self.path / name)
            _flush_folder(self.path)
        distributed.barrier()

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A file to write, which takes its place at the end."""
        with written_whole(self.path / name) as path:
            yield path
            self.become_current()

    def kept(self, name: str) -> Path | None:
        """A file or folder of this run, if it is there."""
        return self.path / name if self._next is None and (self.path / name).exists() else None

    def last_checkpoint(self) -> Path | None:
        """The checkpoint of the most steps."""
        checkpoints = [] if self._next is not None else self._checkpoints()
        return checkpoints[-1][1] if checkpoints else None

    def prune(self, keep: int) -> None:
        """Remove all but the newest checkpoints."""
        if self._writes:
            for _, path in self._checkpoints()[:-keep]:
                self._remove(path.name)

    def finish(self, name: str) -> None:
        """Move the files of `unfinished / name` over those of an older run: this run is finished."""
        source = self.unfinished / name
        _flush(source)
        self.become_current()
        files = sorted(path.name for path in source.iterdir())
        self._write_record({**(self.record or {}), "files": files})
        os.rename(source, self.path / _FINISHED)
        self._settle()

    def discard(self, name: str) -> None:
        """Remove a file that is no longer needed."""
        if self._writes:
            (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what was not completed."""
        if self._writes:
            shutil.rmtree(self.path / _UNFINISHED, ignore_errors=True)

    def remove_if_nothing_was_kept(self) -> None:
        """Remove what `begin` and a failed run left where there is nothing to go on with."""
        if RECORD not in self._before and self._content() - self._before <= {RECORD}:
            self.clear()
            self.discard(RECORD)

    def _content(self) -> set[str]:
        """Names of all complete files and folders."""
        return {path.name for path in self.path.iterdir()} - {_LOCK, _UNFINISHED}

    def _checkpoints(self) -> list[tuple[int, Path]]:
        found = ((_CHECKPOINT.fullmatch(path.name), path) for path in self.path.iterdir())
        return sorted((int(match[1]), path) for match, path in found if match)

    def _remove(self, name: str) -> None:
        path = self.path / name
        if path.exists():
            # A folder that is half removed must not keep its name.
            aside = self.unfinished / f"old-{name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            shutil.rmtree(aside)

    def _settle(self) -> None:
        """Move what is left in `.finished`; remove what was never completed."""
        waiting = self.path / _FINISHED
        if waiting.exists() and self.record is not None:
            ours = self.record.get("files", ())
            for stale in (path for pattern in _WEIGHTS for path in self.path.glob(pattern)):
                if stale.name not in ours:
                    stale.unlink()
            for path in sorted(waiting.iterdir()):
                os.replace(path, self.path / path.name)
            _flush_folder(self.path)
            self._write_record({**self.record, "finished": True})
            waiting.rmdir()
        for name in (RECORD, WARM_UP):
            remove_unfinished(self.path / name)
        if self.record is not None:
            self.clear()

    def _read_record(self) -> dict[str, Any] | None:
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CliError(
                f"--output: {self.path / RECORD} cannot be read: {first_line(error)}; choose another folder"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
            raise CliError(
                f"--output: {self.path / RECORD} is no record of prefloss train; choose another folder"
            )
        return record

    def _write_record(self, record: dict[str, Any]) -> None:
        if self._writes:
            with written_whole(self.path / RECORD) as path:
                path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self.record = record


def _flush(folder: Path) -> None:
    """Write a folder and all in it through to the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb+") as file:
                os.fsync(file.fileno())
        _flush_folder(Path(root))


def _flush_folder(path: Path) -> None:
    # Windows opens no folders.
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
