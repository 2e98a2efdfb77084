"""Batches without padding: sequences one after another in one row, each prompt once where completions share it.

`pack` writes the batch for the collator; `Packed` reads it, or padded rows, and arranges the tokens for a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloss.data.tokens import Encoded, pad
from prefloss.logratios import IGNORE_INDEX, completion_targets

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


PROMPTS = "shared_prompts"
"""What padded rows hold besides their tokens if they may run in another layout, [rows, 2]: a number that rows with one
prompt have in common, and the length of what they share, tokens."""


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
    padded = pad([examples[i][j] for i, j in order], 0, max_length)
    packed = Packed.of_padded(padded, prompts(examples, order, share, max_length), share)
    found = completion_targets(padded["input_ids"], padded["completion_mask"])
    scored = found != IGNORE_INDEX
    counts = scored.sum(1, keepdim=True)
    targets = found.new_full((len(found), max(1, int(counts.max()))), IGNORE_INDEX)
    aligned = torch.arange(targets.shape[1]) < counts
    return {
        "input_ids": packed.ids[None],
        "position_ids": packed.positions[None],
        SEQUENCES: packed.sequences[None],
        ROWS: packed.rows[None],
        TARGETS: targets.masked_scatter(aligned, found[scored]),
        SOURCES: torch.zeros_like(targets).masked_scatter(aligned, packed.sources[scored]),
        SHARED: torch.tensor([share]),
    }


def prompts(
    examples: Sequence[Sequence[Encoded]],
    order: Sequence[tuple[int, int]],
    share: bool,
    max_length: int | None,
) -> Tensor:
    """What the rows of a batch have in common, see `PROMPTS`. Arguments as for `pack`."""
    numbers: dict[Any, int] = {}
    found = []
    common = [_common([prompt for prompt, _ in example]) for example in examples]
    for row, (i, j) in enumerate(order):
        prompt, completion = examples[i][j]
        length = len(prompt) + len(completion)
        shared = min(
            common[i] if share else len(prompt), length if max_length is None else min(length, max_length)
        )
        number = numbers.setdefault(tuple(prompt[:shared]), row) if share and shared else row
        found.append((number, shared))
    return torch.tensor(found)


def _common(prompts: list[list[int]]) -> int:
    """Length of the longest common prefix."""
    same = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
    return sum(itertools.takewhile(bool, same))


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

    @classmethod
    def of_padded(cls, inputs: Mapping[str, Tensor], prompts: Tensor, share: bool) -> Packed:
        """The tokens of padded rows, whose shape [rows, T] their sources keep.

        Args:
            inputs: `input_ids` and `attention_mask`, [rows, T] each.
            prompts: See `PROMPTS`. Rows whose prompts differ after all share nothing.
            share: Keep the tokens once that rows share.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        own = torch.arange(len(ids), device=ids.device)
        number, length = prompts.unbind(1)
        in_prompt = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
        first = (number[:, None] == number).int().argmax(1) if share else own
        same = ((ids == ids[first]) & mask & mask[first]) | ~in_prompt
        first = torch.where(same.all(1) & (length == length[first]), first, own)
        kept = mask & (~in_prompt | (first == own)[:, None])
        order = first.argsort(stable=True)
        row, column = kept[order].nonzero().unbind(1)
        row = order[row]
        places = torch.zeros_like(ids)
        places[row, column] = torch.arange(len(row), device=ids.device)
        _, sequences = torch.unique_consecutive(first[row], return_inverse=True)
        return cls(
            ids[row, column],
            column,
            sequences,
            torch.where(in_prompt[row, column], -1, row),
            torch.where(in_prompt, places[first], places),
            share,
        )

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
        count, firsts = bins(lengths, width)
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


def bins(lengths: list[int], width: int) -> tuple[int, list[int]]:
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
