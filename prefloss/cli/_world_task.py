"""The task that needs no file: the generated world of `prefloss.demo.world`."""

from __future__ import annotations

import prefloss
from prefloss.cli._settings import Settings
from prefloss.cli._task import Row, Task, check_needs
from prefloss.demo import world
from prefloss.feedback import Pairs

ROWS, HELD_OUT, SPOKEN, SAMPLES = 4000, 400, 8000, 256


def world_task(settings: Settings, loss: prefloss.Loss, kind: type) -> Task:
    """Draw a world.

    Raises:
        CliError: If the loss reads what the world does not have.
    """
    from datasets import Dataset

    columns = _grade_columns(kind) if "scores" in loss.needs | loss.spec.reads else {}
    check_needs(loss, columns, "the generated world")

    drawn = world.World(seed=settings.seed)
    spoken: list[Row] = [drawn.spoken() for _ in range(SPOKEN)]
    # What every loss is measured on comes before what each learns from, so that it is the same for all.
    held_out = [drawn.pair() for _ in range(HELD_OUT)]
    asked = [drawn.prompt() for _ in range(SAMPLES)]
    prompts = [asked[i % SAMPLES] for i in range(SAMPLES if settings.samples is None else settings.samples)]
    draw = drawn.pair if kind is Pairs else drawn.labelled
    rows: list[Row] = [draw() for _ in range(ROWS)]
    rows = [_graded(row, columns) for row in rows]
    if "score_chosen" in columns:
        rows = [row for row in rows if row["score_chosen"] > row["score_rejected"]]
    what = "judged pairs" if kind is Pairs else "thumbs up and down"
    judge = "a judge that gives grades" if columns else "a noisy judge"
    return Task(
        train=Dataset.from_list(rows),
        kind=kind,
        conversational=False,
        better=[{"prompt": row["prompt"], "completion": row["chosen"]} for row in held_out],
        worse=[{"prompt": row["prompt"], "completion": row["rejected"]} for row in held_out],
        paired=True,
        prompts=prompts,
        spoken=spoken,
        spoken_are="the world's own sentences",
        reward=lambda i, text: world.true_reward(prompts[i], text),
        ceiling=world.judge_ceiling(held_out),
        facts=(
            f"the generated world, seed {settings.seed}: {len(rows)} {what} of {judge} whose true reward is known; "
            f"{HELD_OUT} further pairs held out",
        ),
    )


def _grade_columns(kind: type) -> dict[str, str]:
    """Columns of grades, and the completion that each grades."""
    if kind is Pairs:
        return {"score_chosen": "chosen", "score_rejected": "rejected"}
    return {"score": "completion"}


def _graded(row: Row, columns: dict[str, str]) -> Row:
    """The row with the true reward of its completions; a judge that gives grades also goes by them."""
    if not columns:
        return row
    if "chosen" in row and world.true_reward(row["prompt"], row["chosen"]) < world.true_reward(
        row["prompt"], row["rejected"]
    ):
        row = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    return row | {column: world.true_reward(row["prompt"], row[of]) for column, of in columns.items()}
