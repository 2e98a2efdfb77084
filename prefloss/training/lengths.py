"""How many tokens the examples of a data set take in a batch, by the layout that computes them."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefloss.arguments import instance
from prefloss.data.errors import DataError
from prefloss.data.examples import read_example
from prefloss.data.row_file import rows_in
from prefloss.data.rows import kind_text
from prefloss.data.tokens import Encoded
from prefloss.feedback import Labels
from prefloss.training import distributed
from prefloss.training.collator import PreferenceCollator

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
# A batch needs two examples for mismatched rows.
_PAIRED_UP = 2


@dataclass(frozen=True)
class Lengths:
    """Tokens of each example of a data set.

    Attributes:
        tokens: Of the longest row of each example where rows are padded, [examples, 1]; prompt and completion apart
            where a prompt may get another's completion, [examples, 2]; else all tokens of the example, [examples, 1].
            int32.
        rows: Rows of each example, [examples], int32.
        padded: Whether a batch is padded to its longest row.
        longest: Tokens that padded rows are cut to, or None.
        least: Fewest examples of a batch.
    """

    tokens: Tensor
    rows: Tensor
    padded: bool = True
    longest: int | None = None
    least: int = 1

    @classmethod
    def of(cls, lengths: Lengths | Sequence[int] | Tensor) -> Lengths:
        """Lengths as they are, or those of examples that are one padded row each.

        Raises:
            TypeError: If they are no whole numbers.
            ValueError: If one is below 1, or there are none.
        """
        if isinstance(lengths, Lengths):
            return lengths
        try:
            values = torch.as_tensor(lengths).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"lengths: got {type(lengths).__name__}, expected a list of whole numbers"
            ) from error
        if values.dim() != 1 or (len(values) and values.dtype not in _WHOLE):
            raise TypeError(
                f"lengths: got {values.dtype} of shape {list(values.shape)}, expected whole numbers, [examples]; or "
                "Lengths, as token_lengths gives"
            )
        if len(values) and not 1 <= int(values.min()) <= int(values.max()) < 2**31:
            place = int(((values < 1) | (values >= 2**31)).nonzero()[0])
            raise ValueError(
                f"lengths: got {int(values[place])} at {place}, expected at least 1 and below 2**31"
            )
        return cls(values.int()[:, None], torch.ones(len(values), dtype=torch.int32))

    def __len__(self) -> int:
        return len(self.rows)

    def of_batch(self, examples: Sequence[int] | Tensor) -> int:
        """Tokens that a batch of these examples takes, at most: rows x the longest, or their sum."""
        tokens, rows = self.tokens[examples].long(), self.rows[examples].long()
        if not self.padded:
            return int(tokens.sum())
        return int(rows.sum()) * self.width(tokens.amax(0).tolist())

    def width(self, parts: Sequence[int]) -> int:
        """Tokens of a row whose parts have these lengths."""
        return sum(parts) if self.longest is None else min(sum(parts), self.longest)


def token_lengths(data: Any, collator: PreferenceCollator) -> Lengths:
    """Read the whole data set once, tokenise it as the collator will, and keep the number of tokens.

    Several processes read a part each; all of them must call this. Keeps 8 or 12 bytes an example.

    Args:
        data: Rows of columns, with a length: a `datasets.Dataset`, or a list.
        collator: Makes the batches. Its layout says what is counted: padded rows, with `layout="packed"` all
            tokens, with "shared_prefix" the prompt of an example once.

    Raises:
        TypeError: If the data have no length, as streamed data, or the collator is another.
        DataError: If a row is not what its columns say.
    """
    instance("collator", collator, PreferenceCollator, "a PreferenceCollator")
    if isinstance(data, Mapping | str) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"data: got {type(data).__name__}, expected rows that have a length, as a list or a datasets.Dataset; the "
            "lengths of streamed data are not known before training"
        )
    share = distributed.share()
    size = -(-len(data) // share.size)
    mine = range(min(len(data), share.rank * size), min(len(data), (share.rank + 1) * size))
    counts = array("i")
    for found in share.together(lambda: _counts(data, mine, collator)):
        counts.extend(found)
    table = torch.frombuffer(counts, dtype=torch.int32) if counts else torch.zeros(0, dtype=torch.int32)
    table = table.view(-1, 3 if collator.mismatched else 2)
    return Lengths(
        table[:, :-1].clone(),
        table[:, -1].clone(),
        padded=_pads(collator),
        longest=collator.max_length if _pads(collator) else None,
        least=_PAIRED_UP if collator.mismatched else 1,
    )


def _counts(data: Any, indices: range, collator: PreferenceCollator) -> array[int]:
    """Tokens and rows of some examples, one after the other."""
    counts = array("i")
    for index, row in zip(indices, _rows(data, indices, collator), strict=True):
        instance(f"row {index}", row, Mapping, "a row: column -> value")
        columns = {name: value for name, value in row.items() if name not in collator.model_inputs}
        example = read_example(index, columns, collator.tokenizer, f"row {index}", allow_empty=True)
        if collator.mismatched and example.kind is not Labels:
            raise DataError(f"mismatched: got data of {kind_text(example.kind)}, expected labels")
        counts.extend(_of_example(example.rows, collator))
    return counts


def _rows(data: Any, indices: range, collator: PreferenceCollator) -> Iterator[Any]:
    if not hasattr(data, "select_columns") or data.format["type"] == "custom":
        yield from (data[index] for index in indices)
    else:
        # Images are large, and not read.
        names = [name for name in data.column_names if name not in collator.model_inputs]
        yield from rows_in(data.select(indices), names)


def _of_example(rows: list[Encoded], collator: PreferenceCollator) -> tuple[int, ...]:
    """Tokens of an example as `Lengths` has them, then its rows."""
    most = collator.max_length
    if collator.mismatched:
        parts = [len(ids[:most]) for ids in rows[0]]
        return (*parts, 1) if _pads(collator) else (sum(parts), 0, 1)
    whole = [len((prompt + completion)[:most]) for prompt, completion in rows]
    if _pads(collator):
        return max(1, *whole), len(rows)
    # As `pack` shares them.
    same = (len(set(tokens)) == 1 for tokens in zip(*(prompt for prompt, _ in rows), strict=False))
    shared = sum(itertools.takewhile(bool, same)) if collator.layout == "shared_prefix" else 0
    again = sum(min(shared, length) for length in whole[1:])
    return max(1, sum(whole) - again), 1


def _pads(collator: PreferenceCollator) -> bool:
    """Whether batches are counted as padded rows; a layout that is chosen for each batch may take fewer tokens."""
    return collator.layout not in ("packed", "shared_prefix")
