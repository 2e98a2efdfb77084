"""The summary of a file's rewards in words, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefloss.cli.scoring.summary import BINS

# Subsets of a benchmark that are printed; all are in the file.
_MOST_SUBSETS = 40


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the summary, a line or a few for each quantity."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="cyan", width=12, no_wrap=True)
    grid.add_column(width=min(66, console.width - 14))
    for name, text in _lines(summary):
        grid.add_row(name, Text(text))
    console.print()
    console.print(grid)


def _lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "scored",
        f"{found['completions']:,} completions of {found['rows']:,} rows, {found['tokens']:,} tokens",
    )
    if found["truncated"]:
        share = found["truncated"] / found["completions"]
        yield (
            "truncated",
            f"{found['truncated']:,} completions ({share:.1%}): their rewards leave out what was cut",
        )
    if "accuracy" in found:
        yield "accuracy", _accuracy(found["accuracy"])
    if "votes" in found:
        votes = found["votes"]
        yield (
            "accuracy",
            f"unknown: {votes['up']:,} upvotes and {votes['down']:,} downvotes; it takes both kinds",
        )
    if "best_of" in found:
        yield "best of K", _best_of(found["best_of"], found["rows"])
    if "margin" in found:
        yield from _compared(found)
    else:
        yield "reward", f"mean {found['mean_reward']:+.4g}; compare completions of one prompt only"
    yield "length", _length(found)
    yield from _subsets(found.get("subsets"))


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    low, high = accuracy["interval"]
    what = {
        "pairs": "of the chosen completions have the higher reward",
        "rankings": "of the comparisons in a ranking are ordered as its scores, mean over rankings",
        "votes": "of upvoted completions are above a downvoted one, over all such, of any prompts",
    }
    interval = f"95% interval {low:.1%} to {high:.1%}; a coin gets 50%"
    return f"{accuracy['share']:.1%} {what[accuracy['of']]} ({interval})"


def _best_of(best: Mapping[str, Any], rows: int) -> str:
    over = f"over {rows:,} rankings of {best['mean_size']:.3g} completions in the mean"
    if "picks_the_best" not in best:
        return f"the highest reward is {best['reward_above_mean']:.4g} above its ranking's mean, {over}"
    return (
        f"the highest reward picks one of the highest score in {best['picks_the_best']:.1%} (chance: "
        f"{best['by_chance']:.1%}); its score is {best['score_above_mean']:+.4g} above its ranking's mean, {over}"
    )


def _compared(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    margin, count = found["margin"], found["comparisons"]
    ends = margin["interval"]
    interval = "" if ends is None else f", 95% interval {ends[0]:+.4g} to {ends[1]:+.4g}"
    if found["accuracy"]["of"] == "rankings":
        # Comparisons of one ranking depend on each other.
        interval = ""
    yield (
        "margin",
        f"mean {margin['mean']:+.4g}{interval}; reward of the better completion minus the worse one's",
    )
    if found["ties"]:
        yield "ties", f"{found['ties']:,} of {count:,} comparisons have equal rewards, and count as wrong"
    else:
        yield "ties", f"none in {count:,} comparisons"
    ece = found["calibration"]["ece"]
    yield (
        "calibration",
        f"ECE {ece:.3f}: mean gap between sigmoid(|margin|) and the share in order, {BINS} bins",
    )


def _length(found: Mapping[str, Any]) -> str:
    if "length" not in found:
        value = found["correlation_of_reward_and_tokens"]
        within = " within rankings" if "best_of" in found else ""
        return f"correlation of reward and tokens{within}: {_signed(value)}"
    length = found["length"]
    text = f"correlation of margin and difference in tokens: {_signed(length['correlation'])}"
    if not (differ := length["differ"]):
        return text
    won, better = (length[name] / differ for name in ("longer_has_higher_reward", "longer_is_better"))
    return f"{text}; the longer one has the higher reward in {won:.1%}, and is the better one in {better:.1%}"


def _subsets(subsets: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if subsets is None:
        return
    shown = list(subsets["of"].items())[:_MOST_SUBSETS]
    more = f", the first {len(shown)} of {len(subsets['of'])}" if len(shown) < len(subsets["of"]) else ""
    yield "subsets", f"mean {subsets['mean']:.1%}{more}"
    for name, each in shown:
        printable = "".join(c if c.isprintable() else "�" for c in name)[:40]
        yield "", f"{printable:<28} {each['share']:>7.1%}  of {each['rows']:,} rows"


def _signed(value: float | None) -> str:
    return "unknown, one of them does not vary" if value is None else f"{value:+.2f}"
