"""The scores of a chunk of rows, as a part of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa

import prefloss
from prefloss.cli.console import CliError
from prefloss.cli.scoring.parts import SCHEMA
from prefloss.cli.scoring.rows import Row
from prefloss.data.examples import read_example


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
    owners = [row for row in rows for _ in row.completions]
    sides = [side for row in rows for side in row.kind.sides(len(row.completions))]
    names = [f"{row.place}: {side}" for row, side in zip(owners, sides, strict=True)]
    encoded = []
    for row in rows:
        columns = {
            "prompt": row.prompt,
            "completions": row.completions,
            "scores": [0.0] * len(row.completions),
        }
        encoded += read_example(row.number, columns, scorer.tokenizer, place=row.place).rows
    for name, (prompt, completion) in zip(names, encoded, strict=True):
        if max(prompt + completion, default=0) >= embedded:
            raise CliError(
                f"{name}: holds the token id {max(prompt + completion)}, expected ids below {embedded}, as many as the "
                "models embed; is the tokenizer that of both?"
            )
    try:
        scores = scorer.encoded(encoded, names=names, per_token=per_token)
    except (ValueError, TypeError, FloatingPointError) as error:
        words = (
            str(error)
            .replace("allow_truncation=True", "--allow-truncation")
            .replace("max_length=", "--max-length")
        )
        raise CliError(words) from error
    for name, reward in zip(names, scores.reward.tolist(), strict=True):
        if not math.isfinite(reward):
            raise CliError(f"{name}: its reward is {reward}, expected a finite number; use another --loss or --dtype")
    none = [None] * len(owners)
    columns = {
        "row": [row.number for row in owners],
        "side": sides,
        "reward": scores.reward.tolist(),
        "logp": scores.logp.tolist(),
        "ref_logp": none if scores.ref_logp is None else scores.ref_logp.tolist(),
        "tokens": scores.tokens.tolist(),
        "truncated": scores.truncated.tolist(),
        "token_ids": [ids.tolist() for ids in scores.token_ids or ()] or none,
        "token_rewards": [values.tolist() for values in scores.token_rewards or ()] or none,
        "given": [score for row in rows for score in row.scores or [None] * len(row.completions)],
        "subset": [row.subset for row in owners],
        "id": [str(row.other["id"]) if "id" in row.other else None for row in owners],
    }
    return pa.table(columns, schema=SCHEMA)
