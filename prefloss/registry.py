"""Losses by name: look one up, register one, ask what it is and needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefloss.losses._core import loss as _loss
from prefloss.losses._core import registry as _registry
from prefloss.losses._core.capabilities import capabilities as capabilities
from prefloss.losses._core.expression import parse as parse
from prefloss.losses._core.loss import Evaluation as Evaluation
from prefloss.losses._core.loss import Loss as Loss
from prefloss.losses._core.loss import Term as Term
from prefloss.losses._core.modifiers import MODIFIERS as MODIFIERS
from prefloss.losses._core.modifiers import admitted as admitted
from prefloss.losses._core.needs import NEEDS as NEEDS
from prefloss.losses._core.registry import Alias as Alias
from prefloss.losses._core.registry import LossSpec as LossSpec
from prefloss.losses._core.registry import get as get
from prefloss.losses._core.registry import register as register
from prefloss.losses._core.registry import spec_of as spec_of
from prefloss.losses._core.registry import specs as specs
from prefloss.losses._core.registry import unregister as unregister
from prefloss.losses._core.sum import Composite as Composite


def spec_from(function: Any, name: str | None = None, **traits: Any) -> LossSpec:
    """The spec that `register` would make of a function; nothing is registered.

    Args:
        function: The loss.
        name: Its name; that of the function if None.
        **traits: As `register` takes them.

    Raises:
        ValueError: If the name is no identifier or a field is unknown.
        TypeError: If the signature is not that of a loss, or a trait is unknown.
    """
    return _registry._spec_from(function, name or getattr(function, "__name__", ""), traits)


@contextmanager
def registered(spec: LossSpec) -> Iterator[None]:
    """Register a loss inside a `with` block, so that `get`, `repr` and `pickle` find it by name.

    Raises:
        ValueError: If another loss has the name.
    """
    # A sum is read from its expression, so it needs no entry.
    if specs.get(spec.name) is spec or not spec.name.isidentifier():
        yield
        return
    if spec.name in specs:
        raise ValueError(f"name: got {spec.name!r}, which another loss has, expected a free one")
    _registry._specs[spec.name] = spec
    try:
        yield
    finally:
        del _registry._specs[spec.name]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings inside a `with` block; a warning that is shown once per process is still shown later."""
    warned = _loss._Warned.empty
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            _loss._Warned.empty = warned
