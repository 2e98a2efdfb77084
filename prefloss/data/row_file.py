"""Rows in a memory-mapped Arrow file: the memory that they take does not grow with their number."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from prefloss.data.atomic import hold
from prefloss.data.errors import DataError
from prefloss.feedback import columns_of

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Value = TypeVar("Value")

# Rows and characters that one batch of the file holds at most, and rows that are read through one mapping.
_BATCH_ROWS, _BATCH_TEXT, _SPAN = 1000, 2**22, 50_000
# Seconds after which a folder without a process that holds it is what a killed process left.
_STALE = 60


@dataclass(frozen=True)
class Share:
    """The part of a file that this process checks, of all that read it together.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        gather: Returns the value of every process, by rank; all of them call it (`training.distributed.gather`).
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def together(self, function: Callable[[], Value]) -> list[Value]:
        """What the function returns on each process; if one raises a `DataError`, all raise the first one's."""
        value, error = None, None
        try:
            value = function()
        except DataError as caught:
            error = caught
        outcomes = self.gather((value, error))
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]


def row_folder() -> Path:
    """A folder of this process for such files, removed when it ends.

    It lies in the cache folder of datasets (HF_DATASETS_CACHE), where folders that killed processes of this machine
    left are removed, or in the system's folder for temporary files if that cannot be written to.

    Raises:
        DataError: If neither can be written to.
    """
    return _row_folder(os.getpid())


@functools.cache
def _row_folder(process: int) -> Path:
    """The folder of a process; a forked one gets its own."""
    from datasets import config

    problems, prefix = [], f"prefloss-{socket.gethostname()}-"
    cache = Path(config.HF_DATASETS_CACHE)
    _remove_stale(cache, prefix)
    for base in (cache, Path(tempfile.gettempdir())):
        try:
            base.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
            atexit.register(_remove, folder, process, hold(folder / "lock"))
            return folder
        except OSError as error:
            problems.append(f"{base} ({error.strerror})")
    raise DataError(
        f"no folder to keep checked rows in: {' and '.join(problems)} cannot be written to; set HF_DATASETS_CACHE to "
        "one"
    )


def _remove(folder: Path, process: int, lock: IO[str] | None) -> None:
    """Remove the folder of a process; the lock is an argument so that it stays open until then."""
    # A forked process that ends must leave its parent's files.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(base: Path, prefix: str) -> None:
    for folder in base.glob(f"{prefix}*"):
        # Another user's folder cannot be opened.
        with contextlib.suppress(OSError):
            is_old = time.time() - folder.stat().st_mtime > _STALE
            if is_old and (lock := hold(folder / "lock")):
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()


def row_schema(kind: type, text: Any, optional: Sequence[str] = (), ending: str = "") -> pa.Schema:
    """The Arrow schema of rows of a kind, whose prompts and completions are of an Arrow type."""
    import pyarrow as pa

    types = {"label": pa.bool_(), "scores": pa.list_(pa.float64()), "completions": pa.list_(text)}
    values = {"label", "scores"}
    columns = [
        (name if name in values else f"{name}{ending}", types.get(name, text)) for name in columns_of(kind)
    ]
    return pa.schema([*columns, *((name, pa.float64()) for name in optional)])


def write_rows(folder: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows to a new file in a folder.

    Raises:
        DataError: If there is no room for them.
    """
    import pyarrow as pa

    path = folder / f"{uuid.uuid4()}.arrow"
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in _batches(rows):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    except BaseException as error:
        path.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise DataError(
            f"{folder}: checked rows cannot be written there: {error.strerror or error}; make room, or set "
            "HF_DATASETS_CACHE to a folder with more"
        ) from error
    return path


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Any]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(repr(row))
        if len(batch) == _BATCH_ROWS or size > _BATCH_TEXT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def open_rows(files: Sequence[Path]) -> Dataset:
    """The rows of such files, one after the other, memory-mapped.

    Raises:
        DataError: If one is not there, because another process wrote it to a folder of its own.
    """
    from datasets import Dataset, concatenate_datasets

    for file in files:
        if not file.exists():
            raise DataError(
                f"{file}: rows that another process checked are not there; set HF_DATASETS_CACHE to a folder that all "
                "processes share"
            )
    return concatenate_datasets([Dataset.from_file(str(file)) for file in files])


def rows_in(rows: Dataset, columns: Sequence[str], span: int = _SPAN) -> Iterator[dict[str, Any]]:
    """Some columns of each row, in order; what was read does not stay in memory.

    Args:
        rows: Mapped rows, or rows in memory.
        columns: Their names.
        span: Rows that are read through one mapping; few where they are spread over the file.
    """
    chosen = rows.select_columns(list(columns))
    for start in range(0, len(rows), span):
        part: Any = chosen.select(range(start, min(start + span, len(rows))))
        # A copy maps the file anew. Pages that were read count as memory of the process until their mapping goes.
        part = pickle.loads(pickle.dumps(part)) if part.cache_files else part
        for batch in part.iter(_BATCH_ROWS):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
