"""What a loss is: read from its signature, its docstring and the traits declared beside it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast, get_type_hints

from torch import Tensor

from prefloss.arguments import flag, instance, shown
from prefloss.arguments import function as checked_function
from prefloss.feedback import KINDS, NEEDS
from prefloss.losses._core import docstring, problems, rewards
from prefloss.losses._core.parameters import Parameter
from prefloss.losses._core.rewards import Reward

FAMILIES: Mapping[str, str] = types.MappingProxyType(
    {
        "pairwise": "DPO and its nearest relatives",
        "margin": "other functions of DPO's margin",
        "two_sided": "each side has a target of its own",
        "divergences": "another divergence than the KL",
        "per_token": "token by token",
        "batch_coupled": "the whole batch decides",
        "reference_free": "no reference model",
        "graded": "scored pairs",
        "pointwise": "single completions",
        "listwise": "groups of completions",
        "contrib": "few users, or a single source",
    }
)
"""The families of losses, in the order of lists: module of `prefloss.losses` -> title."""


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
        if not self.parameters:
            return self.peers
        return f"{self.peers} ({', '.join(f'{name}={value!r}' for name, value in self.parameters.items())})"


@dataclass(frozen=True, eq=False)
class LossSpec:
    """What a loss is, reads and promises; trainers and checks act on this, never on the name.

    Attributes:
        name: Its id in the registry.
        function: The registered function.
        feedback: The kind of feedback it takes: `Pairs`, `Labels` or `Rankings`.
        parameters: Its hyperparameters by name.
        aliases: Names under which trainers know it.
        needs_reference: It reads reference log-probs.
        separable: The loss of an example depends on that example alone.
        difference_only: It depends on a pair only through the difference of the two scores.
        monotone: It never rises when the better completion's score does, at default hyperparameters.
        holds_chosen: It pulls a chosen (or upvoted) completion that fell far below the reference up at least 1.5
            times as strongly as it pushes the rejected one down, at default hyperparameters.
        stateful: It keeps a state between calls at default hyperparameters.
        beta: Name of the hyperparameter that is the KL strength, which trainers call beta; None if it has none.
        needs: Fields of the feedback that must be there, such as `tokens`, `scores`, `gold`, `per_token`.
        reads: Fields that it reads if they are there, such as `kl`; trainers refuse to drop any other.
        valid: Which examples it counts, feedback -> [n]; None is all without an empty completion.
        helps: What its paper says it helps against: a word of `problems.PROBLEMS` -> how, in a clause.
        reward: What it compares between completions, for one of them alone; text says why there is no such reward.
        summary: First line of the docstring.
        formula: Its equation in LaTeX.
        returns: Shape and unit of its values.
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
    holds_chosen: bool = False
    stateful: bool = False
    beta: str | None = None
    needs: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    valid: Callable[[Any], Tensor] | None = None
    helps: Mapping[str, str] = field(default_factory=dict)
    reward: Reward | str = "it has none"
    summary: str = ""
    formula: str = ""
    returns: str = ""
    paper: str = ""
    equation: str = ""
    reference: str = ""
    note: str = ""

    @property
    def family(self) -> str:
        """Which of `FAMILIES` it belongs to; empty for a loss from elsewhere."""
        package, _, module = str(getattr(self.function, "__module__", "")).partition("prefloss.losses.")
        name = module.partition(".")[0]
        return name if not package and name in FAMILIES else ""


class Traits(TypedDict, total=False):
    """What may be declared beside a function, as in `LossSpec`; signature and docstring give the rest.

    `register` says what an alias maps to; `beta` defaults to the hyperparameter of that name, if there is one. `reward`
    defaults to beta h if there is a `beta` and the loss needs a reference.
    """

    aliases: Mapping[str, str | tuple[str, Mapping[str, Any]]] | None
    beta: str | None
    difference_only: bool
    helps: Mapping[str, str]
    holds_chosen: bool
    monotone: bool
    needs: Iterable[str]
    needs_reference: bool
    reads: Iterable[str]
    reward: Reward | Callable[..., Tensor] | str | None
    separable: bool
    stateful: bool
    valid: Callable[[Any], Tensor] | None


TRAITS = tuple(Traits.__annotations__)
_FLAGS = {"difference_only", "holds_chosen", "monotone", "needs_reference", "separable", "stateful"}


def spec_from(function: Any, name: str | None = None, **traits: Any) -> LossSpec:
    """The spec that `register` makes of a function; nothing is registered.

    Raises:
        ValueError: If the name is not an identifier or a field is unknown.
        TypeError: If the signature is not that of a loss, or a trait is unknown.
    """
    if not callable(function):
        raise TypeError(
            f"function: got {shown(function)}, expected a function (feedback, *, hyperparameters) -> values"
        )
    if name is not None:
        instance("name", name, str, "an identifier such as 'my_loss'")
    name = name or str(getattr(function, "__name__", ""))
    if not name.isidentifier():
        raise ValueError(f"name: got {name!r}, expected an identifier such as 'my_loss'")
    unknown = sorted(traits.keys() - set(TRAITS))
    if unknown:
        raise TypeError(f"{name}: got the unknown trait {unknown[0]!r}, expected {', '.join(TRAITS)}")
    for trait in _FLAGS & traits.keys():
        flag(f"{name}: {trait}", traits[trait])
    if traits.get("valid") is not None:
        checked_function(f"{name}: valid", traits["valid"], "a function feedback -> boolean tensor [n]")
    kind, parameters = _signature(function, name)
    beta = traits.pop("beta", None) or ("beta" if "beta" in parameters else None)
    if beta is not None and beta not in parameters:
        raise TypeError(
            f"{name}: beta: got {beta!r}, expected one of its hyperparameters {sorted(parameters)}"
        )
    reads_reference = traits.get("needs_reference", True)
    strength = {beta: docstring.STRENGTH} if reads_reference else {}
    described = {**docstring.PARAMETERS, **strength, **docstring.arguments(function)}
    parts = docstring.parse(function)
    parts["returns"] = parts["returns"] or docstring.RETURNS[kind]
    aliases = _aliases(name, traits.pop("aliases", None) or {}, parameters)
    hyperparameters = {
        key: Parameter.of(key, annotation, default, described.get(key, ""))
        for key, (annotation, default) in parameters.items()
    }
    return LossSpec(
        name=name,
        function=cast(Any, function),
        feedback=kind,
        parameters=types.MappingProxyType(hyperparameters),
        aliases=types.MappingProxyType(aliases),
        beta=beta,
        helps=problems.declared(name, traits.pop("helps", {})),
        needs=_fields(name, "needs", traits.pop("needs", ())),
        reads=_fields(name, "reads", traits.pop("reads", ())),
        reward=rewards.declared(name, traits.pop("reward", None), parameters, beta, reads_reference),
        **parts,
        **traits,
    )


def complete_docstring(spec: LossSpec) -> None:
    """Give a docstring that has a formula the Args and Returns that every loss shares, so that `help()` shows them."""
    function = spec.function
    if spec.formula and isinstance(function, types.FunctionType):
        feedback = function.__code__.co_varnames[0]
        reads = docstring.reads(spec.feedback, spec.needs_reference, spec.needs)
        described = {name: parameter.description for name, parameter in spec.parameters.items()}
        args = {feedback: reads, **described, **docstring.arguments(function)}
        function.__doc__ = docstring.completed(function, args, spec.returns)


def _aliases(name: str, listed: Any, parameters: Mapping[str, Any]) -> dict[str, Alias]:
    instance(f"{name}: aliases", listed, Mapping, "alias -> trainers, or (trainers, hyperparameters)")
    aliases = {}
    for alias, entry in listed.items():
        where, pair = f"{name}: alias {alias!r}", (entry, {}) if isinstance(entry, str) else entry
        if not isinstance(alias, str) or not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{where}: got {shown(entry)}, expected trainers, or (trainers, hyperparameters)")
        peers, preset = pair
        instance(where, peers, str, "the trainers that use it")
        instance(where, preset, Mapping, "hyperparameters and their values")
        unknown = [key for key in preset if key not in parameters]
        if unknown:
            takes = ", ".join(map(repr, parameters)) or "none"
            raise TypeError(f"{where}: unknown hyperparameter {unknown[0]!r}; the loss takes {takes}")
        aliases[alias] = Alias(peers, preset)
    return aliases


def _fields(name: str, trait: str, listed: Iterable[str]) -> frozenset[str]:
    # The letters of a string are not what is meant.
    if (
        isinstance(listed, str)
        or not isinstance(listed, Iterable)
        or not all(isinstance(x, str) for x in listed)
    ):
        raise TypeError(
            f"{name}: {trait}: got {shown(listed)}, expected a tuple of some of {', '.join(NEEDS)}"
        )
    unknown = sorted(set(listed) - set(NEEDS))
    if unknown:
        raise ValueError(f"{name}: {trait}: got {unknown[0]!r}, expected some of {', '.join(NEEDS)}")
    return frozenset(listed)


def _signature(function: Any, name: str) -> tuple[type, dict[str, tuple[Any, Any]]]:
    """Kind of feedback, and annotation and default of each hyperparameter."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"{name}: an annotation could not be read ({error}); import its names at module level"
        ) from error
    first, *rest = inspect.signature(function).parameters.values() or (None,)
    kind = hints.get(first.name) if first else None
    if first is None or kind not in KINDS:
        raise TypeError(
            f"{name}: first parameter: got annotation {kind!r}, expected Pairs, Labels or Rankings"
        )
    for parameter in rest:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise TypeError(
                f"{name}: {parameter.name}: got a {parameter.kind.description} parameter, expected keyword-only"
            )
    return kind, {parameter.name: (hints.get(parameter.name, Any), parameter.default) for parameter in rest}
