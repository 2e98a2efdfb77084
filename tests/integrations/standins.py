"""Modules that stand in for frameworks which the test environment has not; `make trainers` runs the real ones."""

import importlib
import sys
from contextlib import contextmanager
from types import ModuleType


def install(monkeypatch, names):
    """Empty modules under these dotted names and those of their packages: name -> module."""
    made = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in made:
                made[path] = ModuleType(path)
                made[path].__path__ = []
                monkeypatch.setitem(sys.modules, path, made[path])
                if end > 1:
                    setattr(made[".".join(parts[: end - 1])], parts[end - 1], made[path])
    return made


@contextmanager
def imported(name):
    """A module of ours, imported with the stand-ins and forgotten afterwards."""
    yield importlib.import_module(name)
    root = ".".join(name.split(".")[:3])
    for path in [path for path in sys.modules if path == root or path.startswith(f"{root}.")]:
        del sys.modules[path]
