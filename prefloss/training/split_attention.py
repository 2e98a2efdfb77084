"""Attention over a row of many sequences without a mask over the row.

A sequence without branches attends to itself, causally. Completions that share a prompt attend, as rows of a batch, to
the prompt's keys and values followed by their own. Both go through the model's own attention function, so grouped
heads, scaling, soft-caps and sinks are its own. Prefix Grouper (arXiv 2506.05433) splits attention the same way.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloss.training.branched_attention import branched_attention, flat, stacked, supported

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers; a marker mask of width n stands for the n-th."""
ARGUMENT = "prefloss_sequences"
"""Keyword argument of a model's forward that carries the `Sequences` to its attention."""

# Names in the files of models.
_EAGER, _TABLE = "eager_attention_forward", "ALL_ATTENTION_FUNCTIONS"
# Shorter sequences are padded to the longest of their call where that adds at most this part.
_PADDING = 0.1


class Call(NamedTuple):
    """Sequences that one attention call computes.

    Attributes:
        lengths: Tokens of each, the longest first.
        prompt: Sequence whose keys and values come before those of each: its place among all without one; or None.
    """

    lengths: tuple[int, ...]
    prompt: int | None

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of one row, [1, N] tokens, as attention calls: their tokens stand in the row in the calls' order.

    Attributes:
        calls: Those without a prompt first.
        limits: Tokens that a token reaches, by kind of layer; None for all.
    """

    calls: tuple[Call, ...]
    limits: dict[str, int | None]
    _masks: dict[Any, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, sequences: Tensor, rows: Tensor, limits: dict[str, int | None]) -> tuple[Sequences, Tensor]:
        """Read the sequence and the row of each token, [N] each, as a packed batch has them.

        Args:
            sequences: Sequence of each token; the tokens of a sequence are neighbours.
            rows: Row of each token, -1 for a prompt that the rows of its sequence share.
            limits: As the attribute.

        Returns:
            The sequences, and the tokens in the order of their calls, [N].
        """
        alone: list[range] = []
        families: list[tuple[range, list[range]]] = []
        for prompt, *completions in _pieces(sequences, rows):
            if len(completions) > 1:
                alone.append(prompt)
                families.append((prompt, completions))
            else:
                # One completion follows its prompt like any other tokens.
                alone.append(range(prompt.start, completions[-1].stop if completions else prompt.stop))
        together = [(pieces, None) for pieces in alike(alone)]
        first = [piece.start for pieces, _ in together for piece in pieces]
        together += [(pieces, first.index(prompt.start)) for prompt, own in families for pieces in alike(own)]
        calls = tuple(Call(tuple(map(len, pieces)), prompt) for pieces, prompt in together)
        tokens = [token for pieces, _ in together for piece in pieces for token in piece]
        return cls(calls, limits), torch.tensor(tokens, device=rows.device)

    def markers(self, device: torch.device) -> Any:
        """What a model takes as its mask; its width tells an attention function the kind of its layer."""
        marks = {
            kind: torch.ones(1, 1, 1, KINDS.index(kind) + 1, dtype=torch.bool, device=device)
            for kind in self.limits
        }
        return marks if len(marks) > 1 else next(iter(marks.values()))

    def attend(self, attention: Attention, states: Sequence[Tensor], marker: Tensor) -> Tensor:
        """Attention of every token, [1, N, heads, D].

        Args:
            attention: The model's.
            states: Queries, keys and values of the row, [1, heads, N, D] each.
            marker: From `markers`.

        Raises:
            RuntimeError: If the model put a mask of its own in the marker's place.
        """
        if not isinstance(marker, Tensor) or marker.shape[-1] > len(KINDS):
            raise RuntimeError(
                "layout: got a mask of the model's own, expected the one that it was given; train on padded rows"
            )
        kind = KINDS[marker.shape[-1] - 1]
        # One split, whose backward pass is one concatenation.
        blocks = (item.split([call.tokens for call in self.calls], 2) for item in states)
        prompts: list[tuple[Tensor, Tensor]] = []
        results = []
        for call, query, key, value in zip(self.calls, *blocks, strict=True):
            if call.prompt is None:
                prompts += zip(key.split(call.lengths, 2), value.split(call.lengths, 2), strict=True)
            block = Block(
                query, key, value, call.lengths, None if call.prompt is None else prompts[call.prompt]
            )
            results.append(attention(block, self.limits[kind], functools.partial(self._mask, kind, block)))
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    def _mask(self, kind: str, block: Block, causal: bool) -> Tensor | None:
        """For the longest sequence of a block, [1, 1, own, before + own]; the shorter ones are filled up at their end.

        Args:
            kind: Of the layer.
            block: Gives lengths, device and dtype.
            causal: Whether the attention is causal without a mask; None then stands for a causal mask.
        """
        limit, own = self.limits[kind], block.lengths[0]
        before = 0 if block.prompt is None else block.prompt[0].shape[2]
        key = (limit and kind, before, own)
        if key not in self._masks:
            plain = causal and not before and (limit is None or own <= limit)
            self._masks[key] = None if plain else _lower_right(kind, limit, before, own, block.query)
        return self._masks[key]


class Block(NamedTuple):
    """What one attention call reads.

    Attributes:
        query: Of all sequences, one after another, [1, heads, N, D].
        key: The same, [1, key heads, N, D].
        value: The same.
        lengths: Tokens of each sequence, the longest first.
        prompt: Keys and values that come before those of every sequence, [1, key heads, P, D] each, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: tuple[int, ...]
    prompt: tuple[Tensor, Tensor] | None

    def keys_of_rows(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each sequence, the prompt's first."""
        before = self.prompt or (self.key[:, :, :0], self.value[:, :, :0])
        key, value = (
            [torch.cat([first, own], 2) for own in item.split(self.lengths, 2)]
            for first, item in zip(before, (self.key, self.value), strict=True)
        )
        return key, value


Attention = Callable[[Block, int | None, Callable[[bool], Any]], Tensor]
"""Takes a block, the tokens that a token reaches, and what makes its mask; returns [1, N, heads, D]."""


def alike(pieces: Sequence[range]) -> list[list[range]]:
    """Sequences for one call each, the longest first, so that padding adds a small part."""
    calls: list[list[range]] = []
    tokens = 0
    for piece in sorted(pieces, key=len, reverse=True):
        call = calls[-1] if calls else []
        if call and (len(call) + 1) * len(call[0]) <= (1 + _PADDING) * (tokens + len(piece)):
            call.append(piece)
            tokens += len(piece)
        else:
            calls.append([piece])
            tokens = len(piece)
    return calls


def register(name: str, policy: nn.Module) -> None:
    """Let the attention functions that a model of transformers calls take `Sequences`.

    Calls without the argument reach the functions as before.

    Args:
        name: Of its attention.
        policy: The model, unwrapped.
    """
    for file in {sys.modules[type(layer).__module__] for layer in policy.modules()}:
        # Eager attention is a function of each model's file; the others stand in a table that the files share.
        functions = vars(file) if name == "eager" else getattr(file, _TABLE, {})
        key = _EAGER if name == "eager" else name
        if key in functions and not hasattr(functions[key], ARGUMENT):
            functions[key] = _split(functions[key], name)


def _split(own: Callable[..., Any], name: str) -> Callable[..., Any]:
    # Lengths change with every batch: compiled, each would be another program. Here, as it loads torch's compiler.
    attend: Any = torch.compiler.disable()(Sequences.attend)

    @functools.wraps(own)
    def attention(module: Any, *args: Any, **options: Any) -> Any:
        sequences = options.pop(ARGUMENT, None)
        if sequences is None:
            return own(module, *args, **options)
        query, key, value, *masks = args
        # Some models give the mask by name.
        mask = masks[0] if masks else options.pop("attention_mask", None)
        of_block = _attention(name, functools.partial(own, module, **options), options)
        return attend(sequences, of_block, (query, key, value), mask), None

    setattr(attention, ARGUMENT, True)
    return attention


def _attention(name: str, own: Callable[..., Any], options: dict[str, Any]) -> Attention:
    """How an attention function of transformers computes a block."""
    if name.startswith("flash"):
        return lambda block, limit, mask: _varlen(own, block)
    if name == "eager":
        return lambda block, limit, mask: _in_rows(own, block, mask(False))
    plain = not options.get("dropout") and options.get("position_bias") is None

    def sdpa(block: Block, limit: int | None, mask: Callable[[bool], Any]) -> Tensor:
        if plain and limit is None and block.prompt is not None and supported(*block[:3]):
            return branched_attention(
                *block[:3], block.prompt, block.lengths, options.get("scaling")
            ).transpose(1, 2)
        return _in_rows(own, block, mask(True))

    return sdpa


def _in_rows(own: Callable[..., Any], block: Block, mask: Tensor | None) -> Tensor:
    """As a batch of rows that are filled up with zeros at their end, which no token before it reads."""
    query = stacked(block.query, block.lengths)
    if block.prompt is None:
        key, value = (stacked(item, block.lengths) for item in (block.key, block.value))
    else:
        key, value = (
            torch.cat([first.expand(len(rows), -1, -1, -1), rows], 2)
            for first, rows in zip(
                block.prompt, (stacked(item, block.lengths) for item in block[1:3]), strict=True
            )
        )
    found, _ = own(query, key, value, mask)
    return flat(found.transpose(1, 2), block.lengths).transpose(1, 2)


def _varlen(own: Callable[..., Any], block: Block) -> Tensor:
    """As one row, of which FlashAttention gets the lengths; its causal mask is from the lower right."""
    before = 0 if block.prompt is None else block.prompt[0].shape[2]
    key, value = (torch.cat(items, 2) for items in block.keys_of_rows())
    bounds: dict[str, Any] = {}
    for side, more in (("q", 0), ("k", before)):
        ends = list(itertools.accumulate((length + more for length in block.lengths), initial=0))
        bounds[f"cu_seq_lens_{side}"] = torch.tensor(ends, dtype=torch.int32, device=key.device)
        bounds[f"max_length_{side}"] = block.lengths[0] + more
    return own(block.query, key, value, None, **bounds)[0]


def _pieces(sequences: Tensor, rows: Tensor) -> list[list[range]]:
    """Positions of the tokens of each sequence: of its prompt, then of each of its rows."""
    runs, counts = torch.unique_consecutive(torch.stack([sequences, rows]), dim=1, return_counts=True)
    ends = itertools.accumulate(counts.tolist())
    pieces = [(range(end - count, end)) for end, count in zip(ends, counts.tolist(), strict=True)]
    grouped = itertools.groupby(zip(runs[0].tolist(), pieces, strict=True), key=lambda item: item[0])
    return [[piece for _, piece in group] for _, group in grouped]


def _lower_right(kind: str, limit: int | None, before: int, own: int, like: Tensor) -> Tensor:
    key = torch.arange(before + own, device=like.device)
    query = key[before:, None]
    allowed = key <= query
    if limit is not None:
        allowed &= query - key < limit if kind == "sliding_attention" else query // limit == key // limit
    # Eager attention adds its mask, and SDPA on a CPU converts a boolean one like this in every layer.
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, lowest)[
        None, None
    ]
