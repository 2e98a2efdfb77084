"""Rows of Parquet files and of folders that datasets wrote, read batch by batch. Columns of other names stay unread."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloss.data.errors import DataError
from prefloss.data.rows import KNOWN

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# Rows of a batch, and rows that are read through one mapping of a folder.
_BATCH, _SPAN = 1000, 50_000
_BUFFER = 2**20


def count_parquet(path: Path) -> int:
    """Number of rows."""
    with _opened(path) as file:
        return file.metadata.num_rows


def parquet(
    path: Path, start: int = 0, stop: int | None = None, also: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """These rows of a Parquet file, counted from 0; `also` names further columns to read."""
    with _opened(path) as file:
        names, at = file.schema_arrow.names, 0
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DataError(f"{path}: got two columns named {twice[0]!r}, expected each name once")
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if at + rows > start and (stop is None or at < stop):
                batches = file.iter_batches(_BATCH, row_groups=[group], columns=_read_names(names, also))
                yield from _rows(path, batches, names, at, start, stop)
            at += rows


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without a buffer, a whole column of a group of rows is read at once.
        with pq.ParquetFile(path, buffer_size=_BUFFER, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: not a readable Parquet file, perhaps cut off or damaged: {reason}"
        ) from error


def saved_folder(path: Path) -> Path | None:
    """The folder itself, or that of its split named train, if datasets' `save_to_disk` wrote it; None otherwise."""
    index = path / "dataset_dict.json"
    if index.exists():
        splits = _json(index).get("splits", [])
        if "train" not in splits:
            raise DataError(
                f"{path}: a dataset dictionary without a split named 'train' (it has {', '.join(map(str, splits))}); "
                f"name one, as {path / str(splits[0] if splits else '...')}"
            )
        path = path / "train"
        if not (path / "state.json").exists():
            raise DataError(f"{path}: named in {index.name}, but datasets' save_to_disk did not write it")
    return path if (path / "state.json").exists() else None


def count_saved(path: Path) -> int:
    """Number of rows."""
    return len(_loaded(path))


def saved(
    path: Path, start: int = 0, stop: int | None = None, also: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """These rows of a folder that `save_to_disk` wrote, counted from 0; `also` names further columns to read."""
    count = count_saved(path)
    for at in range(start, count if stop is None else stop, _SPAN):
        # Loaded anew, because pages that were read count as memory of the process until their mapping goes.
        loaded, to = _loaded(path), min(at + _SPAN, count if stop is None else stop)
        names = loaded.column_names
        part: Any = loaded.select_columns(_read_names(names, also)).with_format("arrow").select(range(at, to))
        batches = (batch for table in part.iter(_BATCH) for batch in table.combine_chunks().to_batches())
        yield from _rows(path, batches, names, at, at, to)


def _loaded(path: Path) -> Any:
    import datasets

    try:
        return datasets.Dataset.load_from_disk(str(path))
    except Exception as error:
        # Whatever is wrong with its files.
        raise DataError(f"{path}: datasets cannot load it: {str(error) or type(error).__name__}") from error


def _read_names(names: list[str], also: Collection[str]) -> list[str]:
    """The columns to read; the first, which tells how many rows there are, if nothing reads any."""
    return [name for name in names if name in KNOWN or name in also] or names[:1]


def _rows(
    path: Path, batches: Iterator[Any], names: list[str], at: int, start: int, stop: int | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows from `start` to `stop` of batches that begin at row `at`; None in columns that are not read."""
    unread = dict.fromkeys(names)
    for batch in batches:
        first, end = max(start - at, 0), len(batch) if stop is None else min(stop - at, len(batch))
        if first < end:
            kept = batch.slice(first, end - first)
            for number, row in enumerate(_values(path, kept, at + first + 1), start=at + first + 1):
                yield f"{path}: row {number}", unread | row
        at += len(batch)


def _values(path: Path, batch: pa.RecordBatch, first: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except Exception:
        # Text that is not UTF-8, a date beyond Python's: find the value.
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, value in enumerate(column, start=first):
                try:
                    value.as_py()
                except Exception as error:
                    place = f"{path}: row {number}: column {name!r}"
                    raise DataError(f"{place}: cannot be read: {error}") from error
        raise


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: got {type(value).__name__}, expected an object with the names of the splits"
        )
    return value
