"""Losses written as one string: `"ipo(tau=0.1)"`, `"0.8*dpo(beta=0.1) + 0.2*bco_pair + 1.0*nll"`."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

from prefloss.losses._core.schedules import SCHEDULES


@dataclass(frozen=True)
class Term:
    """One weighted loss of an expression."""

    weight: float
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)


def parse(text: str) -> list[Term]:
    """The terms of an expression: names with hyperparameters, times positive numbers, added up.

    A hyperparameter's value is a literal, a bare word (taken as a string), or a call such as
    `linear(0.5, 0.1, steps=100)`, which becomes its configuration.

    Raises:
        ValueError: If the string is none.
    """
    if not set(text) & set("(+*"):
        # A plain name, right or wrong; the registry knows which.
        return [Term(1.0, text.strip())]
    try:
        return _terms(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, _NotAnExpression) as error:
        reason = f" ({error})" if isinstance(error, _NotAnExpression) else ""
        raise ValueError(
            f"name: got {text!r}{reason}, expected a loss name with literal hyperparameters, or a sum of such, as "
            "'ipo(tau=0.1)' or '0.8*dpo(beta=0.1) + 1.0*nll'"
        ) from error


class _NotAnExpression(Exception):
    pass


def _terms(node: ast.expr) -> list[Term]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left) + _terms(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        weight = _literal(node.left)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise _NotAnExpression(f"weight {weight!r} is no number > 0")
        (term,) = _single(node.right)
        return [Term(float(weight), term.name, term.parameters)]
    return _single(node)


def _single(node: ast.expr) -> list[Term]:
    if isinstance(node, ast.Name):
        return [Term(1.0, node.id)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        return [Term(1.0, node.func.id, _keywords(node))]
    raise _NotAnExpression(f"{ast.unparse(node)!r} is no loss with keyword hyperparameters")


def _keywords(call: ast.Call) -> dict[str, Any]:
    if any(item.arg is None for item in call.keywords):
        raise _NotAnExpression("** is not allowed")
    return {str(item.arg): _value(item.value) for item in call.keywords}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        kind = SCHEDULES.get(node.func.id)
        positional = kind.settings if kind else ()
        if len(node.args) > len(positional):
            raise _NotAnExpression(f"{node.func.id} takes its settings by name")
        placed = dict(zip(positional, map(_literal, node.args), strict=False))
        return {"name": node.func.id, **placed, **_keywords(node)}
    return _literal(node)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise _NotAnExpression(f"{ast.unparse(node)!r} is no literal") from error
