"""Answers that torch.compile may take as they are when it traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """Mark a function whose result a compiled graph keeps: `torch.compiler.assume_constant_result`.

    That one imports torch._dynamo, and with it triton, wherever a module uses it as a decorator; a program that
    compiles nothing need not wait for either.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
