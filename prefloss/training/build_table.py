"""Score a data set into a reference table, in one process or several, resuming after a kill.

The data is split into chunks. Each chunk is scored and written as a small table into a folder beside the output,
under a hash of its completions, so that a later run with any number of processes finds what is done. Then one process
merges the parts. Files are written atomically, and the batches of a chunk do not depend on the process that scores
it, so a resumed run gives the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import nn

from prefloss.data.atomic import hold, remove_unfinished
from prefloss.data.errors import shown
from prefloss.data.examples import read_example
from prefloss.data.row_file import rows_in
from prefloss.data.table import Header, ReferenceTable, TableError, as_scored, completion_key, write_table
from prefloss.data.tokens import Encoded
from prefloss.training import distributed
from prefloss.training.score import Score, score_rows
from prefloss.training.table_lookup import header_of

# Parts, without those that a kill left unfinished, whose names begin with a dot.
_PARTS = "[!.]*.parquet"

CHUNK = 256
"""Rows of the data in a part: a killed run loses at most this many in each process."""


@dataclass(frozen=True)
class Built:
    """A finished table.

    Attributes:
        table: The table.
        scored: Completions that this run scored, on all processes.
        empty: Completions without tokens after truncation; tables leave them out.
    """

    table: ReferenceTable
    scored: int
    empty: int


class ReferenceBuilder:
    """Writes a table.

    Args:
        output: The table.
        header: Model, tokenizer and settings of the scores.
        score: Scores completions.
        tokenizer: For text; None if the data holds token ids.
        chunk: Rows of the data in a part.
        anew: Write another table in place of the one that is there, which stays until the new one is whole.

    Raises:
        TableError: If the output, or a part that a killed run left, has another header or cannot be read.
    """

    def __init__(
        self,
        output: Path,
        header: Header,
        score: Callable[[list[Encoded]], list[Score]],
        *,
        tokenizer: Any = None,
        chunk: int = CHUNK,
        anew: bool = False,
    ) -> None:
        self.output = output
        self.header = header
        self.score = score
        self.tokenizer = tokenizer
        self.chunk = chunk
        self.folder = parts_folder(output)
        self.anew = anew
        self.known = ReferenceTable.read(output) if output.exists() and not anew else None
        if self.known is not None:
            _check_same(self.known, header)

    def build(
        self, data: Mapping[str, Sequence[Any]], on_chunk: Callable[[int], None] = lambda rows: None
    ) -> Built:
        """Claim the output, score what is not yet scored, and write the table. Every process must call this.

        Args:
            data: Data sets by name, for messages: rows with the columns that `PreferenceCollator` reads.
            on_chunk: Called with the number of rows of each chunk of this process.

        Raises:
            DataError: If a row is malformed.
            TableError: If another run writes the same table, or a part cannot be read or is missing in the end.
            FloatingPointError: If a log-prob is not finite.
        """
        with claimed(self.output, anew=self.anew):
            return self.build_claimed(data, on_chunk)

    def build_claimed(
        self, data: Mapping[str, Sequence[Any]], on_chunk: Callable[[int], None] = lambda rows: None
    ) -> Built:
        """As `build`, inside `claimed`."""
        parts: list[str] = []
        scored = empty = 0
        for name, rows in itertools.islice(self._chunks(data), distributed.rank(), None, distributed.size()):
            fresh, blank = self._fresh(name, data[name], rows)
            empty += blank
            if fresh:
                path, new = self._part(f"{name}: rows {rows[0] + 1} to {rows[-1] + 1}", fresh)
                parts.append(path)
                scored += new
            on_chunk(len(rows))
        # Waits for the slowest process, so that all parts exist.
        everyone = distributed.gather((parts, scored, empty))
        if distributed.rank() == 0:
            self._merge([name for names, _, _ in everyone for name in names])
        distributed.barrier()
        table = ReferenceTable.read(self.output)
        return Built(table, sum(new for _, new, _ in everyone), sum(blank for _, _, blank in everyone))

    def _chunks(self, data: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, range]]:
        """Data set and rows of each chunk."""
        for name, rows in data.items():
            for start in range(0, len(rows), self.chunk):
                yield name, range(start, min(start + self.chunk, len(rows)))

    def _fresh(self, name: str, data: Any, rows: range) -> tuple[dict[bytes, Encoded], int]:
        """Completions of a chunk that the table lacks, and the number of completions without tokens."""
        fresh: dict[bytes, Encoded] = {}
        empty = 0
        # Of a mapped data set, what was read does not stay in memory.
        part = data.select(rows) if hasattr(data, "select") else None
        examples = (data[i] for i in rows) if part is None else rows_in(part, part.column_names)
        for i, example in zip(rows, examples, strict=True):
            for encoded in read_example(i, example, self.tokenizer, place=f"{name}: row {i + 1}").rows:
                prompt, completion = as_scored(encoded, self.header.max_length)
                if completion:
                    fresh.setdefault(completion_key(prompt, completion), (prompt, completion))
                else:
                    empty += 1
        if self.known is not None and fresh:
            places = self.known.find(list(fresh))
            fresh = {key: row for (key, row), place in zip(fresh.items(), places, strict=True) if place < 0}
        return fresh, empty

    def _part(self, place: str, rows: dict[bytes, Encoded]) -> tuple[str, int]:
        """Score a chunk unless its part exists; the file name, and the number of completions scored."""
        path = self.folder / f"{hashlib.blake2b(b''.join(rows), digest_size=16).hexdigest()}.parquet"
        if path.exists() and not (self.anew and self._is_other(path)):
            _check_same(ReferenceTable.read(path), self.header)
            return path.name, 0
        scores = self.score(list(rows.values()))
        for (prompt, completion), (logp, _) in zip(rows.values(), scores, strict=True):
            if not math.isfinite(logp):
                raise FloatingPointError(
                    f"{place}: the log-prob of the completion with token ids {shown(completion)} after "
                    f"{shown(prompt[-8:])} is {logp}"
                )
        write_table(path, self.header, list(rows), *zip(*scores, strict=True))
        return path.name, len(rows)

    def _is_other(self, path: Path) -> bool:
        """Whether a part is damaged, or was scored otherwise."""
        try:
            return bool(ReferenceTable.read(path).header.differences(self.header))
        except TableError:
            return True

    def _merge(self, names: list[str]) -> None:
        """Merge the known table and all parts, then delete the parts."""
        lost = [name for name in names if not (self.folder / name).exists()]
        if lost:
            raise TableError(
                f"{self.folder}: {len(lost)} of {len(names)} parts are missing; expected a folder that all "
                "processes share"
            )
        import numpy as np

        # A fixed order: two parts may hold the same completion with different rounding.
        tables = [ReferenceTable.read(self.folder / name) for name in sorted(set(names))]
        if self.known is not None:
            tables.insert(0, self.known)
        if names or self.known is None:
            columns = ("keys", "logps", "tokens")
            joined = ([getattr(table, column) for table in tables] for column in columns)
            keys, logps, tokens = (np.concatenate(values) if values else values for values in joined)
            write_table(self.output, self.header, keys, logps, tokens)
        # Left over from a run that was killed while merging.
        remove_unfinished(self.output)
        shutil.rmtree(self.folder)


def write_reference_table(
    path: str | os.PathLike[str],
    model: nn.Module,
    data: Sequence[Any],
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    batch_size: int = 8,
) -> ReferenceTable:
    """Score a data set into a table, or add what the table lacks: `prefloss reference` from Python.

    Under torch.distributed the processes share the work, and each must call this.

    Args:
        path: Table to write or to add to.
        model: The reference, a model of transformers on the device it runs on, with its active adapters.
        data: Rows with the columns that `PreferenceCollator` reads.
        tokenizer: For text and messages.
        max_length: Tokens of prompt and completion together, at most, as in training.
        batch_size: Completions per forward pass.

    Returns:
        The table.

    Raises:
        DataError: If a row is malformed.
        TableError: If the table has another header, cannot be read, or another run is writing it.
        FloatingPointError: If a log-prob is not finite.
        ValueError: If `max_length` or `batch_size` leaves nothing to score.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: got {shown(batch_size)}, expected an integer >= 1")
    builder = ReferenceBuilder(
        Path(path),
        header_of(model, tokenizer, max_length=max_length),
        lambda rows: score_rows(model, rows, batch_size=batch_size),
        tokenizer=tokenizer,
    )
    return builder.build({"data": data}).table


def parts_folder(output: Path) -> Path:
    """Folder of the parts of an unfinished table."""
    return output.with_name(output.name + ".parts")


@contextmanager
def claimed(output: Path, *, anew: bool = False) -> Iterator[bool]:
    """Keep other runs from writing this table; every process must enter it, and one holds the claim.

    Gives whether parts of an earlier run are kept. With `anew` those are removed, unless they are of a run that was
    itself started anew.

    Raises:
        TableError: If another run holds the claim, or the folder cannot be written to.
    """
    folder = parts_folder(output)
    held: list[IO[str]] = []
    share = distributed.share()
    resumes = share.together(lambda: _claim(output, anew, held) if share.rank == 0 else False)[0]
    try:
        yield resumes
    finally:
        # Without a part, there is nothing to go on from.
        if held and folder.exists() and not any(folder.glob(_PARTS)):
            shutil.rmtree(folder, ignore_errors=True)
        for file in held:
            file.close()


def _claim(output: Path, anew: bool, held: list[IO[str]]) -> bool:
    """Take the claim, before anything is removed; whether parts of an earlier run are kept."""
    folder = parts_folder(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder / "lock")
        if lock is None:
            raise TableError(f"{folder}: another run is writing there; wait for it, or end it")
        held.append(lock)
        # A file system without room refuses this.
        lock.write("held by a run that writes this table\n")
        lock.flush()
        begun_anew = folder / "anew"
        if anew and not begun_anew.exists():
            for part in folder.glob(_PARTS):
                part.unlink()
            begun_anew.touch()
        return any(folder.glob(_PARTS))
    except OSError as error:
        raise TableError(f"{output}: cannot be written: {folder}: {error.strerror or error}") from error


def _check_same(table: ReferenceTable, header: Header) -> None:
    """Refuse to add to a table with another header."""
    apart = table.header.differences(header)
    if apart:
        raise TableError(
            f"{table.path}: was scored otherwise than this run would: {'; '.join(apart)}; write to another file, or "
            "start anew with --overwrite"
        )
