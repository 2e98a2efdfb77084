"""Feedback drawn from any source of numbers: a seed, or hypothesis.

Everything is as a trainer would make it: log-probs are at most 0, a completion's sums are the sums of its tokens,
divergences are at least 0, a chosen completion has the higher score, a ranking has at least two completions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios, PerToken
from prefloss.testing.fields import ROWS

MOST_TOKENS, DIMENSIONS = 4, 3
"""Width of the per-token rows, and of an embedding."""

ROW_RANGES = {
    "log_sum_sq": (0.0, 1.0),
    "kl": (0.0, 1.5),
    "reverse_kl": (0.0, 1.5),
    "reference_entropy": (0.05, 0.95),
    "weight": (0.5, 1.5),
}
"""Lowest and highest number of a row; of `log_sum_sq`, relative to that of a token's own probability."""


@dataclass(frozen=True)
class Recipe:
    """What some feedback holds.

    Attributes:
        size: Number of examples; None draws 1 to 6.
        places: Number of completions in each group of a ranking; None draws 2 to 4.
        fields: What to fill beside the log-probs, as named in a loss's `needs`.
        reference: With reference log-probs.
        tokens: With token counts.
        magnitude: Largest log-ratio of a completion, nats.
        weight: With a weight of each example.
        ties: Scores of a ranking may be equal, and those of a pair.
        masked: Rankings may lack completions.
        dtype: Of every floating-point tensor.
    """

    size: int | None = None
    places: int | None = None
    fields: frozenset[str] = frozenset()
    reference: bool = True
    tokens: bool = True
    magnitude: float = 10.0
    weight: bool = False
    ties: bool = False
    masked: bool = True
    dtype: torch.dtype = torch.float64


def log_probs(log_ratio: Tensor, below: Tensor | float) -> tuple[Tensor, Tensor]:
    """Policy and reference log-probs with this log-ratio; the likelier of the two is `below` nats under 0."""
    return -below - (-log_ratio).clamp(min=0), -below - log_ratio.clamp(min=0)


def draw(source: Random, kind: type, recipe: Recipe) -> Feedback:
    """Feedback of this kind."""
    size = source.randint(1, 6) if recipe.size is None else recipe.size
    drawing = Drawing(source, recipe)
    return {Pairs: drawing.pairs, Labels: drawing.labels, Rankings: drawing.rankings}[kind](size)


class Drawing:
    """Draws the feedback of a recipe from a source of numbers."""

    def __init__(self, source: Random, recipe: Recipe) -> None:
        self._source, self._recipe, self._fields = source, recipe, recipe.fields

    def pairs(self, size: int) -> Pairs:
        """Pairs; scores are win probabilities, the chosen one's the higher."""
        values: dict[str, Any] = {"chosen": self.log_ratios((size,)), "rejected": self.log_ratios((size,))}
        if "gold" in self._fields:
            values["gold"] = self.log_ratios((size,))
        if "scores" in self._fields:
            gap = self._doubles((size,), 0.0 if self._recipe.ties else 0.1, 0.5)
            worse = self._doubles((size,), 0.05, 0.45)
            values["score_chosen"], values["score_rejected"] = self._cast(worse + gap), self._cast(worse)
        if "embedding" in self._fields:
            values["embedding"] = self._numbers((size, DIMENSIONS), 0.1, 1.0)
        return Pairs(**values, weight=self._weight(size))

    def labels(self, size: int) -> Labels:
        """Labels, upvotes and downvotes in any proportion, each with a mismatched completion of its own."""
        values: dict[str, Any] = {
            "completions": self.log_ratios((size,)),
            "desirable": torch.tensor([bool(self._source.randint(0, 1)) for _ in range(size)]),
        }
        if "mismatched" in self._fields:
            values["mismatched"] = self.log_ratios((size,))
        if "kl" in self._fields:
            values["kl"] = self._numbers((size,) if self._source.randint(0, 1) else (), 0.0, 3.0)
        for name in ("scores", "baseline"):
            if name in self._fields:
                values[name] = self._numbers((size,), 0.0, 1.0)
        return Labels(**values, weight=self._weight(size))

    def rankings(self, size: int) -> Rankings:
        """Groups of two to four completions, some of them absent where the recipe is `masked`."""
        places = self._recipe.places or self._source.randint(2, 4)
        mask = torch.tensor([self._present(places) for _ in range(size)])
        return Rankings(
            completions=self.log_ratios((size, places)),
            scores=self._cast(torch.stack([self._scores(places) for _ in range(size)])),
            mask=mask if self._recipe.masked else None,
            weight=self._weight(size),
        )

    def log_ratios(self, shape: tuple[int, ...]) -> LogRatios:
        """Completions with log-ratios of both signs."""
        recipe = self._recipe
        if any(name.split(".")[0] == "per_token" for name in recipe.fields):
            ratios = self._rows(shape).log_ratios()
            return ratios if recipe.tokens else replace(ratios, tokens=None)
        log_ratio = self._doubles(shape, -recipe.magnitude, recipe.magnitude)
        policy, reference = map(self._cast, log_probs(log_ratio, below=self._doubles(shape, 0.05, 8.0)))
        tokens = self._counts(shape, most=12)
        return LogRatios(policy, reference if recipe.reference else None, tokens if recipe.tokens else None)

    def _rows(self, shape: tuple[int, ...]) -> PerToken:
        # Any non-empty set of places: left padding and gaps too.
        places = self._counts(shape, 2**MOST_TOKENS - 1).unsqueeze(-1)
        mask = places >> torch.arange(MOST_TOKENS) & 1 == 1
        wide = (*shape, MOST_TOKENS)
        log_ratio = self._doubles(wide, -self._recipe.magnitude / 2, self._recipe.magnitude / 2)
        policy, reference = log_probs(log_ratio, below=self._doubles(wide, 0.05, 3.0))
        rows = {"policy": policy, **({"reference": reference} if self._recipe.reference else {})}
        for row in ROWS:
            if f"per_token.{row}" in self._fields:
                rows[row] = self._doubles(wide, *ROW_RANGES[row])
        if "log_sum_sq" in rows:
            # A token's own squared probability is one term of the sum, and the sum is at most 1.
            rows["log_sum_sq"] = 2 * policy * rows["log_sum_sq"]
        values: dict[str, Any] = {
            name: self._cast(torch.where(mask, value, 0.0)) for name, value in rows.items()
        }
        return PerToken(**{"reference": None, "mask": mask, **values})

    def _present(self, places: int) -> list[bool]:
        present = [bool(self._source.randint(0, 3)) for _ in range(places)]
        while sum(present) < 2:
            present[present.index(False)] = True
        return present

    def _scores(self, places: int) -> Tensor:
        # Ranks in a random order, moved within a third of a step: distinct unless ties are asked for.
        order = sorted(range(places), key=lambda place: (self._source.randint(0, 99), place))
        ranks = torch.tensor(order, dtype=torch.float64)
        if self._recipe.ties and self._source.randint(0, 1):
            return (ranks // 2 + 1) / places
        return (ranks + 1 - self._doubles((places,), 0.0, 0.3)) / places

    def _weight(self, size: int) -> Tensor | None:
        return self._numbers((size,), 0.1, 3.0) if self._recipe.weight else None

    def _counts(self, shape: tuple[int, ...], most: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.tensor([self._source.randint(1, most) for _ in range(count)]).reshape(shape)

    def _doubles(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        values = [self._source.uniform(low, high) for _ in range(torch.Size(shape).numel())]
        return torch.tensor(values, dtype=torch.float64).reshape(shape)

    def _numbers(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return self._cast(self._doubles(shape, low, high))

    def _cast(self, values: Tensor) -> Tensor:
        return values.to(self._recipe.dtype)
