"""Scores in parts, so that a killed run goes on: one chunk of rows each, written whole.

    OUTPUT.parts/settings.json      what the scores are made with
    OUTPUT.parts/00000012.parquet   the scores of chunk 12, a row for each completion
    OUTPUT, OUTPUT.reliability.png, OUTPUT.summary.json   the finished run; the last one holds the settings too

A run with other settings is refused. The parts are removed last, so at any moment either they or the summary tell
what OUTPUT was made with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefloss.data import DataError
from prefloss.data.atomic import remove_unfinished, written_whole
from prefloss.training import parts_folder

COLUMNS = ("row", "side", "reward", "logp", "ref_logp", "tokens", "truncated")
"""Columns of the output, for each completion."""

PER_TOKEN = ("token_ids", "token_rewards")
"""Columns that --per-token adds."""

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("side", pa.string()),
        ("reward", pa.float64()),
        ("logp", pa.float64()),
        ("ref_logp", pa.float64()),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_rewards", pa.list_(pa.float64())),
        # For the summary: what people said, and the part of a benchmark.
        ("given", pa.float64()),
        ("subset", pa.string()),
        ("id", pa.string()),
    ]
)


class Parts:
    """The parts of one output.

    Args:
        output: The file that they become.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, parts_folder(output)
        self.summary = beside(output, ".summary.json")
        self._settings = self.folder / "settings.json"

    def admit(self, settings: Mapping[str, Any], *, anew: bool) -> dict[str, Any] | None:
        """Begin, or go on; what the summary holds if there is nothing left to do.

        Args:
            settings: All that changes the scores, as JSON.
            anew: Begin another run though something is there.

        Raises:
            DataError: If what is there was made with other settings, or by something else.
        """
        begun = _read(self._settings)
        if anew:
            if begun is not None and begun != settings:
                for path in self.folder.glob("*.parquet"):
                    path.unlink()
        elif (done := _read(self.summary)) is not None and self.output.exists():
            self._check_same(done.get("settings"), settings)
            # A kill may have come while they were removed.
            if begun in (None, settings):
                shutil.rmtree(self.folder)
            return done
        elif begun is not None:
            self._check_same(begun, settings)
        elif self.output.exists():
            raise DataError(
                f"--output: {self.output} exists, and no summary of prefloss score is beside it; choose another file, "
                "or add --overwrite"
            )
        if begun != settings:
            _write(self._settings, settings)
        return None

    def path(self, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{number:08}.parquet"

    def write(self, number: int, table: pa.Table) -> None:
        """Keep the scores of a chunk."""
        with written_whole(self.path(number)) as path:
            pq.write_table(table, path, write_page_checksum=True)

    def read(self, count: int) -> Iterator[pa.Table]:
        """The scores of each of so many chunks, in order.

        Raises:
            DataError: If one is missing or damaged.
        """
        for number in range(count):
            path = self.path(number)
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    yield file.read()
            except FileNotFoundError as error:
                raise DataError(f"{path}: is missing; expected a folder that all processes share") from error
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{path}: cannot be read: {str(error).splitlines()[0]}; remove it, and the same command scores "
                    "these rows again"
                ) from error

    def finish(self, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Write the summary, and remove the parts: the run is finished."""
        _write(self.summary, {"settings": settings, "summary": summary})
        for name in (self.output, self.summary):
            remove_unfinished(name)
        shutil.rmtree(self.folder)

    def _check_same(self, then: Any, now: Mapping[str, Any]) -> None:
        then = then if isinstance(then, dict) else {}
        apart = [name for name, value in now.items() if then.get(name) != value]
        if apart:
            also = f" (other differences: {', '.join(apart[1:])})" if len(apart) > 1 else ""
            raise DataError(
                f"{apart[0]}: got {now[apart[0]]}, expected {then.get(apart[0])}, as the scores of {self.output} were "
                f"made with{also}; give the same, choose another --output, or start anew with --overwrite"
            )


def beside(output: Path, ending: str) -> Path:
    """A file that belongs to an output."""
    return output.with_name(output.name + ending)


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; choose another --output, or --overwrite"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: got {type(value).__name__}, expected what prefloss score wrote there")
    return value


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
