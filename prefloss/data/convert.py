"""From one kind of rows to another, and to training and held-out parts; in memory that does not grow with the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prefloss.data.read import Preferences
from prefloss.data.row_file import open_rows, row_folder, row_schema, rows_in, write_rows
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
    weights = [name for name in rows.column_names if name == "weight"]
    text = rows.features.arrow_schema.field("prompt").type
    schema = row_schema(Pairs, text, ("score_chosen", "score_rejected", *weights))

    def pairs() -> Iterator[dict[str, Any]]:
        for row in rows_in(rows, ["prompt", "completions", "scores", *weights]):
            best, worst = extremes(row)
            pair = {"prompt": row["prompt"], "chosen": best[1], "rejected": worst[1]}
            yield pair | {"score_chosen": best[0], "score_rejected": worst[0]} | {n: row[n] for n in weights}

    return open_rows([write_rows(row_folder(), schema, pairs())])


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
    return labels_in_order(rows).shuffle(seed=seed)


def labels_in_order(rows: Dataset) -> Dataset:
    """As `pairs_to_labels`, all upvotes first: reading in the order of the file needs less memory."""
    import numpy as np
    from datasets import concatenate_datasets

    parts = []
    for side in SIDES[Pairs]:
        names = {side: "completion", f"score_{side}": "score"}
        kept = [name for name in ("prompt", side, f"score_{side}", "weight") if name in rows.column_names]
        part = rows.select_columns(kept).rename_columns(
            {old: new for old, new in names.items() if old in kept}
        )
        parts.append(part.add_column("label", np.full(len(rows), side == "chosen")))  # type: ignore[arg-type]
    return concatenate_datasets(parts)


def split(rows: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and held-out rows; all rows of one prompt go to the same side, so none is seen in training.

    A hash of the prompt decides. A prompt stays on its side when rows are added, taken away or put in another order.

    Args:
        rows: Rows of any kind.
        fraction: Share of the prompts to hold out, in [0, 1), about; at least one prompt is on each side if there are
            two.
        seed: Of the choice.
    """
    import numpy as np

    if not isinstance(fraction, int | float) or not 0 <= fraction < 1:
        raise ValueError(f"fraction: got {fraction!r}, expected a number >= 0 and < 1")
    hashes = np.fromiter(
        (_hash(row["prompt"], seed) for row in rows_in(rows, ["prompt"])), np.uint64, len(rows)
    )
    held_out = hashes < np.uint64(fraction * 2**64)
    # Few prompts can all have fallen on one side.
    if fraction > 0 and len(rows) and not held_out.any():
        held_out = hashes == hashes.min()
    if held_out.all() and len(rows):
        held_out = hashes != hashes.max()
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def _hash(prompt: Any, seed: int) -> int:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    digest = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8, person=b"prompt")
    return int.from_bytes(digest.digest(), "little")


def label_counts(rows: Dataset) -> tuple[int, int]:
    """Number of upvotes and of downvotes."""
    up = sum(row["label"] for row in rows_in(rows, ["label"]))
    return up, len(rows) - up


def as_pairs(data: Preferences) -> Dataset:
    """Paired rows of paired or ranked data.

    Raises:
        ValueError: If the data are labelled: which of two answers is better is not known.
    """
    if data.kind is Labels:
        raise ValueError(f"{data.name}: got {kind_text(data.kind)}, expected paired or ranked rows")
    return data.rows if data.kind is Pairs else ranked_to_pairs(data.rows)
