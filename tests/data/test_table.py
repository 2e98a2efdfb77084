"""Reference tables: hashes, lookups, files that are damaged or something else."""

import dataclasses
import json
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
    check_max_length,
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


def tampered(path, header=None, **columns):
    """The table with other columns, or with another text as its header."""
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    if header is not None:
        table = table.replace_schema_metadata({b"prefloss.reference": header})
    pq.write_table(table, path)


GOOD = dataclasses.asdict(HEADER)
NUMBERS = list(range(50))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        *(
            ({"header": text}, "header is no JSON object")
            for text in (b"", b"{", b"[1]", b"3", b"null", b"\xff")
        ),
        *(({"header": b"[" * 100_000}, "header is no JSON object") for _ in "1"),
        ({"header": b"{}"}, "format null"),
        *(({"header": json.dumps(GOOD | {"format": f}).encode()}, "format ") for f in ("1", None, [1], 99)),
        *(
            ({"header": json.dumps(GOOD | {name: value}).encode()}, f"{name} of its header: got ")
            for name in GOOD
            for value in ([], 0.5, True)
            if name != "format"
        ),
        (
            {"header": json.dumps({k: v for k, v in GOOD.items() if k != "weights"}).encode()},
            "weights of its header",
        ),
        ({"key": pa.array(NUMBERS)}, "column 'key': got int64"),
        ({"key": pa.array([str(i) for i in NUMBERS])}, "column 'key': got string"),
        ({"key": pa.array([b"12345678"] * 50, pa.binary(8))}, "column 'key': got fixed_size_binary[8]"),
        ({"key": pa.array([None, *sorted(KEYS)[1:]], pa.binary(16))}, "column 'key': got 1 nulls"),
        ({"key": pa.array(sorted(KEYS)[::-1], pa.binary(16))}, "not sorted"),
        ({"key": pa.array(sorted(KEYS)[:1] * 50, pa.binary(16))}, "not sorted"),
        ({"logp": pa.array(["x"] * 50)}, "column 'logp': got string"),
        ({"logp": pa.array([None] + [-1.0] * 49)}, "column 'logp': got 1 nulls"),
        ({"logp": pa.array([-1] * 50)}, "column 'logp': got int64"),
        ({"logp": pa.array([5.0] * 50)}, "log-probs <= 0"),
        ({"logp": pa.array([-math.inf] * 50)}, "finite"),
        ({"tokens": pa.array([1.5] * 50)}, "column 'tokens': got double"),
        ({"tokens": pa.array(["2"] * 50)}, "column 'tokens': got string"),
        ({"tokens": pa.array([None] * 50, pa.int32())}, "column 'tokens': got 50 nulls"),
        ({"tokens": pa.array([0] * 50, pa.int32())}, "counts > 0"),
        ({"tokens": pa.array([-2] * 50, pa.int32())}, "counts > 0"),
        ({"tokens": pa.array([2**40] * 50)}, "column 'tokens': got int64"),
    ],
)
def test_a_tampered_table_is_refused_by_name(path, changes, word):
    """AUDIT L7."""
    tampered(path, **changes)
    with pytest.raises(TableError) as caught:
        ReferenceTable.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert word in str(caught.value)


def test_a_table_of_arrays_is_that_of_bytes(path):
    table = ReferenceTable.read(path)
    other = path.with_name("other.parquet")
    write_table(other, HEADER, table.keys[::-1], table.logps[::-1], table.tokens[::-1])
    assert other.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("max_length", [-3, 0, 1])
def test_a_cut_leaves_a_token_to_score(max_length):
    with pytest.raises(
        ValueError, match=rf"max_length: got {max_length}, expected at least 2 tokens, or None"
    ):
        check_max_length(max_length)


@pytest.mark.parametrize("max_length", [True, 2.0, "8"])
def test_a_cut_is_an_integer(max_length):
    with pytest.raises(TypeError, match=r"max_length: got .*, expected an integer >= 2, or None for no cut"):
        check_max_length(max_length)


def test_headers_say_how_they_differ():
    other = dataclasses.replace(
        HEADER, dtype="bfloat16", max_length=None, weights="x", model="n", prefloss="9"
    )
    assert HEADER.differences(other) == [
        "weights w and x (m, n)",
        "dtype float32 and bfloat16",
        "max_length 8 and None",
    ]
