"""What a run learns from and how it is marked; the parts that the generated world and a file share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import prefloss
from prefloss.cli._errors import CliError
from prefloss.feedback import KINDS, Rankings, optional_fields

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Rows to train on, and what to measure on.

    Attributes:
        train: A datasets.Dataset, paired or labelled.
        kind: Which of the two.
        conversational: Whether texts are messages.
        better: Held-out (prompt, completion) that people preferred or upvoted.
        worse: Held-out ones that they rejected or downvoted.
        paired: Whether `better[i]` and `worse[i]` belong together.
        prompts: Prompts to sample completions for.
        spoken: Rows (prompt, completion) for a supervised warm start.
        spoken_are: What these rows are, in words.
        reward: True reward of a completion for `prompts[i]`, if anybody knows it.
        ceiling: Held-out accuracy that the true reward itself reaches.
        held_out: Whether `better` and `worse` were kept out of training.
        facts: What to tell the user, one sentence each.
        warnings: The same for what may be wrong.
    """

    train: Any
    kind: type
    conversational: bool
    better: list[Row]
    worse: list[Row]
    paired: bool
    prompts: list[Any]
    spoken: list[Row]
    spoken_are: str
    reward: Callable[[int, str], float] | None = None
    ceiling: float | None = None
    held_out: bool = True
    facts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def kind_for(loss: prefloss.Loss) -> type:
    """The kind of rows that a trainer of TRL needs for this loss.

    Raises:
        CliError: If TRL has no trainer for it.
    """
    if loss.spec.feedback is Rankings:
        raise CliError(
            f"{loss.name} takes {loss.spec.feedback.__name__}, and TRL has no trainer for ranked groups; call it from "
            f"your own loop, or train with one that takes pairs ({fitting(prefloss.Pairs)}) or labels "
            f"({fitting(prefloss.Labels)})"
        )
    return loss.spec.feedback


def fitting(feedback: type, most: int = 6) -> str:
    """Names of losses, the well-known first, that learn from this feedback and nothing besides."""
    names = [name for name, spec in prefloss.specs.items() if spec.feedback is feedback]
    plain = [name for name in names if not prefloss.specs[name].needs]
    more = f" and {len(names) - most} more, see `prefloss losses`" if len(names) > most else ""
    return ", ".join((plain + [name for name in names if name not in plain])[:most]) + more


# Column -> what a loss must read to use it; a weight multiplies any loss.
READ_AS = {field.column: field.need for kind in KINDS for field in optional_fields(kind)}


def check_needs(loss: prefloss.Loss, columns: Collection[str], source: str) -> None:
    """Refuse a loss that reads what the data do not have.

    Raises:
        CliError: If a column is missing; the message names it.
    """
    wanted = {
        "scores": "graded feedback: numbers in the columns score_chosen and score_rejected (of pairs) or score "
        "(of labelled rows)",
        "baseline": "the value of each prompt: numbers in the column baseline (of labelled rows)",
    }
    there = {READ_AS.get(name, name) for name in columns}
    for need, words in wanted.items():
        if need in loss.needs and need not in there:
            raise CliError(f"{loss.name} needs {words}; {source} has none")
