"""Rows to score: every kind, with and without a judgement, and what is refused."""

import json

import datasets
import pytest

from prefloss.cli.scoring.rows import check_rows
from prefloss.data import DataError
from prefloss.data.row_file import Share


def said(role, text):
    return {"role": role, "content": text}


PAIR = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
VOTE = {"prompt": "w1", "completion": "w2", "label": True}
BEST = {
    "id": "ref:1",
    "prompt": "w1",
    "chosen": ["w2"],
    "rejected": ["w3", "w4"],
    "num_correct": 1,
    "subset": "Ties",
}


def checked(tmp_path, *rows, share=None, **options):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return check_rows(path, share or Share(), **options)


@pytest.mark.parametrize(
    ("row", "words", "sides", "completions", "scores"),
    [
        (PAIR, "pairs, plain text", ("chosen", "rejected"), ["w2", "w3"], [1.0, 0.0]),
        (VOTE, "votes, plain text", ("completion",), ["w2"], [1.0]),
        ({**VOTE, "label": 0}, "votes, plain text", ("completion",), ["w2"], [0.0]),
        (
            {"prompt": "w1", "completion": "w2"},
            "completions without a label, plain text",
            ("completion",),
            ["w2"],
            None,
        ),
        (
            {"prompt": "w1", "completions": ["w2", "w3"], "scores": [0.5, 2]},
            "rankings, plain text",
            ("0", "1"),
            ["w2", "w3"],
            [0.5, 2.0],
        ),
        (
            {"prompt": "w1", "completions": ["w2", "w3"]},
            "rankings without scores, plain text",
            ("0", "1"),
            ["w2", "w3"],
            None,
        ),
        (BEST, "rankings, plain text", ("0", "1", "2"), ["w2", "w3", "w4"], [1.0, 0.0, 0.0]),
        (
            {"messages": [said("user", "w1"), said("assistant", "w2")]},
            "completions without a label, messages",
            ("completion",),
            [[said("assistant", "w2")]],
            None,
        ),
        (
            # An output of RewardBench.
            {
                "prompt": "w1 ",
                "text_chosen": "w1 w2",
                "text_rejected": "w1 w3",
                "scores_chosen": 3.0,
                "results": 1,
            },
            "pairs, plain text",
            ("chosen", "rejected"),
            ["w2", "w3"],
            [1.0, 0.0],
        ),
    ],
)
def test_every_kind_of_row(tmp_path, row, words, sides, completions, scores):
    rows = checked(tmp_path, row, row)
    assert (rows.kind.words, rows.count) == (words, 2)
    first, second = rows
    assert (first.number, second.number) == (0, 1)
    assert first.completions == completions
    assert first.kind.sides(len(completions)) == sides
    assert first.scores == scores


def test_other_columns_are_kept(tmp_path):
    (row,) = checked(tmp_path, {**BEST, "note": "é"})
    assert (row.subset, row.other["id"], row.other["note"]) == ("Ties", "ref:1", "é")


def test_plain_text_becomes_messages(tmp_path):
    rows = checked(tmp_path, PAIR, chat=True)
    (row,) = rows
    assert rows.kind.words == "pairs, messages"
    assert row.prompt == [said("user", "w1")]
    assert row.completions == [[said("assistant", "w2")], [said("assistant", "w3")]]


def test_tables_give_the_columns_of_a_benchmark(tmp_path):
    datasets.Dataset.from_list([{**BEST, "extra": 1}] * 3).to_parquet(tmp_path / "d.parquet")
    rows = list(check_rows(tmp_path / "d.parquet", Share()))
    assert [row.subset for row in rows] == ["Ties"] * 3
    assert rows[0].other["id"] == "ref:1"


def test_rows_with_an_empty_completion_are_left_out(tmp_path):
    rows = checked(tmp_path, PAIR, {**PAIR, "chosen": " "}, {**PAIR, "rejected": "w7"})
    assert [row.number for row in rows] == [0, 2]
    assert rows.count == 3
    assert "1 rows left out" in rows.notes[0]
    assert "d.jsonl:2" in rows.notes[0]


def test_chunks_are_of_the_file(tmp_path):
    rows = checked(tmp_path, *({**PAIR, "prompt": f"w{i}"} for i in range(7)), {**PAIR, "chosen": ""})
    found = {number: [row.number for row in chunk] for number, chunk in rows.chunks(3, lambda n: n != 1)}
    assert found == {0: [0, 1, 2], 2: [6]}


def test_each_process_checks_its_part(tmp_path):
    outcomes = []
    for rank in (0, 1):
        share = Share(rank, 2, lambda value: outcomes.append(value) or [value])
        rows = checked(tmp_path, *[PAIR] * 5, share=share)
        assert rows.kind.words == "pairs, plain text"
    assert [outcome[0][1] for outcome in outcomes] == [3, 2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows"),
        ([PAIR, VOTE], "d.jsonl:2: got votes, plain text, expected pairs, plain text, as in the first row"),
        ([VOTE, {**VOTE, "label": None}], "d.jsonl:2: got completions without a label"),
        ([PAIR, {**PAIR, "prompt": [said("user", "w1")]}], "d.jsonl:2: got pairs, messages"),
        ([PAIR, {**PAIR, "chosen": 3}], "d.jsonl:2: column 'chosen': got 3"),
        ([{**VOTE, "label": "yes"}], "d.jsonl:1: column 'label': got 'yes'"),
        ([{"prompt": "w1"}], "d.jsonl:1: got columns 'prompt'"),
        ([{**PAIR, **VOTE}], "which fit two kinds"),
        ([{"prompt": "w1", "completions": []}], "got an empty list"),
        ([{"prompt": "w1", "completions": "w2"}], "column 'completions': got 'w2'"),
        ([{"prompt": "w1", "completions": ["a", "b"], "scores": [1]}], "got 1 scores"),
        ([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}], "got token ids, expected text"),
        ([{**BEST, "num_correct": 2}], "column 'num_correct': got 2, expected 1"),
        ([{**PAIR, "chosen": ""}], "no row is left to score"),
        (
            [{"messages": []}],
            "column 'messages': got [], expected messages of which the last is the assistant's",
        ),
        ([{"messages": [said("user", "w1")]}], "column 'messages': got [{"),
        ([{"messages": "w1"}], "column 'messages': got 'w1'"),
        ([{**PAIR, "chosen": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_what_is_refused(tmp_path, rows, words):
    with pytest.raises(DataError) as caught:
        checked(tmp_path, *rows)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
