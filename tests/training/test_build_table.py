"""Tables are built whole: killed at any moment, by any number of processes, from data that grew."""

import dataclasses
import multiprocessing
import os
import signal
from unittest import mock

import pytest
import torch.distributed as dist

from prefloss.data.table import Header, ReferenceTable, TableError
from prefloss.training.build_table import ReferenceBuilder
from prefloss.training.score import Score
from tests.kills import killing_at, wrap_changes

HEADER = Header("m", None, None, "w", "float32", None, None, None, None, "0.1")
FORK = multiprocessing.get_context("fork")


def pair(i):
    return {"prompt_ids": [i, 3], "chosen_ids": [i, 4], "rejected_ids": [5, i % 3]}


DATA = {"pairs.jsonl": [pair(i) for i in range(11)]}


def score(rows):
    """Stands in for a model: batches matter, as they do to rounding."""
    return [
        Score(-sum(prompt + completion) - len(rows) / 100, len(completion)) for prompt, completion in rows
    ]


def builder(path, header=HEADER, score=score, anew=False):
    return ReferenceBuilder(path, header, score, chunk=3, anew=anew)


def build(path, data=DATA, **options):
    builder(path, **options).build(data)
    return path.read_bytes()


def whole(folder):
    return build(folder / "whole.parquet")


def killed_at(moment, path):
    """In a process of its own: build, and be killed where the file system is about to change for the n-th time."""
    then = killing_at(moment)
    wrap_changes(then, ("fsync", "replace", "unlink", "rmdir", "mkdir"))
    builder(path, score=then(score)).build(DATA)


def test_killed_at_any_moment_it_continues(tmp_path):
    wanted = whole(tmp_path)
    moment, done, made = 0, False, {"whole.parquet"}
    while not done:
        path = tmp_path / f"{moment}.parquet"
        made.add(path.name)
        process = FORK.Process(target=killed_at, args=(moment, path))
        process.start()
        process.join()
        done = process.exitcode == 0
        assert done or process.exitcode == -signal.SIGKILL
        if path.exists():
            ReferenceTable.read(path)
        assert build(path) == wanted
        assert not [item.name for item in tmp_path.iterdir() if item.name not in made]
        moment += 1
    assert moment > 20


def test_what_is_scored_is_not_scored_again(tmp_path):
    seen = []

    def counting(rows):
        seen.append(len(rows))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return score(rows)

    path = tmp_path / "t.parquet"
    with pytest.raises(KeyboardInterrupt):
        build(path, score=counting)
    assert build(path, score=counting) == whole(tmp_path)
    assert seen == [6, 6, 6, 6, 4]
    build(path, score=counting)
    assert len(seen) == 5


def test_data_that_grew_add_rows(tmp_path):
    path = tmp_path / "t.parquet"
    build(path)
    old = ReferenceTable.read(path)
    built = builder(path).build({**DATA, "more": [pair(i) for i in range(9, 14)]})
    assert (len(old), len(built.table), built.scored) == (22, 28, 6)
    rows = built.table.find(old.hashes())
    assert built.table.logps[rows].tolist() == old.logps.tolist()


def joined(rank, path, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    built = builder(path).build(DATA)
    dist.destroy_process_group()
    os._exit(0 if built.scored == len(built.table) == 22 else 1)


def test_two_processes_make_the_table_of_one(tmp_path):
    path = tmp_path / "t.parquet"
    processes = [FORK.Process(target=joined, args=(rank, path, tmp_path / "store")) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert path.read_bytes() == whole(tmp_path)


def test_two_runs_do_not_write_one_table(tmp_path):
    path = tmp_path / "t.parquet"

    def meanwhile(rows):
        with pytest.raises(TableError, match="another run is writing there"):
            build(path)
        return score(rows)

    assert build(path, score=meanwhile) == whole(tmp_path)


def test_a_run_that_starts_anew_does_not_touch_one_at_work(tmp_path):
    """AUDIT M1: it removed the parts before it saw that another run held them."""
    path = tmp_path / "t.parquet"

    def meanwhile(rows):
        with pytest.raises(TableError, match="another run is writing there"):
            builder(path, anew=True).build(DATA)
        return score(rows)

    assert build(path, score=meanwhile) == whole(tmp_path)


def test_the_old_table_stays_until_the_new_one_is_whole(tmp_path):
    """AUDIT M1."""
    path, other = tmp_path / "t.parquet", dataclasses.replace(HEADER, model="n", weights="x")
    before = build(path)
    stop = mock.Mock(side_effect=[score([([1], [2])] * 6), KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        builder(path, other, stop, anew=True).build(DATA)
    assert path.read_bytes() == before
    built = builder(path, other, anew=True).build(DATA)
    # The first chunk of the run that was stopped is kept.
    assert (built.scored, len(built.table), built.table.header) == (16, 22, other)
    assert builder(path, anew=True).build(DATA).scored == 22
    assert path.read_bytes() == before


def test_a_run_that_starts_anew_removes_the_parts_of_one_that_did_not(tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(KeyboardInterrupt):
        build(path, score=mock.Mock(side_effect=[score([([1], [2])] * 6), KeyboardInterrupt]))
    assert builder(path, anew=True).build(DATA).scored == 22


@pytest.mark.parametrize("left", ["table", "parts"])
def test_another_model_does_not_add_to_a_table(tmp_path, left):
    path = tmp_path / "t.parquet"
    stop = mock.Mock(side_effect=[score([([1], [2])] * 6), KeyboardInterrupt])
    if left == "table":
        build(path)
    else:
        with pytest.raises(KeyboardInterrupt):
            build(path, score=stop)
    with pytest.raises(TableError, match=r"weights w and x \(m, n\); write to another file, or start anew"):
        build(path, header=dataclasses.replace(HEADER, model="n", weights="x"))


def test_a_log_prob_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"pairs.jsonl: rows 1 to 3: the log-prob of the completion with"
    ):
        build(tmp_path / "t.parquet", score=lambda rows: [Score(float("nan"), 2)] * len(rows))


def test_rows_without_a_token_to_score(tmp_path):
    path = tmp_path / "t.parquet"
    header = Header("m", None, None, "w", "float32", None, None, None, 2, "0.1")
    built = builder(path, header).build({"short": [pair(1)]})
    assert (len(built.table), built.empty) == (0, 2)


def test_a_malformed_row_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"pairs.jsonl: row 2: column 'chosen_ids': got 'w1', expected a list of token ids"
    ):
        build(tmp_path / "t.parquet", {"pairs.jsonl": [pair(1), {**pair(2), "chosen_ids": "w1"}]})
