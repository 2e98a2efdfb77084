"""Run an experiment and write what it found: results.json, results.csv and picture.png."""

from __future__ import annotations

import csv
import json
import math
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import prefloss
from prefloss.data.atomic import written_whole
from prefloss.evidence.experiment import Experiment, Finding, Verdict

Results = dict[str, Any]


def reproduce(experiment: Experiment, seeds: Sequence[int], folder: Path) -> Results:
    """Run an experiment and write its files into a folder, which is made if it is not there.

    Args:
        experiment: What to run.
        seeds: Consecutive numbers, at least two of them: intervals are over seeds.
        folder: Takes `results.csv` (one row a run), `picture.png` and, once those are complete, `results.json`.

    Returns:
        The content of results.json.
    """
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    # Those of an earlier run must not be taken for those of this one, should it fail.
    (folder / "results.json").unlink(missing_ok=True)
    finding = experiment.run(seeds)
    results = results_of(experiment, finding, seeds) | {"seconds": round(time.perf_counter() - began, 1)}
    _write_picture(finding, folder / "picture.png")
    _write_rows(finding, folder / "results.csv")
    with written_whole(folder / "results.json") as path:
        path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return results


def results_of(experiment: Experiment, finding: Finding, seeds: Sequence[int]) -> Results:
    """The content of results.json; `measured` and `interval` are those of the figure that decides the verdict."""
    figures = [
        {
            "name": figure.name,
            "value": _finite(figure.value),
            "interval": None if figure.interval is None else [_finite(end) for end in figure.interval],
            "expected": _finite(figure.expected),
        }
        for figure in finding.figures
    ]
    return {
        "name": experiment.name,
        "title": experiment.title,
        "claim": experiment.claim,
        "source": experiment.source,
        "setup": experiment.setup,
        "quantity": figures[0]["name"],
        "measured": figures[0]["value"],
        "interval": figures[0]["interval"],
        "verdict": finding.verdict.value,
        "change": finding.change if finding.verdict is Verdict.HOLDS_WITH_A_CHANGE else "",
        "summary": finding.summary,
        "command": command(experiment, seeds),
        "figures": figures,
        "seeds": list(seeds),
        "versions": {
            "prefloss": prefloss.__version__,
            "torch": torch.__version__,
            "scipy": version("scipy"),
            "python": platform.python_version(),
        },
    }


def command(experiment: Experiment, seeds: Sequence[int]) -> str:
    """The command line that gives the same numbers."""
    first = f" --first-seed {seeds[0]}" if seeds[0] else ""
    return f"prefloss reproduce {experiment.name} --seeds {len(seeds)}{first}"


def _write_picture(finding: Finding, target: Path) -> None:
    # Not pyplot: it keeps its figures, and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    finding.draw(figure)
    with written_whole(target) as path:
        figure.savefig(path, dpi=110)
        # A palette is enough for a plot, and a third of the size.
        with Image.open(path) as picture:
            palette = picture.convert("RGB").quantize(256)
        palette.save(path, format="PNG", optimize=True)


def _write_rows(finding: Finding, target: Path) -> None:
    with written_whole(target) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(finding.rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in finding.rows:
            writer.writerow({name: _short(value) for name, value in row.items()})


def _short(value: Any) -> Any:
    """Six digits of a number: what is left differs between machines."""
    return f"{value:.6g}" if isinstance(value, float) else value


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity: null instead."""
    return value if value is not None and math.isfinite(value) else None
