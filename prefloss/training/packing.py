"""Batches without padding: token after token in one row, each prompt once where completions share it.

The collator writes `NAMES` beside the token ids; `Packed` reads them and arranges the tokens as a model takes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloss.data.tokens import Encoded
from prefloss.logratios import IGNORE_INDEX

SEQUENCES, ROWS, TARGETS, SOURCES, SHARED = "sequence_ids", "row_ids", "targets", "sources", "shared"
NAMES = (SEQUENCES, ROWS, TARGETS, SOURCES, SHARED)
"""What a packed batch has beside `input_ids` and `position_ids`, [1, N]:

- `sequence_ids`, [1, N]: tokens of other sequences are never attended to.
- `row_ids`, [1, N]: the completion's row that a token belongs to, -1 in what the rows of a sequence share.
- `targets`, [rows, C]: tokens to score, the first C of each row, `IGNORE_INDEX` where there is none.
- `sources`, [rows, C]: place in 0..N of the token that predicts each target, 0 where there is none.
- `shared`, [1]: whether rows of one prompt share it. Said by the layout and not by the batch, some of which have no two
  rows of a prompt: processes must not go different ways.
"""


def pack(
    examples: Sequence[Sequence[Encoded]],
    order: Sequence[tuple[int, int]],
    share: bool,
    max_length: int | None,
) -> dict[str, Tensor]:
    """One row of tokens, positions starting anew in each sequence.

    Args:
        examples: Prompt and completion token ids of the completions of each example.
        order: Example and completion of each row of the batch.
        share: Whether rows with the same prompt are one sequence, the prompt once and each completion after it. Where
            the prompts of an example differ at their end, their common start is shared.
        max_length: Tokens of a row, prompt and completion, at most; None for all.
    """
    sequences: dict[Any, list[int]] = {}
    starts, ends, scored = [], [], []
    for row, (i, j) in enumerate(order):
        prompt, completion = examples[i][j]
        ids = (prompt + completion)[:max_length]
        start = min(_common([one for one, _ in examples[i]]) if share else len(prompt), len(ids))
        starts.append(ids[:start])
        ends.append(ids[start:])
        scored.append(max(0, len(prompt) - start))
        sequences.setdefault(tuple(ids[:start]) if share and start else row, []).append(row)
    return {**_flat(list(sequences.values()), starts, ends, scored), SHARED: torch.tensor([share])}


def _common(prompts: list[list[int]]) -> int:
    """Tokens with which all of them begin."""
    same = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
    return sum(itertools.takewhile(bool, same))


def _flat(
    sequences: list[list[int]], starts: list[list[int]], ends: list[list[int]], scored: list[int]
) -> dict[str, Tensor]:
    columns: tuple[list[int], ...] = ([], [], [], [])
    width = max(1, *(len(end) - skip for end, skip in zip(ends, scored, strict=True)))
    targets = torch.full((len(ends), width), IGNORE_INDEX)
    sources = torch.zeros(len(ends), width, dtype=torch.long)

    def write(tokens: list[int], position: int, sequence: int, row: int) -> None:
        for column, values in zip(
            columns,
            (tokens, range(position, position + len(tokens)), [sequence] * len(tokens), [row] * len(tokens)),
            strict=True,
        ):
            column.extend(values)

    for sequence, rows in enumerate(sequences):
        start = starts[rows[0]]
        write(start, 0, sequence, -1)
        last = len(columns[0]) - 1 if start else -1
        for row in rows:
            end, skip, first = ends[row], scored[row], len(columns[0])
            write(end, len(start), sequence, row)
            for column, token in enumerate(end[skip:]):
                place = first + skip + column
                source = place - 1 if place > first else last
                if source >= 0:
                    targets[row, column], sources[row, column] = token, source
    names = ("input_ids", "position_ids", SEQUENCES, ROWS)
    batch = {name: torch.tensor([column]) for name, column in zip(names, columns, strict=True)}
    return {**batch, TARGETS: targets, SOURCES: sources}


class Arranged(NamedTuple):
    """The tokens of a packed batch as a model takes them.

    Attributes:
        inputs: Of the model, [B, T] each.
        positions: Position in 0..B T that predicts each target, [rows, C].
        sequences: Sequence of each token, [B, T], -1 in padding.
        rows: Row of each token, [B, T], -1 in what rows share and in padding.
    """

    inputs: dict[str, Any]
    positions: Tensor
    sequences: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Packed:
    """The tokens of a packed batch, [N] each, and the places of those that predict its targets, [rows, C].

    Attributes:
        shares: Whether a sequence may hold several rows.
    """

    ids: Tensor
    positions: Tensor
    sequences: Tensor
    rows: Tensor
    sources: Tensor
    shares: bool

    @classmethod
    def read(cls, batch: Mapping[str, Any]) -> Packed:
        """Of a batch."""
        ids, positions, sequences, rows = (
            batch[name].reshape(-1) for name in ("input_ids", "position_ids", SEQUENCES, ROWS)
        )
        return cls(ids, positions, sequences, rows, batch[SOURCES], bool(batch[SHARED]))

    def arranged(self, one_row: bool) -> Arranged:
        """The sequences side by side in one row, or in as few rows of the longest one's length as they fit in.

        Attention costs the square of a row's length unless its kernel knows where sequences end.
        """
        lengths = torch.bincount(self.sequences).tolist()
        width = sum(lengths) if one_row else max(lengths)
        count, firsts = _bins(lengths, width)
        device = self.ids.device
        starts = torch.tensor([0, *lengths[:-1]], device=device).cumsum(0)
        moved = torch.tensor(firsts, device=device) - starts
        places = torch.arange(len(self.ids), device=device) + moved[self.sequences]

        def spread(values: Tensor, padding: int) -> Tensor:
            room = values.new_full((count * width,), padding)
            return room.index_copy_(0, places, values).view(count, width)

        return Arranged(
            {"input_ids": spread(self.ids, 0), "position_ids": spread(self.positions, 0)},
            places[self.sources],
            spread(self.sequences, -1),
            spread(self.rows, -1),
        )

    def duplicated(self) -> Arranged:
        """Padded rows, each with a prompt of its own, for models that take nothing else."""
        whole = self.whole_rows()
        shape = (len(whole), max(map(len, whole)))
        ids, mask = self.ids.new_zeros(shape), self.ids.new_zeros(shape)
        positions = torch.zeros_like(self.sources)
        for row, found in enumerate(whole):
            ids[row, : len(found)] = self.ids[found]
            mask[row, : len(found)] = 1
            positions[row] = row * shape[1] + torch.searchsorted(found, self.sources[row]).clamp(
                max=len(found) - 1
            )
        numbers = torch.arange(len(whole), device=mask.device)[:, None].expand(shape)
        rows = torch.where(mask.bool(), numbers, -1)
        return Arranged({"input_ids": ids, "attention_mask": mask}, positions, rows, rows)

    def whole_rows(self) -> list[Tensor]:
        """Places of the tokens of each row in order, what it shares first.

        A row whose completion was cut away, and that shares its prompt, has the first token alone: no model takes a
        row of nothing.
        """
        found = []
        for row in range(len(self.sources)):
            own = self.rows == row
            sequence = self.sequences[own][:1] if own.any() else self.sequences.new_full((1,), -1)
            of_row = own | ((self.rows < 0) & (self.sequences == sequence))
            places = of_row.nonzero().squeeze(-1)
            found.append(places if len(places) else places.new_zeros(1))
        return found


def _bins(lengths: list[int], width: int) -> tuple[int, list[int]]:
    """How many rows of that width are needed, and where each sequence begins in all of them, longest first."""
    free: list[int] = []
    firsts = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, room in enumerate(free) if room >= lengths[index]), len(free))
        if row == len(free):
            free.append(width)
        firsts[index] = row * width + width - free[row]
        free[row] -= lengths[index]
    return len(free), firsts
