"""Reference log-probs of completions in one Parquet file, scored once and read by any training.

A row is one completion: a hash of its token ids, the sum of its log-probs, and how many tokens were scored. The file's
header says what they were scored with. Rows are sorted by hash, so a lookup is a binary search in two NumPy arrays of
28 bytes a row, and no index is built at the start.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from prefloss.data.atomic import written_whole
from prefloss.data.errors import DataError, shown

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
"""Version of the file's layout and of the hash."""

_HEADER = b"prefloss.reference"
_COLUMNS = ("key", "logp", "tokens")
_KEY_BYTES = 16
# Nats.
_ROUNDING = 1e-2


class TableError(DataError):
    """A reference table that cannot be read, or lacks a row."""


def completion_key(prompt: Sequence[int], completion: Sequence[int]) -> bytes:
    """Hash of a completion's token ids and of where its prompt ends, 16 bytes (BLAKE2b).

    Args:
        prompt: Token ids of the prompt, as the model sees them.
        completion: Those of the completion, cut where they are cut.

    Example:
        >>> completion_key([5, 6], [7]) == completion_key([5], [6, 7])
        False
    """
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=_KEY_BYTES)
    # 8 bytes a token on every machine that torch runs on; all of them are little-endian.
    digest.update(array("q", prompt).tobytes())
    digest.update(array("q", completion).tobytes())
    return digest.digest()


def check_max_length(max_length: object) -> None:
    """Refuse a length to cut rows at that leaves no token to score.

    Raises:
        TypeError: If it is no integer, nor None.
        ValueError: If it is below 2: the first token is never scored.
    """
    if max_length is None:
        return
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise TypeError(f"max_length: got {shown(max_length)}, expected an integer >= 2, or None for no cut")
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}, expected at least 2 tokens, or None for no cut")


def as_scored(
    encoded: tuple[list[int], list[int]], max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of the context and of the scored completion, cut to `max_length` together.

    Without a prompt the first token is the context, because nothing predicts it.

    Args:
        encoded: Token ids of prompt and completion.
        max_length: Tokens of both together, at most; None for all.
    """
    prompt, completion = encoded
    ids, start = (prompt + completion)[:max_length], max(1, len(prompt))
    return ids[:start], ids[start:]


@dataclass(frozen=True)
class Header:
    """What a table was scored with.

    Attributes:
        model: Name or path.
        revision: Commit of the model, if the hub named one.
        adapter: Path of the adapter that was on, or None.
        weights: Fingerprint of the weights.
        dtype: Of the weights, such as "float32".
        tokenizer: Name or path; None if the data held token ids.
        vocabulary: Fingerprint of the tokenizer.
        chat_template: Hash of its chat template.
        max_length: Tokens that prompt and completion were cut to together, or None.
        prefloss: Version that wrote it.
        format: `FORMAT` of that version.
    """

    model: str
    revision: str | None
    adapter: str | None
    weights: str
    dtype: str
    tokenizer: str | None
    vocabulary: str | None
    chat_template: str | None
    max_length: int | None
    prefloss: str
    format: int = FORMAT

    def differences(self, other: Header) -> list[str]:
        """What makes log-probs scored under the two headers differ, in words; the other's value last."""
        differences = []
        for name in ("weights", "dtype", "vocabulary", "chat_template", "max_length"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                known_as = {"weights": "model", "vocabulary": "tokenizer"}.get(name)
                names = f" ({getattr(self, known_as)}, {getattr(other, known_as)})" if known_as else ""
                differences.append(f"{name} {mine} and {theirs}{names}")
        return differences


class ReferenceTable:
    """A table in memory.

    Args:
        path: Where it was read from, for messages.
        header: What it was scored with.
        keys: Hashes, sorted, [rows, 2] as unsigned 64-bit numbers.
        logps: Sums of log-probs, [rows], float64, nats.
        tokens: Tokens scored, [rows].
    """

    def __init__(
        self, path: Path, header: Header, keys: np.ndarray, logps: np.ndarray, tokens: np.ndarray
    ) -> None:
        self.path, self.header, self.logps, self.tokens = path, header, logps, tokens
        # Two arrays, so that the binary search reads neighbouring numbers.
        self._first, self._second = (keys[:, i].copy() for i in (0, 1))

    def __len__(self) -> int:
        return len(self.logps)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ReferenceTable:
        """Read and check a file that `prefloss reference` wrote.

        Raises:
            TableError: If it is missing, damaged, no reference table, or of a later format.
            ModuleNotFoundError: If pyarrow is missing.
        """
        import numpy as np

        path = Path(path)
        header, columns = _read(path)
        table = cls(path, header, *columns)
        first, second = table._first, table._second
        rising = (first[1:] > first[:-1]) | ((first[1:] == first[:-1]) & (second[1:] > second[:-1]))
        # Rounding may lift a certain token a little above 0.
        possible = np.isfinite(table.logps) & (table.logps <= _ROUNDING * table.tokens) & (table.tokens > 0)
        if not (rising.all() and possible.all()):
            raise TableError(
                f"{path}: a damaged reference table (its rows are not sorted, or hold something else than finite "
                "log-probs <= 0 and counts > 0); run `prefloss reference` again with --overwrite"
            )
        return table

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Row of each key of `completion_key`, -1 for those that are absent."""
        import numpy as np

        numbers = _as_numbers(b"".join(keys))
        starts = np.searchsorted(self._first, numbers[:, 0])
        rows = np.full(len(keys), -1)
        for i, (row, (first, second)) in enumerate(zip(starts.tolist(), numbers.tolist(), strict=True)):
            # More than one step only where two hashes share their first half.
            while row < len(self) and self._first[row] == first:
                if self._second[row] == second:
                    rows[i] = row
                    break
                row += 1
        return rows

    @property
    def keys(self) -> np.ndarray:
        """Hashes, sorted, [rows, 2] as unsigned 64-bit numbers."""
        import numpy as np

        return np.stack([self._first, self._second], axis=1)

    def hashes(self) -> list[bytes]:
        """The keys as bytes, in order."""
        held = self.keys.astype(">u8").tobytes()
        return [held[i : i + _KEY_BYTES] for i in range(0, len(held), _KEY_BYTES)]


def write_table(
    path: Path,
    header: Header,
    keys: Sequence[bytes] | np.ndarray,
    logps: Sequence[float] | np.ndarray,
    tokens: Sequence[int] | np.ndarray,
) -> None:
    """Write a table atomically: a reader of the path sees the old file or the new one.

    Args:
        path: Where to.
        header: What the rows were scored with.
        keys: Hashes, as bytes or as `ReferenceTable.keys`; of two equal ones the first is written.
        logps: Sums of log-probs, nats.
        tokens: Tokens scored.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = keys if isinstance(keys, np.ndarray) else _as_numbers(b"".join(keys))
    # Stable: equal keys stay in their order.
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    numbers = numbers[order]
    is_new = np.append(True, (numbers[1:] != numbers[:-1]).any(1))[: len(order)]
    order, held = order[is_new], pa.py_buffer(numbers[is_new].astype(">u8").tobytes())
    table = pa.table(
        {
            "key": pa.FixedSizeBinaryArray.from_buffers(pa.binary(_KEY_BYTES), len(order), [None, held]),
            "logp": pa.array(np.asarray(logps, np.float64)[order]),
            "tokens": pa.array(np.asarray(tokens, np.int32)[order]),
        }
    ).replace_schema_metadata({_HEADER: json.dumps(asdict(header))})
    with written_whole(path) as unfinished:
        pq.write_table(table, unfinished, compression="none", write_page_checksum=True)


def _read(path: Path) -> tuple[Header, tuple[Any, Any, Any]]:
    if not path.is_file():
        raise TableError(f"{path}: no such file; expected a table that `prefloss reference` wrote")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise ModuleNotFoundError(
            "a reference table needs pyarrow: pip install pyarrow", name="pyarrow"
        ) from error
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise TableError(
            f"{path}: not a readable Parquet file, perhaps cut off or damaged ({str(error).splitlines()[0]}); run "
            "`prefloss reference` again with --overwrite"
        ) from error
    text = (table.schema.metadata or {}).get(_HEADER)
    if text is None or tuple(table.column_names) != _COLUMNS:
        raise TableError(
            f"{path}: a Parquet file, but no reference table (columns {', '.join(table.column_names)}); expected one "
            "that `prefloss reference` wrote"
        )
    header = _header(path, text)
    for name, wanted in zip(_COLUMNS, (pa.binary(_KEY_BYTES), pa.float64(), pa.int32()), strict=True):
        column = table.column(name)
        if column.type != wanted or column.null_count:
            got = f"{column.null_count} nulls" if column.type == wanted else column.type
            raise TableError(
                f"{path}: a damaged reference table: column {name!r}: got {got}, expected {wanted}"
            )
    key, logp, tokens = (table.column(name).combine_chunks() for name in _COLUMNS)
    start = key.offset * _KEY_BYTES
    held = key.buffers()[1][start : start + len(key) * _KEY_BYTES].to_pybytes() if len(key) else b""
    return header, (_as_numbers(held), logp.to_numpy(), tokens.to_numpy())


def _header(path: Path, text: bytes) -> Header:
    """The header that a file holds as JSON."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise TableError(f"{path}: a damaged reference table: its header is no JSON object ({shown(text)})")
    if values.get("format") != FORMAT:
        raise TableError(
            f"{path}: a reference table of format {shown(values.get('format'))}, and this prefloss reads format "
            f"{FORMAT}; update prefloss, or write the table again"
        )
    types = get_type_hints(Header)
    for name, wanted in types.items():
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, wanted):
            kinds = getattr(wanted, "__name__", str(wanted))
            raise TableError(
                f"{path}: a damaged reference table: {name} of its header: got {shown(value)}, expected {kinds}"
            )
    # A later version may have added others.
    known: dict[str, Any] = {name: values.get(name) for name in types}
    return Header(**known)


def _as_numbers(keys: bytes) -> np.ndarray:
    """Hashes one after another -> [rows, 2]; big-endian, so that they sort as the bytes do."""
    import numpy as np

    return np.frombuffer(keys, dtype=">u8").astype(np.uint64).reshape(-1, 2)
