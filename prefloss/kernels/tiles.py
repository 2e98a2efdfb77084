"""How logits [n, V] are cut into tiles, and what a pass over one tile needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prefloss.kernels.naive import LogitTransform

# Elements of the tile of logits between two matmuls, which must be large to keep a device busy: 2**26 are
# 256 MiB of float32, or 512 rows of a vocabulary of 128k.
MATMUL_ELEMENTS = 2**26
# A CPU needs fewer, and 16 MiB stay in its cache.
CPU_MATMUL_ELEMENTS = 2**22
# Columns of a tile for Triton at most: one program holds a row of it in registers.
TILE_COLUMNS = 2**14
# A GPU multiplies blocks of so many rows and columns; a part of a block takes as long as all of it.
MATMUL_BLOCK = 128


class TileSpec(NamedTuple):
    """What a pass over a tile of logits, [m, w], from column `first` of the vocabulary on, needs besides the logits.

    Targets, [m], are those in the whole vocabulary. A negative one marks a row to leave out. One of V, as in another
    shard of the vocabulary, has log-prob -inf and no gradient of its own. One above V is a mistake.
    """

    targets: Tensor
    first: int
    transform: LogitTransform


class LinearInputs(NamedTuple):
    """Hidden states, the head that gives their logits, transform(x @ weight.T + bias), and the targets.

    Shapes: x [..., H], weight [V, H], bias [V] or None, targets [...]; once the tokens that count are selected, x is
    [n, H] and targets are [n].
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    transform: LogitTransform


class Grid(NamedTuple):
    """Logits [n, V] cut into tiles: slabs of tokens by spans of the vocabulary, both in order."""

    slabs: list[slice]
    spans: list[slice]

    @property
    def height(self) -> int:
        """Tokens of the largest slab."""
        return self.slabs[0].stop if self.slabs else 0

    @property
    def width(self) -> int:
        """Columns of the widest span."""
        return self.spans[0].stop


class Numerators(NamedTuple):
    """Softmax numerators of a tile, [m, w], each exp(z - reference of its row) times the slope of z, 0 at the target.

    `rescale`, [m], brings the sums of earlier tiles to this reference; None if there are none.
    """

    values: Tensor
    rescale: Tensor | None


class Finished(NamedTuple):
    """Of the rows of a slab, [m]: `scale` times `Numerators` is p times its slope, `picked` the logit of the target."""

    scale: Tensor
    picked: Tensor


def select_targets(targets: Tensor, ignore_index: int) -> Tensor:
    """Positions of the targets that count among all, flattened, [n]. An accelerator waits for this."""
    return torch.nonzero(targets.reshape(-1) != ignore_index).squeeze(-1)


def slices(n: int, size: int, start: int = 0) -> Iterator[slice]:
    """start..n in steps of `size`."""
    for first in range(start, n, size):
        yield slice(first, min(first + size, n))


def even(total: int, most: int) -> int:
    """Size of a part if `total` is cut into the fewest parts of about one size, none above `most`; at least 1."""
    parts = -(-total // max(1, most))
    return max(1, -(-total // max(1, parts)))


def rows_of(x: Tensor, elements: int) -> int:
    """How many rows of x hold that many elements, at least 1."""
    return max(1, elements // max(1, x.shape[-1]))


def on_cpu(x: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return x.device.type == "cpu"


def default_chunk(tokens: int, vocabulary: int, cpu: bool) -> int:
    """`Plan.chunk_tokens` of the fewest tiles within the limits above, all of about one size."""
    return even(tokens, (CPU_MATMUL_ELEMENTS if cpu else MATMUL_ELEMENTS) // max(1, vocabulary))


def tile_columns(vocabulary: int) -> int:
    """Columns of a span for Triton."""
    return min(vocabulary, _up(even(vocabulary, TILE_COLUMNS)))


def tile_shape(tokens: int, vocabulary: int, elements: int) -> tuple[int, int]:
    """Rows and columns of tiles of at most about so many logits for Triton, in whole blocks of a matmul if possible."""
    columns = tile_columns(vocabulary)
    rows = max(1, elements // columns)
    if rows >= MATMUL_BLOCK:
        rows -= rows % MATMUL_BLOCK
    if tokens <= rows:
        return max(1, tokens), columns
    return min(rows, _up(even(tokens, rows))), columns


def padded(columns: int) -> int:
    """Elements from one row of a tile to the next: aligned rows, which wide loads and fast matmuls need."""
    return -(-columns // 64) * 64


def _up(size: int) -> int:
    return -(-size // MATMUL_BLOCK) * MATMUL_BLOCK
