"""What the pictures of experiments have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.statistics import mean_interval
from prefloss.worlds import World, frontier

# Okabe and Ito's colours, which colour-blind readers can tell apart; grey is for what is known beforehand.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
GREY = "#666666"
COLOURS = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")


def panels(figure: Any, count: int, **sharing: bool) -> Sequence[Any]:
    """Axes side by side, without frames on top and on the right."""
    axes = figure.subplots(1, count, squeeze=False, **sharing)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return axes


def draw_frontier(axis: Any, world: World, betas: Tensor | None = None) -> None:
    """The best true reward at each KL."""
    betas = torch.logspace(-1.5, 2, 200, dtype=torch.float64) if betas is None else betas
    axis.plot(*frontier(world, betas), color=GREY, linestyle="--", linewidth=1.5, label="best possible")
    axis.set(xlabel="KL(policy ‖ reference), nats", ylabel="true reward")


def draw_means(axis: Any, x: Tensor, y: Tensor, label: str, which: int, dots: bool = True) -> None:
    """Seeds as dots, their means as a line with 95 % intervals of y; [points, seeds] each, or x [points].

    Args:
        axis: To draw on.
        x: What is on the horizontal axis.
        y: What is on the vertical axis.
        label: For the legend.
        which: Number of the colour and marker.
        dots: Draw each seed too.
    """
    x = (x.unsqueeze(-1) if x.ndim == 1 else x).double().expand_as(y)
    colour, marker = COLOURS[which % len(COLOURS)], MARKERS[which % len(MARKERS)]
    if dots:
        axis.scatter(x, y, s=6, color=colour, alpha=0.25, linewidths=0)
    mean, low, high = torch.tensor([mean_interval(row.tolist()) for row in y]).T
    axis.errorbar(
        *(x.mean(-1), mean, torch.stack([mean - low, high - mean])),
        color=colour,
        marker=marker,
        markersize=5,
        capsize=2,
        label=label,
    )
