"""The tables of docs/gpu.md from ``results/``: ``python -m benchmarks.gpu.tables`` writes them between its markers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import RESULTS, STAND_IN, rows_of
from benchmarks.tables import ROOT, Row, replaced, table

PAGE = ROOT / "docs" / "gpu.md"
NOTHING = "No GPU has been measured yet."
HEADS = {"": "", "False": ", trainable head", "True": ", frozen head"}


def render(folder: Path = RESULTS) -> str:
    """What stands between the markers: a section for each GPU that there are rows of."""
    files = [path for path in sorted(folder.glob("*.csv")) if path.stem != STAND_IN]
    return "\n\n".join(part for path in files if (part := of_gpu(path))) or NOTHING


def of_gpu(path: Path) -> str:
    """The tables of one GPU, in the order in which its rows were measured; nothing for other machines."""
    rows = [row for row in rows_of(path) if row.get("bench", "").startswith("gpu ")]
    if not rows:
        return ""
    parts = [
        f"Measured on {path.stem.replace('-', ' ')} ({rows[0]['versions']}, commit {rows[0]['commit']}), in turns in "
        f"one process for each part: medians of device time. All rows: `benchmarks/results/{path.name}`."
    ]
    for bench, what, frozen in dict.fromkeys((row["bench"], row["what"], row["frozen"]) for row in rows):
        of_task = [row for row in rows if (row["bench"], row["what"], row["frozen"]) == (bench, what, frozen)]
        columns = list(dict.fromkeys((row["shape"], row["dtype"]) for row in of_task))
        title = (
            f"{bench.removeprefix('gpu ').capitalize()}, {what}{HEADS[frozen]}: time over that of "
            f"'{of_task[0]['baseline']}', and the rate"
        )
        parts += table(title, of_task, columns, cell)
    return "\n\n".join(parts)


def cell(row: Row) -> str:
    """Time over that of the limit, and TFLOP/s or GB/s."""
    rate = f"{float(row['tflop_per_s']):.0f} TFLOP/s" if row["tflop_per_s"] else f"{row['gb_per_s']} GB/s"
    return f"{float(row['ratio']):.3f} · {rate}"


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(), "gpu", render()))
