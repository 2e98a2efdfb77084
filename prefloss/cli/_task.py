"""What a run learns from and how it is marked: the generated world, or the user's file."""

from __future__ import annotations

from collections.abc import Callable
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
    return _world_task(settings, wanted) if settings.data is None else _file_task(settings, loss, wanted)


def _kind_for(loss: prefloss.Loss) -> Kind:
    kinds = {prefloss.Pairs: Kind.PAIRED, prefloss.Labels: Kind.LABELLED}
    if loss.spec.feedback not in kinds:
        raise CliError(
            f"{loss.name} takes {loss.spec.feedback.__name__}, and TRL has no trainer for ranked groups; "
            f"train with one of {', '.join(_fitting(*kinds))}, or call {loss.name} from your own loop"
        )
    return kinds[loss.spec.feedback]


def _fitting(*feedback: type) -> list[str]:
    return sorted(name for name, spec in prefloss.specs.items() if spec.feedback in feedback)


def _world_task(settings: Settings, kind: Kind) -> Task:
    from datasets import Dataset

    drawn = world.World(seed=settings.seed)
    spoken: list[Row] = [drawn.spoken() for _ in range(DEMO_SPOKEN)]
    # What every loss is measured on comes before what each learns from, so that it is the same for all.
    held_out = [drawn.pair() for _ in range(DEMO_HELD_OUT)]
    prompts = [drawn.prompt() for _ in range(256 if settings.samples is None else settings.samples)]
    draw = drawn.pair if kind is Kind.PAIRED else drawn.labelled
    rows: list[Row] = [draw() for _ in range(DEMO_ROWS)]
    what = "pairs judged" if kind is Kind.PAIRED else "thumbs up or down given"
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
            f"the generated world, seed {settings.seed}: {DEMO_ROWS} {what} by a noisy judge whose true reward "
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
            f"losses that learn from labels: {', '.join(_fitting(prefloss.Labels))}"
        )
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
        facts.append(f"{loss.name} learns from labels: each chosen became an upvote, each rejected a downvote")
    if wanted is Kind.LABELLED:
        train = train.shuffle(seed=settings.seed)
        warnings += _label_warnings(loss, *pdata.label_counts(train))
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
    name, value = ("desirable_weight", down / up) if up < down else ("undesirable_weight", up / down)
    return [
        f"{up} upvotes and {down} downvotes weigh {ratio:.2f} to 1; the KTO paper advises 1 to 1.33, "
        f"as with --param {name}={value:.2g}"
    ]
