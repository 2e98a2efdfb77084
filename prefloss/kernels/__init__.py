"""Fused ops on tokens and logits; they know nothing of preferences.

``naive`` says what each op means, ``chunked`` computes the same a tile of logits at a time, ``tiles`` in Triton.
"""

import os
from importlib.util import find_spec

import torch


def available() -> bool:
    """Whether Triton kernels can run here; asks the device and the import system, imports no Triton.

    Returns:
        True with Triton installed and a device that it compiles for, or its interpreter switched on.

    Example:
        >>> available() in (True, False)
        True
    """
    # the interpreter runs kernels on CPU tensors, which is how they are tested without a GPU
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = interpreted or torch.cuda.is_available() or torch.xpu.is_available()
    return device and find_spec("triton") is not None
