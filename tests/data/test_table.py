"""Reference tables: hashes, lookups, files that are damaged or something else."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefloss.data.table import (
    Header,
    ReferenceTable,
    TableError,
    as_scored,
    completion_key,
    write_table,
)

HEADER = Header("m", None, None, "w", "float32", "t", "v", None, 8, "0.1")
KEYS = [completion_key([i], [i + 1, i + 2]) for i in range(50)]


@pytest.fixture
def path(tmp_path):
    write_table(tmp_path / "t.parquet", HEADER, KEYS, [-float(i) for i in range(50)], [2] * 50)
    return tmp_path / "t.parquet"


def test_a_key_is_of_the_ids_and_of_where_the_prompt_ends():
    keys = {completion_key(*ids) for ids in (([5, 6], [7]), ([5], [6, 7]), ([5, 6], [8]), ([5, 6], []))}
    assert len(keys) == 4
    assert completion_key([5, 6], [7]) == completion_key((5, 6), (7,))
    # Fixed for good: tables are read by later versions.
    assert completion_key([5, 6], [7]).hex() == "c7ba601d8039a90cc03a18da1fd5bfed"


@pytest.mark.parametrize(
    ("encoded", "max_length", "wanted"),
    [
        (([1, 2], [3, 4]), None, ([1, 2], [3, 4])),
        (([1, 2], [3, 4]), 3, ([1, 2], [3])),
        (([1, 2, 3], [4]), 2, ([1, 2], [])),
        (([], [3, 4]), None, ([3], [4])),
    ],
)
def test_what_is_scored(encoded, max_length, wanted):
    assert as_scored(encoded, max_length) == wanted
    assert as_scored(wanted) == wanted


def test_what_was_written_is_found(path):
    table = ReferenceTable.read(path)
    assert table.header == HEADER
    assert len(table) == 50
    rows = table.find([*KEYS, completion_key([9], [9])])
    assert table.logps[rows[:-1]].tolist() == [-float(i) for i in range(50)]
    assert rows[-1] == -1
    assert table.hashes() == sorted(KEYS)
    assert [item.name for item in path.parent.iterdir()] == ["t.parquet"]


def test_hashes_that_share_their_first_half():
    keys = np.array([[7, 1], [7, 5], [7, 9]], dtype=np.uint64)
    table = ReferenceTable(None, HEADER, keys, np.zeros(3), np.ones(3))
    asked = [np.array([7, second], dtype=">u8").tobytes() for second in (9, 1, 5, 6)]
    assert table.find(asked).tolist() == [2, 0, 1, -1]


def test_the_first_of_equal_rows_stays(tmp_path):
    write_table(tmp_path / "t.parquet", HEADER, KEYS[:1] * 2, [-1.0, -2.0], [2, 2])
    assert ReferenceTable.read(tmp_path / "t.parquet").logps.tolist() == [-1.0]


def test_an_empty_table(tmp_path):
    write_table(tmp_path / "t.parquet", HEADER, [], [], [])
    assert ReferenceTable.read(tmp_path / "t.parquet").find(KEYS[:1]).tolist() == [-1]


def test_damage_is_noticed(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TableError, match=r"t\.parquet: not a readable Parquet file, perhaps cut off"):
        ReferenceTable.read(path)
    flipped = bytearray(whole)
    flipped[whole.index(sorted(KEYS)[20])] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(TableError, match="cut off or damaged"):
        ReferenceTable.read(path)
    with pytest.raises(TableError, match="no such file"):
        ReferenceTable.read(path.with_name("absent.parquet"))


def test_another_file_is_no_table(path):
    pq.write_table(pa.table({"prompt": ["p"], "chosen": ["c"]}), path)
    with pytest.raises(TableError, match=r"no reference table \(columns prompt, chosen\)"):
        ReferenceTable.read(path)


def test_a_later_format_is_refused(path):
    write_table(path, dataclasses.replace(HEADER, format=2), KEYS[:1], [-1.0], [2])
    with pytest.raises(TableError, match="format 2, and this prefloss reads format 1"):
        ReferenceTable.read(path)


@pytest.mark.parametrize("logp", [math.nan, math.inf])
def test_a_table_holds_finite_numbers(path, logp):
    write_table(path, HEADER, KEYS[:1], [logp], [2])
    with pytest.raises(TableError, match="damaged reference table"):
        ReferenceTable.read(path)


def test_headers_say_how_they_differ():
    other = dataclasses.replace(
        HEADER, dtype="bfloat16", max_length=None, weights="x", model="n", prefloss="9"
    )
    assert HEADER.differences(other) == [
        "weights w and x (m, n)",
        "dtype float32 and bfloat16",
        "max_length 8 and None",
    ]
