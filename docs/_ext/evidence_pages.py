"""Writes docs/evidence/ from the results that are committed there: a page for each experiment, and an overview.

`prefloss reproduce --all --output docs/evidence/results` renews the results. The texts come from the experiments. Other
pages quote an experiment with the directive `{found} NAME`, so their figures are those of the results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from prefloss.evidence import Experiment
from prefloss.evidence.experiments import experiments

FOLDER = "evidence"
# Written by hand, from all results; it stands first where it is there.
ANSWER = "dpo-or-the-others"
INTRODUCTION = (
    "Claims of papers, and questions that learners ask, tried in worlds small enough to enumerate: every completion, "
    "the true reward and the best policy are known, so reward and KL are sums, not estimates. A rule in the "
    "experiment's code turns the figures into the verdict, and negative results stay as they came out. What holds in "
    "such a world need not hold for a language model."
)


def setup(app: Sphinx) -> dict[str, Any]:
    """Generate the pages before Sphinx reads its sources."""
    app.connect("builder-inited", generate)
    app.add_directive("found", Found)
    return {"parallel_read_safe": True}


class Found(SphinxDirective):
    """What an experiment found, in its own words, with a link to its page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A quotation; an experiment that does not exist stops the build."""
        name = self.arguments[0]
        folder = Path(self.env.srcdir) / FOLDER / "results" / name
        self.env.note_dependency(str(folder / "results.json"))
        results = read(folder)
        text = f"**Measured** in [{results['title']}](/{FOLDER}/{name}.md): {results['summary']}"
        return [nodes.block_quote("", *self.parse_text_to_nodes(text))]


def generate(app: Sphinx) -> None:
    """Write what changed; delete the pages of experiments that no longer exist."""
    folder = Path(app.srcdir) / FOLDER
    known = experiments()
    results = {name: read(folder / "results" / name) for name in known}
    pages = {f"{name}.md": page(known[name], results[name]) for name in known}
    pages["index.md"] = index(known, results, answered=(folder / f"{ANSWER}.md").exists())
    for old in folder.glob("*.md"):
        if old.name not in pages and old.stem != ANSWER:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def read(folder: Path) -> dict[str, Any]:
    """The results of an experiment."""
    path = folder / "results.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no results; write them with `prefloss reproduce {folder.name} --output docs/evidence/results`"
        )
    return json.loads(path.read_text())


def page(experiment: Experiment, results: dict[str, Any]) -> str:
    """One experiment: claim, verdict, picture, figures, set-up, command."""
    verdict = f"**{results['verdict'].capitalize()}.** {results['summary']}"
    change = f"What differs from the claim: {results['change']}" if results["change"] else ""
    picture = f"results/{experiment.name}/picture.png"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seeds = results["seeds"]
    parts = [
        f"# {experiment.title}",
        f"**Claim.** {experiment.claim}\n\n**Source.** {linked(experiment.source)}",
        f"## What was found\n\n{verdict}",
        change,
        f"![{experiment.title}]({picture})",
        f"## What was measured\n\n{figures(results)}\n\nIntervals are 95 % of the mean over {len(seeds)} seeds "
        f"({seeds[0]} to {seeds[-1]}); a value without one is exact. The first figure is the one that the "
        "verdict rests on first.",
        f"## Set-up\n\n{experiment.setup}",
        f"## Do it again\n\n```bash\n{results['command']}\n```\n\nThese results took {results['seconds']:.0f} s, with "
        f"{versions}. One row a run: {{download}}`results.csv <results/{experiment.name}/results.csv>`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(results: dict[str, Any]) -> str:
    """Table of what was measured."""
    rows = [
        f"| {figure['name']} | {number(figure['value'])} | {interval(figure['interval'])} "
        f"| {'' if figure['expected'] is None else number(figure['expected'])} |"
        for figure in results["figures"]
    ]
    return "\n".join(["| | value | 95 % interval | expected |", "| --- | ---: | ---: | ---: |", *rows])


def index(known: dict[str, Experiment], results: dict[str, dict[str, Any]], answered: bool) -> str:
    """The overview and the toctree."""
    rows = [
        f"| [{experiment.title}]({name}.md) | {result['verdict']} | {result['quantity']}: "
        f"{number(result['measured'])} {interval(result['interval'])} |"
        for (name, experiment), result in zip(known.items(), results.values(), strict=True)
    ]
    head = ["| experiment | verdict | the figure it rests on |", "| --- | --- | --- |"]
    names = "\n".join([ANSWER] * answered + list(known))
    table = "\n".join([*head, *rows])
    answer = f"What they say together stands in [DPO or the others?]({ANSWER}.md).\n\n" if answered else ""
    return (
        f"# Evidence\n\n{INTRODUCTION}\n\n{answer}{table}\n\nAll of them, in under ten minutes on two cores:\n\n"
        "```bash\nprefloss reproduce --all\n```\n\n"
        f"```{{toctree}}\n:hidden:\n\n{names}\n```\n"
    )


def linked(source: str) -> str:
    """The source with links to its papers."""
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def number(value: float | None) -> str:
    """Three digits."""
    return "not reached" if value is None else f"{value:.3g}"


def interval(ends: list[float | None] | None) -> str:
    """As on the command line."""
    return "exact" if ends is None else f"({number(ends[0])} to {number(ends[1])})"
