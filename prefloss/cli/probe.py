"""`prefloss probe`: what the installed trainer trains under each loss name that it accepts."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefloss.cli.console import CliError, first_line, quiet
from prefloss.integrations.probes import FRAMEWORKS, Prober
from prefloss.registry import Loss
from prefloss.testing import Identity, compare, identify

# Trainers compute log-probs from logits in float32.
_FLOAT32 = 1e-3


@dataclass(frozen=True)
class Row:
    """One loss name.

    Attributes:
        name: As the trainer accepts it.
        asked: The loss that it means.
        trained: What the trainer's step computed, in words.
        verdict: "same", "differs", or "not run".
    """

    name: str
    asked: str
    trained: str
    verdict: str


def probe_trainer(framework: str, names: list[str] | None) -> None:
    """Print a table of every loss name, or some; exit with 1 where another loss is trained than asked for."""
    console = Console(highlight=False)
    prober = FRAMEWORKS.get(framework)
    if prober is None:
        raise CliError(f"trainer: got {framework!r}, expected one of {', '.join(FRAMEWORKS)}")
    try:
        version = prober.version
    except importlib.metadata.PackageNotFoundError as error:
        raise CliError(f"{framework}: the package {prober.package} is not installed here") from error
    with quiet(console):
        accepted = prober.names()
        unknown = [name for name in names or () if name not in accepted]
        if unknown:
            raise CliError(f"name: got {unknown[0]!r}, expected one of {', '.join(accepted)}")
        rows = list(_rows(prober, names or accepted))
    console.print(_table(f"{prober.package} {version}", rows))
    counts = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in ("same", "differs", "not run")
    }
    console.print(Text(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)))
    if counts["differs"]:
        raise typer.Exit(1)


def _rows(prober: Prober, names: list[str]) -> Iterator[Row]:
    for name in names:
        try:
            asked = prober.asked(name)
            if asked.state:
                yield Row(name, _words(asked), "keeps a state, which a single step does not show", "not run")
            else:
                yield Row(name, _words(asked), *_trained(prober, name, asked))
        # Another package's code: it may refuse a name, or these options, with any error.
        except Exception as error:
            yield Row(name, "", f"{type(error).__name__}: {first_line(error)}", "not run")


def _trained(prober: Prober, name: str, asked: Loss) -> tuple[str, str]:
    step = prober.step(name)
    taken: Any = {"feedback": prober.feedback, "tolerance": _FLOAT32}
    if compare(step, asked, **taken):
        return _words(asked), "same"
    # Most often it is another of the trainer's own.
    own = {prober.asked(other).name for other in _known(prober)}
    found = identify(step, among=own, **taken) or identify(step, **taken)
    return _of(found), "differs"


def _known(prober: Prober) -> Iterator[str]:
    """The trainer's loss names that the registry has."""
    for name in prober.names():
        with suppress(ValueError):
            prober.asked(name)
            yield name


def _of(found: Identity) -> str:
    if found.loss is None:
        return str(found)
    factor = "" if found.factor == 1 else f"{found.factor:.4g} * "
    return f"{factor}{_words(found.loss)}"


def _words(loss: Loss) -> str:
    written = (
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in loss.params.items()
    )
    return f"{loss.name}({', '.join(written)})"


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in ("name", "asked for", "trained", "verdict"):
        table.add_column(column, overflow="fold")
    colours = {"same": "green", "differs": "bold red", "not run": "yellow"}
    for row in rows:
        table.add_row(
            Text(row.name), Text(row.asked), Text(row.trained), Text(row.verdict, style=colours[row.verdict])
        )
    return table
