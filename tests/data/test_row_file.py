"""Rows on disk: shared by processes, removed at the end, and little of them in memory."""

import gzip
import json
import os
import resource
import socket
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefloss.data import DataError, pairs_to_labels, ranked_to_pairs, read, row_file, split
from prefloss.data.files import rows_of
from prefloss.data.read import read_token_ids
from prefloss.data.row_file import Share, row_folder


def pair(i, **columns):
    return {"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", **columns}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def forms(folder, rows):
    """The rows in every format."""
    datasets.disable_progress_bars()
    write(folder / "x.jsonl", rows)
    (folder / "x.jsonl.gz").write_bytes(gzip.compress((folder / "x.jsonl").read_bytes()))
    (folder / "x.json").write_text(json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet", row_group_size=7)
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    (folder / "many").mkdir()
    for i, start in enumerate(range(0, len(rows), 10)):
        pq.write_table(pa.Table.from_pylist(rows[start : start + 10]), folder / "many" / f"{i}.parquet")
    return ["x.jsonl", "x.jsonl.gz", "x.json", "x.parquet", "saved", "many"]


@pytest.mark.parametrize("size", [2, 3, 8, 40])
def test_processes_read_contiguous_parts_of_every_format(tmp_path, size):
    """Issue 11, item 3: under torchrun each process reads its share."""
    rows = [pair(i) for i in range(33)]
    for name in forms(tmp_path, rows):
        parts = [list(rows_of(tmp_path / name, rank, size)) for rank in range(size)]
        assert [row for part in parts for _, row in part] == rows, name
        assert max(map(len, parts)) <= 33 // size + 2


def test_a_process_does_not_parse_the_parts_of_others(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("nonsense\n" * 50 + json.dumps(pair(0)) + "\n" + "\n" * 48)
    assert [place for place, _ in rows_of(path, 1, 2)] == [f"{path}:51"]
    with pytest.raises(DataError, match=r"x.jsonl:1:1: bad JSON"):
        list(rows_of(path, 0, 2))


def in_threads(size, function):
    """The result of the function for each process; threads stand in for those."""
    values, barrier, results = [None] * size, threading.Barrier(size), [None] * size

    def run(rank):
        def gather(value):
            values[rank] = value
            barrier.wait()
            everything = list(values)
            barrier.wait()
            return everything

        try:
            results[rank] = function(Share(rank, size, gather))
        except DataError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [2, 5])
def test_all_processes_get_all_rows_and_notes(tmp_path, size):
    rows = [pair(i, weight=1, extra=i) for i in range(30)]
    rows[3]["chosen"] = rows[20]["chosen"] = rows[25]["chosen"] = rows[29]["chosen"] = ""
    path = write(tmp_path / "x.jsonl", rows)
    alone = read(path)
    assert alone.notes == ("4 rows dropped, empty 'chosen' (lines 4, 21, 26, ...)",)
    for found in in_threads(size, lambda share: read(path, share)):
        assert found.rows.to_list() == alone.rows.to_list()
        assert (found.notes, found.optional, found.unused) == (alone.notes, ("weight",), ("extra",))


def test_the_first_error_of_any_process_is_that_of_all(tmp_path):
    rows = [pair(i) for i in range(90)]
    rows[40]["chosen"] = rows[80]["chosen"] = 3
    path = write(tmp_path / "x.jsonl", rows)
    for error in in_threads(3, lambda share: read(path, share)):
        assert str(error).startswith(f"{path}:41: column 'chosen': got 3")
    # A number in a late row only is noticed by the process that reads that row.
    path = write(tmp_path / "y.jsonl", [pair(i, weight=None if i < 80 else 1) for i in range(90)])
    for error in in_threads(3, lambda share: read(path, share)):
        assert str(error) == (
            f"{path}:81: column 'weight': got 1, and line 1 has none; give every row a number there, or no row"
        )


def test_a_process_that_cannot_see_the_others_rows_says_so(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", [pair(i) for i in range(9)])
    real = row_file.write_rows

    def lost(folder, schema, rows):
        made = real(folder, schema, rows)
        made.unlink()
        return made

    monkeypatch.setattr(sys.modules["prefloss.data.read"], "write_rows", lost)
    for error in in_threads(2, lambda share: read(path, share)):
        assert "set HF_DATASETS_CACHE to a folder that all processes share" in str(error)


def test_token_ids_are_read_as_rows_are(tmp_path):
    rows = [{"prompt_ids": [i, 1], "chosen_ids": [2], "rejected_ids": [3, 4]} for i in range(20)]
    for found in in_threads(
        2, lambda share: read_token_ids(write(tmp_path / f"{share.rank}.jsonl", rows), share)
    ):
        assert found.to_list() == rows
    assert read_token_ids(write(tmp_path / "x.jsonl", [pair(1)])) is None


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Issue 11, item 3: 30,000 rows of 2 kB took 200 MB and more."""
    path = tmp_path / "x.jsonl"
    with path.open("w") as file:
        for i in range(30_000):
            row = {"prompt": f"{i} " + "p" * 700, "chosen": "c" * 700, "rejected": "r" * 700}
            file.write(json.dumps(row) + "\n")
    read(write(tmp_path / "small.jsonl", [pair(i) for i in range(2000)]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train, held_out = split(read(path).rows, 0.1)
    labels = pairs_to_labels(train.select(range(5000)))
    assert (len(train) + len(held_out), len(labels)) == (30_000, 10_000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * 1024


def test_numbers_in_a_file_are_as_large_as_float32(tmp_path):
    with pytest.raises(DataError, match=r"got 1e\+39, expected a finite number >= 0 of at most 3.4e\+38"):
        read(write(tmp_path / "x.jsonl", [pair(1, weight=1e39)]))


def test_ranked_rows_become_pairs_in_batches(tmp_path):
    rows = [
        {"prompt": f"p{i}", "completions": ["a", "b"], "scores": [i, 1.5], "weight": 2} for i in range(2500)
    ]
    pairs = ranked_to_pairs(read(write(tmp_path / "x.jsonl", rows)).rows)
    assert len(pairs) == 2500
    assert pairs[2400] == {
        "prompt": "p2400",
        "chosen": "a",
        "rejected": "b",
        "score_chosen": 2400.0,
        "score_rejected": 1.5,
        "weight": 2.0,
    }


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, for one test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    row_file._row_folder.cache_clear()
    yield tmp_path / "cache"
    row_file._row_folder.cache_clear()


def test_rows_lie_in_the_cache_of_datasets_and_those_of_killed_runs_go(tmp_path, cache):
    killed, other = (cache / f"prefloss-{host}-x" for host in (socket.gethostname(), "elsewhere"))
    for folder in (killed, other):
        folder.mkdir(parents=True)
        (folder / "rows.arrow").touch()
        os.utime(folder, (time.time() - 1000,) * 2)
    found = read(write(tmp_path / "x.jsonl", [pair(1)]))
    assert Path(found.rows.cache_files[0]["filename"]).parent.parent == cache
    assert not killed.exists()
    assert other.exists()
    # A folder that a process holds stays.
    os.utime(row_folder(), (time.time() - 1000,) * 2)
    held = row_folder()
    row_file._row_folder.cache_clear()
    assert row_folder() != held
    assert held.exists()


def test_a_cache_that_cannot_be_written_to_gives_way(tmp_path, cache, monkeypatch):
    cache.write_text("a file")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = read(write(tmp_path / "x.jsonl", [pair(1)]))
    assert Path(found.rows.cache_files[0]["filename"]).parent.parent == tmp_path
    row_file._row_folder.cache_clear()
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(
        DataError, match=r"no folder to keep checked rows in: .* set HF_DATASETS_CACHE to one"
    ):
        read(tmp_path / "x.jsonl")


def test_a_full_disk_is_named_and_what_was_written_goes(tmp_path, cache):
    path = write(tmp_path / "x.jsonl", [pair(i) for i in range(2000)])
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with (
        mock.patch.object(row_file, "_batches", full),
        pytest.raises(
            DataError, match=r"cannot be written there: No space left on device; make room, or set HF_"
        ),
    ):
        read(path)
    assert not list(row_folder().glob("*.arrow"))
