"""`prefloss losses`: the registered losses grouped by the data that they need, and one of them in full."""

from __future__ import annotations

import inspect
import textwrap

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import prefloss
from prefloss.cli.console import CliError
from prefloss.feedback import Labels, Pairs, Rankings
from prefloss.hyperparameters import Parameter
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
    """Print all losses, or one in full.

    Raises:
        CliError: If no loss has that name.
    """
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
    parts.append(
        Text.assemble(
            "\n* needs no reference model. One in full: ",
            ("prefloss losses ipo", "bold"),
            ".\nTrain with it: ",
            ("prefloss train --loss ipo", "bold"),
            ".",
        )
    )
    return Group(*parts)


def _page(spec: LossSpec) -> RenderableType:
    parts: list[RenderableType] = [Text(spec.summary, style="bold")]
    if spec.formula:
        from prefloss.cli.formula import unicode_of

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
    needs = "log-probs of the policy" + (
        " and of a frozen reference" if spec.needs_reference else ", no reference"
    )
    needs += "" if spec.separable else "; the loss of an example depends on its batch"
    needs += "; keeps a state between batches, saved with checkpoints" if spec.stateful else ""
    table.add_row("needs", needs)
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
        table.add_row(f"{name} = {default}", Text.assemble(meaning, (f" [{_allowed(parameter)}]", "dim")))
    return Group(Text("\nHyperparameters", style="bold"), Padding(table, (0, 0, 0, 2)))


def _allowed(parameter: Parameter) -> str:
    if parameter.constraint is not None:
        return str(parameter.constraint)
    words = {bool: "True or False", float: "a number", int: "an integer", str: "text"}
    return words.get(parameter.type, str(parameter.type))
