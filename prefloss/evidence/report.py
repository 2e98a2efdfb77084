"""The report of a comparison: one page of HTML that needs no network, and a table of all runs."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from prefloss.evidence import pictures
from prefloss.evidence.comparison import FIXED_KL, Comparison
from prefloss.registry import get
from prefloss.worlds import settings


@dataclass(frozen=True)
class Origin:
    """Where the numbers come from.

    Attributes:
        command: Runs the comparison again.
        versions: Of what computed it.
        data_hash: Of all training data.
        budget: What every loss got, in words.
        left_out: Losses that the worlds cannot feed, with the fields that they lack.
    """

    command: str
    versions: Mapping[str, str]
    data_hash: str
    budget: str
    left_out: Mapping[str, Sequence[str]]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def rows_of(comparison: Comparison) -> list[Mapping[str, Any]]:
    """One row a run."""
    return [
        row
        for loss in comparison.losses
        for world in comparison.worlds
        for row in comparison.sweeps[loss, world]["rows"]
    ]


def summary(comparison: Comparison) -> list[dict[str, Any]]:
    """One row a loss: its true reward in the mean over the worlds, and the difference to the baseline."""
    rows = []
    for loss in comparison.ranked:
        found = comparison.differences.get(loss)
        row = {"loss": loss, "worlds": " ".join(comparison.worlds), "seeds": comparison.seeds}
        row |= {
            "baseline": comparison.baseline,
            "reward": round(float(comparison.over_worlds(loss).mean()), 4),
        }
        figures = (
            [None] * 4 if found is None else [found.mean, found.low, found.high, comparison.corrected[loss]]
        )
        names = ("difference", "low", "high", "p_corrected")
        rows.append(
            row
            | {name: None if one is None else round(one, 4) for name, one in zip(names, figures, strict=True)}
        )
    return rows


def page(comparison: Comparison, origin: Origin) -> str:
    """The whole report as HTML."""
    known = settings()
    return template("report.html").render(
        comparison=comparison,
        origin=origin,
        facts={world: known[world].facts for world in comparison.worlds},
        legend=pictures.legend(comparison),
        drawn_all=len(comparison.others) + 1 <= pictures.MOST_DRAWN,
        frontiers=[pictures.frontier_of(comparison, world) for world in comparison.worlds],
        forest=pictures.forest(
            comparison.differences,
            {loss: comparison.shown(loss) for loss in comparison.others},
            f"true reward, difference to {comparison.baseline}",
        )
        if comparison.others
        else "",
        matrix=pictures.matrix(comparison) if comparison.others else "",
        curves=[pictures.curve(comparison, name) for name in pictures.CURVES],
        fixed_kl=FIXED_KL,
        findings=_findings(comparison),
        samples=_samples(comparison),
        strengths={loss: _strengths(comparison, loss) for loss in comparison.losses},
        exact={loss: repr(get(loss)) for loss in comparison.losses},
        seconds={loss: _seconds(comparison, loss) for loss in comparison.losses},
        runs=len(rows_of(comparison)),
    )


def template(name: str) -> jinja2.Template:
    """A page in templates/."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prefloss.evidence"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _findings(comparison: Comparison) -> dict[str, dict[str, int]]:
    """Of each loss, in how many of its chosen runs the diagnosis found what."""
    found = {}
    for loss in comparison.losses:
        rows = [row for world in comparison.worlds for row in comparison.sweeps[loss, world]["rows"]]
        found[loss] = dict(Counter(name for row in rows for name in row["findings"].split()))
    return found


def _samples(comparison: Comparison) -> dict[int, dict[str, list[Any]]]:
    """The likeliest completions of each drawn loss by prompt, in the first world."""
    by_prompt: dict[int, dict[str, list[Any]]] = {}
    for loss, _ in pictures.legend(comparison):
        for sample in comparison.sweeps[loss, comparison.worlds[0]]["samples"]:
            by_prompt.setdefault(sample["prompt"], {}).setdefault(loss, []).append(sample)
    return by_prompt


def _strengths(comparison: Comparison, loss: str) -> str:
    """Which strengths were tried, and how often each was chosen."""
    sweeps = [comparison.sweeps[loss, world] for world in comparison.worlds]
    tried = sweeps[0]["strengths"]
    if tried[0] is None:
        return "none to choose"
    chosen = Counter(place for sweep in sweeps for place in sweep["chosen"])
    return ", ".join(f"{value:.3g} ({chosen[place]})" for place, value in enumerate(tried))


def _seconds(comparison: Comparison, loss: str) -> float:
    return sum(comparison.sweeps[loss, world]["seconds"] for world in comparison.worlds)
