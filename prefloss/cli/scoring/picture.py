"""The reliability picture: how sure the rewards are of an order, and how often that order is people's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prefloss.cli.scoring.summary import wilson

_BLUE, _GREY = "#0072b2", "#666666"


def write_reliability(path: Path, summary: Mapping[str, Any], title: str) -> None:
    """Draw the bins of a summary: accuracy over confidence, and how many comparisons each bin holds."""
    calibration = summary["calibration"]
    bins = calibration["bins"]
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    confidence = [each["confidence"] for each in bins]
    above.plot([0.5, 1], [0.5, 1], color=_GREY, linestyle="--", linewidth=1, label="as sure as right")
    shares = [each["accuracy"] for each in bins]
    ends = [wilson(each["accuracy"], each["count"]) for each in bins]
    lengths = [[share - low for share, (low, _) in zip(shares, ends, strict=True)]]
    lengths += [[high - share for share, (_, high) in zip(shares, ends, strict=True)]]
    above.errorbar(
        confidence, shares, lengths, fmt="o-", color=_BLUE, capsize=3, label="rewards, 95% intervals"
    )
    above.set(ylabel="comparisons ordered as people did", xlim=(0.49, 1.01), ylim=(-0.02, 1.02))
    above.set_title(f"{title}\ncalibration error (ECE) {calibration['ece']:.3f}", fontsize=11)
    above.legend(frameon=False, loc="lower right")
    edges = [0.5 + 0.05 * number for number in range(11)]
    below.hist(
        confidence, edges, weights=[each["count"] for each in bins], color=_BLUE, alpha=0.6, rwidth=0.92
    )
    below.set(xlabel="confidence: sigmoid of the margin's size", ylabel="comparisons")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    above.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.savefig(path, dpi=130)
