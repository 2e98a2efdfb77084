"""An experiment: a claim, tried in a world whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Verdict(Enum):
    """What became of the claim."""

    HOLDS = "holds"
    HOLDS_WITH_A_CHANGE = "holds with a change"
    DOES_NOT_APPEAR = "does not appear here"


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        name: What it is, with its unit, as in "true reward at a KL of 3 nats, DPO minus IPO".
        value: Mean over the seeds, or an exact value.
        interval: 95 % interval of the mean over seeds; None where the value is exact.
        expected: The closed form or the paper's own number, where there is one.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    expected: float | None = None

    @property
    def signed(self) -> str:
        """The value with its sign, as summaries give a difference; a KL that a run did not reach has none."""
        return "not reached" if math.isnan(self.value) else f"{self.value:+.3f}"

    def __str__(self) -> str:
        """A difference as a sentence says it: "+0.031 (+0.010 to +0.052)"."""
        if math.isnan(self.value):
            return self.signed
        if self.interval is None:
            return f"{self.value:+.3f}"
        return f"{self.value:+.3f} ({self.interval[0]:+.3f} to {self.interval[1]:+.3f})"

    def above(self, bound: float) -> bool:
        """Whether the whole interval, or the exact value, is above a bound."""
        return (self.value if self.interval is None else self.interval[0]) > bound

    def below(self, bound: float) -> bool:
        """Whether the whole interval, or the exact value, is below a bound."""
        return (self.value if self.interval is None else self.interval[1]) < bound


@dataclass(frozen=True)
class Finding:
    """What one run of an experiment found.

    Attributes:
        summary: One or two plain sentences with the numbers: what was found.
        figures: What was measured; the first one decides the verdict.
        verdict: Computed from the figures.
        rows: Rows of results.csv, one a run (loss, strength, seed, ...), all with the same keys.
        draw: Draws the picture on an empty matplotlib figure.
        change: What differs from the claim or from the paper's set-up, where the verdict holds with a change.
    """

    summary: str
    figures: Sequence[Figure]
    verdict: Verdict
    rows: Sequence[Mapping[str, Any]]
    draw: Callable[[Any], None]
    change: str = ""


@dataclass(frozen=True)
class Experiment:
    """A claim and the run that tries it.

    Attributes:
        name: On the command line, as in "ipo-deterministic".
        title: A line for lists.
        claim: What the source says, in one or two sentences.
        source: Paper with section and arXiv number, or "asked by learners".
        setup: World, data, losses, strengths and budget, in plain words.
        run: Takes the seeds, returns the finding; the same seeds give the same numbers.
        seeds: How many it takes where nobody asks for another number.
    """

    name: str
    title: str
    claim: str
    source: str
    setup: str
    run: Callable[[Sequence[int]], Finding]
    seeds: int = 20
