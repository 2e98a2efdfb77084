"""A run writes the same bytes however often it was killed, and by however many processes; what is there is kept."""

import json
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from prefloss.cli.command_options import ScoreOptions
from prefloss.cli.console import CliError
from prefloss.cli.scoring import run as module
from prefloss.cli.scoring.rows import check_rows
from prefloss.data import DataError
from prefloss.data.row_file import Share
from prefloss.training import claimed
from tests import tiny
from tests.kills import killing_at, wrap_changes

FORK = multiprocessing.get_context("fork")
ROWS = [{"prompt": f"w{i}", "chosen": f" w{i} w2", "rejected": f" w3 w{i} w5"} for i in range(8)]
# Left out.
ROWS.insert(3, {"prompt": "w1", "chosen": "", "rejected": "w3"})


class Scorer:
    """Stands in for a model: batches matter, as they do to rounding."""

    tokenizer = tiny.tokenizer()

    def encoded(self, rows, *, names, per_token):
        values = [[i + len(rows) / 100 for i in completion] for _, completion in rows]
        sums = torch.tensor([sum(value) for value in values], dtype=torch.float64)
        return SimpleNamespace(
            reward=sums,
            logp=-sums,
            ref_logp=None,
            tokens=torch.tensor([len(value) for value in values]),
            truncated=torch.zeros(len(rows), dtype=torch.bool),
            token_rewards=[torch.tensor(value) for value in values] if per_token else None,
            token_ids=[torch.tensor(completion) for _, completion in rows] if per_token else None,
        )


def setup(loss="dpo(beta=0.1)"):
    return SimpleNamespace(
        tokenizer=Scorer.tokenizer,
        loss=SimpleNamespace(name="dpo", reward="β h"),
        reference_name="ref",
        embedded=43,
        settings=lambda: {"--loss": loss},
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "CHUNK", 5)
    # Drawing takes long.
    monkeypatch.setattr(
        module, "write_reliability", lambda path, summary, title: path.write_text(str(summary))
    )
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def prepared(path, loss="dpo(beta=0.1)", scorer=None, **options):
    options = {"html": path.with_suffix(".html"), **options}
    options = ScoreOptions(model="m", data=path.parent / "d.jsonl", output=path, **options)
    return module.Run(options, check_rows(options.data, Share()), setup(loss), scorer or Scorer())


def score(path, **options):
    """Score; the files that there are then."""
    run = prepared(path, **options)
    with claimed(path, anew=run.options.overwrite):
        if run.admit() is None:
            run.score()
    return written(path)


def written(path):
    return {
        item.name.removeprefix(path.stem): item.read_bytes() for item in path.parent.glob(f"{path.stem}.*")
    }


def killed_at(moment, path, options):
    """In a process of its own: be killed where the file system is about to change for the n-th time."""
    then = killing_at(moment)
    wrap_changes(then, ("fsync", "replace", "unlink", "rmdir", "mkdir"))
    scorer = Scorer()
    scorer.encoded = then(scorer.encoded)
    score(path, scorer=scorer, **options)


@pytest.mark.parametrize("options", [{}, {"overwrite": True, "loss": "ipo"}])
def test_killed_at_any_moment_it_goes_on(folder, options):
    (folder / "whole").mkdir()
    (folder / "d.jsonl").rename(folder / "whole" / "d.jsonl")
    wanted = score(folder / "whole" / "s.jsonl", **options)
    assert set(wanted) == {".jsonl", ".html", ".jsonl.summary.json", ".jsonl.reliability.png"}
    moment, code = 0, None
    while code != 0:
        path = folder / str(moment) / "s.jsonl"
        path.parent.mkdir()
        (path.parent / "d.jsonl").write_bytes((folder / "whole" / "d.jsonl").read_bytes())
        if options:
            before = score(path)
        process = FORK.Process(target=killed_at, args=(moment, path, options))
        process.start()
        process.join()
        code = process.exitcode
        assert code in (0, -signal.SIGKILL)
        if path.exists():
            assert path.read_bytes() in (wanted[".jsonl"], *([before[".jsonl"]] if options else []))
        assert score(path, **options) == wanted
        assert sorted(item.name for item in path.parent.iterdir()) == [
            *("d.jsonl", "s.html", "s.jsonl", "s.jsonl.reliability.png", "s.jsonl.summary.json")
        ]
        # Each takes some time; most moments of the two are the same.
        moment += 3 if options else 1
    assert moment > 25


def joined(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path.parent / 'store'}", rank=rank, world_size=2)
    score(path)
    dist.destroy_process_group()
    os._exit(0)


def test_two_processes_write_the_files_of_one(folder):
    processes = [FORK.Process(target=joined, args=(rank, folder / "two.jsonl")) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert written(folder / "two.jsonl") == score(folder / "one.jsonl")


def test_other_settings_are_refused(folder):
    path = folder / "s.jsonl"
    before = score(path)
    with pytest.raises(
        DataError, match=r"^--loss: got ipo, expected dpo\(beta=0.1\), as the scores of .*--overwrite"
    ):
        score(path, loss="ipo")
    with pytest.raises(DataError, match=r"^--per-token: got True, expected False"):
        score(path, per_token=True)
    with (folder / "d.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match=r"^content of --data: got "):
        score(path)
    assert written(path) == before
    assert score(path, overwrite=True) != before


def test_other_settings_are_refused_while_it_is_unfinished(folder):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    path, scorer = folder / "s.jsonl", Scorer()
    calls = []
    scorer.encoded = lambda *args, **options: (
        stopped() if len(calls) == 1 else calls.append(1) or Scorer.encoded(scorer, *args, **options)
    )
    with pytest.raises(KeyboardInterrupt):
        score(path, scorer=scorer)
    assert not path.exists()
    with pytest.raises(DataError, match=r"^--loss: got ipo"):
        score(path, loss="ipo")
    calls.append(1)
    score(path, scorer=scorer)
    # One of two chunks was kept.
    assert len(calls) == 2 + 1


def test_a_file_of_something_else_is_not_overwritten(folder):
    path = folder / "s.jsonl"
    path.write_text("precious")
    with pytest.raises(DataError, match="exists, and no summary of prefloss score is beside it"):
        score(path)
    assert path.read_text() == "precious"
    score(path, overwrite=True)


def test_a_damaged_part_is_named(folder):
    run = prepared(folder / "s.jsonl")
    with claimed(folder / "s.jsonl"):
        run.admit()
        run.parts.path(0).write_bytes(b"PAR1")
        with pytest.raises(DataError, match=r"00000000.parquet: cannot be read: .*; remove it"):
            run.score()
    run.parts.path(0).unlink()
    assert score(folder / "s.jsonl") == score(folder / "t.jsonl")


def test_a_full_disk_keeps_what_was_scored(folder, monkeypatch):
    write, count = module.Parts.write, []

    def full(self, number, table):
        if len(count) == 1:
            raise OSError(28, "No space left on device")
        count.append(write(self, number, table))

    monkeypatch.setattr(module.Parts, "write", full)
    with pytest.raises(CliError, match="No space left on device; scored rows are kept in"):
        score(folder / "s.jsonl")
    monkeypatch.setattr(module.Parts, "write", write)
    assert score(folder / "s.jsonl") == score(folder / "t.jsonl")


def test_formats(folder):
    lines = [json.loads(line) for line in score(folder / "s.jsonl")[".jsonl"].splitlines()]
    assert list(lines[0]) == ["row", "side", "reward", "logp", "ref_logp", "tokens", "truncated"]
    assert [(line["row"], line["side"]) for line in lines[4:8]] == [
        *((2, "chosen"), (2, "rejected"), (4, "chosen"), (4, "rejected"))
    ]
    score(folder / "p.parquet", per_token=True)
    table = pq.read_table(folder / "p.parquet")
    assert table.select(list(lines[0])).to_pylist() == lines
    assert table["token_rewards"][0].as_py() == pytest.approx(
        [i + 8 / 100 for i in table["token_ids"][0].as_py()]
    )
    assert json.loads(table.schema.metadata[b"prefloss.score"])["--loss"] == "dpo(beta=0.1)"
    text = score(folder / "c.csv")[".csv"].decode().splitlines()
    assert text[0] == '"row","side","reward","logp","ref_logp","tokens","truncated"'
    assert text[1].startswith('0,"chosen",')
    assert len(text) == 1 + len(lines)


def test_what_rewardbench_reads(folder):
    rows = [{**row, "subset": "chat", "id": 3} for row in ROWS]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        json.loads(line) for line in score(folder / "o.jsonl", format="rewardbench")[".jsonl"].splitlines()
    ]
    names = ["prompt", "results", "scores_chosen", "scores_rejected", "text_chosen", "text_rejected"]
    assert list(found[0]) == [*names, "subset", "id"]
    assert [row["text_chosen"] for row in found[:2]] == ["w0 w0 w2", "w1 w1 w2"]
    for row in found:
        assert row["results"] == (row["scores_chosen"] > row["scores_rejected"])


def test_what_rewardbench_2_reads(folder):
    best = {"prompt": "w1", "chosen": [" w9"], "rejected": [" w3", " w3", " w4"], "num_correct": 1}
    tied = {"prompt": "w1", "chosen": [" w9", " w8"], "rejected": [" w3"], "num_correct": 2}
    rows = [
        {**best, "id": "5", "subset": "Math"},
        {**best, "chosen": [" w3"], "id": "6", "subset": "Math"},
        {**best, "id": "ref:0", "subset": "Ties"},
        {**tied, "id": "tied:0", "subset": "Ties"},
    ]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = score(folder / "o.json", format="rewardbench")
    found = json.loads(files[".json"])
    assert set(found) == {
        *("id", "num_correct", "results", "scores", "subset", "text", "model", "model_type", "chat_template")
    }
    assert found["results"] == [1.0, 0.0, None, None]
    assert found["num_correct"] == [1, 1, 1, 2]
    assert [len(scores) for scores in found["scores"]] == [4, 4, 4, 3]
    assert found["text"][3] == ["w1 w9", "w1 w8", "w1 w3"]
    subsets = json.loads(files[".json.summary.json"])["summary"]["subsets"]
    assert subsets["of"]["Math"] == {"rows": 2, "share": 0.5}
    # Both right; the right ones differ by 1, and are 5 above the wrong one: .3 + .3 + .2 + .2 + .01 tanh(4).
    assert subsets["of"]["Ties"]["share"] == pytest.approx(1.00999, abs=1e-5)
