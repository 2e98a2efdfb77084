"""Data files with one thing wrong: each is refused with its file, and where there is one the line and the column."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefloss.data import DataError, read
from prefloss.data.read import read_token_ids

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
VOTE = {"prompt": "p", "completion": "good", "label": True}
GROUP = {"prompt": "p", "completions": ["a", "b"], "scores": [0.1, 0.9]}
USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "p"), ("assistant", "g"), ("assistant", "b"))
)
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
IDS = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
GRADED = {**PAIR, "score_chosen": 1, "score_rejected": 0}
HUGE = "1" + 400 * "0"


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


def text(row, name, raw):
    """The row as JSON, with a value that Python's json would not write."""
    return json.dumps({**row, name: "@"}).replace('"@"', raw)


def optional_columns():
    """AUDIT M5: an optional column of numbers has one in every row, or in none, whatever its first row holds."""
    for base, names in (
        (PAIR, ["weight"]),
        (VOTE, ["weight", "score", "kl", "baseline"]),
        (GROUP, ["weight"]),
    ):
        for name in names:
            for value in ('"0.5"', "NaN", "[1]", "true", "Infinity", HUGE, "1e39"):
                yield [text(base, name, value), base], 1, name
            for value in ("1", "0.5", '"0.5"', "NaN"):
                yield [base, text(base, name, value)], 2, name
                yield [text(base, name, "null"), text(base, name, value)], 2, name
            yield [text(base, name, "1"), base], 2, name
            yield [text(base, name, "1"), text(base, name, "null")], 2, name
    yield [{**PAIR, "weight": -1}], 1, "weight"
    yield [PAIR, PAIR, {**PAIR, "weight": 1}], 3, "weight"


# Rows of a .jsonl file, the line that is named, and a word of the message: a column, or what is wrong.
ROWS = [
    *optional_columns(),
    *(
        ([GOOD_ROW, without(GOOD_ROW, name)], 2, name)
        for GOOD_ROW in (PAIR, VOTE, GROUP)
        for name in GOOD_ROW
    ),
    *(
        ([GOOD_ROW, {**GOOD_ROW, name: None}], 2, name)
        for GOOD_ROW in (PAIR, VOTE, GROUP)
        for name in GOOD_ROW
    ),
    *(
        ([PAIR, {**PAIR, name: value}], 2, name)
        for name in PAIR
        for value in (1, True, {}, 0.5, ["x"], [[USER]])
    ),
    *(([VOTE, {**VOTE, "label": value}], 2, "label") for value in ("1", 2, -1, 0.5, [], "yes")),
    *(
        ([GROUP, {**GROUP, "scores": value}], 2, "scores")
        for value in ([1], [1, 2, 3], ["1", 2], {}, "12", [1, None])
    ),
    *(
        ([GROUP, {**GROUP, "completions": value}], 2, "completions")
        for value in ("ab", {}, ["a", 1], [["a"], "b"])
    ),
    *(
        ([CHAT, {**CHAT, "chosen": value}], 2, "chosen")
        for value in ([{}], [None], [{"role": "a", "content": 1}])
    ),
    ([GROUP, text(GROUP, "scores", f"[1, {HUGE}]")], 2, "scores"),
    ([GROUP, text(GROUP, "scores", "[1, 1e400]")], 2, "scores"),
    ([PAIR, VOTE], 2, "labelled"),
    ([PAIR, GROUP], 2, "ranked"),
    ([VOTE, PAIR], 2, "paired"),
    ([GROUP, VOTE], 2, "labelled"),
    ([PAIR, CHAT], 2, "messages"),
    ([CHAT, PAIR], 2, "plain text"),
    ([{**PAIR, **VOTE}], 1, "two kinds"),
    ([{}], 1, "no columns"),
    ([{"text": "x"}], 1, "text"),
    ([{**PAIR, "score_chosen": 1}], 1, "score_chosen"),
    ([{**PAIR, "score_rejected": 1}], 1, "score_rejected"),
    ([GRADED, without(GRADED, "score_rejected")], 2, "score_rejected"),
    ([PAIR, GRADED], 2, "score_chosen"),
    ([PAIR, '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}'], 2, "'chosen' is there twice"),
    ([PAIR, '{"prompt": "p"'], "2:", "bad JSON"),
    ([PAIR, "{'prompt': 'p'}"], "2:2", "bad JSON"),
    ([PAIR, '{"prompt": "p",}'], "2:", "bad JSON"),
    ([PAIR, "[1, 2]"], 2, "expected an object"),
    ([PAIR, '"text"'], 2, "expected an object"),
    ([PAIR, "null"], 2, "expected an object"),
    ([PAIR, "nonsense"], "2:1", "bad JSON"),
    ([PAIR, json.dumps(PAIR) + json.dumps(PAIR)], "2:", "bad JSON"),
    ([PAIR, '{"prompt": "a\tb"}'], "2:", "bad JSON"),
    ([PAIR, b'{"prompt": "\xff"}'], 2, "not UTF-8"),
    ([json.dumps(PAIR).encode("utf-16")], 1, "not UTF-8"),
    ([PAIR, text(PAIR, "chosen", '"\\ud800"')], 2, "surrogate"),
    ([PAIR, '{"a":' * 100_000], 2, "bad JSON"),
    ([PAIR, text(PAIR, "weight", "1" * 5000)], 2, "bad JSON"),
]


def as_bytes(row):
    return row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()


@pytest.mark.parametrize(("rows", "line", "word"), ROWS)
def test_bad_json_lines_are_named_by_line_and_column(tmp_path, rows, line, word):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(map(as_bytes, rows)))
    message = refused(path)
    assert message.startswith(f"{path}:{line}")
    assert word in message
    assert "\n" not in message


IDS_ROWS = [
    *(
        ({**IDS, name: value}, name)
        for name in IDS
        for value in (["a"], [2**70], [-1], [0.5], [True], "12", 1)
    ),
    ({**IDS, "chosen_ids": []}, "chosen_ids"),
    *((without(IDS, name), name) for name in IDS),
    (PAIR, "prompt_ids"),
    ({"prompt_ids": [1], "completion_ids": [2], "label": True}, "labelled"),
]


@pytest.mark.parametrize(("row", "word"), IDS_ROWS)
def test_bad_token_ids_are_named_by_line_and_column(tmp_path, row, word):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(map(as_bytes, [IDS, row])))
    with pytest.raises(DataError) as caught:
        read_token_ids(path)
    assert str(caught.value).startswith(f"{path}:2")
    assert word in str(caught.value)


def refused(path):
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize("place", [1, 2000, 40_000])
def test_a_bad_row_is_found_anywhere_in_an_array(tmp_path, place):
    path = tmp_path / "x.json"
    rows = [json.dumps(PAIR)] * 40_000
    rows[place - 1] = json.dumps({**PAIR, "chosen": 3})
    path.write_text("[\n" + ",\n".join(rows) + "\n]")
    assert (
        refused(path)
        == f"{path}:{place + 1}: column 'chosen': got 3, expected a string or a list of messages"
    )
    rows[place - 1] = '{"prompt": x}'
    path.write_text("[" + ",".join(rows) + "]")
    column = 2 + (place - 1) * (len(json.dumps(PAIR)) + 1) + len('{"prompt": ')
    assert refused(path) == f"{path}:1:{column}: bad JSON: Expecting value"
    path.write_bytes(("[" + ",\n".join(rows)).encode().replace(b"x}", b'"\xff"}'))
    assert refused(path) == f"{path}:{place}: not UTF-8 text: byte 0xff at byte {13 + (place == 1)}"


def parquet(path, rows, **types):
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        table = table.set_column(table.column_names.index(name), name, table.column(name).cast(kind))
    pq.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    ("rows", "types", "word"),
    [
        ([PAIR, PAIR, {**PAIR, "chosen": None}], {}, "column 'chosen'"),
        ([{**PAIR, "chosen": i} for i in range(3)], {}, "column 'chosen'"),
        ([PAIR] * 3, {"chosen": pa.binary()}, "column 'chosen'"),
        ([{**PAIR, "weight": w} for w in (1.0, 2.0, None)], {}, "column 'weight'"),
        ([{**PAIR, "weight": w} for w in (None, None, 1.0)], {}, "column 'weight'"),
        ([{**PAIR, "weight": w} for w in (1.0, 2.0, float("nan"))], {}, "column 'weight'"),
        ([{**PAIR, "weight": "1"}] * 3, {}, "column 'weight'"),
        ([{**VOTE, "label": 1.0}] * 3, {}, "column 'label'"),
        ([{**VOTE, "label": value} for value in (True, False, None)], {}, "column 'label'"),
        ([GROUP, GROUP, {**GROUP, "scores": [1.0]}], {}, "column 'scores'"),
    ],
)
def test_bad_parquet_rows_are_named_by_row_and_column(tmp_path, rows, types, word):
    message = refused(parquet(tmp_path / "x.parquet", rows, **types))
    assert message.startswith(f"{tmp_path}/x.parquet: row ")
    assert word in message


def test_text_of_a_parquet_file_that_is_not_utf_8(tmp_path):
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(
        pa.table({"prompt": broken, "chosen": ["a", "a"], "rejected": ["b", "b"]}), tmp_path / "x.parquet"
    )
    assert refused(tmp_path / "x.parquet").startswith(
        f"{tmp_path}/x.parquet: row 2: column 'prompt': cannot be read"
    )


def test_a_damaged_parquet_page_names_its_file(tmp_path):
    """AUDIT, tracebacks: a damaged parquet page named no file."""
    path = parquet(tmp_path / "x.parquet", [{**PAIR, "prompt": "needle" * 20 + str(i)} for i in range(50)])
    whole = path.read_bytes()
    at = whole.index(b"needle")
    for damaged in (
        whole[: len(whole) // 2],
        whole[:8] + bytes(40) + whole[48:],
        whole[: at - 9] + b"\xff" * 30 + whole[at + 21 :],
        b"",
        whole[:4],
    ):
        path.write_bytes(damaged)
        assert refused(path).startswith(f"{path}: ")


def test_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 4, names=["prompt", "chosen", "rejected", "chosen"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "two columns named 'chosen'" in refused(tmp_path / "x.parquet")


def lines(path, *rows):
    Path(path).write_bytes(b"\n".join(map(as_bytes, rows)))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: (p / "x").mkdir(), "x: a folder that datasets' save_to_disk did not write"),
        (lambda p: (p / "x").write_text(""), "the ending ''"),
        (lambda p: os.symlink("nowhere", p / "x"), "no such file"),
        (lambda p: os.symlink("x", p / "x"), "x: "),
        (lambda p: os.mkfifo(p / "x.jsonl"), "pipe or device"),
        (lambda p: os.symlink("/dev/zero", p / "x.jsonl"), "pipe or device"),
        (lambda p: (p / "x.jsonl").write_text(""), "no rows"),
        (lambda p: (p / "x.json").write_text("[]"), "no rows"),
        (lambda p: (p / "x.json").write_text("["), "the text ends there"),
        (lambda p: (p / "x.json").write_text("[1]"), "expected an object"),
        (lambda p: (p / "x.json").write_text("{}"), "no columns"),
        (lambda p: (p / "x.csv").write_text("a,b"), "the ending '.csv'"),
        (lambda p: (p / "x.jsonl.gz").write_text("{}"), "Not a gzipped file"),
        (
            lambda p: (p / "x.jsonl.gz").write_bytes(gzip.compress(as_bytes(PAIR) * 99)[:-9]),
            "x.jsonl.gz: cannot be read",
        ),
        (lambda p: pq.write_table(pa.table({}), p / "x.parquet"), "no rows"),
        (lambda p: pq.write_table(pa.table({"a": [1]}), p / "x.parquet"), "got columns 'a'"),
    ],
)
def test_what_is_no_data_file_is_refused(tmp_path, make, word):
    make(tmp_path)
    (path,) = tmp_path.iterdir()
    assert word in refused(path)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["a.jsonl", "b.parquet"], "'b.parquet' beside 'a.jsonl'"),
        (["a.jsonl", "notes.txt"], "'notes.txt' beside"),
        (["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"], "several data sets (test, train)"),
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "lacks the file train-00001-of-00003"),
    ],
)
def test_folders_that_are_not_one_data_set_are_refused(tmp_path, names, word):
    for name in names:
        lines(tmp_path / name, PAIR)
    assert word in refused(tmp_path)


def test_a_bad_row_of_a_folder_is_named_by_its_own_file(tmp_path):
    lines(tmp_path / "train-00000-of-00002.jsonl", PAIR, PAIR)
    lines(tmp_path / "train-00001-of-00002.jsonl", PAIR, {**PAIR, "chosen": 3})
    assert refused(tmp_path).startswith(f"{tmp_path}/train-00001-of-00002.jsonl:2: column 'chosen': got 3")


@pytest.mark.parametrize("path", [3, None, ["x.jsonl"], b"x.jsonl"])
def test_a_path_is_a_name(path):
    with pytest.raises(TypeError, match=r"path: got .*, expected the name of a file or folder"):
        read(path)


@pytest.mark.parametrize("path", ["a\0b.jsonl", "x" * 300 + ".jsonl"])
def test_a_path_that_the_system_refuses(path):
    assert "cannot be read" in refused(path) or "no such file" in refused(path)
