"""Docstrings of losses: read their parts, and add the parts that every loss shares."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prefloss.feedback import Labels, Pairs, Rankings

_SECTION = re.compile(r"^(Args|Returns|Raises|Example|Examples|Note|Reference):\s*(.*)$")
_PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}")
_EQUATION = re.compile(r"\bEqs?\.\s*([\d.]+(?:\s*[-–]\s*\d+)?)")

_FEEDBACK = {
    Pairs: "Reads the log-ratios h of both sides, [pairs], nats.",
    Labels: "Reads the log-ratios h and the labels, [n], nats.",
    Rankings: "Reads the log-ratios h, [groups, K], nats, and the scores r.",
}
_RETURNS = {
    Pairs: "Loss of each pair, [pairs], nats; not reduced.",
    Labels: "Loss of each completion, [n], nats; not reduced.",
    Rankings: "Loss of each group, [groups], nats; not reduced.",
}
_STRENGTH = "Strength of the pull towards the reference."
_PARAMETERS = {
    "nll_weight": "Weight α of the negative log-likelihood per token.",
    "desirable_weight": "Weight λ_D of upvotes.",
    "undesirable_weight": "Weight λ_U of downvotes.",
}


@dataclass
class Docstring:
    """The parts of a docstring in the shape of `docs/extend.md`; absent parts are empty."""

    summary: str = ""
    formula: str = ""
    args: dict[str, str] = field(default_factory=dict)
    returns: str = ""
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


def parse(documented: object) -> Docstring:
    """Split the docstring of a function into its parts."""
    sections = _sections(documented)
    head = "\n".join(sections[""])
    return Docstring(
        summary=head.strip().split("\n\n")[0].replace("\n", " "),
        formula=_math(sections[""]),
        args=_entries(sections.get("Args", [])),
        returns=_paragraph(sections.get("Returns", [])),
        note=_paragraph(sections.get("Note", [])),
        reference=_paragraph(sections.get("Reference", [])),
    )


def standard_args(kind: type, feedback: str, names: Iterable[str], strength: str | None) -> dict[str, str]:
    """What the parameters mean in a loss whose docstring does not say otherwise.

    Args:
        kind: `Pairs`, `Labels` or `Rankings`.
        feedback: Name of the first parameter.
        names: Names of the hyperparameters.
        strength: Name of the one that pulls towards the reference, or None.
    """
    known = {**_PARAMETERS, **({strength: _STRENGTH} if strength else {})}
    return {feedback: _FEEDBACK[kind], **{name: known[name] for name in names if name in known}}


def standard_returns(kind: type) -> str:
    """What a loss returns if its docstring does not say otherwise."""
    return _RETURNS[kind]


def completed(documented: object, args: Mapping[str, str], returns: str) -> str:
    """The docstring with an Args section of these lines and a Returns section, if it lacks one.

    Args:
        documented: The function.
        args: Description of every parameter, in order.
        returns: For the Returns section.
    """
    sections = _sections(documented)
    lines = [f"    {name}: {text}" for name, text in args.items()]
    added = {"Args": ["", *lines, ""], "Returns": sections.get("Returns", ["", f"    {returns}", ""])}
    rest = {name: body for name, body in sections.items() if name not in ("", *added)}
    head = "\n".join(sections[""]).rstrip("\n")
    parts = (
        f"{name}: {body[0]}".rstrip() + "\n" + "\n".join(body[1:]) for name, body in {**added, **rest}.items()
    )
    return "\n\n".join([head, *(part.rstrip("\n") for part in parts)]) + "\n"


def _sections(documented: object) -> dict[str, list[str]]:
    """The lines of each section; the first line of each stands after its heading, those before all are under ''."""
    sections: dict[str, list[str]] = {"": []}
    current = ""
    for line in (inspect.getdoc(documented) or "").splitlines():
        heading = _SECTION.match(line)
        if heading:
            current = heading.group(1)
            sections[current] = [heading.group(2)]
        else:
            sections[current].append(line)
    return sections


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
