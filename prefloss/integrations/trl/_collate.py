"""Weights, scores and other feedback of each example on their way through TRL's collators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# Batch items that only a loss can use, with what a loss must read to take them.
ITEMS: Mapping[str, str | None] = {
    "weight": None,
    "score_chosen": "scores",
    "score_rejected": "scores",
    "scores": "scores",
    "kl": "kl",
    "baseline": "baseline",
}


class FeedbackCollator:
    """Lets columns of feedback through a TRL collator, which would drop them.

    For losses that read scores, and for weights of examples. The trainer must be given
    `remove_unused_columns=False`, or it takes the columns out before the collator sees them.

    Args:
        collator: The collator that builds the rest of the batch, such as TRL's `DataCollatorForPreference`.

    Example:
        >>> collator = FeedbackCollator(lambda examples: {"rows": len(examples)})
        >>> collator([{"weight": 0.5}, {"weight": 2.0}])
        {'rows': 2, 'weight': tensor([0.5000, 2.0000])}
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of the wrapped collator, and a tensor [examples] for each column of feedback.

        Raises:
            ValueError: If a column is there for some examples only, or holds something that is no number.
        """
        batch = self.collator([{k: v for k, v in example.items() if k not in ITEMS} for example in examples])
        for name in ITEMS:
            values = [example[name] for example in examples if name in example]
            if not values:
                continue
            if len(values) != len(examples) or any(
                isinstance(value, bool) or not isinstance(value, int | float) for value in values
            ):
                raise ValueError(
                    f"{name}: got {values!r} for {len(examples)} examples, expected a number for each"
                )
            batch[name] = torch.tensor(values, dtype=torch.float32)
        return batch
