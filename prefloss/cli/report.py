"""The results of a run: a table, sentences that explain it, and metrics.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefloss.demo.measure import Measurement
from prefloss.diagnosis import resisting
from prefloss.worlds import language


@dataclass(frozen=True)
class Result:
    """Everything a report is made from.

    Attributes:
        loss: The loss with its hyperparameters, as `ipo(tau=0.1, per_token=True)`.
        measurements: Before training, during, and after.
        losses: (step, training loss).
        ceiling: Held-out accuracy that the true reward itself reaches, if known.
        paired: Whether accuracy compares two answers to one prompt.
        held_out: Whether the measured rows were kept out of training.
        holds_chosen: Whether the loss resists falling chosen completions.
        setting: Model, data and length of the run, in one line.
        warm_loss: Loss at the end of the warm start, nats per token, if there was one.
        prompts: Prompts of the samples, as text.
        seconds: Wall time by part of the run.
        about: What the run was: options, data, versions.
    """

    loss: str
    measurements: Sequence[Measurement]
    losses: Sequence[tuple[int, float]]
    ceiling: float | None
    paired: bool
    held_out: bool
    holds_chosen: bool
    setting: str
    warm_loss: float | None
    prompts: Sequence[str]
    seconds: dict[str, float]
    about: dict[str, Any]

    @property
    def sides(self) -> tuple[str, str]:
        """What the better and the worse completions are called."""
        return ("chosen", "rejected") if self.paired else ("upvoted", "downvoted")

    @property
    def rows(self) -> str:
        """What the measured rows are called."""
        return "held-out" if self.held_out else "training"

    @property
    def before(self) -> Measurement:
        """The first measurement, before any step."""
        return self.measurements[0]

    @property
    def after(self) -> Measurement:
        """The last one."""
        return self.measurements[-1]


def print_report(console: Console, result: Result) -> None:
    """Print table, sentences and samples."""
    console.print()
    console.print(table(result))
    for sentence in verdict(result):
        console.print(sentence)
    if result.after.samples:
        console.print()
        console.print(samples(result))


def table(result: Result) -> Table:
    """Before and after, one row per quantity that could be measured."""
    # Text, not markup: a hyperparameter may be written with brackets.
    title = Text.assemble((result.loss, "bold"), f" after {result.after.step} steps")
    table = Table(box=box.ROUNDED, title=title, title_justify="left", title_style="")
    table.add_column("", style="cyan")
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True, style="bold")
    table.add_column("how to read it", style="dim", ratio=1)
    before, after = result.before, result.after
    better, worse = result.sides
    count = len(after.samples)
    if after.reward is not None and before.reward is not None:
        table.add_row(
            "true reward",
            _with_error(before.reward, before.reward_error),
            _with_error(after.reward, after.reward_error),
            f"the judge's own scale, {language.WORST_REWARD:g} to {language.BEST_REWARD:g}; mean ± standard error of "
            f"{count} samples",
        )
    if after.kl is not None and before.kl is not None:
        table.add_row(
            "KL to the reference",
            f"{before.kl:.2f}",
            _with_error(after.kl, after.kl_error, "{:.2f}"),
            f"nats per completion over {count} samples; how far the model moved",
        )
    if after.accuracy is not None and before.accuracy is not None:
        what = "pairs ordered as judged" if result.paired else "upvoted above downvoted, over all such pairs"
        ceiling = "" if result.ceiling is None else f", the true reward itself {_share(result.ceiling)}"
        table.add_row(
            "implicit-reward accuracy",
            _share(before.accuracy),
            _share(after.accuracy) + (f" ± {after.accuracy_error:.1%}" if after.accuracy_error else ""),
            f"{result.rows} {what}; a coin gets 50 %{ceiling}",
        )
    change = "nats per completion, change since the start"
    if after.chosen is not None:
        falling = f"{change}; fell for {_share(after.chosen_falling)} of them"
        table.add_row(f"log-prob of {better}", "+0.00", f"{after.chosen:+.2f}", falling)
    if after.rejected is not None:
        margin = "; the margin between the two is what is trained" if result.paired else ""
        table.add_row(f"log-prob of {worse}", "+0.00", f"{after.rejected:+.2f}", change + margin)
    return table


def verdict(result: Result) -> list[Text]:
    """The table in sentences."""
    before, after = result.before, result.after
    sentences = []
    if after.reward is not None and before.reward is not None:
        gain = after.reward - before.reward
        error = math.hypot(before.reward_error or 0, after.reward_error or 0)
        good = gain > 2 * error
        rose = "rose" if good else "did not clearly rise"
        sentence = f"The true reward {rose}: {gain:+.2f} ± {error:.2f}."
        sentences.append(Text(sentence, style="green" if good else "yellow"))
    elif after.accuracy is not None and after.accuracy_error is not None:
        good = after.accuracy - 0.5 > 2 * after.accuracy_error
        compared = "clearly better than" if good else "within the noise of"
        words = f"The model orders {result.rows} pairs {compared} a coin: {_share(after.accuracy)}."
        sentences.append(Text(words, style="green" if good else "yellow"))
    # Smaller falls show as 0.0 in the table.
    if after.chosen is not None and after.rejected is not None and after.chosen <= -0.05:
        sentences.append(_fall(result, after.chosen - after.rejected))
    if not result.held_out:
        sentences.append(Text("Nothing was held out, so accuracy is that of training rows.", style="yellow"))
    return sentences


def _fall(result: Result, margin: float) -> Text:
    """What a fall of the better completions means."""
    better, worse = result.sides
    words = f"{better.capitalize()} completions became less likely"
    if margin <= 0:
        return Text(f"{words}, and {worse} ones no less so: the margin did not grow.", style="yellow")
    words += (
        f". That is no bug: the loss raises the margin between {better} and {worse}, here to {margin:+.2f} nats, "
        "and both may fall on the way."
    )
    if result.paired and not result.holds_chosen:
        words += f" Losses that hold {better} ones up: {', '.join(resisting())}."
    return Text(words, style="dim")


def samples(result: Result, count: int = 3) -> Table:
    """What the model says before and after, to the same prompts."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="Samples", title_justify="left", title_style="bold"
    )
    table.add_column("prompt", style="dim", max_width=28)
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1, style="bold")
    # One row per prompt, the first of its samples.
    rows: dict[str, tuple[str, ...]] = {}
    for row in zip(result.prompts, result.before.samples, result.after.samples, strict=True):
        rows.setdefault(row[0], row)
    for row in list(rows.values())[:count]:
        table.add_row(*(Text(_printable(text)) for text in row))
    return table


def write_metrics(result: Result, path: Path) -> None:
    """All numbers of the run, without the sampled texts."""

    def numbers(measurement: Measurement) -> dict[str, Any]:
        return {name: value for name, value in asdict(measurement).items() if name != "samples"}

    content = {
        **result.about,
        "loss": result.loss,
        "before": numbers(result.before),
        "after": numbers(result.after),
        "measurements": [numbers(measurement) for measurement in result.measurements],
        "training_loss": [{"step": step, "loss": value} for step, value in result.losses],
        "accuracy_of_true_reward": result.ceiling,
        "held_out": result.held_out,
        "warm_start_loss": result.warm_loss,
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
    }
    path.write_text(json.dumps(_finite(content), indent=2) + "\n", encoding="utf-8")


def _with_error(value: float, error: float | None, shown: str = "{:+.2f}") -> str:
    return f"{shown.format(value)} ± {error:.2f}" if error else shown.format(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _printable(text: str, width: int = 200) -> str:
    # An untrained model may write control characters, which a terminal would obey.
    flat = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#666666"


def write_picture(result: Result, path: Path) -> None:
    """Four panels over steps: reward (or loss), KL, accuracy, log-probs."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle(f"{result.loss}\n{result.setting}", fontsize=12)
    panels = (_first_panel, _kl_panel, _accuracy_panel, _log_prob_panel)
    for axis, draw in zip(axes.flat, panels, strict=True):
        draw(axis, result)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, loc="lower left" if axis is axes[1, 1] else "lower right")
    for axis in axes[1]:
        axis.set_xlabel("optimizer steps")
    figure.savefig(path, dpi=130)


def _first_panel(axis: Any, result: Result) -> None:
    rewards = _series(result, "reward")[1]
    if not rewards:
        axis.plot(*zip(*result.losses, strict=True), color=_BLUE)
        axis.set(title="Training loss", ylabel="loss")
        return
    low = _banded(axis, result, "reward", _BLUE, "policy, ± 2 standard errors")
    first, best = rewards[0], language.BEST_REWARD
    axis.axhline(first, color=_GREY, linestyle="--", linewidth=1, label=f"before training, {first:+.2f}")
    axis.axhline(best, color=_GREEN, linestyle=":", linewidth=1.5, label=f"best possible, {best:g}")
    axis.set(title="True reward of sampled completions", ylabel="reward (judge's scale)")
    # Room for the legend below the curve, which rises.
    axis.set_ylim(min(low, first - 0.4 * (best - first)), best + 0.3)


def _kl_panel(axis: Any, result: Result) -> None:
    axis.set(title="How far the model moved, per completion", ylabel="KL(policy ‖ reference), nats")
    if not _series(result, "kl")[1]:
        axis.text(0.5, 0.5, "not measured (--samples 0)", transform=axis.transAxes, ha="center", color=_GREY)
        return
    low = _banded(axis, result, "kl", _ORANGE, "± 2 standard errors")
    axis.set_ylim(bottom=min(0.0, low))


def _banded(axis: Any, result: Result, field: str, colour: str, label: str) -> float:
    """Draw a curve with a band of two standard errors; returns the lowest point of the band."""
    steps, values = _series(result, field)
    points = list(zip(values, _series(result, f"{field}_error")[1], strict=True))
    low, high = ([value + sign * 2 * error for value, error in points] for sign in (-1, 1))
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


def _log_prob_panel(axis: Any, result: Result) -> None:
    for field, name, colour in zip(("chosen", "rejected"), result.sides, (_GREEN, _ORANGE), strict=True):
        steps, changes = _series(result, field)
        if changes:
            axis.plot(steps, changes, "o-", color=colour, label=name)
    axis.axhline(0.0, color=_GREY, linestyle="--", linewidth=1, label="as at the start")
    axis.set(title=f"Log-probability of {result.rows} completions", ylabel="change per completion, nats")


def _series(result: Result, field: str) -> tuple[list[int], list[float]]:
    points = [(m.step, getattr(m, field)) for m in result.measurements if getattr(m, field) is not None]
    return [step for step, _ in points], [value for _, value in points]
