"""Known numbers in place of a model's logits: its output for them shows what it does to its logits.

One row as wide as the vocabulary, so that a model which cuts off or overwrites some tokens' logits shows that too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefloss.training.head import HeadSpec

INSTEAD = (
    "Its log-probs cannot be computed without its logits; prefloss.token_logps computes them from logits"
)
"""What still works for a model that is refused."""

# Repeated over the vocabulary.
_NUMBERS = (-40.0, -3.0, -0.5, 0.0, 0.25, 2.0, 30.0)


def in_place_of_logits(spec: HeadSpec, hidden: Any, result: Tensor) -> Any:
    """What the head returns for hidden states [..., H]: one row [..., V], whatever the number of tokens.

    DDP finds the parameters in use from the model's outputs, so the row must depend on `result`. where() passes on none
    of its values, not even NaN.
    """
    dtype = spec.dtype
    row = _row(spec.rows, dtype, result.device)
    row = torch.where(torch.zeros_like(row, dtype=torch.bool), result.sum().to(dtype), row)
    return _like(hidden, row.view(*[1] * (hidden.ndim - 1), -1))


def explains(spec: HeadSpec, logits: Tensor, vocabulary: int) -> bool:
    """Whether the transform makes these outputs of the probe.

    Args:
        spec: The transform.
        logits: What the model made of the probe, [..., V or fewer].
        vocabulary: V.
    """
    expected = spec.transformed(_row(vocabulary, logits.dtype, logits.device))[: spec.vocabulary]
    # The last position: one row may have been copied.
    actual = logits.reshape(-1, logits.shape[-1])[-1]
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def fitting(readings: Iterable[HeadSpec], logits: Tensor, vocabulary: int, model: str) -> HeadSpec:
    """The reading of a configuration that explains what the model made of the probe.

    Raises:
        TypeError: If none does.
    """
    kept = logits.shape[-1] if logits.shape[-1] < vocabulary else None
    for reading in readings:
        spec = replace(reading, vocabulary=kept)
        if explains(spec, logits, vocabulary):
            return spec
    outputs = [round(x, 4) for x in logits.detach().reshape(-1, logits.shape[-1])[-1].float().tolist()]
    spec = next(iter(readings))
    raise TypeError(
        f"model: got {model}, which turns logits {list(_NUMBERS)} into {outputs[: len(_NUMBERS)]} "
        f"({len(outputs)} of {vocabulary} columns); expected the scale of {spec.logit_scale} and the softcap of "
        f"{spec.softcap} that its configuration names, or none, in every column. {INSTEAD}"
    )


def _row(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    numbers = torch.tensor(_NUMBERS, dtype=dtype, device=device)
    return numbers.repeat(width // len(numbers) + 1)[:width]


def _like(hidden: Any, row: Tensor) -> Any:
    """The row as a DTensor if the hidden states are one: hooks of a tensor-parallel head expect that."""
    if not hasattr(hidden, "device_mesh"):
        return row
    from torch.distributed.tensor import DTensor, Replicate

    mesh = hidden.device_mesh
    return DTensor.from_local(row, mesh, [Replicate()] * mesh.ndim, run_check=False)
