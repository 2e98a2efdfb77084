"""The scores of a chunk of rows, as a part of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from torch import Tensor

import prefloss
from prefloss.cli.console import CliError
from prefloss.cli.scoring.parts import SCHEMA
from prefloss.cli.scoring.rows import Row
from prefloss.data.examples import read_example
from prefloss.data.tokens import Encoded


def score_chunk(scorer: prefloss.Scorer, rows: Sequence[Row], *, embedded: int, per_token: bool) -> pa.Table:
    """Score rows.

    Args:
        scorer: Gives the rewards.
        rows: The rows.
        embedded: Number of token ids that the models know.
        per_token: Whether each token's reward is wanted.

    Raises:
        CliError: If a completion cannot be scored; the message names it.
    """
    if not rows:
        return SCHEMA.empty_table()
    owners = [row for row in rows for _ in row.completions]
    sides = [side for row in rows for side in row.kind.sides(len(row.completions))]
    names = [f"{row.place}: {side}" for row, side in zip(owners, sides, strict=True)]
    encoded = [each for row in rows for each in _encoded(scorer.tokenizer, row)]
    for name, (prompt, completion) in zip(names, encoded, strict=True):
        largest = max(prompt + completion, default=0)
        if largest >= embedded:
            raise CliError(
                f"{name}: holds the token id {largest}, expected ids below {embedded}, as many as the models embed; is "
                "the tokenizer that of both?"
            )
    columns = {
        "row": [row.number for row in owners],
        "side": sides,
        **_scored(scorer, encoded, names, per_token),
        "given": [score for row in rows for score in row.scores or [None] * len(row.completions)],
        "subset": [row.subset for row in owners],
        "id": [str(row.other["id"]) if "id" in row.other else None for row in owners],
    }
    none = [None] * len(owners)
    return pa.table({name: columns.get(name, none) for name in SCHEMA.names}, schema=SCHEMA)


def _encoded(tokenizer: Any, row: Row) -> list[Encoded]:
    """Token ids, as training makes them."""
    scores = [0.0] * len(row.completions)
    columns = {"prompt": row.prompt, "completions": row.completions, "scores": scores}
    return read_example(row.number, columns, tokenizer, place=row.place).rows


def _scored(
    scorer: prefloss.Scorer, encoded: Sequence[Encoded], names: Sequence[str], per_token: bool
) -> dict[str, list[Any]]:
    """The scores by the names of their columns.

    Equal completions are scored once: their places in a batch would show in the last digits, and break ties.
    """
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    places = [first.setdefault((tuple(a), tuple(b)), i) for i, (a, b) in enumerate(encoded)]
    once = list(first.values())
    try:
        scores = scorer.encoded(
            [encoded[i] for i in once], names=[names[i] for i in once], per_token=per_token
        )
    except (ValueError, TypeError, FloatingPointError) as error:
        words = str(error).replace("allow_truncation=True", "--allow-truncation")
        raise CliError(words.replace("max_length=", "--max-length")) from error
    number = {i: at for at, i in enumerate(once)}
    columns = {}
    for column, values in vars(scores).items():
        if values is not None:
            listed = values.tolist() if isinstance(values, Tensor) else [value.tolist() for value in values]
            columns[column] = [listed[number[i]] for i in places]
    for name, reward in zip(names, columns["reward"], strict=True):
        if not math.isfinite(reward):
            raise CliError(f"{name}: its reward is {reward}, expected a finite number; try another --dtype")
    return columns
