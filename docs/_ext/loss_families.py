"""The losses by family: a page for each family, the index of all, the gallery of their pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import prefloss
from prefloss.registry import FAMILIES, LossSpec


def members(family: str) -> list[LossSpec]:
    """The losses of a family, in the order of the registry."""
    return [spec for spec in prefloss.specs.values() if spec.family == family]


def title(family: str) -> str:
    """A family as a heading."""
    return FAMILIES[family][0].upper() + FAMILIES[family][1:]


def pages() -> dict[str, str]:
    """The pages of this module by file name."""
    return {
        "index.md": _index(),
        "gallery.md": _gallery(),
        **{f"family-{family}.md": _family(family) for family in FAMILIES},
    }


def facts(spec: LossSpec) -> str:
    """What a loss needs, in a few words."""
    needs = [need for need in sorted(spec.needs) if need != "per_token"]
    words = [
        "" if spec.needs_reference else "no reference",
        f"needs {', '.join(needs)}" if needs else "",
        "" if spec.separable else "reads the whole batch",
    ]
    return "; ".join(word for word in words if word)


def _index() -> str:
    sections = "\n\n".join(
        f"## [{title(family)}](family-{family}.md)\n\n{_table(family)}" for family in FAMILIES
    )
    entries = "\n".join(f"family-{family}" for family in FAMILIES)
    return (
        f"# Losses\n\n{len(prefloss.specs)} losses, each by its name: `prefloss.get(name)`. `prefloss losses` shows "
        "them in a terminal. [Which loss?](../choose.md) says which one to take.\n\n"
        "All [pictures](gallery.md), [papers](papers.md), [names in other trainers](names.md), and "
        "[what can be combined](capabilities.md).\n\n"
        f"{sections}\n\n```{{toctree}}\n:hidden:\n\n{entries}\ngallery\npapers\nnames\ncapabilities\n```\n"
    )


def _family(family: str) -> str:
    text = (sys.modules[f"prefloss.losses.{family}"].__doc__ or "").strip()
    entries = "\n".join(spec.name for spec in members(family))
    return f"# {title(family)}\n\n{text}\n\n{_table(family)}\n\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


def _table(family: str) -> str:
    rows = [f"| [{spec.name}]({spec.name}.md) | {_described(spec)} |" for spec in members(family)]
    return "\n".join(["| Loss | |", "| --- | --- |", *rows])


def _described(spec: LossSpec) -> str:
    text = facts(spec)
    return f"{spec.summary}{f' *{text[0].upper()}{text[1:]}.*' if text else ''}".replace("|", "\\|")


def _gallery() -> str:
    sections = "\n\n".join(f"## {title(family)}\n\n{_grid(family)}" for family in FAMILIES)
    return (
        "# Gallery\n\nEach loss and its derivative at its default hyperparameters, over the margin of a pair, the "
        "log-ratio of a vote, or the log-ratio of the best of three. A click opens the page of the loss.\n\n"
        f"{sections}\n"
    )


def _grid(family: str) -> str:
    return "::::{grid} 1 2 2 2\n:gutter: 2\n\n" + "\n\n".join(_cards(family)) + "\n::::"


def _cards(family: str) -> Iterator[str]:
    for spec in members(family):
        yield (
            f":::{{grid-item-card}} {spec.name}\n:link: {spec.name}\n:link-type: doc\n:img-bottom: {spec.name}.png\n"
            f":img-alt: {spec.name}, loss and derivative\n:::"
        )
