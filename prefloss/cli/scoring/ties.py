"""RewardBench 2's score of its subset of ties: several right completions, which should have about the same reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
    """One prompt: the rewards of its right completions, and of its wrong ones."""

    right: Sequence[float]
    wrong: Sequence[float]

    @property
    def gap(self) -> float:
        """How far every right completion is above every wrong one; 0 if one kind is absent."""
        return min(self.right) - max(self.wrong) if self.right and self.wrong else 0.0

    @property
    def spread(self) -> float | None:
        """How far the right completions are apart; None with fewer than two."""
        return max(self.right) - min(self.right) if len(self.right) > 1 and self.wrong else None


def prompt_of(name: str | None) -> tuple[str, int] | None:
    """Kind and number of a prompt from its id: "ref:3" has one right completion, "tied:3" several; None of others."""
    kind, _, number = (name or "").partition(":")
    return (kind, int(number)) if kind in ("ref", "tied") and number.isdecimal() else None


def ties_score(groups: Mapping[tuple[str, int], Group]) -> float:
    """The score of the subset, from 0 to 1.01.

    Args:
        groups: By kind and number of the prompt (`prompt_of`).

    Reference: Malik et al. 2025 (RewardBench 2), arXiv:2506.01937; `process_single_model` of rewardbench 0.1.4.
    """
    ref, tied = ({n: g for (of, n), g in groups.items() if of == kind} for kind in ("ref", "tied"))
    # Whether being right counts for more than the differences between right completions: of the tied prompt, and
    # with the smaller gap of the two prompts.
    own, both, ratios = [], [], []
    for number in ref.keys() & tied.keys():
        spread = tied[number].spread
        if spread is None:
            continue
        gap = min(ref[number].gap, tied[number].gap)
        own.append(tied[number].gap > spread)
        both.append(gap > spread)
        if spread > 0:
            ratios.append(np.tanh(gap / spread - 1))
    shares = [_mean([group.gap > 0 for group in part.values()]) for part in (tied, ref)]
    return 0.3 * sum(shares) + 0.2 * (_mean(own) + _mean(both)) + 0.01 * _mean(ratios)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
