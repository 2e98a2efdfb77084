"""One run of `prefloss score`: what is left is scored in chunks, by any number of processes; then one writes it out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import prefloss
from prefloss.cli.command_options import ScoreOptions
from prefloss.cli.console import CliError
from prefloss.cli.run_folder import unwritable
from prefloss.cli.scoring.chunk import score_chunk
from prefloss.cli.scoring.output import write_lines, write_parquet, write_rewardbench, write_table
from prefloss.cli.scoring.page import MOST_ROWS, write_page
from prefloss.cli.scoring.parts import Parts, beside
from prefloss.cli.scoring.picture import write_reliability
from prefloss.cli.scoring.rows import Rows
from prefloss.cli.scoring.summary import Summary
from prefloss.data.atomic import remove_unfinished, written_whole
from prefloss.training import distributed

if TYPE_CHECKING:
    from prefloss.cli.scoring.models import Setup

CHUNK = 256
"""Rows of a part: a killed run loses at most this many in each process."""


class Run:
    """One run.

    Args:
        options: Of the command.
        rows: The rows to score.
        setup: What they are scored with.
        scorer: Made of it.
    """

    def __init__(self, options: ScoreOptions, rows: Rows, setup: Setup, scorer: prefloss.Scorer) -> None:
        self.options, self.rows, self.setup, self.scorer = options, rows, setup, scorer
        self.settings = {**options.settings(), **setup.settings()}
        self.parts = Parts(options.output)
        self._chunks = -(-rows.count // CHUNK)
        self._picture = beside(options.output, ".reliability.png")

    def admit(self) -> dict[str, Any] | None:
        """Begin, or go on; the summary of a finished run. Every process must call this.

        Raises:
            DataError: If what is there was made with other settings, or by something else.
        """
        first = distributed.rank() == 0
        anew = self.options.overwrite
        return distributed.share().together(
            lambda: self.parts.admit(self.settings, anew=anew) if first else None
        )[0]

    def score(self, on_chunk: Callable[[int], None] = lambda rows: None) -> dict[str, Any]:
        """Score what is left, write everything, and return the summary. Every process must call this.

        Args:
            on_chunk: Called with the number of rows that lie before the next chunk.
        """
        rank, size = distributed.rank(), distributed.size()
        with self._faults_named():
            left = {n for n in range(rank, self._chunks, size) if not self.parts.path(n).exists()}
            for number, rows in self.rows.chunks(CHUNK, left.__contains__):
                # The page shows the first rows.
                shown = self.options.html is not None and number * CHUNK < MOST_ROWS
                per_token = shown or self.options.per_token
                scores = score_chunk(self.scorer, rows, embedded=self.setup.embedded, per_token=per_token)
                self.parts.write(number, scores)
                on_chunk(min((number + size) * CHUNK, self.rows.count))
        # Waits for the slowest process, so that all parts exist.
        distributed.barrier()
        return distributed.share().together(lambda: self._finish() if rank == 0 else {})[0]

    def files(self) -> Iterator[tuple[Path, str]]:
        """What the run wrote, and what it is."""
        yield self.options.output, "the rewards"
        yield self.parts.summary, "every number above, and the settings"
        if self._picture.exists():
            yield self._picture, "how sure, and how often right"
        if self.options.html is not None:
            yield self.options.html, "completions, each token in the colour of its reward"

    def _finish(self) -> dict[str, Any]:
        """Write output, picture, page and summary from the parts."""
        counted = Summary(self.rows.kind)
        for part in self.parts.read(self._chunks):
            counted.add(part)
        summary, options = counted.result(), self.options
        with self._faults_named():
            # From here on it no longer tells what the output was made with; the parts do.
            self.parts.summary.unlink(missing_ok=True)
            with written_whole(options.output) as path:
                self._write(path)
            if "calibration" in summary:
                with written_whole(self._picture) as path:
                    write_reliability(path, summary, f"{Path(options.model).name} on {options.data.name}")
            else:
                self._picture.unlink(missing_ok=True)
            if options.html is not None:
                with written_whole(options.html) as path:
                    self._write_page(path)
                remove_unfinished(options.html)
            remove_unfinished(self._picture)
            self.parts.finish(self.settings, summary)
        return summary

    def _write(self, path: Path) -> None:
        form, per_token = self.options.written_as, self.options.per_token
        if form == "parquet":
            write_parquet(path, self.parts.read(self._chunks), per_token, self.settings)
        elif form == "table":
            write_table(path, self.parts.read(self._chunks), per_token)
        elif form == "jsonl":
            write_lines(path, self.parts.read(self._chunks), per_token)
        else:
            about = {
                "model": self.options.model,
                "model_type": f"{self.setup.loss.name} implicit reward",
                "chat_template": "tokenizer" if self.rows.kind.conversational else "none",
            }
            write_rewardbench(
                path, self.rows, lambda: self.parts.read(self._chunks), self.setup.tokenizer, about
            )

    def _write_page(self, path: Path) -> None:
        options, setup = self.options, self.setup
        lines = (
            f"Model: {options.model}. Reference: {setup.reference_name}. Loss: {setup.loss!r}.",
            "Only differences between completions of one prompt mean something.",
        )
        facts = {
            "title": f"Rewards of {options.data.name}",
            "lines": lines,
            "unit": f"as the loss counts it: {setup.loss.reward!r}, log-probs in nats",
        }
        write_page(path, self.rows, next(self.parts.read(1)), setup.tokenizer, facts)

    @contextlib.contextmanager
    def _faults_named(self) -> Iterator[None]:
        """Turn what the disk and the device refuse into a `CliError` that says what is kept."""
        kept = f"; scored rows are kept in {self.parts.folder}, and the same command goes on from there"
        try:
            yield
        except OSError as error:
            raise unwritable(self.options.output, error, kept) from error
        except torch.OutOfMemoryError as error:
            raise CliError(
                f"--batch-tokens: {self.options.batch_tokens} tokens at once do not fit into memory; try fewer, with "
                "--overwrite"
            ) from error
