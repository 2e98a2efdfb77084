"""The benchmark scripts run and their own checks pass, at a size that takes no time."""

import csv

import pytest
import torch

from benchmarks import bench_batches, bench_linear, bench_logits, measure, peers, tables
from benchmarks.shapes import LINEAR, LOGITS


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results go to a folder of the test, and the peers that need a package or seconds of compiling are left out."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    of_logits = {"plain PyTorch": peers.naive_logits, "F.cross_entropy": peers.cross_entropy}
    monkeypatch.setattr(bench_logits, "logits_ways", lambda: of_logits)
    monkeypatch.setattr(bench_linear, "linear_ways", lambda: {"plain PyTorch": peers.naive_linear})
    monkeypatch.setattr(bench_linear, "liger_steps", lambda loss, beta: {})
    return tmp_path


def rows(folder):
    (path,) = folder.glob("*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bench_logits(results, dtype, capsys):
    bench_logits.run(LOGITS["tiny"], dtype, rounds=1, name="tiny")
    ours = [row for row in rows(results) if row["way"].startswith("prefloss")]
    assert len(ours) == 5
    assert all(
        row["ok"] == "True" and float(row["median_ms"]) > 0 and "torch " in row["versions"] for row in ours
    )
    assert "prefloss, in place" in capsys.readouterr().out


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bench_linear(results, dtype, frozen):
    for loss in ("dpo", "kto", "dpo"):
        bench_linear.run(LINEAR["tiny"], dtype, frozen, rounds=1, name="tiny", loss=loss)
    ours = [row for row in rows(results) if row["way"].startswith("prefloss")]
    # what is measured again takes the place of what was there
    assert len(ours) == 3
    assert all(row["ok"] == "True" and float(row["gradient_error"]) < 4e-3 for row in ours)


def test_bench_batches(results):
    examples = bench_batches.log_normal(20)
    bench_batches.run("tiny", "pairs", examples, bench_batches.TINY, rounds=1, save=True)
    ways = {row["way"]: row for row in rows(results)}
    assert len(ways) == 3
    assert all(row["ok"] == "True" and float(row["median_ms"]) > 0 for row in ways.values())


def test_tables_show_the_rows_there_are(results):
    bench_logits.run(LOGITS["tiny"], torch.float32, rounds=1, name="32k")
    bench_linear.run(LINEAR["tiny"], torch.bfloat16, True, rounds=1, name="128k")
    text = tables.render(results)
    assert text.count("| **prefloss** |") == 3
    assert "trainable head" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| **prefloss, no budget** |")]
    assert [bool(cell.strip()) for cell in line.split("|")[2:6]] == [False, False, False, True]


def test_the_page_of_benchmarks_shows_the_results_that_are_kept():
    page = tables.PAGE.read_text()
    assert tables.written(page) == page, "run python -m benchmarks.tables"


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="expected the markers"):
        tables.replaced("# prefloss", "layouts", "")
