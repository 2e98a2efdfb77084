"""Read a loss's docstring: the one place its equation, paper and disagreements are written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_SECTION = re.compile(r"^(Args|Returns|Raises|Example|Examples|Note|Reference):\s*(.*)$")
_PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}")
_EQUATION = re.compile(r"\bEqs?\.\s*([\d.]+(?:\s*[-–]\s*\d+)?)")


@dataclass
class Docstring:
    """The parts of a docstring in the shape of `docs/extend.md`; absent parts are empty."""

    summary: str = ""
    formula: str = ""
    args: dict[str, str] = field(default_factory=dict)
    note: str = ""
    reference: str = ""

    @property
    def paper(self) -> str:
        """The arXiv id in the reference, or empty."""
        match = _PAPER.search(self.reference)
        return match.group(0) if match else ""

    @property
    def equation(self) -> str:
        """The equation number in the reference, or empty."""
        match = _EQUATION.search(self.reference)
        return match.group(1).rstrip(".") if match else ""


def parse(function: Callable[..., Any]) -> Docstring:
    """Split a function's docstring into its parts."""
    text = inspect.getdoc(function) or ""
    sections: dict[str, list[str]] = {"": []}
    current = ""
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading:
            current = heading.group(1)
            sections[current] = [heading.group(2)]
        else:
            sections[current].append(line)
    head = "\n".join(sections[""])
    return Docstring(
        summary=head.strip().split("\n\n")[0].replace("\n", " "),
        formula=_math(sections[""]),
        args=_entries(sections.get("Args", [])),
        note=_paragraph(sections.get("Note", [])),
        reference=_paragraph(sections.get("Reference", [])),
    )


def _paragraph(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def _math(lines: list[str]) -> str:
    starts = [index for index, line in enumerate(lines) if line.strip().startswith(".. math::")]
    if not starts:
        return ""
    first = starts[0]
    block = [lines[first].split("::", 1)[1]]
    for line in lines[first + 1 :]:
        if line.strip() and not line.startswith(" "):
            break
        block.append(line)
    return _paragraph(block)


def _entries(lines: list[str]) -> dict[str, str]:
    entries: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        entry = re.match(r"^    (\w+): (.*)$", line)
        if entry:
            name = entry.group(1)
            entries[name] = [entry.group(2)]
        elif name:
            entries[name].append(line)
    return {key: _paragraph(value) for key, value in entries.items()}
