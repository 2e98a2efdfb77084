"""Writes docs/losses/ from the registry: a page and a picture for each loss, and the pages over all of them.

All facts come from the losses' docstrings and traits, from evaluating them, and from what was measured.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import loss_curves
import loss_families
import loss_snippets
import loss_tables
import papers
from relatives import Relative, relatives
from sphinx.application import Sphinx

import prefloss
from prefloss.registry import LossSpec, capabilities

FOLDER = "losses"


def setup(app: Sphinx) -> dict[str, Any]:
    """Generate the pages before Sphinx reads its sources."""
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True}


def generate(app: Sphinx) -> None:
    """Write what changed; delete the pages of losses that no longer exist."""
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(exist_ok=True)
    pages = {f"{spec.name}.md": page(spec) for spec in prefloss.specs.values()}
    pages |= loss_families.pages() | loss_tables.pages() | papers.pages()
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for spec in prefloss.specs.values():
        loss_curves.draw(spec, folder / f"{spec.name}.png")


def page(spec: LossSpec) -> str:
    """Everything that is known about one loss."""
    parts = [
        f"# {spec.name}\n\n{spec.summary}",
        f"$$\n{spec.formula}\n$$" if spec.formula else "",
        _origin(spec),
        f"![{spec.name}: loss and gradient]({spec.name}.png)\n\n{loss_curves.caption(spec)}",
        "## Train with it\n\n" + loss_snippets.snippets(spec),
        "## Hyperparameters\n\n" + parameters(spec),
        f"## Relatives\n\n{related(spec)}" if related(spec) else "",
        f"## Where papers and trainers differ\n\n{spec.note}" if spec.note else "",
        f"## Measured in our worlds\n\n{measured(spec.name)}" if measured(spec.name) else "",
        "## What it takes\n\n" + what_it_takes(spec),
        f"## Other names\n\n{other_names(spec)}" if spec.aliases else "",
        f"## Cite\n\n```bibtex\n{papers.bibtex(spec)}\n```" if papers.numbers(spec) else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def related(spec: LossSpec) -> str:
    """Losses that this one becomes, then losses that become this one."""
    lines = [f"- {_sentence(item)}" for item in relatives(spec)]
    become = [
        f"[{other.name}]({other.name}.md){_setting(item.settings)}{', on groups of two' if item.pairs else ''}"
        for other in prefloss.specs.values()
        for item in relatives(other)
        if (item.name, item.factor) == (spec.name, 1) and not item.its_settings
    ]
    return "\n".join([*lines, f"- The same as this loss: {'; '.join(become)}."] if become else lines)


def _sentence(item: Relative) -> str:
    factor = "" if item.factor == 1 else f"{item.factor:.6g} times "
    offset = f" {item.offset:+.6g}" if item.offset else ""
    other = f"{factor}[{item.name}]({item.name}.md){_setting(item.its_settings)}{offset}"
    start = f"With{_setting(item.settings).removeprefix(' with')}, it" if item.settings else "It"
    return f"{start} is {other}{', on groups of two' if item.pairs else ''}."


def _setting(settings: dict[str, Any]) -> str:
    return f" with {', '.join(f'`{name}={value!r}`' for name, value in settings.items())}" if settings else ""


def measured(name: str) -> str:
    """What `prefloss compare --all` found for a loss; empty if it was not compared."""
    rows = _measured()
    if name not in rows:
        return ""
    row = rows[name]
    worlds = " and ".join(f"`{world}`" for world in row["worlds"].split())
    earned = f"true reward {float(row['reward']):.2f} in the mean over {worlds}, {row['seeds']} seeds"
    if row["difference"]:
        low, mean, high, p_value = (
            float(row[column]) for column in ("low", "difference", "high", "p_corrected")
        )
        word = "more than" if mean > 0 else "less than"
        shown = (
            f"{word} `{row['baseline']}`"
            if p_value < 0.05
            else f"no difference from `{row['baseline']}` is shown"
        )
        interval = f"{mean:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}"
        earned += f"; {shown} ({interval}, p {p_value:.2g} after correction for {len(rows) - 1} losses)"
    return (
        f"{earned[0].upper()}{earned[1:]}. Held-out pairs chose the strength; every loss had the same budget. "
        "This is a world of short sequences, where a loss shows how it treats noisy judgements. It does not say which "
        "loss is best for your model and data: see [Comparing losses](../compare.md)."
    )


@cache
def _measured() -> dict[str, dict[str, str]]:
    """The rows of losses.csv of `prefloss compare --all`; none where no such table was committed."""
    path = Path(__file__).parents[1] / "evidence" / "measured.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["loss"]: row for row in csv.DictReader(file)}


def parameters(spec: LossSpec) -> str:
    """Table of hyperparameters."""
    if not spec.parameters:
        return "None."
    rows = [
        f"| `{item.name}` | {'required' if item.required else f'`{item.default!r}`'} | {item.constraint or ''} "
        f"| {item.description} |"
        for item in spec.parameters.values()
    ]
    return "\n".join(["| name | default | range | meaning |", "| --- | --- | --- | --- |", *rows])


def what_it_takes(spec: LossSpec) -> str:
    """Feedback, needs and modifiers."""
    row = {column: cell.replace("|", "\\|") for column, cell in capabilities(spec).items()}
    return "\n".join(["| | |", "| --- | --- |", *(f"| {column} | {cell} |" for column, cell in row.items())])


def other_names(spec: LossSpec) -> str:
    """Aliases with the trainers that use them."""
    return "\n".join(f"- `{alias}`: {entry}" for alias, entry in spec.aliases.items())


def _origin(spec: LossSpec) -> str:
    """The reference with a link to its paper, and the family."""
    number = spec.paper.removeprefix("arXiv:")
    link = f"[{spec.paper}](https://arxiv.org/abs/{number})"
    source = spec.reference.replace(spec.paper, link) if spec.paper else spec.reference
    family = loss_families.family_of(spec)
    facts = loss_families.facts(spec)
    title = loss_families.FAMILIES[family][0]
    return f"{source} [{title}](family-{family}.md){f': {facts}' if facts else ''}."
