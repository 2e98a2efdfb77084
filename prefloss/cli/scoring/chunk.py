"""The scores of a chunk of rows, as a part of the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from prefloss.cli.console import CliError
from prefloss.cli.scoring.parts import SCHEMA
from prefloss.cli.scoring.rows import Row

Scorer = Callable[..., Any]
"""Called as a `prefloss.Scorer` is."""


def score_chunk(scorer: Scorer, rows: Sequence[Row], first: int, *, per_token: bool) -> pa.Table:
    """Score rows.

    Args:
        scorer: Gives the rewards.
        rows: The rows.
        first: Number of the first.
        per_token: Whether each token's reward is wanted.

    Raises:
        CliError: If a row cannot be scored; the message names it.
    """
    try:
        scores = _called(scorer, rows, per_token)
    except (ValueError, TypeError, FloatingPointError) as error:
        for row in rows:
            _check_alone(scorer, row, per_token)
        raise CliError(str(error)) from error
    numbers, sides, given = [], [], []
    for number, row in enumerate(rows, start=first):
        count = len(row.completions)
        numbers += [number] * count
        sides += row.kind.sides(count)
        given += row.scores or [None] * count
    owners = [rows[number - first] for number in numbers]
    rewards = scores.reward.tolist()
    for owner, side, reward in zip(owners, sides, rewards, strict=True):
        if not math.isfinite(reward):
            raise CliError(
                f"{owner.place}: the reward of {side} is {reward}; expected a model of finite log-probs"
            )
    none = [None] * len(rewards)
    columns = {
        "row": numbers,
        "side": sides,
        "reward": rewards,
        "logp": scores.logp.tolist(),
        "ref_logp": none if scores.ref_logp is None else scores.ref_logp.tolist(),
        "tokens": scores.tokens.tolist(),
        "truncated": scores.truncated.tolist(),
        "token_ids": [_listed(ids) for ids in scores.token_ids] if per_token else none,
        "token_rewards": [_listed(values) for values in scores.token_rewards] if per_token else none,
        "given": given,
        "subset": [owner.subset for owner in owners],
        "id": [str(owner.other["id"]) if "id" in owner.other else None for owner in owners],
    }
    return pa.table(columns, schema=SCHEMA)


def _called(scorer: Scorer, rows: Sequence[Row], per_token: bool) -> Any:
    return scorer([row.prompt for row in rows], [row.completions for row in rows], per_token=per_token)


def _check_alone(scorer: Scorer, row: Row, per_token: bool) -> None:
    """Raise the error of this row, if it has one, with its place."""
    try:
        _called(scorer, [row], per_token)
    except (ValueError, TypeError, FloatingPointError) as error:
        raise CliError(f"{row.place}: {error}") from error


def _listed(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
