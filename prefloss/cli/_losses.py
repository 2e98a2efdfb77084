"""`prefloss losses`: the registry as a table, or one loss in full."""

from __future__ import annotations

import inspect

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import prefloss
from prefloss.cli._errors import CliError
from prefloss.hyperparameters import Parameter
from prefloss.registry import LossSpec, admitted, spec_of

_FEEDBACK = {
    "Pairs": "a chosen and a rejected completion of one prompt",
    "Labels": "one completion with thumbs up or down",
    "Rankings": "several completions of one prompt, ranked",
}

_SYMBOLS = {
    "Pairs": "h = log π(y|x) - log π_ref(y|x) in nats; h_w of the chosen (winning), h_l of the rejected completion",
    "Labels": "h = log π(y|x) - log π_ref(y|x) of the completion, in nats",
    "Rankings": "h_k = log π(y_k|x) - log π_ref(y_k|x) of the k-th completion, best first, in nats",
}


def show(name: str | None) -> None:
    """Print the table of losses, or one loss.

    Raises:
        CliError: If no loss has that name.
    """
    console = Console(highlight=False)
    if name is None:
        console.print(_table())
        console.print(
            "One in full: [bold]prefloss losses ipo[/]. Train with it: [bold]prefloss train --loss ipo[/]."
        )
        return
    try:
        spec = spec_of(name)
    except (TypeError, ValueError) as error:
        raise CliError(str(error)) from error
    console.print(_page(spec))


def _table() -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", style="bold cyan", no_wrap=True)
    table.add_column("feedback", no_wrap=True)
    table.add_column("reference", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    table.add_column("summary", ratio=1)
    for name in sorted(prefloss.specs):
        spec = prefloss.specs[name]
        needs = "needed" if spec.needs_reference else "not needed"
        table.add_row(name, spec.feedback.__name__.lower(), needs, spec.paper, spec.summary)
    return table


def _page(spec: LossSpec) -> RenderableType:
    parts: list[RenderableType] = [Text(spec.summary, style="bold")]
    if spec.formula:
        from prefloss.cli._math import unicode_of

        parts.append(Padding(Text(unicode_of(spec.formula), style="green"), (1, 0, 0, 2)))
        parts.append(Padding(Text(_SYMBOLS[spec.feedback.__name__], style="dim"), (0, 0, 1, 2)))
    parts.append(_facts(spec))
    parts.append(_parameters(spec))
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
    table.add_row("feedback", f"{spec.feedback.__name__}: {_FEEDBACK[spec.feedback.__name__]}")
    table.add_row("needs", _needs(spec))
    modifiers = list(admitted(spec))
    if modifiers:
        table.add_row(
            "also takes", f"{', '.join(modifiers)} (they mean the same to every loss that takes them)"
        )
    if spec.aliases:
        table.add_row("aliases", "; ".join(f"{alias} ({peers})" for alias, peers in spec.aliases.items()))
    return table


def _needs(spec: LossSpec) -> str:
    needs = [
        "log-probs of the policy",
        "and of a frozen reference" if spec.needs_reference else "no reference",
    ]
    if not spec.separable:
        needs.append("the loss of an example depends on its batch")
    if spec.stateful:
        needs.append("keeps a state between batches, saved with checkpoints")
    return "; ".join([" ".join(needs[:2]) if spec.needs_reference else ", ".join(needs[:2]), *needs[2:]])


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
        row = Text.assemble(meaning, (f" [{_allowed(parameter)}]", "dim"))
        table.add_row(f"{name} = {_default(parameter)}", row)
    return Group(Text("\nHyperparameters", style="bold"), Padding(table, (0, 0, 0, 2)))


def _default(parameter: Parameter) -> str:
    return "required" if parameter.default is inspect.Parameter.empty else str(parameter.default)


def _allowed(parameter: Parameter) -> str:
    if parameter.constraint is not None:
        return str(parameter.constraint)
    return {bool: "True or False", float: "a number", int: "an integer", str: "text"}.get(
        parameter.type, str(parameter.type)
    )
