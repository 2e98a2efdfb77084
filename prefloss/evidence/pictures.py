"""Pictures of a comparison, as SVG to stand inside a page."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from prefloss.evidence.comparison import Comparison
from prefloss.evidence.statistics import Difference, mean_interval
from prefloss.worlds import frontier, settings

# Okabe and Ito's colours, which colour-blind readers can tell apart; black is the baseline.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
_MARKERS = "osD^vP*X"
_GREY = "#888888"
# More than this many losses in one picture cannot be told apart.
MOST_DRAWN = len(_COLOURS)
# Column of a sweep's curves -> title of its panel.
CURVES = {
    "reward": "True reward",
    "accuracy": "Implicit accuracy, held out",
    "kl": "KL to the reference, nats",
    "length": "Length, tokens",
    "chosen": "Log-prob of chosen, change in nats",
    "rejected": "Log-prob of rejected, change in nats",
}


def svg(draw: Callable[[Any], None], width: float, height: float, title: str) -> str:
    """What `draw` does to an empty figure as an <svg> element; sizes in inches, the title for screen readers."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.size": 10,
        "font.family": "sans-serif",
    }
    with mpl.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        text = io.StringIO()
        # No metadata: they name addresses, and the page needs none.
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    element = text.getvalue()
    element = element[element.index("<svg") :]
    return element.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def focus(comparison: Comparison) -> list[str]:
    """The losses that are drawn: the baseline first, and where there are too many, the highest and the lowest."""
    others = [loss for loss in comparison.ranked if loss != comparison.baseline]
    room = MOST_DRAWN - 1
    if len(others) > room:
        others = [*others[: room - 3], *others[-3:]]
    return [comparison.baseline, *others]


def frontier_of(comparison: Comparison, world: str) -> str:
    """True reward over KL in one world: every run a dot, each loss's mean with its band, the oracle above all."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        reached = 0.1
        for place, loss in enumerate(focus(comparison)):
            colour, marker = _COLOURS[place], _MARKERS[place]
            rows = [row for row in comparison.sweeps[loss, world]["rows"] if row["kl"] is not None]
            axis.plot(
                [row["kl"] for row in rows],
                [row["reward"] for row in rows],
                marker,
                color=colour,
                ms=2.5,
                alpha=0.35,
            )
            reached = max(reached, *(row["kl"] for row in rows))
            _mean_with_band(axis, rows, colour, marker, loss)
        kl, reward = frontier(settings()[world].world, torch.logspace(-1.5, 3, 200).double())
        inside = kl <= 1.05 * reached
        axis.plot(kl[inside], reward[inside], "--", color=_GREY, label="oracle: no policy is above")
        axis.set(title=world, xlabel="KL to the reference, nats", ylabel="true reward")

    return svg(draw, 4.2, 3.2, f"True reward over KL in the world {world}")


def _mean_with_band(axis: Any, rows: Sequence[Any], colour: str, marker: str, label: str) -> None:
    betas = sorted({row["beta"] for row in rows}, key=lambda beta: beta or 0.0)
    points = []
    for beta in betas:
        ours = [row for row in rows if row["beta"] == beta]
        if len(ours) > 1:
            points.append(
                (float(np.mean([row["kl"] for row in ours])), *mean_interval([r["reward"] for r in ours]))
            )
    if points:
        kl, mean, low, high = zip(*sorted(points), strict=True)
        axis.plot(kl, mean, "-", marker=marker, ms=4, color=colour, label=label, lw=1.3)
        axis.fill_between(kl, low, high, color=colour, alpha=0.12, lw=0)


def forest(differences: Mapping[str, Difference], shown: Mapping[str, int], label: str) -> str:
    """Each loss's difference to the baseline with its interval; filled where it is shown, 1 or -1."""
    losses = sorted(differences, key=lambda loss: differences[loss].mean)

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.axvline(0, color=_GREY, lw=1)
        for place, loss in enumerate(losses):
            found = differences[loss]
            colour = {1: "#009e73", -1: "#d55e00", 0: _GREY}[shown[loss]]
            axis.plot([found.low, found.high], [place, place], color=colour, lw=1.6)
            axis.plot(found.mean, place, "o", color=colour, ms=5, mfc=colour if shown[loss] else "white")
        axis.set_yticks(range(len(losses)), [_short(loss) for loss in losses])
        axis.set(xlabel=label, ylim=(-0.7, len(losses) - 0.3))

    return svg(draw, 4.2, 0.9 + 0.24 * len(losses), "Paired differences with 95 % intervals")


def matrix(comparison: Comparison) -> str:
    """How often the loss of a row earns more than that of a column."""
    losses, values = comparison.ranked, comparison.better_than
    count = len(losses)
    size = 1.8 + max(0.42 * min(count, 12), 0.13 * count)

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.imshow(values, cmap="PuOr_r", vmin=0, vmax=1)
        font = {"fontsize": 9 if count <= 12 else 5}
        axis.set_xticks(range(count), [_short(loss) for loss in losses], rotation=90, **font)
        axis.set_yticks(range(count), [_short(loss) for loss in losses], **font)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        if count <= 12:
            for row, column in np.ndindex(count, count):
                if row != column:
                    value = values[row, column]
                    dark = "white" if abs(value - 0.5) > 0.35 else "black"
                    axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color=dark)

    return svg(draw, size, size, "How often the loss of a row earns more than that of a column")


def curve(comparison: Comparison, name: str) -> str:
    """One figure over the steps of training, mean over worlds and seeds of the chosen runs."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for place, loss in enumerate(focus(comparison)):
            sweeps = [comparison.sweeps[loss, world] for world in comparison.worlds]
            means = np.mean([np.asarray(sweep["curves"][name], dtype=float) for sweep in sweeps], axis=0)
            axis.plot(
                sweeps[0]["steps"], means, "-", marker=_MARKERS[place], ms=3.5, color=_COLOURS[place], lw=1.3
            )
        axis.set(title=CURVES[name], xlabel="step")
        axis.margins(y=0.12)

    return svg(draw, 4.2, 2.6, f"{CURVES[name]} over the steps of training")


def legend(comparison: Comparison) -> list[tuple[str, str]]:
    """The drawn losses with their colours."""
    return [(loss, _COLOURS[place]) for place, loss in enumerate(focus(comparison))]


def _short(loss: str) -> str:
    return loss if len(loss) <= 18 else loss[:17] + "…"
