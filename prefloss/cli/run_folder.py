"""The folder of one training run: one process writes there, and what stands there is whole at every moment.

    .lock           held by the process at work
    run.json        settings of the run, and whether it is finished
    warm-up.pt      the warm-up as far as it is; removed when it is over
    warm-start/     the model after its warm-up: where training begins, and the reference
    checkpoint-N/   all that training needs after N steps, as transformers' Trainer writes it
    config.json, model.safetensors, tokenizer.json, ..., curves.png, metrics.json   the finished run

A folder is written in `.unfinished/`, flushed to the disk and renamed; it is renamed back before it is removed. So a
folder under its own name is complete. The files of the finished run wait in `.finished/`, also complete, and go from
there one by one over those of an older run. A process killed on the way leaves the rest there, and the next one that
takes the folder moves it.

A run that overwrites an older one leaves its record and checkpoints alone until it has something complete itself, and
its model, picture and numbers until it is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prefloss
from prefloss.cli.command_options import TrainOptions
from prefloss.cli.console import CliError, first_line
from prefloss.data.atomic import remove_unfinished, written_whole
from prefloss.training import distributed

RECORD, WARM_UP, WARM_START = "run.json", "warm-up.pt", "warm-start"
LOCK, _UNFINISHED, _FINISHED = ".lock", ".unfinished", ".finished"
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
    """The error of a folder that cannot be written to, whichever package found out."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    # Torch's own words for a full disk name a line of its source.
    words = "a file could not be written to its end" if "inline_container" in words else words
    full = " (the disk is full)" if _is_full(path) else ""
    return CliError(f"--output: {path} cannot be written to: {words}{full}{advice}")


def _is_full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path).free < 1 << 20
    except OSError:
        return False


class RunFolder:
    """What a run keeps; made by `taking.taken`.

    Attributes:
        path: The folder.
        record: What run.json holds, or None: `settings` of the run, and whether it is `finished`.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        self.record = self._read_record()
        # The record of a run that overwrites an older one and has nothing complete yet.
        self._next: dict[str, Any] | None = None
        self._settings: dict[str, Any] = {}
        self._resume = False
        if writes:
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
        """Whether the run here has come to its end."""
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
                f"--output: {self.path} exists and is not empty; choose another, or add --overwrite"
            )
        if not resume:
            steps = [step for step, _ in self._checkpoints()]
            where = "finished" if self.finished else f"stopped after step {max(steps, default=0)}"
            raise CliError(
                f"--output: {self.path} holds a run, {where}; add --resume to go on with it or --overwrite to start "
                "anew, or choose another"
            )
        self.check_same(settings)

    def check_same(self, settings: dict[str, Any]) -> None:
        """Raise a `CliError` if the run here was started with other settings."""
        then = {} if self.record is None else self.record["settings"]
        apart = [name for name, value in settings.items() if name in then and then[name] != value]
        if apart:
            name = apart[0]
            also = f" (and other {', '.join(apart[1:])})" if len(apart) > 1 else ""
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
        """From now on the folder is this run's; the checkpoints of an older one are removed."""
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
        """Remove a file that has served."""
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
        """Names of what was here, or was completed."""
        return {path.name for path in self.path.iterdir()} - {LOCK, _UNFINISHED}

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


def settings_of(options: TrainOptions, loss: prefloss.Loss) -> dict[str, Any]:
    """What a run was asked for, as far as it changes what is trained."""
    content = None if options.data is None else _digest(options.data)
    return {
        "--loss": repr(loss),
        **options.training_settings(),
        "content of --data": content,
        "processes": distributed.size(),
    }


def _digest(path: Path) -> str | None:
    """Hash of a file, or of all files in a folder; None if there is nothing that can be read."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=16)
    try:
        for item in files:
            digest.update(f"{item.relative_to(path)} {item.stat().st_size};".encode())
            with item.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


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
