"""What a run learns from and is measured on: a preference file, or the generated world."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefloss
from prefloss import data as pdata
from prefloss.cli.command_options import TrainOptions
from prefloss.cli.console import CliError
from prefloss.data.convert import labels_in_order
from prefloss.data.row_file import Share, rows_in
from prefloss.data.rows import KIND_WORDS, kind_text
from prefloss.feedback import KINDS, Labels, Pairs, Rankings, columns_of, optional_fields
from prefloss.worlds import language

Row = dict[str, Any]

# Of the world: rows to train on, pairs to measure on, lines of the warm start, samples.
ROWS, HELD_OUT, SPOKEN, WORLD_SAMPLES = 4000, 400, 8000, 256
# Of a file: samples, and most rows to measure on. More than that costs more time than its precision is worth.
FILE_SAMPLES, MEASURED = 64, 500
# Most completions of a file that a warm start, and the training of a tokenizer, choose from.
SPOKEN_OF_FILE = 20_000
# Most columns that are named as unread.
_MOST_NAMES = 10


@dataclass(frozen=True)
class Task:
    """Rows to train on, and what to measure on.

    Attributes:
        train: A datasets.Dataset, paired or labelled.
        conversational: Whether texts are messages.
        better: Held-out (prompt, completion) that people preferred or upvoted.
        worse: Held-out ones that they rejected or downvoted.
        paired: Whether `better[i]` and `worse[i]` belong together.
        prompts: Prompts to sample completions for.
        spoken: Rows (prompt, completion) for a supervised warm start.
        spoken_are: What these rows are, in words.
        facts: Sentences about the data.
        warnings: Sentences about what may be wrong with them.
        reward: True reward of a completion for `prompts[i]`, if it is known.
        ceiling: Held-out accuracy that the true reward itself reaches.
        held_out: Whether `better` and `worse` were kept out of training.
    """

    train: Any
    conversational: bool
    better: list[Row]
    worse: list[Row]
    paired: bool
    prompts: list[Any]
    spoken: list[Row]
    spoken_are: str
    facts: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    reward: Callable[[int, str], float] | None = None
    ceiling: float | None = None
    held_out: bool = True


def task_of(options: TrainOptions, loss: prefloss.Loss, share: Share | None = None) -> Task:
    """The task of a file, or of the generated world; a `CliError` if the loss cannot be trained on it.

    Args:
        options: Of the command.
        loss: What is trained.
        share: Of several processes, each of which checks its part of the file; all of them get the whole task.
    """
    if loss.spec.feedback is Rankings:
        raise CliError(
            f"{loss.name} takes Rankings, and TRL has no trainer for ranked groups; call it from your own loop, or "
            f"train with one that takes pairs ({_some_losses(Pairs)}) or labels ({_some_losses(Labels)})"
        )
    return (
        _world_task(options, loss) if options.data is None else _file_task(options, loss, options.data, share)
    )


def _some_losses(feedback: type, most: int = 6) -> str:
    """Names of losses that take this feedback, first those that need nothing else."""
    names = [name for name, spec in prefloss.specs.items() if spec.feedback is feedback]
    more = f" and {len(names) - most} more, see `prefloss losses`" if len(names) > most else ""
    return ", ".join(sorted(names, key=lambda name: bool(prefloss.specs[name].needs))[:most]) + more


# Optional column -> what a loss must read to use it; a weight multiplies any loss.
_NEEDS = {field.column: field.need for kind in KINDS for field in optional_fields(kind)}

_NEED_WORDS = {
    "scores": "graded feedback: numbers in the columns score_chosen and score_rejected (of pairs) or score (of "
    "labelled rows)",
    "baseline": "the value of each prompt: numbers in the column baseline (of labelled rows)",
}


def _read_columns(loss: prefloss.Loss, columns: Collection[str]) -> list[str]:
    """The optional columns that a loss reads."""
    return [name for name in columns if _NEEDS[name] in (None, *loss.needs, *loss.spec.reads)]


def _check_needs(loss: prefloss.Loss, columns: Collection[str], source: str) -> None:
    """Refuse a loss that needs a column that the data do not have."""
    for need, words in _NEED_WORDS.items():
        if need in loss.needs and need not in {_NEEDS[name] for name in columns}:
            raise CliError(f"{loss.name} needs {words}; {source} has none")


def _sides(rows: Any, paired: bool) -> tuple[list[Row], list[Row]]:
    """(prompt, completion) of the better and of the worse completions."""
    # Of a file, they are spread over it.
    rows = rows if isinstance(rows, list) else list(rows_in(rows, rows.column_names, span=1000))
    if not paired:
        return [row for row in rows if row["label"]], [row for row in rows if not row["label"]]
    better = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return better, [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows]


def _cycled(prompts: Sequence[Any], count: int) -> list[Any]:
    """`count` prompts, starting over if there are fewer."""
    return list(itertools.islice(itertools.cycle(prompts), count))


def _world_task(options: TrainOptions, loss: prefloss.Loss) -> Task:
    """Draw a world."""
    from datasets import Dataset

    paired = loss.spec.feedback is Pairs
    grades = {"score_chosen": "chosen", "score_rejected": "rejected"} if paired else {"score": "completion"}
    grades = grades if "scores" in loss.needs | loss.spec.reads else {}
    _check_needs(loss, grades, "the generated world")
    drawn = language.LanguageWorld(seed=options.seed)
    spoken: list[Row] = [drawn.spoken() for _ in range(SPOKEN)]
    # What every loss is measured on comes before what each learns from, so that it is the same for all.
    held_out = [drawn.pair() for _ in range(HELD_OUT)]
    asked = [drawn.prompt() for _ in range(WORLD_SAMPLES)]
    prompts = _cycled(asked, WORLD_SAMPLES if options.samples is None else options.samples)
    draw = drawn.pair if paired else drawn.labelled
    rows = [_graded(draw(), grades) for _ in range(ROWS)]
    if paired and grades:
        rows = [row for row in rows if row["score_chosen"] > row["score_rejected"]]
    what = "judged pairs" if paired else "upvotes and downvotes"
    judge = "a judge that gives grades" if grades else "a noisy judge"
    better, worse = _sides(held_out, paired=True)
    return Task(
        train=Dataset.from_list(rows),
        conversational=False,
        better=better,
        worse=worse,
        paired=True,
        prompts=prompts,
        spoken=spoken,
        spoken_are="the world's own sentences",
        reward=lambda i, text: language.true_reward(prompts[i], text),
        ceiling=language.judge_ceiling(held_out),
        facts=(
            f"the generated world, seed {options.seed}: {len(rows)} {what} of {judge} whose true reward is known; "
            f"{HELD_OUT} further pairs held out",
        ),
    )


def _graded(row: Row, grades: dict[str, str]) -> Row:
    """The row with the true reward of its completions; a judge that gives grades also orders the sides by them."""
    rewards = {side: language.true_reward(row["prompt"], row[side]) for side in grades.values()}
    if "chosen" in rewards and rewards["chosen"] < rewards["rejected"]:
        row = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
        rewards = {"chosen": rewards["rejected"], "rejected": rewards["chosen"]}
    return row | {column: rewards[side] for column, side in grades.items()}


def _spoken(rows: Any, paired: bool, seed: int) -> tuple[list[Row], str]:
    """Completions for a warm start, and what they are: the better ones, or the others if there are none."""
    import numpy as np

    places, spoken_are = np.arange(len(rows)), "the preferred completions"
    if not paired:
        up = np.fromiter((row["label"] for row in rows_in(rows, ["label"])), bool, len(rows))
        places = np.flatnonzero(up) if up.any() else places
        spoken_are = spoken_are if up.any() else "the downvoted completions, for there are no others"
    if len(places) > SPOKEN_OF_FILE:
        places = np.sort(np.random.default_rng(seed).choice(places, SPOKEN_OF_FILE, replace=False))
    better, worse = _sides(rows.select(places), paired)
    return better or worse, spoken_are


def _file_task(options: TrainOptions, loss: prefloss.Loss, path: Path, share: Share | None) -> Task:
    """Read a file, convert its rows for the loss, split them by prompt."""
    data = pdata.read(path, share)
    labelled, from_pairs = loss.spec.feedback is Labels, data.kind is not Labels
    if not labelled and not from_pairs:
        raise CliError(
            f"{loss.name} compares two completions, but {data.name} holds {kind_text(data.kind)} rows; "
            f"losses that learn from labels: {_some_losses(Labels)}"
        )
    columns = list(data.optional)
    if data.kind is Rankings:
        columns += ["score_chosen", "score_rejected"]
    if labelled and "score_chosen" in columns:
        columns = [*(name for name in columns if not name.startswith("score_")), "score"]
    columns = _read_columns(loss, columns)
    _check_needs(loss, columns, data.name)
    rows, facts = data.rows, _facts(loss, data)
    if data.kind is Rankings:
        rows = pdata.ranked_to_pairs(rows)
        facts.append("ranked rows became pairs: the best completion against the worst")
    train, held_out = pdata.split(rows, options.eval_fraction, options.seed)
    measured = held_out if len(held_out) else train
    if len(measured) > MEASURED:
        measured = measured.shuffle(seed=options.seed).select(range(MEASURED))
    if len(held_out):
        part = f", {len(measured)} of them measured on" if len(measured) < len(held_out) else ""
        facts.append(
            f"{len(train)} rows to train on; {len(held_out)} held out{part}, none of whose prompts is trained on"
        )
    else:
        facts.append(
            f"{len(train)} rows to train on and none held out: measured on {len(measured)} of the training rows"
        )
    better, worse = _sides(measured, from_pairs)
    spoken, spoken_are = _spoken(train, from_pairs, options.seed)
    warnings = list(data.notes)
    if labelled and from_pairs:
        # A split takes each prompt to the same side again.
        train, _ = pdata.split(labels_in_order(rows), options.eval_fraction, options.seed)
        facts.append(
            f"{loss.name} learns from labels: each chosen became an upvote, each rejected a downvote"
        )
    if labelled:
        warnings += _label_warnings(loss, *pdata.label_counts(train))
        train = train.shuffle(seed=options.seed)
    return Task(
        train=train.select_columns([*columns_of(loss.spec.feedback), *columns]),
        conversational=data.conversational,
        better=better,
        worse=worse,
        paired=from_pairs,
        prompts=_cycled(measured["prompt"], FILE_SAMPLES if options.samples is None else options.samples),
        spoken=spoken,
        spoken_are=spoken_are,
        held_out=len(held_out) > 0,
        facts=tuple(facts),
        warnings=tuple(warnings),
    )


def _facts(loss: prefloss.Loss, data: pdata.Preferences) -> list[str]:
    """What the file holds, and what the loss reads of it."""
    form = "conversational" if data.conversational else "plain text"
    columns = ", ".join(columns_of(data.kind))
    facts = [f"{data.name}: {len(data)} {KIND_WORDS[data.kind]} rows ({columns}), {form}"]
    used = _read_columns(loss, data.optional)
    unused = [*(name for name in data.optional if name not in used), *data.unused]
    facts += [f"{loss.name} reads also: {', '.join(used)}"] if used else []
    if unused:
        more = f" and more of {len(unused)}" if len(unused) > _MOST_NAMES else ""
        facts.append(f"columns that {loss.name} does not read: {', '.join(unused[:_MOST_NAMES])}{more}")
    return facts


def _label_warnings(loss: prefloss.Loss, up: int, down: int) -> list[str]:
    """What the balance of upvotes and downvotes may do to the training."""
    if not up or not down:
        which, lacking = ("downvotes", "upvotes") if not up else ("upvotes", "downvotes")
        return [
            f"all {up + down} labels are {which}: {loss.name} can train on them, but without {lacking} it only "
            f"learns {'what to avoid' if not up else 'to raise everything it is shown'}"
        ]
    weights: list[Any] = [loss.params.get(name) for name in ("desirable_weight", "undesirable_weight")]
    # A loss may have none, and a schedule is no number.
    if not all(isinstance(weight, int | float) and weight for weight in weights):
        return []
    liked, disliked = weights
    # Eq. 8 of the KTO paper: the two sides should weigh about the same, upvotes up to a third more.
    ratio = liked * up / (disliked * down)
    if 0.95 <= ratio <= 4 / 3:
        return []
    # In the middle of the advised range, by the weight that has to grow.
    name, value = "undesirable_weight", liked * up / down / 1.15
    if ratio < 1:
        name, value = "desirable_weight", 1.15 * disliked * down / up
    return [
        f"{up} upvotes and {down} downvotes weigh {ratio:.2f} to 1; the KTO paper advises 1 to 1.33, as with "
        f"--param {name}={value:.2g}. Too far from it, all completions can become unlikely together"
    ]
