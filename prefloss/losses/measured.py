"""What was measured of each loss in worlds whose truth is known: problem by problem, and over all worlds.

`tried.csv` holds figures of `prefloss reproduce`, `measured.csv` is the table of `prefloss compare --all`. Tests hold
both to the results in docs/evidence.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

# A smaller difference of reward (or nats) is no reason to change the loss.
SMALLEST = 0.05
_FOLDER = Path(__file__).parent


class Grade(IntEnum):
    """How well it is known that a loss helps against a problem; higher is better."""

    CONTRADICTED = 0
    NO_DIFFERENCE = 1
    CLAIMED = 2
    MIXED = 3
    MEASURED = 4
    CLAIMED_AND_MEASURED = 5


@dataclass(frozen=True)
class Tried:
    """A figure of an experiment: how a loss did against a problem.

    Attributes:
        loss: Its name.
        problem: The problem, or the kind of data.
        experiment: What `prefloss reproduce` calls it.
        quantity: What was measured.
        value: The figure; None where no run reached that KL.
        interval: 95 % interval over seeds; None where the figure is exact.
        dpo: DPO's figure; 0 where the figure is a difference from DPO.
        higher_is_better: Which direction is good.
        figure: Its name in the results of the experiment.
        dpo_figure: The same for DPO's figure; empty where that is 0.
    """

    loss: str
    problem: str
    experiment: str
    quantity: str
    value: float | None
    interval: tuple[float, float] | None
    dpo: float
    higher_is_better: bool
    figure: str
    dpo_figure: str

    @property
    def better(self) -> bool | None:
        """Whether the loss did better than DPO, or worse; None if no difference worth a change is shown."""
        if self.value is None:
            return None
        low, high = self.interval or (self.value, self.value)
        if abs(self.value - self.dpo) < SMALLEST or low <= self.dpo <= high:
            return None
        return (self.value > self.dpo) is self.higher_is_better

    @property
    def shown(self) -> str:
        """As "+0.50 (+0.42 to +0.57): reward at a KL of 0.5 nats, minus DPO's"."""
        sign = "+" if self.dpo == 0 else ""
        value = "not reached" if self.value is None else f"{self.value:{sign}.2f}"
        if self.interval:
            value += f" ({self.interval[0]:{sign}.2f} to {self.interval[1]:{sign}.2f})"
        against = f" against DPO's {self.dpo:.2f}" if self.dpo else ""
        return f"{value}{against}: {self.quantity}"

    def __str__(self) -> str:
        return f"{self.shown}; {self.experiment}"


@dataclass(frozen=True)
class Compared:
    """A row of `prefloss compare --all`: a loss over all worlds.

    Attributes:
        worlds: Names of the worlds.
        seeds: Seeds in each.
        baseline: What it is compared with.
        reward: Mean true reward.
        difference: Mean difference of the reward from the baseline; None for the baseline itself.
        interval: 95 % interval of the difference.
        p_corrected: P value after the correction for the number of losses.
    """

    worlds: tuple[str, ...]
    seeds: int
    baseline: str
    reward: float
    difference: float | None
    interval: tuple[float, float]
    p_corrected: float

    @property
    def shown(self) -> bool:
        """Whether a difference from the baseline is shown, at 5 % after the correction."""
        return self.difference is not None and self.p_corrected < 0.05


@cache
def tried() -> tuple[Tried, ...]:
    """All figures that bear on a problem."""
    return tuple(
        Tried(
            row["loss"],
            row["problem"],
            row["experiment"],
            row["quantity"],
            float(row["value"]) if row["value"] else None,
            (float(row["low"]), float(row["high"])) if row["low"] else None,
            float(row["dpo"]),
            row["better"] == "higher",
            row["figure"],
            row["dpo_figure"],
        )
        for row in _rows("tried.csv")
    )


@cache
def compared() -> dict[str, Compared]:
    """Every loss that `prefloss compare --all` trained, by name."""
    return {
        row["loss"]: Compared(
            tuple(row["worlds"].split()),
            int(row["seeds"]),
            row["baseline"],
            float(row["reward"]),
            float(row["difference"]) if row["difference"] else None,
            (float(row["low"] or 0), float(row["high"] or 0)),
            float(row["p_corrected"] or 1),
        )
        for row in _rows("measured.csv")
    }


def grade(claimed: bool, figures: list[Tried]) -> Grade | None:
    """What a claim and the figures say together; None without either."""
    found = {figure.better for figure in figures if figure.value is not None}
    if not found:
        return Grade.CLAIMED if claimed else None
    if found == {True}:
        return Grade.CLAIMED_AND_MEASURED if claimed else Grade.MEASURED
    if not claimed:
        return None
    if True in found:
        return Grade.MIXED
    return Grade.CONTRADICTED if False in found else Grade.NO_DIFFERENCE


def _rows(name: str) -> list[dict[str, str]]:
    with (_FOLDER / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
