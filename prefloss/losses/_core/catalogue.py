"""The table of losses: register one, look one up; installed packages are asked for a name that is missing."""

from __future__ import annotations

import importlib.metadata
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import Tensor

from prefloss.arguments import instance, shown
from prefloss.losses._core import names
from prefloss.losses._core.spec import LossSpec, Traits, complete_docstring, spec_from

if TYPE_CHECKING:
    from typing_extensions import Unpack

ENTRY_POINTS = "prefloss.losses"
"""Entry-point group in which other packages publish losses."""

Function = TypeVar("Function", bound=Callable[..., Tensor])

_specs: dict[str, LossSpec] = {}
_aliases: dict[str, str] = {}
specs: Mapping[str, LossSpec] = types.MappingProxyType(_specs)
"""Every registered loss by name; read-only."""


@overload
def register(function: Function, /) -> Function: ...


@overload
def register(*, name: str | None = None, **traits: Unpack[Traits]) -> Callable[[Function], Function]: ...


def register(function: Any = None, /, **traits: Any) -> Any:
    """Add a loss to the registry; use as `@register` or `@register(monotone=True, ...)`.

    The function takes its feedback first, annotated `Pairs`, `Labels` or `Rankings`, then keyword-only
    hyperparameters, and returns one value per example. It is returned as it is; where its docstring has a formula,
    the Args and Returns that every loss shares are added.

    Args:
        function: The loss.
        **traits: `name` (the function's own if absent), and `aliases`, `needs_reference`, `separable`,
            `difference_only`, `monotone`, `holds_chosen`, `stateful`, `beta`, `needs`, `reads`, `valid`, `helps`,
            `reward` as in `LossSpec`. An alias maps to the trainers that use it, or to them and the hyperparameters
            it sets. `helps` maps a problem, such as "noisy", to how the loss answers it; `prefloss.losses.suggest`
            reads it. A reward is a function ``(log-ratios, *, hyperparameters) -> rewards``, or the reason why there is
            none; by default beta h for a loss that has a `beta` and needs a reference.

    Raises:
        ValueError: If the name or an alias is taken.
        TypeError: If the signature is not that of a loss, or a trait unknown.

    Example:
        >>> @prefloss.register(name="doctest_exponential")
        ... def exponential(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
        ...     return torch.exp(-beta * pairs.margin())
        >>> prefloss.get("doctest_exponential", beta=1.0)(Pairs.of([0.0], [0.0]))
        tensor([1.])
        >>> prefloss.registry.unregister("doctest_exponential")
    """
    if function is None:
        return lambda decorated: _add(decorated, traits)
    return _add(function, traits)


def unregister(name: str) -> None:
    """Take a loss out of the registry, with its aliases; for tests and notebooks. ValueError if there is none."""
    instance("name", name, str, "the name of a loss")
    if name not in _specs:
        raise ValueError(names.unknown(name, _specs))
    for alias in _specs.pop(name).aliases:
        del _aliases[alias]


@contextmanager
def registered(spec: LossSpec) -> Iterator[None]:
    """Register a loss inside a `with` block, so that `get`, `repr` and `pickle` find it by its name.

    An alias of another loss gives way inside the block; ValueError if another loss has the name itself.
    """
    # The spec of a weighted sum has an expression for a name: `get` reads it without an entry.
    if _specs.get(spec.name) is spec or not spec.name.isidentifier():
        yield
        return
    if spec.name in _specs:
        _check_free(spec.name)
    _specs[spec.name] = spec
    try:
        yield
    finally:
        del _specs[spec.name]


def spec_of(name: str) -> LossSpec:
    """The spec behind a name or alias.

    Raises:
        TypeError: If it is not a string.
        ValueError: If no loss has the name; the message lists the closest ones.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {shown(name)}, expected the name of a loss")
    if not is_name(name):
        _load_entry_point(name)
    # A name comes before an alias: `registered` takes a loss that is named like one.
    spec = _specs.get(name if name in _specs else _aliases.get(name, name))
    if spec is None:
        raise ValueError(names.unknown(name, [*_specs, *_aliases]))
    return spec


def is_name(text: str) -> bool:
    """Whether it is the name or an alias of a loss in the table."""
    return text in _specs or text in _aliases


def _add(function: Any, traits: Mapping[str, Any]) -> Any:
    spec = spec_from(function, **traits)
    for name in (spec.name, *spec.aliases):
        _check_free(name)
    complete_docstring(spec)
    _specs[spec.name] = spec
    _aliases.update(dict.fromkeys(spec.aliases, spec.name))
    return function


def _check_free(name: str) -> None:
    if is_name(name):
        owner = spec_of(name).function
        place = f"{getattr(owner, '__module__', '?')}.{getattr(owner, '__qualname__', '?')}"
        raise ValueError(f"name: got {name!r}, which another loss has ({place}), expected a free one")


def _load_entry_point(name: str) -> None:
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        function = entry_point.load()
        # Importing the module runs its @register; a plain function is registered under the entry point's name.
        if not is_name(name):
            _add(function, {"name": name})
