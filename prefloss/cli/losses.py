"""`prefloss losses`: the registered losses grouped by the data that they need, and one of them in full."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db
from pylatexenc.latexwalker import get_default_latex_context_db as walker_context_db
from pylatexenc.macrospec import MacroSpec, MacroStandardArgsParser
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import prefloss
from prefloss.cli.console import CliError
from prefloss.feedback import Labels, Pairs, Rankings
from prefloss.registry import LossSpec, admitted, spec_of

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
_NAME_WIDTH, _PAPER_WIDTH, _WIDE = 16, 18, 110


def show_losses(name: str | None) -> None:
    """Print all losses, or one in full; a `CliError` if no loss has that name."""
    console = Console(highlight=False)
    if name is None:
        console.print(_groups(console.width))
        return
    try:
        spec = spec_of(name)
    except (TypeError, ValueError) as error:
        raise CliError(str(error)) from error
    console.print(_page(spec))


def _groups(width: int) -> RenderableType:
    """One line per loss: name, whether it needs a reference model, summary; a wide terminal shows the paper, too."""
    paper = _PAPER_WIDTH if width >= _WIDE else 0
    parts: list[RenderableType] = []
    for (feedback, scored), title in _GROUPS.items():
        parts.append(Text(f"\n{title}", style="bold"))
        for name, spec in sorted(prefloss.specs.items()):
            if spec.feedback is not feedback or ("scores" in spec.needs) is not scored:
                continue
            mark = " " if spec.needs_reference else "*"
            line = Text.assemble((f"  {name:<{_NAME_WIDTH}}", "cyan"), (f" {mark} ", "dim"))
            room = max(20, width - line.cell_len - paper)
            summary = spec.summary.replace("`", "")
            line.append(textwrap.shorten(summary, room, placeholder=" …", break_on_hyphens=False))
            if paper:
                line.append(f"{'':<{width - paper - line.cell_len}}{spec.paper:>{paper}}", style="dim")
            parts.append(line)
    one, train = ("prefloss losses ipo", "bold"), ("prefloss train --loss ipo", "bold")
    parts.append(
        Text.assemble("\n* needs no reference model. One in full: ", one, ".\nTrain with it: ", train, ".")
    )
    return Group(*parts)


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
    text = _CONVERTER.latex_to_text(_marked_scripts(flat), latex_context=_WALKER)
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


_WALKER = walker_context_db()
_WALKER.add_context_category(
    "prefloss",
    prepend=True,
    macros=[
        MacroSpec("raised", MacroStandardArgsParser("{")),
        MacroSpec("lowered", MacroStandardArgsParser("{")),
        MacroSpec("tfrac", MacroStandardArgsParser("{{")),
    ],
)
_TEXTS = get_default_latex_context_db()
_TEXTS.add_context_category(
    "prefloss",
    prepend=True,
    macros=[
        MacroTextSpec("frac", _fraction),
        MacroTextSpec("tfrac", _fraction),
        MacroTextSpec("raised", _scripted(_RAISED, "^")),
        MacroTextSpec("lowered", _scripted(_LOWERED, "_")),
        MacroTextSpec("mathrm", "%s"),
    ],
)
_CONVERTER = LatexNodes2Text(latex_context=_TEXTS, math_mode="text", strict_latex_spaces=False)
