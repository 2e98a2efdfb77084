"""The registry: loss functions by name, with what each is and needs."""

from __future__ import annotations

import importlib.metadata
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, get_type_hints, overload

from torch import Tensor

from prefloss import feedback as _feedback
from prefloss.losses._core import docstring, expression, names
from prefloss.losses._core import modifiers as _modifiers
from prefloss.losses._core import needs as _needs
from prefloss.losses._core import parameters as _parameters
from prefloss.losses._core.loss import Loss
from prefloss.losses._core.parameters import Parameter

ENTRY_POINTS = "prefloss.losses"
"""Entry-point group in which other packages publish losses."""

Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Alias:
    """Another name of a loss.

    Attributes:
        peers: The trainers that use it.
        parameters: Hyperparameters that it sets, where the trainers' form differs from the defaults here.
    """

    peers: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The trainers, and what the name sets."""
        return (
            f"{self.peers} ({', '.join(f'{k}={v!r}' for k, v in self.parameters.items())})"
            if self.parameters
            else self.peers
        )


@dataclass(frozen=True, eq=False)
class LossSpec:
    """What a loss is, reads and promises; trainers and checks act on this, never on the name.

    Attributes:
        name: Its id in the registry.
        function: The registered function, unchanged.
        feedback: The kind of feedback it takes: `Pairs`, `Labels` or `Rankings`.
        parameters: Its hyperparameters by name.
        aliases: Names under which trainers know it, each with those trainers and the hyperparameters by which their
            form of it differs.
        needs_reference: It reads reference log-probs.
        separable: The loss of an example depends on that example alone.
        difference_only: It depends on a pair only through the difference of the two scores.
        monotone: It never rises when the better completion's score does, at default hyperparameters.
        stateful: It keeps a state between calls at default hyperparameters.
        beta: Name of the hyperparameter that is the KL strength, which trainers call beta; None if it has none.
        needs: Fields of the feedback that must be there, such as `tokens`, `scores`, `gold`, `per_token`.
        reads: Fields that it reads if they are there, such as `kl`; trainers refuse to drop any other.
        valid: Which examples it counts, feedback -> [n]; None is all without an empty completion.
        summary: First line of the docstring.
        formula: Its equation in LaTeX.
        paper: arXiv id, as `arXiv:2305.18290`.
        equation: Equation number in that paper.
        reference: The whole reference line.
        note: Where papers and trainers disagree.
    """

    name: str
    function: Callable[..., Tensor]
    feedback: type
    parameters: Mapping[str, Parameter]
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    needs_reference: bool = True
    separable: bool = True
    difference_only: bool = False
    monotone: bool = False
    stateful: bool = False
    beta: str | None = None
    needs: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    valid: Callable[[Any], Tensor] | None = None
    summary: str = ""
    formula: str = ""
    paper: str = ""
    equation: str = ""
    reference: str = ""
    note: str = ""


_specs: dict[str, LossSpec] = {}
_aliases: dict[str, str] = {}
specs: Mapping[str, LossSpec] = types.MappingProxyType(_specs)
"""Every registered loss by name; read-only."""


@overload
def register(function: Function, /) -> Function: ...


@overload
def register(
    *,
    name: str | None = None,
    aliases: Mapping[str, str | tuple[str, Mapping[str, Any]]] | None = None,
    needs_reference: bool = True,
    separable: bool = True,
    difference_only: bool = False,
    monotone: bool = False,
    stateful: bool = False,
    beta: str | None = None,
    needs: Iterable[str] = (),
    reads: Iterable[str] = (),
    valid: Callable[[Any], Tensor] | None = None,
) -> Callable[[Function], Function]: ...


def register(function: Any = None, /, **traits: Any) -> Any:
    """Add a loss to the registry; use as `@register` or `@register(monotone=True, ...)`.

    The function takes its feedback first, annotated `Pairs`, `Labels` or `Rankings`, then keyword-only
    hyperparameters, and returns one value per example. It is returned unchanged.

    Args:
        function: The loss.
        **traits: `name` (the function's own if absent), `aliases`, `needs_reference`, `separable`,
            `difference_only`, `monotone`, `stateful`, `beta`, `needs`, `reads`, `valid` as in
            `LossSpec`; an alias maps to the trainers that use it, or to them and the hyperparameters it sets. `beta`
            defaults to the hyperparameter of that name, if there is one.

    Raises:
        ValueError: If the name or an alias is taken.
        TypeError: If the signature is not that of a loss, or a trait unknown.

    Example:
        >>> @register(name="doctest_exponential")
        ... def exponential(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
        ...     return torch.exp(-beta * pairs.margin())
        >>> get("doctest_exponential", beta=1.0)(Pairs.of([0.0], [0.0]))
        tensor([1.])
        >>> unregister("doctest_exponential")
    """
    if function is None:
        return lambda decorated: _register(decorated, **traits)
    return _register(function, **traits)


def unregister(name: str) -> None:
    """Take a loss out of the registry, with its aliases; for tests and notebooks.

    Raises:
        ValueError: If there is no such loss.
    """
    if name not in _specs:
        raise ValueError(names.unknown(name, _specs))
    for alias in _specs.pop(name).aliases:
        del _aliases[alias]


def get(name: str, /, **parameters: Any) -> Loss:
    """A loss by name, its hyperparameters checked now rather than at the first batch.

    Args:
        name: Registered name or alias, with hyperparameters if you like (`"ipo(tau=0.1)"`), or a weighted sum of
            such (`"0.8*dpo(beta=0.1) + 1.0*nll"`). A name that is missing is looked up among the entry points of
            installed packages.
        **parameters: Hyperparameters and modifiers (`label_smoothing`, `divergence` ...); the rest keep the defaults
            of the loss. A numeric one may be a schedule: `beta=Linear(0.5, 0.1, steps=100)`.

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
    terms = [expression.Term(1.0, name)] if name in _aliases else expression.parse(_checked_name(name))
    if len(terms) == 1 and terms[0].weight == 1.0:
        return bind(terms[0].name, _merged(name, terms[0].parameters, parameters))
    if parameters:
        raise TypeError(
            f"{name}: got {sorted(parameters)} beside a sum of losses, expected them inside its terms"
        )
    from prefloss.losses._core.sum import Composite

    return Composite([(term.weight, bind(term.name, term.parameters)) for term in terms])


def bind(name: str, given: Mapping[str, Any]) -> Loss:
    """A loss with these hyperparameters and modifiers, checked; the rest keep their defaults."""
    spec = spec_of(name)
    preset = spec.aliases[name].parameters if name in spec.aliases else {}
    values = {**preset, **given}
    modifiers = {
        key: values.pop(key)
        for key in list(values)
        if key not in spec.parameters and key in _modifiers.MODIFIERS
    }
    params = _parameters.check(spec.name, spec.parameters, values, _modifiers.admitted(spec))
    for key, value in modifiers.items():
        refusal = _modifiers.refusal(spec, _modifiers.MODIFIERS[key])
        if refusal:
            raise TypeError(f"{spec.name}: {key}: got {value!r}, but the loss {refusal}")
        params[key] = _modifiers.MODIFIERS[key].parameter.checked(spec.name, value)
    return Loss(spec, params, stated=given)


def _merged(name: str, written: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    repeated = sorted(written.keys() & parameters.keys())
    if repeated:
        raise TypeError(
            f"{name}: {repeated[0]}: got it both in the name and as an argument, expected it once"
        )
    return {**written, **parameters}


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r}, expected the name of a loss")
    return name


def spec_of(name: str) -> LossSpec:
    """The spec behind a name or alias.

    Raises:
        ValueError: If no loss has the name.
    """
    if _checked_name(name) not in _specs and name not in _aliases:
        _load_entry_point(name)
    spec = _specs.get(_aliases.get(name, name))
    if spec is None:
        raise ValueError(names.unknown(name, [*_specs, *_aliases]))
    return spec


def _register(function: Any, *, name: str | None = None, **traits: Any) -> Any:
    spec = _spec_from(function, name or getattr(function, "__name__", ""), traits)
    for taken in (spec.name, *spec.aliases):
        if taken in _specs or taken in _aliases:
            owner = _specs[_aliases.get(taken, taken)]
            module, found = (
                getattr(owner.function, "__module__", "?"),
                getattr(owner.function, "__qualname__", "?"),
            )
            raise ValueError(f"name: {taken!r} is taken by {module}.{found}, expected a free one")
    _specs[spec.name] = spec
    _aliases.update(dict.fromkeys(spec.aliases, spec.name))
    return function


def _spec_from(function: Any, name: str, traits: dict[str, Any]) -> LossSpec:
    if not callable(function):
        raise TypeError(
            f"function: got {function!r}, expected a function (feedback, *, hyperparameters) -> values"
        )
    if not name.isidentifier():
        raise ValueError(f"name: got {name!r}, expected an identifier such as 'my_loss'")
    unknown = sorted(traits.keys() - _TRAITS)
    if unknown:
        raise TypeError(f"{name}: unknown trait {unknown[0]!r}, expected {', '.join(sorted(_TRAITS))}")
    text = docstring.parse(function)
    kind, parameters = _signature(function, name, text.args)
    beta = traits.pop("beta", None) or ("beta" if "beta" in parameters else None)
    if beta is not None and beta not in parameters:
        raise TypeError(
            f"{name}: beta: got {beta!r}, expected one of its hyperparameters {sorted(parameters)}"
        )
    aliases = {
        alias: Alias(entry) if isinstance(entry, str) else Alias(*entry)
        for alias, entry in (traits.pop("aliases", None) or {}).items()
    }
    return LossSpec(
        name=name,
        function=cast(Any, function),
        feedback=kind,
        parameters=types.MappingProxyType(parameters),
        aliases=types.MappingProxyType(aliases),
        beta=beta,
        needs=_fields(name, "needs", traits.pop("needs", ())),
        reads=_fields(name, "reads", traits.pop("reads", ())),
        summary=text.summary,
        formula=text.formula,
        paper=text.paper,
        equation=text.equation,
        reference=text.reference,
        note=text.note,
        **traits,
    )


def _fields(name: str, trait: str, listed: Iterable[str]) -> frozenset[str]:
    unknown = sorted(set(listed) - set(_needs.NEEDS))
    if unknown:
        raise ValueError(f"{name}: {trait}: got {unknown[0]!r}, expected some of {', '.join(_needs.NEEDS)}")
    return frozenset(listed)


_TRAITS = {
    "aliases",
    "beta",
    "difference_only",
    "monotone",
    "needs",
    "needs_reference",
    "reads",
    "separable",
    "stateful",
    "valid",
}


def _signature(function: Any, name: str, described: Mapping[str, str]) -> tuple[type, dict[str, Parameter]]:
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"{name}: an annotation could not be read ({error}); import its names at module level"
        ) from error
    first, *rest = inspect.signature(function).parameters.values() or (None,)
    kind = hints.get(first.name) if first else None
    if kind not in _feedback.KINDS:
        raise TypeError(
            f"{name}: first parameter: got annotation {kind!r}, expected Pairs, Labels or Rankings"
        )
    for parameter in rest:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise TypeError(
                f"{name}: {parameter.name}: got a {parameter.kind.description} parameter, expected keyword-only"
            )
    return kind, {
        parameter.name: _parameters.from_annotation(
            parameter.name,
            hints.get(parameter.name, Any),
            parameter.default,
            described.get(parameter.name, ""),
        )
        for parameter in rest
    }


def _load_entry_point(name: str) -> None:
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        function = entry_point.load()
        # Importing the module runs its @register; a plain function is registered under the entry point's name.
        if name not in _specs and name not in _aliases:
            _register(function, name=name)
