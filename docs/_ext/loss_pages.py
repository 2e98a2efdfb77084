"""Writes docs/losses/ and docs/choose.md from the registry: a page and a picture for each loss, an index, tables.

All facts come from the losses' docstrings and traits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import choose_page
import loss_curves
from sphinx.application import Sphinx

import prefloss
from prefloss.losses import measured
from prefloss.registry import MODIFIERS, LossSpec, capabilities

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
    pages |= {"index.md": index(), "capabilities.md": capability_table(), "names.md": names_elsewhere()}
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    pages["../choose.md"] = choose_page.page()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for spec in prefloss.specs.values():
        loss_curves.draw(spec, folder / f"{spec.name}.png")


def page(spec: LossSpec) -> str:
    """Everything that the registry holds about one loss."""
    parts = [
        f"# {spec.name}\n\n{spec.summary}",
        f"$$\n{spec.formula}\n$$" if spec.formula else "",
        f"{loss_curves.caption(spec)}\n\n![{spec.name}: loss and gradient]({spec.name}.png)",
        f"```python\nloss = prefloss.get({spec.name!r})\n```",
        "## Hyperparameters\n\n" + parameters(spec),
        f"## Values\n\n{spec.returns}",
        f"## Where papers and trainers differ\n\n{spec.note}" if spec.note else "",
        "## What it takes\n\n" + what_it_takes(spec),
        f"## Measured in our worlds\n\n{overall(spec.name)}" if overall(spec.name) else "",
        f"## Other names\n\n{other_names(spec)}" if spec.aliases else "",
        f"## Source\n\n{source(spec)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def overall(name: str) -> str:
    """What `prefloss compare --all` found for a loss; empty if it was not compared."""
    row = measured.compared().get(name)
    if row is None:
        return ""
    worlds = " and ".join(f"`{world}`" for world in row.worlds)
    earned = f"true reward {row.reward:.2f} in the mean over {worlds}, {row.seeds} seeds"
    if row.difference is not None:
        word = "more than" if row.difference > 0 else "less than"
        shown = f"{word} `{row.baseline}`" if row.shown else f"no difference from `{row.baseline}` is shown"
        interval = f"{row.difference:+.2f}, 95 % interval {row.interval[0]:+.2f} to {row.interval[1]:+.2f}"
        corrected = f"p {row.p_corrected:.2g} after correction for {len(measured.compared()) - 1} losses"
        earned += f"; {shown} ({interval}, {corrected})"
    return (
        f"{earned[0].upper()}{earned[1:]}. Held-out pairs chose the strength; every loss had the same budget. "
        "This is a world of short sequences, where a loss shows how it treats noisy judgements. It does not say which "
        "loss is best for your model and data: see [Comparing losses](../compare.md)."
    )


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


def source(spec: LossSpec) -> str:
    """Reference with a link to its paper."""
    number = spec.paper.removeprefix("arXiv:")
    return (
        spec.reference.replace(spec.paper, f"[{spec.paper}](https://arxiv.org/abs/{number})")
        if spec.paper
        else spec.reference
    )


def names_elsewhere() -> str:
    """Table of every alias: the name, the trainers that use it, and the loss with what the name sets."""
    rows = []
    for spec in prefloss.specs.values():
        for alias, entry in spec.aliases.items():
            preset = ", ".join(f"{key}={value!r}" for key, value in entry.parameters.items())
            rows.append(f"| `{alias}` | {entry.peers} | [{spec.name}]({spec.name}.md) | {preset} |")
    table = "\n".join(["| name | used by | loss | sets |", "| --- | --- | --- | --- |", *sorted(rows)])
    return (
        "# Names in other trainers\n\nAliases: `prefloss.get` takes these names too. A name with a colon is a "
        f"trainer's own form of a loss.\n\n{table}\n"
    )


def index() -> str:
    """Table of all losses and the toctree of their pages."""
    specs = sorted(
        prefloss.specs.values(), key=lambda spec: (spec.feedback.__name__ != "Pairs", spec.feedback.__name__)
    )
    rows = [
        f"| [{spec.name}]({spec.name}.md) | {spec.feedback.__name__} | {'yes' if spec.needs_reference else 'no'} "
        f"| {', '.join(sorted(spec.needs)) or ''} | {spec.paper} | {spec.summary} |"
        for spec in specs
    ]
    names = "\n".join(sorted(prefloss.specs))
    table = "\n".join(
        ["| name | feedback | reference | needs | paper | |", "| --- | --- | --- | --- | --- | --- |", *rows]
    )
    return (
        f"# Losses\n\n{len(prefloss.specs)} losses, each by its name: `prefloss.get(name)`. This page and those of the "
        "losses are generated from the registry; `prefloss losses` shows the same in a terminal. What can be combined "
        f"stands in the [capability table](capabilities.md).\n\n{table}\n\n"
        f"```{{toctree}}\n:hidden:\n\ncapabilities\nnames\n{names}\n```\n"
    )


def capability_table() -> str:
    """Loss by feedback, needs, modifiers and state; the cells are what the checks at run time say."""
    columns = ["feedback", "reference", "needs", *MODIFIERS, "fused", "state"]
    rows = []
    for name in sorted(prefloss.specs):
        row = capabilities(prefloss.specs[name])
        cells = [
            row[column].split(":")[0] if column not in ("feedback", "needs") else row[column]
            for column in columns
        ]
        rows.append(f"| [{name}]({name}.md) | " + " | ".join(cells) + " |")
    head = "| loss | " + " | ".join(columns) + " |"
    modifiers = "\n".join(f"- `{name}`: {item.parameter.description}" for name, item in MODIFIERS.items())
    return (
        "# Capabilities\n\nWhere a cell says no, `prefloss.get` refuses and says why; the reason stands on the loss's "
        f"own page.\n\nThe modifiers, given as further hyperparameters:\n\n{modifiers}\n\n"
        + "\n".join([head, "| --- " * (len(columns) + 1) + "|", *rows])
        + "\n"
    )
