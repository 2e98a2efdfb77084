"""Papers of the losses: the BibTeX entry of each, and an index from paper to loss."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from pybtex.database import BibliographyData, Entry, parse_file

import prefloss
from prefloss.registry import LossSpec

FILE = Path(__file__).parents[1] / "papers.bib"


def pages() -> dict[str, str]:
    """The pages of this module by file name."""
    entries = sorted(_papers().items(), key=lambda item: item[0])
    rows = [_row(number, entry) for number, entry in entries if _losses(number)]
    table = "\n".join(["| Paper | Losses |", "| --- | --- |", *rows])
    return {
        "papers.md": f"# Papers\n\nFrom a paper to the name of its loss, oldest first. Each loss's page has the BibTeX "
        f"entry, and says where papers and trainers differ.\n\n{table}\n"
    }


def bibtex(spec: LossSpec) -> str:
    """The entries of the papers that a loss's reference names."""
    entries = {number: _papers()[number] for number in numbers(spec)}
    return BibliographyData({entry.key: entry for entry in entries.values()}).to_string("bibtex").strip()


def numbers(spec: LossSpec) -> list[str]:
    """The arXiv numbers in a loss's reference."""
    return list(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{5})", spec.reference)))


@cache
def _papers() -> dict[str, Entry]:
    entries = parse_file(FILE).entries.values()
    return {entry.fields["eprint"]: entry for entry in entries}


def _losses(number: str) -> list[LossSpec]:
    return [spec for spec in prefloss.specs.values() if number in numbers(spec)]


def _row(number: str, entry: Entry) -> str:
    first = str(entry.persons["author"][0].last_names[0])
    names = ", ".join(f"[{spec.name}]({spec.name}.md)" for spec in _losses(number))
    title = entry.fields["title"].replace("{", "").replace("}", "").replace("|", "\\|")
    return f"| {title}. {first} et al. {entry.fields['year']}, [{number}](https://arxiv.org/abs/{number}) | {names} |"
