"""Losses compared: paired differences to a baseline, corrected for being many, and true reward at equal KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefloss.evidence.statistics import Difference, at_kl, holm, mean_interval, paired_difference
from prefloss.evidence.sweeps import is_baseline

# Nats.
FIXED_KL = (1.0, 3.0, 10.0)
LEVEL = 0.05


@dataclass(frozen=True)
class AtKL:
    """True reward at one KL: mean and interval over the seeds that reached it; None where fewer than two did.

    Attributes:
        interval: Mean, low, high.
        reached: Number of seeds that reached it.
        seeds: Of how many.
    """

    interval: tuple[float, float, float] | None
    reached: int
    seeds: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that was run, and what follows from it.

    Attributes:
        losses: As the user wrote them, the baseline among them.
        worlds: Names of the settings.
        baseline: What the others are compared with.
        sweeps: What `run_sweep` gave for each loss and world.
    """

    losses: tuple[str, ...]
    worlds: tuple[str, ...]
    baseline: str
    sweeps: Mapping[tuple[str, str], Mapping[str, Any]]

    @property
    def seeds(self) -> int:
        """Runs of each loss at each strength."""
        return len(self.sweeps[self.baseline, self.worlds[0]]["prompts"])

    @property
    def others(self) -> tuple[str, ...]:
        """All losses whose runs are finite, but for the baseline; none if its own are not."""
        if self.baseline in self.broken:
            return ()
        return tuple(loss for loss in self.losses if loss != self.baseline and loss not in self.broken)

    @cached_property
    def broken(self) -> dict[str, list[str]]:
        """Losses with a chosen run that is not finite, and the worlds in which."""
        worlds = {
            loss: [world for world in self.worlds if not np.isfinite(self.prompts(loss, world)).all()]
            for loss in self.losses
        }
        return {loss: names for loss, names in worlds.items() if names}

    def prompts(self, loss: str, world: str) -> NDArray[np.float64]:
        """True reward of the chosen runs by seed and prompt, [seeds, prompts]."""
        return np.asarray(self.sweeps[loss, world]["prompts"], dtype=float)

    def over_worlds(self, loss: str) -> NDArray[np.float64]:
        """The mean of that over the worlds, [seeds, prompts]; a seed and a prompt are the same in each."""
        return np.mean([self.prompts(loss, world) for world in self.worlds], axis=0)

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """Of each loss to the baseline, in the mean over worlds: the primary figure."""
        reference = self.over_worlds(self.baseline)
        return {
            loss: paired_difference(self.over_worlds(loss), reference, len(self.others))
            for loss in self.others
        }

    @cached_property
    def by_world(self) -> dict[tuple[str, str], Difference]:
        """The same in each world."""
        return {
            (loss, world): paired_difference(
                self.prompts(loss, world), self.prompts(self.baseline, world), len(self.others)
            )
            for loss in self.others
            for world in self.worlds
        }

    @cached_property
    def corrected(self) -> dict[str, float]:
        """P-value of each loss's difference, corrected by Holm over the losses."""
        return _holm({loss: found.p_value for loss, found in self.differences.items()})

    def corrected_in(self, world: str) -> dict[str, float]:
        """The same in one world."""
        return _holm({loss: self.by_world[loss, world].p_value for loss in self.others})

    def shown(self, loss: str) -> int:
        """1 if the loss is shown to be better than the baseline, -1 if worse, 0 if neither."""
        return int(np.sign(self.differences[loss].mean)) if self.corrected[loss] < LEVEL else 0

    @cached_property
    def better_than(self) -> NDArray[np.float64]:
        """How often the loss of a row earned more than that of a column, over seeds, prompts and worlds; ties half."""
        names = self.ranked
        values = np.stack([np.stack([self.prompts(loss, world) for world in self.worlds]) for loss in names])
        flat = values.reshape(len(names), -1)
        return np.stack([0.5 * (1 + np.sign(row - flat)).mean(-1) for row in flat])

    @property
    def ranked(self) -> list[str]:
        """The baseline and the others, the highest mean reward first."""
        return sorted((self.baseline, *self.others), key=lambda loss: -self.over_worlds(loss).mean())

    def at_kl(self, loss: str, world: str, target: float) -> AtKL:
        """True reward of the loss at a KL, from each seed's whole sweep."""
        rows = self.sweeps[loss, world]["rows"]
        found = []
        seeds = sorted({row["seed"] for row in rows})
        for seed in seeds:
            runs = [row for row in rows if row["seed"] == seed and row["kl"] is not None]
            value = at_kl([row["kl"] for row in runs], [row["reward"] for row in runs], target)
            found += [] if value is None else [value]
        return AtKL(mean_interval(found) if len(found) > 1 else None, len(found), len(seeds))

    def reached_kl(self, world: str) -> list[float]:
        """The fixed KLs that at least two seeds of some loss reached."""
        return [kl for kl in FIXED_KL if any(self.at_kl(loss, world, kl).interval for loss in self.ranked)]

    @property
    def verdict(self) -> list[str]:
        """What was found, in plain sentences; the first one answers."""
        where = "in this world" if len(self.worlds) == 1 else f"in the mean over {len(self.worlds)} worlds"
        groups = {sign: [loss for loss in self.others if self.shown(loss) == sign] for sign in (1, -1, 0)}
        sentences = []
        if not self.others:
            sentences.append(f"There is nothing to compare {self.baseline} with.")
        if self.others and not groups[1] and not groups[-1]:
            sentences.append(
                f"No difference in true reward from {self.baseline} is shown {where} for {listed(groups[0], 'or')}."
            )
        else:
            for sign, word in ((1, "more"), (-1, "less")):
                if groups[sign]:
                    verb = "earns" if len(groups[sign]) == 1 else "earn"
                    sentences.append(
                        f"{self._with_sizes(groups[sign])} {verb} {word} true reward than {self.baseline} {where}."
                    )
            if groups[0]:
                sentences.append(f"No difference from {self.baseline} is shown for {listed(groups[0])}.")
        if self.others:
            sentences.append(self._resolution())
        for loss, worlds in self.broken.items():
            sentences.append(
                f"{loss} is left out: a run gave numbers that are not finite ({', '.join(worlds)})."
            )
        return sentences

    def _with_sizes(self, losses: Sequence[str]) -> str:
        ordered = sorted(losses, key=lambda loss: -abs(self.differences[loss].mean))
        return listed([f"{loss} ({self.differences[loss].mean:+.2f})" for loss in ordered])

    def _resolution(self) -> str:
        smallest = sorted(found.smallest for found in self.differences.values())
        middle = smallest[len(smallest) // 2]
        many = f", after the correction for {len(self.others)} losses" if len(self.others) > 1 else ""
        return (
            f"{self.seeds} seeds would have shown a difference of about {middle:.2f} in true reward in 4 of 5 such "
            f"comparisons{many}; smaller ones may be there."
        )


def compared(sweeps: Sequence[Mapping[str, Any]], losses: Sequence[str], worlds: Sequence[str]) -> Comparison:
    """The comparison of finished sweeps; the baseline is the first loss that is DPO."""
    baseline = next(loss for loss in losses if is_baseline(loss))
    by_key = {(sweep["loss"], sweep["world"]): sweep for sweep in sweeps}
    return Comparison(tuple(losses), tuple(worlds), baseline, by_key)


def _holm(p_values: Mapping[str, float]) -> dict[str, float]:
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))


def listed(names: Sequence[str], joint: str = "and") -> str:
    """As "ipo and kto", or "7 losses (ipo, kto, ...)"."""
    if len(names) > 6:
        return f"{len(names)} losses ({', '.join(names)})"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joint} {names[-1]}"
