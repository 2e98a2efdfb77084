"""The curves of a run as a PNG, drawn by matplotlib without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prefloss.cli.report import Result
from prefloss.demo import world

_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#666666"


def write_picture(result: Result, path: Path) -> None:
    """Four panels over steps: reward (or loss), KL, accuracy, log-probs."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle(f"{result.loss}\n{result.setting}", fontsize=12)
    _first_panel(axes[0, 0], result)
    _kl_panel(axes[0, 1], result)
    _accuracy_panel(axes[1, 0], result)
    _log_prob_panel(axes[1, 1], result)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    for axis in axes[1]:
        axis.set_xlabel("optimizer steps")
    figure.savefig(path, dpi=130)


def _first_panel(axis: Any, result: Result) -> None:
    rewards = _series(result, "reward")[1]
    if not rewards:
        axis.plot([step for step, _ in result.losses], [value for _, value in result.losses], color=_BLUE)
        axis.set(title="Training loss", ylabel="loss")
        return
    low = _banded(axis, result, "reward", _BLUE, "policy, ± 2 standard errors")
    first, best = rewards[0], world.BEST_REWARD
    axis.axhline(first, color=_GREY, linestyle="--", linewidth=1, label=f"before training, {first:+.2f}")
    axis.axhline(best, color=_GREEN, linestyle=":", linewidth=1.5, label=f"best possible, {best:g}")
    axis.set(title="True reward of sampled completions", ylabel="reward (judge's scale)")
    # Room for the legend below the curve, which rises.
    axis.set_ylim(min(low, first - 0.4 * (best - first)), best + 0.3)
    axis.legend(frameon=False, loc="lower right")


def _kl_panel(axis: Any, result: Result) -> None:
    axis.set(title="How far the model moved, per completion", ylabel="KL(policy ‖ reference), nats")
    if not _series(result, "kl")[1]:
        axis.text(0.5, 0.5, "not measured (--samples 0)", transform=axis.transAxes, ha="center", color=_GREY)
        return
    low = _banded(axis, result, "kl", _ORANGE, "± 2 standard errors")
    axis.set_ylim(bottom=min(0.0, low))
    axis.legend(frameon=False, loc="lower right")


def _banded(axis: Any, result: Result, field: str, colour: str, label: str) -> float:
    """Draw a curve with a band of two standard errors; returns the lowest point of the band."""
    steps, values = _series(result, field)
    errors = _series(result, f"{field}_error")[1]
    low = [value - 2 * error for value, error in zip(values, errors, strict=True)]
    high = [value + 2 * error for value, error in zip(values, errors, strict=True)]
    axis.plot(steps, values, "o-", color=colour, label=label)
    axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    return min(low)


def _accuracy_panel(axis: Any, result: Result) -> None:
    steps, shares = _series(result, "accuracy")
    axis.set(title=f"Implicit-reward accuracy on {result.rows} rows")
    axis.set_ylabel("pairs ordered as judged" if result.paired else "upvoted above downvoted")
    if not shares:
        axis.text(0.5, 0.5, "needs both kinds of rows", transform=axis.transAxes, ha="center", color=_GREY)
        return
    if len(_series(result, "accuracy_error")[1]) == len(shares):
        _banded(axis, result, "accuracy", _BLUE, "policy, ± 2 standard errors")
    else:
        axis.plot(steps, shares, "o-", color=_BLUE, label="policy")
    axis.axhline(0.5, color=_GREY, linestyle="--", linewidth=1, label="coin flip, 50 %")
    if result.ceiling is not None:
        words = f"the true reward, {result.ceiling:.1%}"
        axis.axhline(result.ceiling, color=_GREEN, linestyle=":", linewidth=1.5, label=words)
    axis.set_ylim(min(0.2, *shares), 1.0)
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.legend(frameon=False, loc="lower right")


def _log_prob_panel(axis: Any, result: Result) -> None:
    for field, name, colour in zip(("chosen", "rejected"), result.sides, (_GREEN, _ORANGE), strict=True):
        steps, changes = _series(result, field)
        if changes:
            axis.plot(steps, changes, "o-", color=colour, label=name)
    axis.axhline(0.0, color=_GREY, linestyle="--", linewidth=1, label="as at the start")
    axis.set(title=f"Log-probability of {result.rows} completions", ylabel="change per completion, nats")
    axis.legend(frameon=False, loc="lower left")


def _series(result: Result, field: str) -> tuple[list[int], list[float]]:
    points = [(m.step, getattr(m, field)) for m in result.measurements if getattr(m, field) is not None]
    return [step for step, _ in points], [value for _, value in points]
