"""Old names that still work for one release, with a warning that gives the new one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level `__getattr__` that finds names where they are now.

    Args:
        module: Name of the module that had them.
        names: Old name -> new place, as `package.module:attribute`.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        owner, _, attribute = names[name].partition(":")
        warnings.warn(
            f"{module}.{name} is now {owner}.{attribute}; the old name goes in the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(owner), attribute)

    return __getattr__
