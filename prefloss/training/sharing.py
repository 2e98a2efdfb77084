"""Completions in batches of similar length, at most so many tokens each; completions of one prompt share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from prefloss.data.tokens import Encoded, pad
from prefloss.logratios import completion_targets
from prefloss.training.batch import Rows
from prefloss.training.layouts import TARGETS, Packed, pack

# Sharing needs attention calls of its own, so it must save at least this part of the tokens.
_SAVED = 0.2


def token_logps(
    rows: Sequence[Encoded],
    compute: Callable[[Rows], Tensor],
    limit: int,
    names: Sequence[str],
    whose: str,
) -> list[Tensor]:
    """Log-probs of the tokens of each completion, [T], nats, float64, on the CPU.

    Args:
        rows: Token ids of prompts and completions.
        compute: Gives the log-prob of each target of a batch.
        limit: Tokens of a batch, at most; a longer row is a batch of its own.
        names: What messages call each row.
        whose: Model that gives the log-probs, for messages.

    Raises:
        FloatingPointError: If a log-prob is not finite.
    """
    found: dict[int, Tensor] = {}
    for numbers, batch in _batches(rows, limit):
        logps, scored = compute(batch).cpu().double(), batch.targets >= 0
        for number, mask, row in zip(numbers, scored, logps, strict=True):
            values = found[number] = row[mask]
            wrong = ~values.isfinite()
            if wrong.any():
                place = int(wrong.nonzero()[0])
                raise FloatingPointError(
                    f"{names[number]}: the log-prob of token {place + 1} of {len(values)} is {values[place]:g} under "
                    f"{whose}; check its weights, and whether its precision has the range (float16 often lacks it)"
                )
    return [found[number] for number in range(len(rows))]


def _batches(rows: Sequence[Encoded], limit: int) -> Iterator[tuple[list[int], Rows]]:
    """Batches of completions, each with the numbers of its rows."""
    alone: list[list[int]] = []
    shared: list[list[int]] = []
    for members in _by_prompt(rows).values():
        for group in _within(rows, members, limit):
            whole = sum(len(prompt) + len(completion) for prompt, completion in (rows[i] for i in group))
            if whole - _length(rows, group) >= _SAVED * whole:
                shared.append(group)
            else:
                alone.extend([i] for i in group)
    for picked in _filled(rows, alone, limit, padded=True):
        numbers = [i for group in picked for i in group]
        batch = pad([rows[i] for i in numbers], 0)
        targets = completion_targets(batch["input_ids"], batch.pop("completion_mask"))
        yield numbers, Rows(batch, targets)
    for picked in _filled(rows, shared, limit, padded=False):
        numbers = [i for group in picked for i in group]
        order = [(g, j) for g, group in enumerate(picked) for j in range(len(group))]
        packed = pack([[rows[i] for i in group] for group in picked], order, True, None)
        yield numbers, Rows({}, packed[TARGETS], Packed.of(packed))


def _by_prompt(rows: Sequence[Encoded]) -> dict[tuple[int, ...], list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, _) in enumerate(rows):
        groups.setdefault(tuple(prompt), []).append(i)
    return groups


def _within(rows: Sequence[Encoded], members: list[int], limit: int) -> Iterator[list[int]]:
    """The completions of a prompt in groups of at most `limit` tokens, the prompt included."""
    group: list[int] = []
    length = 0
    for i in members:
        prompt, completion = rows[i]
        if group and length + len(completion) > limit:
            yield group
            group = []
        length = len(completion) + (length if group else len(prompt))
        group.append(i)
    yield group


def _length(rows: Sequence[Encoded], group: list[int]) -> int:
    """Tokens of a group that shares its prompt."""
    return len(rows[group[0]][0]) + sum(len(rows[i][1]) for i in group)


def _filled(
    rows: Sequence[Encoded], groups: list[list[int]], limit: int, *, padded: bool
) -> Iterator[list[list[int]]]:
    """Groups of similar length, together at most `limit` tokens; padded ones count as the longest of them."""
    batch: list[list[int]] = []
    total = 0
    # The longest first, so that a lack of memory shows at once.
    for group in sorted(groups, key=lambda group: -_length(rows, group)):
        length = _length(rows, batch[0] if padded and batch else group)
        if batch and total + length > limit:
            yield batch
            batch, total, length = [], 0, _length(rows, group)
        batch.append(group)
        total += length
    if batch:
        yield batch
