"""The task of a preference file: read, converted for the loss, split by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prefloss
from prefloss import data as pdata
from prefloss.cli._errors import CliError
from prefloss.cli._settings import Settings
from prefloss.cli._task import READ_AS, Row, Task, check_needs, fitting
from prefloss.data.rows import KIND_WORDS, kind_text
from prefloss.feedback import Labels, Pairs, Rankings, columns_of

SAMPLES, MEASURED = 64, 500


def file_task(settings: Settings, loss: prefloss.Loss, wanted: type, path: Path) -> Task:
    """Read a file for a loss that wants this kind of rows.

    Raises:
        CliError: If it cannot be read, or does not fit the loss.
    """
    try:
        found = pdata.read(path)
    except (pdata.DataError, OSError) as error:
        raise CliError(str(error)) from error
    form = "conversational" if found.conversational else "plain text"
    columns = ", ".join(columns_of(found.kind))
    facts = [f"{found.name}: {len(found)} {KIND_WORDS[found.kind]} rows ({columns}), {form}"]
    if wanted is Pairs and found.kind is Labels:
        raise CliError(
            f"{loss.name} compares two completions, but {found.name} holds {kind_text(found.kind)} rows; "
            f"losses that learn from labels: {fitting(prefloss.Labels)}"
        )
    columns = _columns(found, wanted)
    used = _used(loss, columns)
    check_needs(loss, used, found.name)
    facts += _column_facts(loss, found)
    train, held_out = pdata.split(found.rows, settings.eval_fraction, settings.seed)
    if found.kind is Rankings:
        train, held_out = (pdata.ranked_to_pairs(rows) if len(rows) else rows for rows in (train, held_out))
        facts.append("ranked rows became pairs: the best completion against the worst")
    pairs = found.kind is not Labels
    marked = _some(held_out if len(held_out) else train, settings.seed)
    facts.append(_split_fact(train, held_out, marked))
    better, worse = _sides(marked, pairs)
    liked, disliked = _sides(train, pairs)
    warnings = list(found.notes)
    if wanted is Labels and pairs:
        train = pdata.pairs_to_labels(train, settings.seed)
        facts.append(
            f"{loss.name} learns from labels: each chosen became an upvote, each rejected a downvote"
        )
    if wanted is Labels:
        train = train.shuffle(seed=settings.seed)
        warnings += _label_warnings(loss, *pdata.label_counts(train))
    train = train.select_columns([*columns_of(wanted), *used])
    return Task(
        train=train,
        kind=wanted,
        conversational=found.conversational,
        better=better,
        worse=worse,
        paired=pairs,
        prompts=_prompts(marked, SAMPLES if settings.samples is None else settings.samples),
        spoken=liked or disliked,
        spoken_are="the preferred completions"
        if liked
        else "the downvoted completions, for there are no others",
        held_out=len(held_out) > 0,
        facts=tuple(facts),
        warnings=tuple(warnings),
    )


def _columns(found: pdata.Preferences, wanted: type) -> tuple[str, ...]:
    """Optional columns of the training rows, after their conversion to the wanted kind."""
    columns = found.optional
    if found.kind is Rankings:
        columns = (*columns, "score_chosen", "score_rejected")
    if wanted is Labels and "score_chosen" in columns:
        columns = (*(name for name in columns if not name.startswith("score_")), "score")
    return columns


def _used(loss: prefloss.Loss, columns: tuple[str, ...]) -> tuple[str, ...]:
    reads = loss.needs | loss.spec.reads
    return tuple(name for name in columns if READ_AS.get(name, name) in (None, *reads))


def _column_facts(loss: prefloss.Loss, found: pdata.Preferences) -> list[str]:
    used = _used(loss, found.optional)
    unused = [*(name for name in found.optional if name not in used), *found.unused]
    facts = [f"{loss.name} reads also: {', '.join(used)}"] if used else []
    return facts + ([f"columns that {loss.name} does not read: {', '.join(unused)}"] if unused else [])


def _some(rows: Any, seed: int) -> Any:
    """Enough rows to measure on: beyond some hundreds, precision costs more time than it tells."""
    return rows if len(rows) <= MEASURED else rows.shuffle(seed=seed).select(range(MEASURED))


def _split_fact(train: Any, held_out: Any, marked: Any) -> str:
    if len(held_out):
        part = f", {len(marked)} of them measured on" if len(marked) < len(held_out) else ""
        return f"{len(train)} rows to train on; {len(held_out)} held out{part}, none of whose prompts is trained on"
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
    liked, disliked = loss.params.get("desirable_weight"), loss.params.get("undesirable_weight")
    # A schedule or a 0 is somebody's plan.
    if (
        not isinstance(liked, int | float)
        or not isinstance(disliked, int | float)
        or not liked
        or not disliked
    ):
        return []
    # Eq. 8 of the KTO paper: the two sides should weigh about the same, upvotes up to a third more.
    ratio = liked * up / (disliked * down)
    if 0.95 <= ratio <= 4 / 3:
        return []
    # In the middle of the advised range, by the weight that has to grow.
    name, value = (
        ("desirable_weight", 1.15 * disliked * down / up)
        if ratio < 1
        else ("undesirable_weight", liked * up / down / 1.15)
    )
    return [
        f"{up} upvotes and {down} downvotes weigh {ratio:.2f} to 1; the KTO paper advises 1 to 1.33, as with "
        f"--param {name}={value:.2g}. Too far from it, all completions can become unlikely together"
    ]
