"""Random feedback from any source of numbers: hypothesis, or a seed.

Everything is as a trainer would make it: log-probs are at most 0, a completion's sums are the sums of its tokens,
divergences are at least 0, a chosen completion has the higher score, a ranking has at least two completions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios, PerToken
from prefloss.testing._fields import ROWS, summed

MOST_TOKENS = 4
DIMENSIONS = 3


class Source(Protocol):
    """Where numbers come from."""

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        ...

    def number(self, low: float, high: float) -> float:
        """A number in [low, high]."""
        ...


class Seeded:
    """Numbers from a seed; no two are alike, so a kink of a loss is never hit."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self._random.randint(low, high)

    def number(self, low: float, high: float) -> float:
        """A number in [low, high]."""
        return self._random.uniform(low, high)


@dataclass(frozen=True)
class Wanted:
    """What some feedback shall have.

    Attributes:
        size: Number of examples; None draws 1 to 6.
        places: Number of completions in each group of a ranking; None draws 2 to 4.
        fields: Names as in a loss's `needs`: what to fill beside the log-probs.
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

    @property
    def rows(self) -> bool:
        """Whether the log-ratios carry per-token rows."""
        return any(name.split(".")[0] == "per_token" for name in self.fields)


def draw(source: Source, kind: type, wanted: Wanted) -> Feedback:
    """Feedback of this kind."""
    if wanted.size is None:
        wanted = replace(wanted, size=source.integer(1, 6))
    makers = {Pairs: draw_pairs, Labels: draw_labels, Rankings: draw_rankings}
    return makers[kind](source, wanted)


def draw_log_ratios(source: Source, shape: tuple[int, ...], wanted: Wanted) -> LogRatios:
    """Completions with log-ratios of both signs."""
    if wanted.rows:
        return _from_rows(source, shape, wanted)
    log_ratio = _numbers(source, shape, -wanted.magnitude, wanted.magnitude)
    below = _numbers(source, shape, 0.05, 8.0)
    tokens = torch.tensor([source.integer(1, 12) for _ in range(_count(shape))]).reshape(shape)
    return LogRatios(
        # Whichever of the two is higher stays below 0.
        policy=(-below - (-log_ratio).clamp(min=0)).to(wanted.dtype),
        reference=(-below - log_ratio.clamp(min=0)).to(wanted.dtype) if wanted.reference else None,
        tokens=tokens if wanted.tokens else None,
    )


def _from_rows(source: Source, shape: tuple[int, ...], wanted: Wanted) -> LogRatios:
    counts = torch.tensor([source.integer(1, MOST_TOKENS) for _ in range(_count(shape))]).reshape(shape)
    mask = torch.arange(MOST_TOKENS) < counts.unsqueeze(-1)
    wide = (*shape, MOST_TOKENS)
    bound = wanted.magnitude / 2
    log_ratio = _numbers(source, wide, -bound, bound)
    below = _numbers(source, wide, 0.05, 3.0)
    policy = -below - (-log_ratio).clamp(min=0)
    rows: dict[str, Tensor] = {"policy": policy}
    if wanted.reference:
        rows["reference"] = -below - log_ratio.clamp(min=0)
    rows.update(_further_rows(source, policy, wanted))
    clean = {name: torch.where(mask, value, 0.0).to(wanted.dtype) for name, value in rows.items()}
    ratios = summed(PerToken(**{"reference": None, "mask": mask, **clean}))  # type: ignore[arg-type]
    return ratios if wanted.tokens else replace(ratios, tokens=None)


def _further_rows(source: Source, policy: Tensor, wanted: Wanted) -> dict[str, Tensor]:
    ranges = {
        "kl": (0.0, 1.5),
        "reverse_kl": (0.0, 1.5),
        "reference_entropy": (0.05, 0.95),
        "weight": (0.5, 1.5),
    }
    rows = {}
    for row in ROWS:
        if f"per_token.{row}" not in wanted.fields:
            continue
        if row == "log_sum_sq":
            # A token's own squared probability is one term of the sum, and the sum is at most 1.
            rows[row] = 2 * policy * _numbers(source, tuple(policy.shape), 0.0, 1.0)
        else:
            rows[row] = _numbers(source, tuple(policy.shape), *ranges[row])
    return rows


def draw_pairs(source: Source, wanted: Wanted) -> Pairs:
    """Pairs; scores are win probabilities, the chosen one's the higher."""
    shape = (wanted.size or 1,)
    values: dict[str, Any] = {
        "chosen": draw_log_ratios(source, shape, wanted),
        "rejected": draw_log_ratios(source, shape, wanted),
    }
    if "gold" in wanted.fields:
        values["gold"] = draw_log_ratios(source, shape, wanted)
    if "scores" in wanted.fields:
        gap = _numbers(source, shape, 0.0 if wanted.ties else 0.1, 0.5)
        worse = _numbers(source, shape, 0.05, 0.45)
        values["score_chosen"], values["score_rejected"] = (
            (worse + gap).to(wanted.dtype),
            worse.to(wanted.dtype),
        )
    if "embedding" in wanted.fields:
        values["embedding"] = _numbers(source, (*shape, DIMENSIONS), 0.1, 1.0).to(wanted.dtype)
    return Pairs(**values, **_weight(source, shape, wanted))


def draw_labels(source: Source, wanted: Wanted) -> Labels:
    """Labels, upvotes and downvotes in any proportion, each with a mismatched completion of its own."""
    shape = (wanted.size or 1,)
    values: dict[str, Any] = {
        "completions": draw_log_ratios(source, shape, wanted),
        "desirable": torch.tensor([bool(source.integer(0, 1)) for _ in range(_count(shape))]),
    }
    if "mismatched" in wanted.fields:
        values["mismatched"] = draw_log_ratios(source, shape, wanted)
    if "kl" in wanted.fields:
        values["kl"] = _numbers(source, shape if source.integer(0, 1) else (), 0.0, 3.0).to(wanted.dtype)
    for name in ("scores", "baseline"):
        if name in wanted.fields:
            values[name] = _numbers(source, shape, 0.0, 1.0).to(wanted.dtype)
    return Labels(**values, **_weight(source, shape, wanted))


def draw_rankings(source: Source, wanted: Wanted) -> Rankings:
    """Groups of two to four completions, some of them absent where `wanted.masked`."""
    groups, places = wanted.size or 1, wanted.places or source.integer(2, 4)
    mask = [_present(source, places) for _ in range(groups)]
    return Rankings(
        completions=draw_log_ratios(source, (groups, places), wanted),
        scores=torch.stack([_scores(source, places, wanted.ties) for _ in range(groups)]).to(wanted.dtype),
        mask=torch.tensor(mask) if wanted.masked else None,
        **_weight(source, (groups,), wanted),
    )


def _present(source: Source, places: int) -> list[bool]:
    present = [bool(source.integer(0, 3)) for _ in range(places)]
    missing = [place for place in range(places) if not present[place]]
    for place in missing[: max(0, 2 - sum(present))]:
        present[place] = True
    return present


def _scores(source: Source, places: int, ties: bool) -> Tensor:
    # Ranks in a random order, moved within a third of a step: distinct unless ties are wanted.
    order = sorted(range(places), key=lambda place: (source.integer(0, 99), place))
    ranks = torch.tensor(order, dtype=torch.float64)
    if ties and source.integer(0, 1):
        return (ranks // 2 + 1) / places
    return (ranks + 1 - _numbers(source, (places,), 0.0, 0.3)) / places


def _weight(source: Source, shape: tuple[int, ...], wanted: Wanted) -> dict[str, Any]:
    return {"weight": _numbers(source, shape, 0.1, 3.0).to(wanted.dtype)} if wanted.weight else {}


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _numbers(source: Source, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    values = [source.number(low, high) for _ in range(_count(shape))]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)
