"""From one kind of rows to another, and to training and held-out parts."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

from prefloss.data.read import Preferences
from prefloss.data.rows import extremes, kind_text
from prefloss.feedback import SIDES, Labels, Pairs

if TYPE_CHECKING:
    from datasets import Dataset


def ranked_to_pairs(rows: Dataset) -> Dataset:
    """The best completion of each group against its worst one.

    Args:
        rows: Ranked rows (prompt, completions, scores), as `read` returns them.

    Returns:
        As many paired rows, with the scores of both sides.
    """
    from datasets import Dataset

    pairs = []
    for row in rows.to_list():
        best, worst = extremes(row)
        pair = {"prompt": row["prompt"], "chosen": best[1], "rejected": worst[1]}
        pair |= {"score_chosen": best[0], "score_rejected": worst[0]}
        pairs.append(pair | ({"weight": row["weight"]} if "weight" in row else {}))
    return Dataset.from_list(pairs)


def pairs_to_labels(rows: Dataset, seed: int = 0) -> Dataset:
    """Each chosen completion with an upvote and each rejected one with a downvote.

    Shuffled, because trainers that pair a prompt with its neighbour's completion (KTO's KL estimate) would
    otherwise pair it with the other answer to the same prompt.

    Args:
        rows: Paired rows (prompt, chosen, rejected).
        seed: Of the order.

    Returns:
        Twice as many labelled rows (prompt, completion, label).
    """
    from datasets import Dataset

    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        | ({"score": row[f"score_{side}"]} if f"score_{side}" in row else {})
        | ({"weight": row["weight"]} if "weight" in row else {})
        for row in rows.to_list()
        for side in SIDES[Pairs]
    ]
    random.Random(seed).shuffle(labelled)
    return Dataset.from_list(labelled)


def split(rows: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and held-out rows; all rows of one prompt go to the same side, so none is seen in training.

    Args:
        rows: Rows of any kind.
        fraction: Share of the prompts to hold out, in [0, 1); at least one prompt stays on each side if
            there are two.
        seed: Of the choice.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: got {fraction}, expected a number >= 0 and < 1")
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(rows["prompt"]):
        groups.setdefault(json.dumps(prompt, sort_keys=True), []).append(i)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    count = 0 if fraction == 0 else min(len(order) - 1, max(1, round(fraction * len(order))))
    held_out = sorted(i for key in order[:count] for i in groups[key])
    kept = sorted(i for key in order[count:] for i in groups[key])
    return rows.select(kept), rows.select(held_out)


def label_counts(rows: Dataset) -> tuple[int, int]:
    """Number of upvotes and of downvotes."""
    labels: list[Any] = list(rows["label"])
    return sum(labels), len(labels) - sum(labels)


def as_pairs(data: Preferences) -> Dataset:
    """Paired rows of paired or ranked data.

    Raises:
        ValueError: If the data are labelled: which of two answers is better is not known.
    """
    if data.kind is Labels:
        raise ValueError(f"{data.name}: got {kind_text(data.kind)}, expected paired or ranked rows")
    return data.rows if data.kind is Pairs else ranked_to_pairs(data.rows)
