"""How the linear op goes about its tokens: what it keeps for the backward pass, and how many at a time it takes.

Of n tokens that count, one product with a head of V rows is 2 n V H operations. The schemes:

- "unscaled", for a frozen head: the gradient of each log-prob in its hidden state, [n, H]. It depends on that token
  alone, so backward only scales it. Two products, one tile of memory, any loss.
- "keep": the logits of as many tokens as `kept_tokens` says, in float32, or for half precision in 16 bits each
  (`rows.code_columns`), where the gradient of the head will be (`kept`). Three products, any loss.
- "recompute": nothing; backward computes the logits of each tile again. Four products.
- "score": nothing, for there is no gradient. One product.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from prefloss.kernels.rows import code_columns

Scheme = Literal["score", "unscaled", "keep", "recompute"]

# Elements of the tile of logits between two matmuls, which must be large to keep a device busy: 2**26 are
# 256 MiB of float32, or 512 rows of a vocabulary of 128k.
MATMUL_ELEMENTS = 2**26
# A CPU is busy with fewer, and finds them in its cache: 16 MiB.
_CPU_MATMUL_ELEMENTS = 2**22


class Path(NamedTuple):
    """How the linear op goes about n tokens.

    Attributes:
        scheme: See above.
        chunk_tokens: A tile of logits has as many elements as the logits of so many tokens.
        kept_tokens: Tokens, from the first on, of which the scheme "keep" keeps the logits.
        skip_below: See `prefloss.linear_token_logps`.
    """

    scheme: Scheme = "recompute"
    chunk_tokens: int = 1
    kept_tokens: int = 0
    skip_below: float = 0.0


def even(total: int, most: int) -> int:
    """Size of the fewest parts of about one size that none exceeds `most`, at least 1."""
    parts = -(-total // max(1, most))
    return max(1, -(-total // max(1, parts)))


def default_chunk(tokens: int, vocabulary: int, cpu: bool) -> int:
    """`Path.chunk_tokens` of the fewest tiles within the limits, all of about one size."""
    return even(tokens, (_CPU_MATMUL_ELEMENTS if cpu else MATMUL_ELEMENTS) // max(1, vocabulary))


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the scheme "keep" holds logits of that precision: as they are, or in 16 bits."""
    return torch.int16 if dtype.itemsize == 2 else dtype


def kept_columns(dtype: torch.dtype, vocabulary: int) -> int:
    """Elements per token of what the scheme "keep" holds."""
    return code_columns(vocabulary) if kept_dtype(dtype) == torch.int16 else vocabulary
