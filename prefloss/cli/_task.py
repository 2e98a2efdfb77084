"""What a run learns from and how it is marked: the generated world, or the user's file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import prefloss
from prefloss import data as pdata
from prefloss.cli._errors import CliError
from prefloss.cli._settings import Settings
from prefloss.data import Kind
from prefloss.demo import world

DEMO_ROWS, DEMO_HELD_OUT, DEMO_SPOKEN = 4000, 400, 4000

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
        reward: True reward of a completion for `prompts[i]`, if anybody knows it.
        ceiling: Held-out accuracy that the true reward itself reaches.
        held_out: Whether `better` and `worse` were kept out of training.
        facts: What to tell the user, one sentence each.
        warnings: The same for what may be wrong.
    """

    train: Any
    kind: Kind
    conversational: bool
    better: list[Row]
    worse: list[Row]
    paired: bool
    prompts: list[Any]
    spoken: list[Row]
    reward: Callable[[int, str], float] | None = None
    ceiling: float | None = None
    held_out: bool = True
    facts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def make_task(settings: Settings, loss: prefloss.Loss) -> Task:
    """The task that the options name.

    Raises:
        CliError: If the data cannot be read, or do not fit the loss.
    """
    wanted = _kind_for(loss)
    return (
        _world_task(settings, loss, wanted) if settings.data is None else _file_task(settings, loss, wanted)
    )


def _kind_for(loss: prefloss.Loss) -> Kind:
    kinds = {prefloss.Pairs: Kind.PAIRED, prefloss.Labels: Kind.LABELLED}
    if loss.spec.feedback not in kinds:
        raise CliError(
            f"{loss.name} takes {loss.spec.feedback.__name__}, and TRL has no trainer for ranked groups; call it from "
            f"your own loop, or train with one that takes pairs ({_fitting(prefloss.Pairs)}) or labels "
            f"({_fitting(prefloss.Labels)})"
        )
    return kinds[loss.spec.feedback]


def _fitting(feedback: type, most: int = 6) -> str:
    """Names of losses, the well-known first, that learn from this feedback and nothing besides."""
    names = [name for name, spec in prefloss.specs.items() if spec.feedback is feedback]
    plain = [name for name in names if not prefloss.specs[name].needs]
    more = f" and {len(names) - most} more, see `prefloss losses`" if len(names) > most else ""
    return ", ".join((plain + [name for name in names if name not in plain])[:most]) + more


def _world_task(settings: Settings, loss: prefloss.Loss, kind: Kind) -> Task:
    from datasets import Dataset

    columns = _world_grades(kind) if "scores" in loss.needs | loss.spec.reads else {}
    _check_needs(loss, columns, "the generated world")

    drawn = world.World(seed=settings.seed)
    spoken: list[Row] = [drawn.spoken() for _ in range(DEMO_SPOKEN)]
    # What every loss is measured on comes before what each learns from, so that it is the same for all.
    held_out = [drawn.pair() for _ in range(DEMO_HELD_OUT)]
    prompts = [drawn.prompt() for _ in range(256 if settings.samples is None else settings.samples)]
    draw = drawn.pair if kind is Kind.PAIRED else drawn.labelled
    rows: list[Row] = [draw() for _ in range(DEMO_ROWS)]
    rows = [_graded(row, columns) for row in rows]
    if "score_chosen" in columns:
        rows = [row for row in rows if row["score_chosen"] > row["score_rejected"]]
    what = "pairs judged" if kind is Kind.PAIRED else "thumbs up or down given"
    graded = " and graded" if columns else ""
    return Task(
        train=Dataset.from_list(rows),
        kind=kind,
        conversational=False,
        better=[{"prompt": row["prompt"], "completion": row["chosen"]} for row in held_out],
        worse=[{"prompt": row["prompt"], "completion": row["rejected"]} for row in held_out],
        paired=True,
        prompts=prompts,
        spoken=spoken,
        reward=lambda i, text: world.true_reward(prompts[i], text),
        ceiling=world.judge_ceiling(held_out),
        facts=(
            f"the generated world, seed {settings.seed}: {len(rows)} {what}{graded} by a noisy judge whose true reward "
            f"is known; {DEMO_HELD_OUT} further pairs held out",
        ),
    )


def _file_task(settings: Settings, loss: prefloss.Loss, wanted: Kind) -> Task:
    assert settings.data is not None
    try:
        found = pdata.read(settings.data)
    except (pdata.DataError, OSError) as error:
        raise CliError(str(error)) from error
    form = "conversational" if found.conversational else "plain text"
    facts = [f"{found.name}: {len(found)} {found.kind.value} rows ({', '.join(found.kind.columns)}), {form}"]
    if wanted is Kind.PAIRED and found.kind is Kind.LABELLED:
        raise CliError(
            f"{loss.name} compares two completions, but {found.name} holds {found.kind} rows; "
            f"losses that learn from labels: {_fitting(prefloss.Labels)}"
        )
    columns = _columns(found, wanted)
    used = _used(loss, columns)
    _check_needs(loss, used, found.name)
    facts += _column_facts(loss, found)
    train, held_out = pdata.split(found.rows, settings.eval_fraction, settings.seed)
    if found.kind is Kind.RANKED:
        train, held_out = (pdata.ranked_to_pairs(rows) if len(rows) else rows for rows in (train, held_out))
        facts.append("ranked rows became pairs: the best completion against the worst")
    pairs = found.kind is not Kind.LABELLED
    marked = held_out if len(held_out) else train.select(range(min(len(train), 200)))
    facts.append(_split_fact(train, held_out, marked))
    better, worse = _sides(marked, pairs)
    spoken = _sides(train, pairs)[0] or _sides(train, pairs)[1]
    warnings = list(found.notes)
    if wanted is Kind.LABELLED and pairs:
        train = pdata.pairs_to_labels(train, settings.seed)
        facts.append(
            f"{loss.name} learns from labels: each chosen became an upvote, each rejected a downvote"
        )
    if wanted is Kind.LABELLED:
        train = train.shuffle(seed=settings.seed)
        warnings += _label_warnings(loss, *pdata.label_counts(train))
    train = train.select_columns([*wanted.columns, *used])
    return Task(
        train=train,
        kind=wanted,
        conversational=found.conversational,
        better=better,
        worse=worse,
        paired=pairs,
        prompts=_prompts(marked, 64 if settings.samples is None else settings.samples),
        spoken=spoken,
        held_out=len(held_out) > 0,
        facts=tuple(facts),
        warnings=tuple(warnings),
    )


def _graded(row: Row, columns: dict[str, str]) -> Row:
    """The row with the true reward of its completions; a judge that gives grades also goes by them."""
    if not columns:
        return row
    if "chosen" in row and world.true_reward(row["prompt"], row["chosen"]) < world.true_reward(
        row["prompt"], row["rejected"]
    ):
        row = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    return row | {column: world.true_reward(row["prompt"], row[of]) for column, of in columns.items()}


def _world_grades(kind: Kind) -> dict[str, str]:
    """Columns of grades, and the completion that each grades."""
    if kind is Kind.PAIRED:
        return {"score_chosen": "chosen", "score_rejected": "rejected"}
    return {"scores": "completion"}


# Column -> what a loss must read to use it; a weight multiplies any loss.
_READ_AS = {"weight": None, "score_chosen": "scores", "score_rejected": "scores", "scores": "scores"}


def _columns(found: pdata.Preferences, wanted: Kind) -> tuple[str, ...]:
    """Optional columns of the training rows, after their conversion to the wanted kind."""
    columns = found.optional
    if found.kind is Kind.RANKED:
        columns = (*columns, "score_chosen", "score_rejected")
    if wanted is Kind.LABELLED and "score_chosen" in columns:
        columns = (*(name for name in columns if not name.startswith("score_")), "scores")
    return columns


def _used(loss: prefloss.Loss, columns: tuple[str, ...]) -> tuple[str, ...]:
    reads = loss.needs | loss.spec.reads
    return tuple(name for name in columns if _READ_AS.get(name, name) in (None, *reads))


def _column_facts(loss: prefloss.Loss, found: pdata.Preferences) -> list[str]:
    used = _used(loss, found.optional)
    unused = [*(name for name in found.optional if name not in used), *found.unused]
    facts = [f"{loss.name} reads also: {', '.join(used)}"] if used else []
    return facts + ([f"columns that {loss.name} does not read: {', '.join(unused)}"] if unused else [])


def _check_needs(loss: prefloss.Loss, columns: Collection[str], source: str) -> None:
    wanted = {
        "scores": "graded feedback: numbers in the columns score_chosen and score_rejected (of pairs) or scores "
        "(of labelled rows)",
        "baseline": "the value of each prompt: numbers in the column baseline (of labelled rows)",
    }
    there = {_READ_AS.get(name, name) for name in columns}
    for need, words in wanted.items():
        if need in loss.needs and need not in there:
            raise CliError(f"{loss.name} needs {words}; {source} has none")


def _split_fact(train: Any, held_out: Any, marked: Any) -> str:
    if len(held_out):
        return f"{len(train)} rows to train on; {len(held_out)} held out, none of whose prompts is trained on"
    return f"{len(train)} rows to train on and none held out: measured on {len(marked)} of the training rows"


def _sides(rows: Any, pairs: bool) -> tuple[list[Row], list[Row]]:
    """(prompt, completion) of the better and of the worse completions."""
    if pairs:
        better = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        return better, [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows]
    return [row for row in rows if row["label"]], [row for row in rows if not row["label"]]


def _prompts(rows: Any, count: int) -> list[Any]:
    """`count` prompts, going around again if there are fewer."""
    prompts = list(rows["prompt"])
    return [prompts[i % len(prompts)] for i in range(count)]


def _label_warnings(loss: prefloss.Loss, up: int, down: int) -> list[str]:
    if not up or not down:
        which, lacking = ("downvotes", "upvotes") if not up else ("upvotes", "downvotes")
        return [
            f"all {up + down} labels are {which}: {loss.name} can train on them, but without {lacking} it only "
            f"learns {'what to avoid' if not up else 'to raise everything it is shown'}"
        ]
    weights = [loss.params.get(f"{side}desirable_weight") for side in ("", "un")]
    if None in weights or 0 in weights:
        return []
    # Eq. 8 of the KTO paper: the two sides should weigh about the same, upvotes up to a third more.
    ratio = weights[0] * up / (weights[1] * down)
    if 0.95 <= ratio <= 4 / 3:
        return []
    # In the middle of the advised range, by the weight that has to grow.
    name, value = (
        ("desirable_weight", 1.15 * weights[1] * down / up)
        if ratio < 1
        else ("undesirable_weight", weights[0] * up / down / 1.15)
    )
    return [
        f"{up} upvotes and {down} downvotes weigh {ratio:.2f} to 1; the KTO paper advises 1 to 1.33, as with "
        f"--param {name}={value:.2g}. Too far from it, all completions can become unlikely together"
    ]
