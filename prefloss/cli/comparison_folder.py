"""The folder of a comparison: what was run is kept as it finishes, so that the same command goes on after a kill.

.lock         held by the process that writes
run.json      what the comparison was asked for
runs.jsonl    what is finished, an object a line
results.csv, report.html
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch
from rich.console import Console
from rich.text import Text

import prefloss
from prefloss.cli.console import CliError, first_line
from prefloss.cli.run_folder import RunFolder, taken, unwritable
from prefloss.data.atomic import written_whole

_RUNS = "runs.jsonl"
_CONTENT = {
    "report.html": "the report",
    "results.csv": "one row a run",
    "losses.csv": "one row a loss",
}
_COMMAND = "prefloss compare"


class ComparisonFolder:
    """What a comparison keeps; made by `opened`.

    Attributes:
        path: The folder.
        finished: What is there, and what was added.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.finished = path, _whole_lines(path / _RUNS)

    def add(self, run: dict[str, Any]) -> None:
        """Keep what is finished; it is on the disk when this returns."""
        with (self.path / _RUNS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.finished.append(run)

    def publish(self, console: Console, verdict: Sequence[str], texts: Mapping[str, str]) -> None:
        """Write the files by their names, and print what was found."""
        for name, text in texts.items():
            with written_whole(self.path / name) as path:
                path.write_text(text, encoding="utf-8", newline="\n")
        console.print()
        for sentence in verdict:
            console.print(Text(sentence))
        for name in texts:
            line = Text.assemble((str(self.path / name), "bold"), (f"   {_CONTENT[name]}", "dim"))
            console.print(line, soft_wrap=True)


@contextmanager
def opened(output: Path, settings: Mapping[str, Any]) -> Iterator[ComparisonFolder]:
    """The folder of a comparison with these settings, made if need be.

    Raises:
        CliError: If it holds something else or a comparison with other settings, or cannot be written to.
    """
    asked = {"command": _COMMAND, "prefloss": prefloss.__version__, **json.loads(json.dumps(settings))}
    with taken(output, "compare") as folder:
        try:
            _admit(folder, asked)
            yield ComparisonFolder(folder.path)
        except OSError as error:
            raise unwritable(folder.path, error) from error


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "prefloss": prefloss.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "Python": platform.python_version(),
    }


def _admit(folder: RunFolder, settings: dict[str, Any]) -> None:
    names = {path.name for path in folder.path.iterdir() if not path.name.startswith(".")}
    if names and (folder.record is None or folder.record["settings"].get("command") != _COMMAND):
        raise CliError(
            f"--output: {folder.path} holds something else than a comparison; choose another folder"
        )
    folder.admit(settings, resume=True, overwrite=False)
    folder.begin({})


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file; a last line that a kill cut short is removed."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    try:
        found = [json.loads(line) for line in whole]
    except ValueError as error:
        raise CliError(
            f"--output: {path} cannot be read: {first_line(error)}; choose another folder"
        ) from error
    if len(whole) < len(lines):
        with written_whole(path) as new:
            new.write_text("".join(whole), encoding="utf-8")
    return found
