"""The report of a comparison on a user's own data, where no true reward is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from prefloss.evidence import pictures
from prefloss.evidence.comparison import LEVEL, listed
from prefloss.evidence.report import Origin, template
from prefloss.evidence.statistics import Difference, holm, mean_interval, paired_difference
from prefloss.evidence.sweeps import is_baseline

# Figures of a run -> what they are called.
FIGURES = {
    "accuracy": "held-out accuracy",
    "confidence": "confidence",
    "chosen": "log-prob of chosen, change in nats",
    "rejected": "log-prob of rejected, change in nats",
    "kl": "KL to the reference, nats",
    "length": "length of samples, tokens",
}
NO_RANKING = (
    "This report ranks no quality: without a true reward, its figures do not say which model answers better."
)


@dataclass(frozen=True, eq=False)
class DataComparison:
    """All runs on one data set, and how held-out accuracy differs.

    Attributes:
        losses: What was compared, by the user's words.
        runs: One mapping a run: loss, seed, the figures, samples.
    """

    losses: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]

    @property
    def baseline(self) -> str:
        """The first loss that is DPO; without one, the first loss."""
        return next((loss for loss in self.losses if is_baseline(loss)), next(iter(self.losses)))

    @property
    def others(self) -> list[str]:
        """The other losses."""
        return [loss for loss in self.losses if loss != self.baseline]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row a run."""
        return [
            {"loss": run["loss"], "world": "data", "beta": run["beta"], "seed": run["seed"]}
            | {"reward": None, "kl": run["kl"], "accuracy": run["accuracy"], "length": run["length"]}
            | {
                "chosen_drift": run["chosen"],
                "rejected_drift": run["rejected"],
                "confidence": run["confidence"],
            }
            for run in sorted(self.runs, key=lambda run: (list(self.losses).index(run["loss"]), run["seed"]))
        ]

    def values(self, loss: str, name: str) -> list[float]:
        """A figure of each seed that has it."""
        ours = sorted((run for run in self.runs if run["loss"] == loss), key=lambda run: run["seed"])
        return [run[name] for run in ours if run[name] is not None]

    def interval(self, loss: str, name: str) -> tuple[float, float, float] | None:
        """Its mean and 95 % interval over the seeds."""
        values = self.values(loss, name)
        return mean_interval(values) if len(values) > 1 else None

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """Held-out accuracy against the baseline on the same seeds, in percentage points."""
        accuracies = {loss: 100 * np.asarray(self.values(loss, "accuracy"))[:, None] for loss in self.losses}
        one = accuracies[self.baseline]
        return {
            loss: paired_difference(accuracies[loss], one, len(self.others))
            for loss in self.others
            if len(accuracies[loss]) == len(one) > 1
        }

    @cached_property
    def shown(self) -> dict[str, int]:
        """1 for a loss whose accuracy is shown to be higher, -1 for lower, 0 for neither."""
        corrected = holm([found.p_value for found in self.differences.values()])
        return {
            loss: int(np.sign(found.mean)) if p_value < LEVEL else 0
            for (loss, found), p_value in zip(self.differences.items(), corrected, strict=True)
        }

    @property
    def verdict(self) -> list[str]:
        """What was found, in plain sentences."""
        rows = "held-out" if all(run["held_out"] for run in self.runs) else "training"
        sentences = [NO_RANKING]
        for sign, word in ((1, "more"), (-1, "fewer"), (0, "")):
            names = [loss for loss, shown in self.shown.items() if shown == sign]
            if names and sign:
                verb = "orders" if len(names) == 1 else "order"
                sentences.append(
                    f"{listed(names)} {verb} {word} {rows} comparisons as judged than {self.baseline}."
                )
            elif names:
                sentences.append(
                    f"No difference in {rows} accuracy from {self.baseline} is shown for {listed(names)}."
                )
        if self.differences:
            smallest = max(found.smallest for found in self.differences.values())
            seeds = len(self.values(self.baseline, "accuracy"))
            sentences.append(
                f"{seeds} seeds would have shown a difference of {smallest:.1f} percentage points in 4 of 5 such "
                "comparisons; smaller ones may be there."
            )
        return sentences


def page(comparison: DataComparison, origin: Origin) -> str:
    """The whole report as HTML."""
    first = {loss: next(run for run in comparison.runs if run["loss"] == loss) for loss in comparison.losses}
    return template("data_report.html").render(
        comparison=comparison,
        origin=origin,
        names=FIGURES,
        forest=pictures.forest(
            comparison.differences,
            comparison.shown,
            f"held-out accuracy minus that of {comparison.baseline}, points",
        ),
        first=first,
        exact={loss: repr(bound) for loss, bound in comparison.losses.items()},
        seconds={loss: sum(comparison.values(loss, "seconds")) for loss in comparison.losses},
        setting=first[comparison.baseline]["setting"],
    )
