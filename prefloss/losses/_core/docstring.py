"""Docstrings of losses: read their parts, and add the parts that every loss shares."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Mapping

from prefloss.feedback import Labels, Pairs, Rankings, meaning_of

_SECTION = re.compile(r"^(Args|Returns|Raises|Example|Examples|Note|Reference):", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n(?!    \w+: ).*)*)", re.MULTILINE)
_MATH = re.compile(r"^\s*\.\. math::(.*(?:\n(?: .*)?)*)", re.MULTILINE)
_PAPER = re.compile(r"(arXiv:\d{4}\.\d{4,5})")
_EQUATION = re.compile(r"\bEqs?\.\s*([\d.]+(?:\s*[-–]\s*\d+)?)")

_READS = {
    Pairs: "of both sides, [pairs], nats",
    Labels: "and the labels, [n], nats",
    Rankings: "and the scores r, [groups, K], nats",
}
RETURNS = {
    Pairs: "Loss of each pair, [pairs], nats; not reduced.",
    Labels: "Loss of each completion, [n], nats; not reduced.",
    Rankings: "Loss of each group, [groups], nats; not reduced.",
}
STRENGTH = "Strength of the pull towards the reference."
PARAMETERS = {
    "nll_weight": "Weight α of the negative log-likelihood per token.",
    "desirable_weight": "Weight λ_D of upvotes.",
    "undesirable_weight": "Weight λ_U of downvotes.",
}
"""What a hyperparameter means in a loss whose docstring does not say otherwise."""


def parse(documented: object) -> dict[str, str]:
    """The parts that `LossSpec` holds, by attribute, of a docstring as `docs/extend.md` shows it; absent ones empty."""
    sections = _sections(documented)
    head, reference = sections[""], sections.get("Reference", "")
    return {
        "summary": head.strip().split("\n\n")[0].replace("\n", " "),
        "formula": _first(_MATH, head),
        "returns": _paragraph(sections.get("Returns", "")),
        "note": _paragraph(sections.get("Note", "")),
        "reference": _paragraph(reference),
        "paper": _first(_PAPER, reference),
        "equation": _first(_EQUATION, reference).rstrip("."),
    }


def arguments(documented: object) -> dict[str, str]:
    """The entries of the Args section."""
    entries = _ENTRY.findall(_sections(documented).get("Args", ""))
    return {name: _paragraph(text) for name, text in entries}


def reads(kind: type, needs_reference: bool, needs: Iterable[str]) -> str:
    """What a loss with these traits reads, for a docstring that does not say it."""
    log_probs = "log-ratios h" if needs_reference else "policy log-probs"
    fields = [meaning_of(need, kind) for need in sorted(needs)]
    return "; ".join([f"Reads the {log_probs} {_READS[kind]}", *fields]) + "."


def completed(documented: object, args: Mapping[str, str], returns: str) -> str:
    """The docstring with this Args section, and this Returns section if it has none."""
    sections = _sections(documented)
    lines = [f"\n    {name}: {text}" for name, text in args.items()]
    added = {"Args": "".join(lines), "Returns": sections.get("Returns", f"\n    {returns}")}
    rest = {name: body for name, body in sections.items() if name not in ("", *added)}
    parts = (f"{name}:{body.rstrip()}" for name, body in {**added, **rest}.items())
    return "\n\n".join([sections[""].rstrip(), *parts]) + "\n"


def _sections(documented: object) -> Mapping[str, str]:
    return _split(getattr(documented, "__doc__", None) or inspect.getdoc(documented) or "")


# A loss that is registered has its docstring read four times in a row.
@functools.lru_cache(maxsize=1)
def _split(text: str) -> Mapping[str, str]:
    """The text of each section; what stands before all of them under ''."""
    head, *rest = _SECTION.split(inspect.cleandoc(text))
    return {"": head, **dict(zip(rest[::2], rest[1::2], strict=True))}


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _first(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return _paragraph(match.group(1)) if match else ""
