"""`prefloss losses`: the registered losses by data and family, one of them in full, or those for a purpose."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import prefloss
from prefloss.cli.console import CliError
from prefloss.feedback import Labels, Pairs, Rankings
from prefloss.losses import suggest
from prefloss.registry import FAMILIES, LossSpec, admitted, spec_of

if TYPE_CHECKING:
    from pylatexenc.latex2text import LatexNodes2Text

# Kind of feedback, whether the loss needs scores -> the data that a user has.
_GROUPS = {
    (Pairs, False): "Pairs: a chosen and a rejected completion",
    (Labels, False): "Labels: upvotes and downvotes",
    (Rankings, False): "Rankings: several completions of one prompt, each with a score",
    (Pairs, True): "Graded scores of pairs",
    (Labels, True): "Graded scores of single completions",
}

_FEEDBACK = {
    Pairs: "a chosen and a rejected completion of one prompt",
    Labels: "one completion with an upvote or a downvote",
    Rankings: "several completions of one prompt, ranked",
}

_SYMBOLS = {
    Pairs: "h = log π(y|x) - log π_ref(y|x) in nats; h_w of the chosen (winning), h_l of the rejected completion",
    Labels: "h = log π(y|x) - log π_ref(y|x) of the completion, in nats",
    Rankings: "h_k = log π(y_k|x) - log π_ref(y_k|x) of the k-th completion, best first, in nats",
}


# Longer names push their own summary to the right. A wide terminal has room for the papers, too.
_NAME_WIDTH, _PAPER_WIDTH, _NARROW, _WIDE = 16, 18, 50, 110


def show_losses(name: str | None, purpose: str | None = None) -> None:
    """Print all losses, one in full, or those for a purpose; a `CliError` if a name or a word is unknown."""
    console = Console(highlight=False)
    width = max(console.width, _NARROW)
    if name is not None and purpose is not None:
        raise CliError(f"--for: got it beside the name {name!r}, expected one of them")
    try:
        if purpose is not None:
            console.print(_suggested(purpose, width))
        else:
            console.print(_listed(width) if name is None else _page(spec_of(name)))
    except (TypeError, ValueError) as error:
        raise CliError(str(error).replace("words: ", "--for: ", 1)) from error


def _suggested(purpose: str, width: int) -> RenderableType:
    """At most three losses for words such as "votes,noisy", with the reasons."""
    found = suggest(purpose)
    lines = [(found.start, 0, "")]
    for one in found:
        lines += [("", 0, ""), (one.loss, 0, "bold cyan"), (one.why, 2, "")]
        lines += [(text, 2, "dim") for text in (*one.evidence, f"Needs: {one.needs}.")]
    for note in found.notes:
        lines += [("", 0, ""), (note, 0, "yellow")]
    return Group(*(Text(_wrapped(text, width, " " * indent), style) for text, indent, style in lines))


def _wrapped(text: str, width: int, indent: str, later: str | None = None) -> str:
    """Text in lines of a width; names with hyphens or in parentheses stay whole where they fit."""
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent if later is None else later,
        break_on_hyphens=False,
    )


def _listed(width: int) -> RenderableType:
    """Each loss with its summary, by data and family; a wide terminal shows the paper, too."""
    parts: list[RenderableType] = []
    order = [*FAMILIES, ""]
    for (feedback, scored), title in _GROUPS.items():
        group = [
            s for s in prefloss.specs.values() if (s.feedback, "scores" in s.needs) == (feedback, scored)
        ]
        group.sort(key=lambda spec: (order.index(spec.family), spec.name))
        families = [(name, [*specs]) for name, specs in itertools.groupby(group, lambda spec: spec.family)]
        parts.append(Text(f"\n{title}", style="bold"))
        for family, specs in families:
            if len(families) > 1:
                parts.append(
                    Text(f" {FAMILIES.get(family, 'of other packages, or your own')}", style="italic")
                )
            parts += (_line(spec, width) for spec in specs)
    commands = ("prefloss losses ipo", "prefloss losses --for pairs,noisy", "prefloss train --loss ipo")
    one, which, train = ((command, "bold") for command in commands)
    parts.append(Text.assemble("\n* needs no reference model. One in full: ", one, "."))
    parts.append(Text.assemble("Which one to take: ", which, ".\nTrain with it: ", train, "."))
    return Group(*parts)


def _line(spec: LossSpec, width: int) -> Text:
    """Name, mark and summary, which goes on below itself where the line is too short for it."""
    paper = _PAPER_WIDTH if width >= _WIDE else 0
    name, mark = f"  {spec.name:<{_NAME_WIDTH}}", f" {' ' if spec.needs_reference else '*'} "
    below = " " * (_NAME_WIDTH + 5)
    body = _wrapped(spec.summary.replace("`", ""), width - paper, name + mark, below)
    first, *rest = body.removeprefix(name + mark).split("\n")
    line = Text.assemble((name, "cyan"), (mark, "dim"), first)
    if paper:
        line.append(f"{'':<{width - paper - line.cell_len}}{spec.paper:>{paper}}", style="dim")
    return Text("\n").join([line, *map(Text, rest)])


def _page(spec: LossSpec) -> RenderableType:
    parts: list[RenderableType] = [Text(spec.summary, style="bold")]
    if spec.formula:
        parts.append(Padding(Text(unicode_of(spec.formula), style="green"), (1, 0, 0, 2)))
        parts.append(Padding(Text(_SYMBOLS[spec.feedback], style="dim"), (0, 0, 1, 2)))
    parts += [_facts(spec), _parameters(spec)]
    if spec.note:
        parts += [Text("\nWhere peers differ", style="bold"), Padding(Text(spec.note), (0, 0, 0, 2))]
    return Panel(Group(*parts), title=f"[bold cyan]{spec.name}", title_align="left", border_style="dim")


def _facts(spec: LossSpec) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("paper", spec.reference or spec.paper or "none")
    if spec.equation and "Eq" not in spec.reference:
        table.add_row("equation", spec.equation)
    table.add_row("feedback", f"{spec.feedback.__name__}: {_FEEDBACK[spec.feedback]}")
    reference = " and of a frozen reference" if spec.needs_reference else ", no reference"
    needs = f"log-probs of the policy{reference}"
    needs += "" if spec.separable else "; the loss of an example depends on its batch"
    needs += "; keeps a state between batches, saved with checkpoints" if spec.stateful else ""
    table.add_row("needs", needs)
    reward = (
        f"none: {spec.reward}" if isinstance(spec.reward, str) else f"{spec.reward.formula} of a completion y"
    )
    table.add_row("reward", reward)
    modifiers = ", ".join(admitted(spec))
    if modifiers:
        table.add_row("also takes", f"{modifiers} (they mean the same to every loss that takes them)")
    if spec.aliases:
        table.add_row("aliases", "; ".join(f"{alias} ({peers})" for alias, peers in spec.aliases.items()))
    return table


def _parameters(spec: LossSpec) -> RenderableType:
    if not spec.parameters:
        return Text("\nNo hyperparameters.")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, parameter in spec.parameters.items():
        meaning = parameter.description.replace("`", "")
        if name == spec.beta and name != "beta":
            meaning += " Trainers call it beta."
        default = "required" if parameter.default is inspect.Parameter.empty else parameter.default
        words = {bool: "True or False", float: "a number", int: "an integer", str: "text"}
        allowed = parameter.constraint or words.get(parameter.type, parameter.type)
        table.add_row(f"{name} = {default}", Text.assemble(meaning, (f" [{allowed}]", "dim")))
    return Group(Text("\nHyperparameters", style="bold"), Padding(table, (0, 0, 0, 2)))


# LaTeX formulas as plain unicode.
_RAISED = dict(zip("0123456789+-()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", strict=True))
# Letters stay as _w and _l: unicode lowers some of them only, and a formula needs them all alike.
_LOWERED = dict(zip("0123456789+-()", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎", strict=True))
# Braces, with up to two levels of braces inside.
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"


def unicode_of(latex: str) -> str:
    r"""A formula on one line.

    Example:
        >>> unicode_of(r"\ell = \left(h_w - h_l - \frac{1}{2\tau}\right)^2")
        'ℓ = (h_w - h_l - 1/(2τ))²'
    """
    flat = " ".join(latex.split()).replace(r"\left", "").replace(r"\right", "").replace(r"\|", "‖")
    # TeX drops the space after a macro; here it separates words, and a function needs one.
    flat = re.sub(r"\\(log|exp|max|min|sup|inf)(?=[\\A-Za-z0-9])", r"\\\1 ", flat)
    # The logarithm of a fraction alone; of a mean, 1/n times a sum, only the author knows where it ends.
    flat = re.sub(rf"\\(log|exp) (\\t?frac{_GROUP}{_GROUP})(?=\s*(?:$|[-+,)\]|]))", r"\\\1(\2)", flat)
    flat = re.sub(r"(\\(?!bar|hat|tilde|overline)[A-Za-z]+) ", r"\1{} ", flat)
    flat = re.sub(rf"(\\t?frac{_GROUP}{_GROUP})(?=[\\A-Za-z])", r"\1 ", flat)
    text = _converter()(_marked_scripts(flat))
    text = re.sub(r"(?<=\d) (?=[α-ωϕϵ])", "", text)
    return re.sub(r"\s+", " ", text).strip()


def _marked_scripts(latex: str) -> str:
    r"""`x_{ij}` -> `\lowered{ij}`: pylatexenc prints scripts as they stand."""
    return re.sub(rf"([_^])\s*({_GROUP}|\\[A-Za-z]+(?:{_GROUP})?|[^\s\\{{])", _script, latex)


def _script(match: re.Match[str]) -> str:
    inner = match[2][1:-1] if match[2].startswith("{") else match[2]
    return rf"\{'raised' if match[1] == '^' else 'lowered'}{{{_marked_scripts(inner)}}}"


def _fraction(node: Any, l2tobj: LatexNodes2Text) -> str:
    top, bottom = (l2tobj.nodelist_to_text([arg]).strip() for arg in node.nodeargs[-2:])
    return f"{_grouped(top)}/{_grouped(bottom)}"


def _grouped(text: str) -> str:
    """Parentheses where a fraction would be misread without them."""
    single = re.fullmatch(r"[\w.|]+|\w+\([^()]*\)", text) and not re.fullmatch(r"\d+\D+", text)
    return text if single else f"({text})"


def _scripted(table: dict[str, str], sign: str) -> Any:
    def text(node: Any, l2tobj: LatexNodes2Text) -> str:
        inner = l2tobj.nodelist_to_text([node.nodeargs[-1]]).strip()
        if all(character in table for character in inner):
            return "".join(table[character] for character in inner)
        bare = inner.isalnum() or len(inner) == 1 or re.fullmatch(r"\([^()]*\)", inner)
        return f"{sign}{inner}" if bare else f"{sign}({inner})"

    return text


@functools.cache
def _converter() -> Callable[[str], str]:
    """LaTeX -> text, with the macros of our formulas."""
    from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db
    from pylatexenc.latexwalker import get_default_latex_context_db as walker_context_db
    from pylatexenc.macrospec import MacroSpec, MacroStandardArgsParser

    arguments = {"raised": "{", "lowered": "{", "tfrac": "{{"}
    texts = {
        "frac": _fraction,
        "tfrac": _fraction,
        "raised": _scripted(_RAISED, "^"),
        "lowered": _scripted(_LOWERED, "_"),
        "mathrm": "%s",
    }
    walker, context = walker_context_db(), get_default_latex_context_db()
    macros = [MacroSpec(name, MacroStandardArgsParser(kinds)) for name, kinds in arguments.items()]
    walker.add_context_category("prefloss", prepend=True, macros=macros)
    shown = [MacroTextSpec(name, text) for name, text in texts.items()]
    context.add_context_category("prefloss", prepend=True, macros=shown)
    converter = LatexNodes2Text(latex_context=context, math_mode="text", strict_latex_spaces=False)
    return functools.partial(converter.latex_to_text, latex_context=walker)
