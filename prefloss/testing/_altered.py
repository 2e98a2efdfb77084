"""Feedback with something else in place of what is there, and whether that shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from prefloss.feedback import Feedback
from prefloss.logratios import LogRatios
from prefloss.testing import _fields
from prefloss.testing._draws import Seeded
from prefloss.testing._values import close, told

NOTICED = 1e-6
"""Relative difference between two float64 values that counts as a dependence."""


def differs(first: Tensor, second: Tensor) -> bool:
    """Whether some value differs by more than rounding can explain."""
    return not close(first, second, NOTICED)


def from_to(first: Tensor, second: Tensor) -> str:
    return f"from {told(first)} to {told(second)}"


def mixed(ratios: LogRatios) -> LogRatios:
    """The same sums from other rows: policy log-probs in the reverse order of the tokens."""
    rows = ratios.per_token
    if rows is None:
        return ratios
    tokens = rows.mask.sum(-1, keepdim=True)
    place = (tokens - 1 - torch.arange(rows.mask.shape[-1])).clamp(min=0)
    policy = torch.where(rows.mask, rows.policy.gather(-1, place), 0.0)
    return _fields.summed(replace(rows, policy=policy))


def altered(feedback: Feedback, name: str, seed: int) -> Feedback:
    """The feedback with something else in place of what is there under this name."""
    first, _, row = name.partition(".")
    if name == "tokens":
        return _with_other_tokens(feedback)
    if name == "per_token":
        return _fields.map_parts(feedback, lambda _, part: mixed(part))
    changes: dict[str, Tensor | None] = {}
    for path, value in _fields.tensors(feedback).items():
        if _belongs(path, first, row) and value.is_floating_point():
            changes[path] = _other_values(value, seed, rising=first == "scores")
    return _fields.with_tensors(feedback, changes)


def _belongs(path: str, first: str, row: str) -> bool:
    if first == "per_token":
        return path.endswith(f".per_token.{row}")
    if first == "scores":
        return path in ("scores", "score_chosen")
    if first in ("gold", "mismatched"):
        return path in (f"{first}.policy", f"{first}.per_token.policy")
    return path == first


def _other_values(value: Tensor, seed: int, rising: bool) -> Tensor:
    source = Seeded(1000 + seed)
    shares = torch.tensor([source.number(0.2, 0.9) for _ in range(value.numel())], dtype=value.dtype)
    shares = shares.reshape(value.shape)
    # A score stays in (0, 1) and above that of the rejected completion.
    return value + shares * (1 - value) if rising else value * (1 + shares)


def _with_other_tokens(feedback: Feedback) -> Feedback:
    def change(name: str, part: LogRatios) -> LogRatios:
        extra = (torch.arange(part.policy.numel()).reshape(part.shape) + len(name)) % 3 + 1
        return part if part.tokens is None else replace(part, tokens=part.tokens + extra)

    return _fields.map_parts(feedback, change)


def narrowed(feedback: Feedback, problem: Callable[[Feedback], str | None]) -> tuple[str | None, Feedback]:
    """The first single example that shows a problem, or all of them."""
    for place in range(feedback.shape[0]):
        alone = _fields.select(feedback, torch.tensor([place]))
        found = problem(alone)
        if found:
            return found, alone
    return problem(feedback), feedback
