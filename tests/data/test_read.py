"""Reading preference files: every format, and every error with its place."""

import json

import pytest

import prefloss.data
from prefloss.data import DataError, read
from prefloss.feedback import Labels, Pairs, Rankings

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
LABELLED = {"prompt": "p", "completion": "good", "label": True}
RANKED = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [0.1, 0.9, 0.5]}
USER, GOOD, BAD = (
    {"role": "user", "content": "p"},
    {"role": "assistant", "content": "good"},
    {"role": "assistant", "content": "bad"},
)
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


def write(path, *rows):
    """Rows as JSON lines; a string or bytes goes in as it stands."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def refused(path):
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value).replace(str(path.parent) + "/", "")


@pytest.mark.parametrize(
    ("row", "kind", "conversational"),
    [
        (PAIR, Pairs, False),
        (LABELLED, Labels, False),
        (RANKED, Rankings, False),
        (CHAT, Pairs, True),
        ({"prompt": [USER], "completion": [GOOD], "label": False}, Labels, True),
        ({"prompt": [USER], "completions": [[GOOD], [BAD]], "scores": [1, 0]}, Rankings, True),
    ],
)
def test_kind_and_form_are_detected(tmp_path, row, kind, conversational):
    found = read(write(tmp_path / "x.jsonl", row))
    assert (found.kind, found.conversational, len(found)) == (kind, conversational, 1)
    assert found.rows[0] == row


def test_every_format_gives_the_same_rows(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [PAIR, {"prompt": "é\u2028x", "chosen": "yes", "rejected": "no"}]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    # U+2028 inside a string does not end a line; blank lines and a byte order mark are skipped.
    lines = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "splits"))
    for name in ("x.jsonl", "x.json", "lines.json", "x.parquet", "saved", "splits"):
        assert read(tmp_path / name).rows.to_list() == rows, name


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**PAIR, "chosen": 3}, "x.jsonl:2: column 'chosen': got 3, expected a string or a list of messages"),
        (
            {**PAIR, "chosen": None},
            "x.jsonl:2: column 'chosen': got null, expected a string or a list of messages",
        ),
        (
            {**PAIR, "prompt": {"a": 1}},
            "x.jsonl:2: column 'prompt': got {'a': 1}, expected a string or a list of messages",
        ),
        ({"prompt": "p", "chosen": "a"}, "x.jsonl:2: missing column 'rejected' of paired"),
        ({"chosen": "a", "rejected": "b"}, "x.jsonl:2: missing column 'prompt' of paired"),
        (
            LABELLED,
            "x.jsonl:2: got labelled (prompt, completion, label), expected a row of kind paired",
        ),
        (CHAT, "x.jsonl:2: got messages, expected plain text as in line 1"),
        ([1, 2], 'x.jsonl:2: got [1, 2], expected an object with named columns, as {"prompt": ...}'),
        ('{"prompt": "p", "chosen" "a"}', "x.jsonl:2:26: bad JSON: Expecting ':' delimiter"),
        ('{"prompt": "p", "chosen": "a', "x.jsonl:2:27: bad JSON: Unterminated string"),
        (json.dumps(PAIR) + " {}", "x.jsonl:2:54: bad JSON: got more: '{}', expected nothing after it"),
        ("[" * 100_000, "x.jsonl:2: bad JSON: "),
        (b'{"prompt": "\xe9"}', "x.jsonl:2: not UTF-8 text: byte 0xe9 at byte 13"),
        (
            {**PAIR, "chosen": "\ud800"},
            "x.jsonl:2: column 'chosen': got half of a surrogate pair at character 1, expected text",
        ),
    ],
)
def test_a_bad_row_is_named_by_line_and_column(tmp_path, bad, message):
    assert refused(write(tmp_path / "x.jsonl", PAIR, bad)).startswith(message)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**LABELLED, "label": "true"}, "column 'label': got 'true', expected true or false (or 1 or 0)"),
        ({**LABELLED, "label": 1.0}, "column 'label': got 1.0, expected true or false (or 1 or 0)"),
        ({**LABELLED, "label": 2}, "column 'label': got 2, expected true or false (or 1 or 0)"),
        ({**LABELLED, "label": None}, "column 'label': got null, expected true or false (or 1 or 0)"),
        (
            {**RANKED, "scores": [1, 2]},
            "column 'scores': got 2 scores, expected one for each of 3 completions",
        ),
        ({**RANKED, "scores": [1, 2, "x"]}, "column 'scores'[2]: got 'x', expected a finite number"),
        ({**RANKED, "scores": [1, 2, True]}, "column 'scores'[2]: got True, expected a finite number"),
        ({**RANKED, "scores": [1, 2, float("nan")]}, "column 'scores'[2]: got nan, expected a finite number"),
        ({**RANKED, "scores": 1}, "column 'scores': got 1, expected a list of numbers"),
        ({**RANKED, "completions": "a"}, "column 'completions': got 'a', expected a list of completions"),
        (
            {**RANKED, "completions": ["a", 2, "c"]},
            "column 'completions'[1]: got 2, expected a string or a list of messages",
        ),
        ({**CHAT, "chosen": ["hi"]}, "column 'chosen'[0]: got 'hi', expected a message, as {role, content}"),
        (
            {**CHAT, "chosen": [{"role": "assistant"}]},
            "column 'chosen'[0]: missing 'content' of a message; it has 'role'",
        ),
        (
            {**CHAT, "chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "column 'chosen'[0].content: got [{'type': 'image'}], expected a string",
        ),
        (
            {**CHAT, "chosen": [{**GOOD, "tool_calls": [{}]}]},
            "column 'chosen'[0]: got a message with tool_calls, expected role and content",
        ),
        (
            {**PAIR, **LABELLED},
            "got columns 'prompt', 'chosen', 'rejected', 'completion', 'label', which fit two kinds, expected",
        ),
        (
            {"question": "q", "answer": "a"},
            "got columns 'question', 'answer', expected paired (prompt, chosen, rejected), ",
        ),
        (
            {"prompt": "p", "completion": "c"},
            "missing column 'label' of labelled (prompt, completion, label) rows",
        ),
        (
            {**PAIR, "score_chosen": 1.0},
            "got column 'score_chosen' alone, expected scores of both sides, or of neither",
        ),
    ],
)
def test_a_bad_first_row_is_named_too(tmp_path, row, message):
    assert refused(write(tmp_path / "x.jsonl", row)).startswith(f"x.jsonl:1: {message}")


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_labels_are_booleans_or_0_and_1(tmp_path, label):
    found = read(write(tmp_path / "x.jsonl", {**LABELLED, "label": label})).rows[0]["label"]
    assert found is bool(label)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "x.json: no rows"),
        (
            json.dumps([PAIR])[:-1] + ',\n {"chosen": "c", "chosen": "d"}]',
            "x.json:2: bad JSON: the name 'chosen' is there twice",
        ),
        ('[{"prompt": "p"', "x.json:1:16: bad JSON: Expecting ',' delimiter"),
        (json.dumps([PAIR])[:-1] + "\n{}]", "x.json:2:1: bad JSON: Expecting ',' delimiter"),
        (json.dumps([PAIR])[:-1] + ",\n", "x.json:2:1: bad JSON: Expecting value, and the text ends there"),
        (json.dumps([PAIR]) + "\n x", "x.json:2:2: bad JSON: got more: 'x', expected nothing after it"),
        (
            json.dumps([PAIR, {**PAIR, "rejected": 5}], indent=0),
            "x.json:7: column 'rejected': got 5, expected a string",
        ),
    ],
)
def test_errors_in_a_json_array_have_lines(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    assert refused(tmp_path / "x.json").startswith(message)


def test_errors_in_a_table_have_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    mixed = [{**PAIR, "completion": None, "label": None}, {**dict.fromkeys(PAIR), **LABELLED}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(mixed), tmp_path / "mixed.parquet")
    assert refused(tmp_path / "mixed.parquet").startswith(
        "mixed.parquet: row 2: got labelled (prompt, completion, label), expected a row of kind paired"
    )
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([PAIR, {**PAIR, "chosen": None}]), tmp_path / "x.parquet"
    )
    assert refused(tmp_path / "x.parquet").startswith(
        "x.parquet: row 2: column 'chosen': got null, expected a string"
    )


def test_what_is_no_preference_file_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n")
    (tmp_path / "x.parquet").write_text("nope")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n \n")
    assert "no such file or folder; expected JSON lines" in refused(tmp_path / "nothing.jsonl")
    assert "x.csv: got the ending '.csv', expected JSON lines" in refused(tmp_path / "x.csv")
    assert "not a readable Parquet file" in refused(tmp_path / "x.parquet")
    assert "save_to_disk did not write" in refused(tmp_path / "folder")
    assert refused(tmp_path / "empty.jsonl") == "empty.jsonl: no rows"


def test_a_dataset_dictionary_without_train_split_says_which_it_has(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    datasets.DatasetDict({"prefs": datasets.Dataset.from_list([PAIR])}).save_to_disk(str(tmp_path / "splits"))
    assert "it has prefs" in refused(tmp_path / "splits")
    assert len(read(tmp_path / "splits" / "prefs")) == 1


def test_useless_rows_are_dropped_and_counted(tmp_path):
    same = {**PAIR, "rejected": "good"}
    found = read(write(tmp_path / "x.jsonl", PAIR, {**PAIR, "chosen": " "}, *[same] * 4))
    assert len(found) == 1
    assert found.notes == (
        "1 row dropped, empty 'chosen' (line 2)",
        "4 rows dropped, 'chosen' and 'rejected' are the same (lines 3, 4, 5, ...)",
    )


def test_groups_with_nothing_to_rank_are_dropped(tmp_path):
    tied, single = (
        {**RANKED, "scores": [1, 1, 1]},
        {"prompt": "p", "completions": ["a", ""], "scores": [1, 0]},
    )
    found = read(write(tmp_path / "x.jsonl", tied, single, RANKED))
    assert len(found) == 1
    assert found.notes == (
        "1 row dropped, all completions have the same score (line 1)",
        "1 row dropped, fewer than two completions that are not empty (line 2)",
    )


def test_a_file_of_useless_rows_is_refused(tmp_path):
    message = refused(write(tmp_path / "x.jsonl", {**PAIR, "chosen": ""}))
    assert message == "x.jsonl: no row is left to train on; 1 row dropped, empty 'chosen' (line 1)"


@pytest.mark.parametrize("prompt", [{}, {"prompt": "p"}])
def test_whole_conversations_are_split_where_they_part(tmp_path, prompt):
    found = read(write(tmp_path / "x.jsonl", {**prompt, "chosen": [USER, GOOD], "rejected": [USER, BAD]}))
    assert found.rows[0] == CHAT
    assert found.notes == (
        "1 row rewritten: the messages that both sides start with became the prompt (line 1)",
    )


def test_plain_text_beside_messages_becomes_messages(tmp_path):
    found = read(write(tmp_path / "x.jsonl", {**CHAT, "chosen": "good", "rejected": "bad"}))
    assert found.rows[0] == CHAT
    assert "plain text became messages" in found.notes[0]


def test_columns_of_numbers_come_along_and_others_are_named(tmp_path):
    row = {**PAIR, "weight": 2, "score_chosen": 0.9, "score_rejected": 0.1, "id": "x", "source": None}
    found = read(write(tmp_path / "x.jsonl", row, {**row, "later": 1}))
    assert found.optional == ("weight", "score_chosen", "score_rejected")
    assert found.unused == ("id", "source", "later")
    assert found.rows[0] == {**PAIR, "weight": 2.0, "score_chosen": 0.9, "score_rejected": 0.1}


def test_the_old_name_of_the_score_is_read_with_a_warning(tmp_path):
    with pytest.warns(DeprecationWarning, match="column 'scores' of labelled rows is now called 'score'"):
        found = read(write(tmp_path / "x.jsonl", {**LABELLED, "scores": 1}, {**LABELLED, "scores": 2}))
    assert found.optional == ("score",)
    assert found.unused == ()
    assert found.rows.to_list() == [{**LABELLED, "score": 1.0}, {**LABELLED, "score": 2.0}]


def test_the_enum_of_kinds_is_an_alias_for_one_release():
    with pytest.warns(DeprecationWarning, match="the kind of a row is now its class of feedback"):
        kinds = prefloss.data.Kind
    assert vars(kinds) == {"PAIRED": Pairs, "LABELLED": Labels, "RANKED": Rankings}


@pytest.mark.parametrize(("weight", "got"), [(-1, "-1"), ("2", "'2'"), (None, "null")])
def test_a_weight_is_a_number_not_below_0_in_every_row(tmp_path, weight, got):
    message = refused(write(tmp_path / "x.jsonl", {**PAIR, "weight": 1}, {**PAIR, "weight": weight}))
    assert (
        message
        == f"x.jsonl:2: column 'weight': got {got}, expected a finite number >= 0 as in the rows before"
    )
