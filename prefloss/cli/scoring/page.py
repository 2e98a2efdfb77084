"""One HTML page that shows completions with each token coloured by its reward. It loads nothing from the network."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa

from prefloss.cli.scoring.rows import Row, Rows
from prefloss.data.tokens import Text
from prefloss.feedback import Pairs, Rankings

MOST_ROWS = 100
"""Rows that a page shows, the first of the file."""

MOST_SIDES, MOST_TOKENS, MOST_IN_ALL, MOST_PROMPT = 8, 500, 60_000, 2000
"""Completions of a row, tokens of a completion and of the page, and characters of a message that it shows."""

# Steps of the colour scale on each side of 0, and tokens that together may spell one character.
_STEPS, _LONGEST_CHARACTER = 10, 8


@dataclass(frozen=True)
class Piece:
    """Tokens that spell whole characters: their text, reward and colour (-10 to 10)."""

    text: str
    reward: float
    step: int


@dataclass(frozen=True)
class Side:
    """A completion."""

    name: str
    reward: float
    tokens: int
    truncated: bool
    given: float | None
    pieces: Sequence[Piece]
    hidden: int


@dataclass(frozen=True)
class Shown:
    """A row of the page; `value` is its margin, or the reward of a single completion."""

    number: int
    prompt: Sequence[tuple[str, str]]
    value: float
    sides: Sequence[Side]
    hidden: int


def write_page(path: Path, rows: Rows, scores: pa.Table, tokenizer: Any, facts: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: The page.
        rows: The rows.
        scores: Their scores, with the rewards of their tokens.
        tokenizer: Turns token ids to text.
        facts: `title`, `lines` of text above, and the `unit` of a token's reward.
    """
    groups = itertools.groupby(scores.to_pylist(), key=lambda score: score["row"])
    pairs = itertools.islice(zip(rows, groups, strict=False), MOST_ROWS)
    found = [(row, list(group)) for row, (_, group) in pairs]
    values = [value for _, group in found for score in group for value in score["token_rewards"]]
    # A few tokens are far from the others; they get the last colour.
    scale = float(np.quantile(np.abs(values), 0.98)) if values else 0.0
    scale = scale or 1.0
    shown, left = [], MOST_IN_ALL
    for row, group in found:
        if left <= 0:
            break
        shown.append(_shown(row, group, tokenizer, scale))
        left -= sum(len(side.pieces) for side in shown[-1].sides)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compared = rows.kind.feedback in (Pairs, Rankings)
    template = environment.get_template("page.html")
    pieces = template.generate(
        rows=shown,
        count=rows.count,
        scale=scale,
        steps=_STEPS,
        value="margin" if compared else "reward",
        **facts,
    )
    with path.open("w", encoding="utf-8") as file:
        file.writelines(pieces)


def _shown(row: Row, group: list[dict[str, Any]], tokenizer: Any, scale: float) -> Shown:
    sides = []
    for score, given in zip(group[:MOST_SIDES], row.scores or [None] * len(group), strict=False):
        pieces = list(pieces_of(tokenizer, score["token_ids"], score["token_rewards"], scale))
        sides.append(
            Side(
                score["side"],
                score["reward"],
                score["tokens"],
                score["truncated"],
                given if row.kind.feedback is not Pairs else None,
                pieces,
                max(0, len(score["token_ids"]) - MOST_TOKENS),
            )
        )
    return Shown(row.number, list(_messages(row.prompt)), _value(row, group), sides, len(group) - len(sides))


def _value(row: Row, group: list[dict[str, Any]]) -> float:
    """The margin between the best completion and the worst, as people see them; or the one reward."""
    rewards = [score["reward"] for score in group]
    if len(rewards) == 1:
        return rewards[0]
    if row.scores is None:
        return max(rewards) - min(rewards)
    best, worst = (row.scores.index(end) for end in (max(row.scores), min(row.scores)))
    return rewards[best] - rewards[worst]


def _messages(prompt: Text) -> Iterator[tuple[str, str]]:
    """Role and text of each message, without the middle of a long prompt."""
    for message in [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt:
        text = message["content"]
        if len(text) > MOST_PROMPT:
            left_out = f"{len(text) - MOST_PROMPT} characters left out"
            text = f"{text[: MOST_PROMPT // 2]} [... {left_out} ...] {text[-MOST_PROMPT // 2 :]}"
        yield message["role"], _visible(text)


def pieces_of(tokenizer: Any, ids: Sequence[int], rewards: Sequence[float], scale: float) -> Iterator[Piece]:
    """Text and reward of tokens; those that spell one character together are one piece."""
    before: list[int] = []
    waiting: list[int] = []
    reward = 0.0
    for at, (token, value) in enumerate(zip(ids[:MOST_TOKENS], rewards, strict=False), start=1):
        waiting, reward = [*waiting, token], reward + value
        # With the token before it: alone, a tokenizer may leave out the space at its start.
        start = tokenizer.decode(before)
        text = tokenizer.decode([*before, *waiting])[len(start) :]
        if text.endswith("�") and len(waiting) < _LONGEST_CHARACTER and at < min(len(ids), MOST_TOKENS):
            continue
        step = round(max(-1.0, min(1.0, reward / scale)) * _STEPS)
        yield Piece(_visible(text), reward, step)
        before, waiting, reward = [token], [], 0.0


def _visible(text: str) -> str:
    """The text with control characters, which a browser would drop or obey, as "�"."""
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)
