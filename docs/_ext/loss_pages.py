"""Writes docs/losses/ and docs/choose.md: a page and a picture for each loss, and the pages over all of them.

All facts come from the losses' docstrings and traits, from evaluating them, and from what was measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import choose_page
import loss_curves
import loss_families
import loss_snippets
import loss_tables
import papers
from relatives import Relative, relatives
from sphinx.application import Sphinx

import prefloss
from prefloss import Labels, Pairs, Rankings
from prefloss.losses import measured, suggest
from prefloss.registry import PROBLEMS, LossSpec, capabilities

FOLDER = "losses"
KINDS = {Pairs: "pairs", Labels: "votes", Rankings: "rankings"}


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
    pages["../choose.md"] = choose_page.page()
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
        f"## When to use it\n\n{when(spec)}",
        "## Train with it\n\n" + loss_snippets.snippets(spec),
        "## Hyperparameters\n\n" + parameters(spec),
        f"## Relatives\n\n{related(spec)}" if related(spec) else "",
        f"## Where papers and trainers differ\n\n{spec.note}" if spec.note else "",
        f"## Measured in our worlds\n\n{overall(spec.name)}" if overall(spec.name) else "",
        "## What it takes\n\n" + what_it_takes(spec),
        f"## Other names\n\n{other_names(spec)}" if spec.aliases else "",
        f"## Cite\n\n```bibtex\n{papers.bibtex(spec)}\n```" if papers.numbers(spec) else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def when(spec: LossSpec) -> str:
    """What it is made for and what was measured of that, problem by problem."""
    lines = []
    for name, problem in PROBLEMS.items():
        figures = [one for one in measured.tried() if (one.loss, one.problem) == (spec.name, name)]
        if name not in spec.helps and not figures:
            continue
        claim = f" Its paper: {spec.helps[name].rstrip('.')}." if name in spec.helps else ""
        found = "; ".join(
            f"{one.shown} ([{one.experiment}](../evidence/{one.experiment}.md))" for one in figures
        )
        worse = " **Worse than DPO here.**" if {one.better for one in figures} == {False} else ""
        lines.append(f"- If {problem.meaning}.{claim} Measured: {found or 'not yet'}.{worse}")
    start = suggest(KINDS[spec.feedback]).start
    return f"{start} [Which loss?](../choose.md) compares all losses.\n\n" + "\n".join(lines)


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


def _origin(spec: LossSpec) -> str:
    """The reference with a link to its paper, and the family."""
    number = spec.paper.removeprefix("arXiv:")
    link = f"[{spec.paper}](https://arxiv.org/abs/{number})"
    source = spec.reference.replace(spec.paper, link) if spec.paper else spec.reference
    facts = loss_families.facts(spec)
    family = f"[{loss_families.title(spec.family)}](family-{spec.family}.md)"
    return f"{source} {family}{f': {facts}' if facts else ''}."
