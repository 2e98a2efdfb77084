"""Fused log-prob ops on tokens and logits; preferences play no part here.

`naive` defines each op in plain torch. `chunked` computes the same one tile of logits at a time, with compiled C on a
CPU. `triton` does so in Triton kernels.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """Let torch.compile evaluate a function once, while it traces, and keep the result in the graph.

    Like `torch.compiler.assume_constant_result`, which as a decorator imports torch._dynamo and triton; programs that
    compile nothing should not wait for these.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def available() -> bool:
    """Whether Triton is installed, and a device that it compiles for or its interpreter; imports no Triton.

    Example:
        >>> available() in (True, False)
        True
    """
    # the interpreter runs kernels on CPU tensors, which is how they are tested without a GPU
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = interpreted or torch.cuda.is_available() or torch.xpu.is_available()
    return device and find_spec("triton") is not None
