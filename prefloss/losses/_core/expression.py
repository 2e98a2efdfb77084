"""Losses written as text: `"ipo(tau=0.1)"`, `"0.8*dpo(beta=0.1) + 0.2*bco_pair + 1.0*nll"`."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from prefloss.arguments import instance, is_finite, shown
from prefloss.losses._core.catalogue import is_name
from prefloss.losses._core.loss import Loss
from prefloss.losses._core.state import SCHEDULES
from prefloss.losses._core.weighted_sum import WeightedSum

# A loss with thousands of kept values is written in fewer characters.
_LONGEST = 1_000_000


class ParsedTerm(NamedTuple):
    """One weighted loss of an expression."""

    weight: float
    name: str
    parameters: dict[str, Any]


def get(name: str, /, **parameters: Any) -> Loss:
    """A loss by name, its hyperparameters checked now rather than at the first batch.

    Args:
        name: Name or alias, with hyperparameters if you like (`"ipo(tau=0.1)"`), or a weighted sum of such
            (`"0.8*dpo(beta=0.1) + 1.0*nll"`). Entry points of installed packages are asked for a missing name.
        **parameters: Hyperparameters and modifiers (`label_smoothing`, `divergence` ...); the rest keep their
            defaults. A numeric one may be a schedule: `beta=Linear(0.5, 0.1, steps=100)`.

    Returns:
        A callable: feedback -> one value per example.

    Raises:
        ValueError: If no loss has the name (the closest ones are listed), or a hyperparameter is out of range.
        TypeError: If a hyperparameter is unknown, missing or of the wrong type.

    Example:
        >>> get("ipo", tau=0.1)
        ipo(tau=0.1, per_token=True)
        >>> get("ipo(tau=0.5)").params["tau"]
        0.5
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {shown(name)}, expected the name of a loss")
    # An alias may hold a colon, which an expression may not.
    terms = [ParsedTerm(1.0, name, {})] if is_name(name) else parse(name)
    first = terms[0]
    if len(terms) == 1 and first.weight == 1.0:
        repeated = sorted(first.parameters.keys() & parameters.keys())
        if repeated:
            raise TypeError(
                f"{name}: {repeated[0]}: got it both in the name and as an argument, expected it once"
            )
        return Loss.bind(first.name, {**first.parameters, **parameters})
    if parameters:
        raise TypeError(
            f"{shown(name)}: got {sorted(parameters)} beside a sum of losses, expected them inside its terms"
        )
    return WeightedSum([(term.weight, Loss.bind(term.name, term.parameters)) for term in terms])


def parse(text: str) -> list[ParsedTerm]:
    """The terms of an expression: names with hyperparameters, times positive numbers, added up.

    A hyperparameter's value is a literal, a bare word (taken as a string), or a call such as
    `linear(0.5, 0.1, steps=100)`, which becomes its configuration.

    Raises:
        TypeError: If it is not text.
        ValueError: If the text is not an expression, gives a hyperparameter twice, or is too long or too deep to read.
    """
    instance("name", text, str, "the name of a loss, or an expression")
    if not set(text) & set("(+*"):
        # A plain name, right or wrong; the registry knows which.
        return [ParsedTerm(1.0, text.strip(), {})]
    try:
        if len(text) > _LONGEST:
            raise _NotAnExpression(f"{len(text)} characters, at most {_LONGEST} are read")
        return _terms(ast.parse(text.strip(), mode="eval").body)
    except _NotAnExpression as error:
        reason, cause = str(error), error
    except (RecursionError, MemoryError) as error:
        reason, cause = "too many terms, signs or brackets", error
    except (SyntaxError, ValueError) as error:
        # ValueError: characters that are none, such as half of a surrogate pair.
        reason, cause = "", error
    raise ValueError(
        f"name: got {shown(text)}{f' ({reason})' if reason else ''}, expected a loss name with literal "
        "hyperparameters, or a sum of such, as 'ipo(tau=0.1)' or '0.8*dpo(beta=0.1) + 1.0*nll'"
    ) from cause


class _NotAnExpression(Exception):
    pass


def _terms(node: ast.expr) -> list[ParsedTerm]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        # a + b + c is (a + b) + c, so the left side holds all terms but the last.
        return [*_terms(node.left), *_terms(node.right)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        weight = _literal(node.left)
        number = isinstance(weight, int | float) and not isinstance(weight, bool) and is_finite(weight)
        if not number or not weight > 0:
            raise _NotAnExpression(f"weight: got {shown(weight)}, expected a number > 0")
        return [_term(node.right, float(weight))]
    return [_term(node, 1.0)]


def _term(node: ast.expr, weight: float) -> ParsedTerm:
    if isinstance(node, ast.Name):
        return ParsedTerm(weight, node.id, {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        return ParsedTerm(weight, node.func.id, _keywords(node))
    raise _NotAnExpression(f"{shown(ast.unparse(node))} is not a loss with keyword hyperparameters")


def _keywords(call: ast.Call) -> dict[str, Any]:
    if any(item.arg is None for item in call.keywords):
        raise _NotAnExpression("** is not allowed")
    _check_once(str(item.arg) for item in call.keywords)
    return {str(item.arg): _value(item.value) for item in call.keywords}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        positional = next((kind.settings for kind in SCHEDULES if kind.name == node.func.id), ())
        if len(node.args) > len(positional):
            raise _NotAnExpression(f"{node.func.id} takes its settings by name")
        placed = dict(zip(positional, map(_literal, node.args), strict=False))
        _check_once([*placed, *(str(item.arg) for item in node.keywords)])
        return {"name": node.func.id, **placed, **_keywords(node)}
    return _literal(node)


def _literal(node: ast.expr) -> Any:
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            _check_once(ast.unparse(key) for key in part.keys if key is not None)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise _NotAnExpression(f"{shown(ast.unparse(node))} is not a literal") from error


def _check_once(names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise _NotAnExpression(f"{repeated[0]} is given twice")


def as_loss(loss: str | Loss, hyperparameters: Mapping[str, Any]) -> Loss:
    """A loss as trainers take it: a `Loss`, or a name with hyperparameters.

    Raises:
        TypeError: If it is neither, hyperparameters accompany a `Loss`, or as `get`.
        ValueError: As `get`.
    """
    if not isinstance(loss, Loss):
        instance("loss", loss, str, "the name of a loss, or a Loss as prefloss.get(...) gives")
        return get(loss, **hyperparameters)
    if hyperparameters:
        raise TypeError(
            f"hyperparameters: got {sorted(hyperparameters)} with a Loss, expected them in the Loss"
        )
    return loss
