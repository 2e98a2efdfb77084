"""Batches without padding: sequences one after another in one row, each prompt once where completions share it.

`pack` writes the batch for the collator; `Packed` reads it and arranges the tokens for a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloss.data.tokens import Encoded
from prefloss.logratios import IGNORE_INDEX

SEQUENCES, ROWS, TARGETS, SOURCES, SHARED = "sequence_ids", "row_ids", "targets", "sources", "shared"
NAMES = (SEQUENCES, ROWS, TARGETS, SOURCES, SHARED)
"""What a packed batch holds besides `input_ids` and `position_ids`, [1, N]:

- `sequence_ids`, [1, N]: attention stays within a sequence.
- `row_ids`, [1, N]: the completion that a token belongs to, -1 for tokens that the rows of a sequence share.
- `targets`, [rows, C]: tokens to score, left-aligned in each row, `IGNORE_INDEX` beyond.
- `sources`, [rows, C]: position in 0..N of the token that predicts each target, 0 beyond.
- `shared`, [1]: True for the layout with shared prompts. A flag of the layout, not of the batch's contents: a batch may
  have no two rows with one prompt, and all processes must take the same path.
"""


def pack(
    examples: Sequence[Sequence[Encoded]],
    order: Sequence[tuple[int, int]],
    share: bool,
    max_length: int | None,
) -> dict[str, Tensor]:
    """One row of tokens; positions restart with each sequence.

    Args:
        examples: Prompt and completion token ids of the completions of each example.
        order: Example and completion of each row of the batch.
        share: Put rows with the same prompt into one sequence: the prompt once, then each completion. Where the prompts
            of an example differ at their end, their common start is shared.
        max_length: Tokens of a row, prompt and completion, at most; None for all.
    """
    sequences: dict[Any, list[int]] = {}
    rows: list[_Row] = []
    for number, (i, j) in enumerate(order):
        prompt, completion = examples[i][j]
        ids = (prompt + completion)[:max_length]
        start = min(_common([one for one, _ in examples[i]]) if share else len(prompt), len(ids))
        rows.append(_Row(ids[:start], ids[start:], max(0, len(prompt) - start)))
        sequences.setdefault(tuple(ids[:start]) if share and start else number, []).append(number)
    return {**_flat(list(sequences.values()), rows), SHARED: torch.tensor([share])}


class _Row(NamedTuple):
    """Tokens of a row: those that it may share, its own, and how many of its own still belong to the prompt."""

    start: list[int]
    end: list[int]
    unscored: int


def _common(prompts: list[list[int]]) -> int:
    """Length of the longest common prefix."""
    same = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
    return sum(itertools.takewhile(bool, same))


def _flat(sequences: list[list[int]], rows: list[_Row]) -> dict[str, Tensor]:
    columns: tuple[list[int], ...] = ([], [], [], [])
    width = max(1, *(len(row.end) - row.unscored for row in rows))
    targets = torch.full((len(rows), width), IGNORE_INDEX)
    sources = torch.zeros(len(rows), width, dtype=torch.long)

    def write(tokens: list[int], position: int, sequence: int, row: int) -> None:
        count = len(tokens)
        values = (tokens, range(position, position + count), [sequence] * count, [row] * count)
        for column, new in zip(columns, values, strict=True):
            column.extend(new)

    for sequence, members in enumerate(sequences):
        start = rows[members[0]].start
        write(start, 0, sequence, -1)
        last_shared = len(columns[0]) - 1 if start else -1
        for number in members:
            _, end, unscored = rows[number]
            first = len(columns[0])
            write(end, len(start), sequence, number)
            for column, token in enumerate(end[unscored:]):
                position = first + unscored + column
                source = position - 1 if position > first else last_shared
                if source >= 0:
                    targets[number, column], sources[number, column] = token, source
    names = ("input_ids", "position_ids", SEQUENCES, ROWS)
    batch = {name: torch.tensor([column]) for name, column in zip(names, columns, strict=True)}
    return {**batch, TARGETS: targets, SOURCES: sources}


class Arranged(NamedTuple):
    """The tokens of a packed batch in the form that a model takes.

    Attributes:
        inputs: Keyword arguments of the model, [B, T] each.
        positions: Position in 0..B*T that predicts each target, [rows, C].
        sequences: Sequence of each token, [B, T], -1 in padding.
        rows: Row of each token, [B, T], -1 for shared tokens and padding.
    """

    inputs: dict[str, Any]
    positions: Tensor
    sequences: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Packed:
    """The tokens of a packed batch, [N] each, and the positions that predict its targets, [rows, C].

    Attributes:
        shares: True if a sequence may hold several rows.
    """

    ids: Tensor
    positions: Tensor
    sequences: Tensor
    rows: Tensor
    sources: Tensor
    shares: bool

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Packed:
        """Read the tensors that `pack` wrote."""
        ids, positions, sequences, rows = (
            batch[name].reshape(-1) for name in ("input_ids", "position_ids", SEQUENCES, ROWS)
        )
        return cls(ids, positions, sequences, rows, batch[SOURCES], bool(batch[SHARED]))

    def to(self, device: torch.device) -> Packed:
        """The same tokens on a device."""
        names = ("ids", "positions", "sequences", "rows", "sources")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def arranged(self, one_row: bool) -> Arranged:
        """All sequences in one row, or in as few rows as possible of the longest sequence's length.

        Attention costs the square of a row's length unless its kernel skips what lies between sequences.
        """
        lengths = torch.bincount(self.sequences).tolist()
        width = sum(lengths) if one_row else max(lengths)
        count, firsts = _bins(lengths, width)
        device = self.ids.device
        starts = torch.tensor([0, *lengths[:-1]], device=device).cumsum(0)
        shift = torch.tensor(firsts, device=device) - starts
        positions = torch.arange(len(self.ids), device=device) + shift[self.sequences]

        def spread(values: Tensor, padding: int) -> Tensor:
            grid = values.new_full((count * width,), padding)
            return grid.index_copy_(0, positions, values).view(count, width)

        return Arranged(
            {"input_ids": spread(self.ids, 0), "position_ids": spread(self.positions, 0)},
            positions[self.sources],
            spread(self.sequences, -1),
            spread(self.rows, -1),
        )

    def in_order(self, order: Tensor) -> Arranged:
        """All tokens in one row, in another order, [N]: for attention that does not go by their places."""
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        ids, positions, sequences, rows = (
            values[order][None] for values in (self.ids, self.positions, self.sequences, self.rows)
        )
        inputs = {"input_ids": ids, "position_ids": positions}
        return Arranged(inputs, places[self.sources], sequences, rows)

    def padded(self) -> Arranged:
        """Padded rows, each with its own copy of the prompt, for models that support nothing else."""
        whole = self.whole_rows()
        shape = (len(whole), max(map(len, whole)))
        ids, mask = self.ids.new_zeros(shape), self.ids.new_zeros(shape)
        positions = torch.zeros_like(self.sources)
        for row, tokens in enumerate(whole):
            ids[row, : len(tokens)] = self.ids[tokens]
            mask[row, : len(tokens)] = 1
            column = torch.searchsorted(tokens, self.sources[row]).clamp(max=len(tokens) - 1)
            positions[row] = row * shape[1] + column
        numbers = torch.arange(len(whole), device=mask.device)[:, None].expand(shape)
        rows = torch.where(mask.bool(), numbers, -1)
        return Arranged({"input_ids": ids, "attention_mask": mask}, positions, rows, rows)

    def whole_rows(self) -> list[Tensor]:
        """Positions of the tokens of each row in order, the shared prompt first.

        Models reject empty rows, so a row whose completion was cut away keeps one token.
        """
        rows = []
        for row in range(len(self.sources)):
            own = self.rows == row
            sequence = self.sequences[own][:1] if own.any() else self.sequences.new_full((1,), -1)
            in_row = own | ((self.rows < 0) & (self.sequences == sequence))
            tokens = in_row.nonzero().squeeze(-1)
            rows.append(tokens if len(tokens) else tokens.new_zeros(1))
        return rows


def _bins(lengths: list[int], width: int) -> tuple[int, list[int]]:
    """First-fit packing, longest first: number of rows of that width, and the offset of each sequence."""
    free: list[int] = []
    firsts = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, space in enumerate(free) if space >= lengths[index]), len(free))
        if row == len(free):
            free.append(width)
        firsts[index] = row * width + width - free[row]
        free[row] -= lengths[index]
    return len(free), firsts
