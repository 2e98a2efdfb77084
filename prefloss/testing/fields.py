"""Feedback as named tensors: read them, replace them, pick examples, print them as code.

Where a completion carries per-token rows, its sums are those of the rows: a change of the rows changes the sums.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from prefloss.feedback import Feedback, fields_of
from prefloss.logratios import LogRatios, PerToken

Record = TypeVar("Record")

ROWS: tuple[str, ...] = tuple(item.name for item in fields(PerToken) if item.default is None)
"""What per-token rows can carry beside log-probs and mask, named `per_token.<row>` in `needs` and `reads`."""


def available(kind: type) -> tuple[str, ...]:
    """Every name that a loss of this kind of feedback can list in `needs` or `reads`."""
    needs = dict.fromkeys(field.need for field in fields_of(kind) if field.need)
    return ("tokens", *needs, "per_token", *(f"per_token.{row}" for row in ROWS))


def covered_by(kind: type, need: str) -> tuple[str, ...]:
    """The fields of this kind of feedback that an entry of `needs` or `reads` covers."""
    return tuple(field.name for field in fields_of(kind) if field.need == need)


def parts(feedback: Feedback) -> dict[str, LogRatios]:
    """The log-ratios of some feedback by field, in order."""
    values = {item.name: getattr(feedback, item.name) for item in fields(feedback)}
    return {name: value for name, value in values.items() if isinstance(value, LogRatios)}


def tensors(record: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a record by path, such as `chosen.policy` or `chosen.per_token.kl`."""
    by_path: dict[str, Tensor] = {}
    for item in fields(record):
        value, path = getattr(record, item.name), f"{prefix}{item.name}"
        if isinstance(value, Tensor):
            by_path[path] = value
        elif isinstance(value, LogRatios | PerToken):
            by_path.update(tensors(value, f"{path}."))
    return by_path


def numbers(feedback: Feedback) -> dict[str, Tensor]:
    """Every floating-point tensor by path, without the sums that follow from rows."""
    with_rows = {name for name, part in parts(feedback).items() if part.per_token is not None}
    return {
        path: value
        for path, value in tensors(feedback).items()
        if value.is_floating_point() and (".per_token." in path or path.split(".")[0] not in with_rows)
    }


def trainable(feedback: Feedback) -> dict[str, Tensor]:
    """The tensors to which a loss may send a gradient, by path: the policy's log-probs and the KL of tokens."""
    own = {path: value for path, value in numbers(feedback).items() if not path.startswith("mismatched.")}
    return {
        path: value
        for path, value in own.items()
        if path.endswith((".policy", ".per_token.kl", ".per_token.reverse_kl"))
    }


def data(feedback: Feedback) -> dict[str, Tensor]:
    """The tensors to which no loss may send a gradient, by path: reference, KL baselines, scores, weights ..."""
    # A value baseline may come from a model that is trained.
    free = {*trainable(feedback), "baseline"}
    return {path: value for path, value in numbers(feedback).items() if path not in free}


def with_tensors(record: Record, changes: Mapping[str, Tensor | None]) -> Record:
    """The record with some tensors replaced, by path; where rows change, their sums follow."""
    values: dict[str, Any] = {path: value for path, value in changes.items() if "." not in path}
    for name in dict.fromkeys(path.split(".")[0] for path in changes if "." in path):
        start = f"{name}."
        inner = {path[len(start) :]: value for path, value in changes.items() if path.startswith(start)}
        values[name] = with_tensors(getattr(record, name), inner)
    rows = values.get("per_token")
    if isinstance(record, LogRatios) and rows is not None and not values.keys() & {"policy", "reference"}:
        return rows.log_ratios()
    return replace(record, **values)  # type: ignore[type-var]


def with_leaves(feedback: Feedback, values: Mapping[str, Tensor]) -> tuple[Feedback, dict[str, Tensor]]:
    """The feedback with these tensors as leaves that take a gradient, and the leaves by path."""
    leaves = {path: value.detach().clone().requires_grad_() for path, value in values.items()}
    return with_tensors(feedback, leaves), leaves


def map_parts(feedback: Feedback, change: Callable[[LogRatios], LogRatios]) -> Feedback:
    """The feedback with each of its log-ratios changed."""
    return replace(feedback, **{name: change(part) for name, part in parts(feedback).items()})


def map_rows(rows: PerToken, change: Callable[[Tensor], Tensor]) -> PerToken:
    """The rows with each tensor changed, the mask too."""
    return replace(rows, **{name: change(value) for name, value in tensors(rows).items()})


def shifted(ratios: LogRatios, policy: Tensor | float = 0.0, reference: Tensor | float = 0.0) -> LogRatios:
    """The completions with log-probs raised by some nats, spread evenly over the tokens where there are rows."""
    rows = ratios.per_token
    if rows is None:
        moved = None if ratios.reference is None else ratios.reference + reference
        return replace(ratios, policy=ratios.policy + policy, reference=moved)
    tokens = rows.mask.sum(-1).clamp(min=1)

    def spread(values: Tensor, nats: Tensor | float) -> Tensor:
        each = torch.as_tensor(nats, dtype=values.dtype) / tokens
        return torch.where(rows.mask, values + each.unsqueeze(-1), values)

    moved = None if rows.reference is None else spread(rows.reference, reference)
    return replace(rows, policy=spread(rows.policy, policy), reference=moved).log_ratios()


def select(feedback: Feedback, index: Any) -> Feedback:
    """Some of the examples, each with everything that belongs to it.

    A mismatched completion of its own belongs to an example; a scalar KL baseline belongs to all.
    """
    size = len(feedback.shape) and feedback.shape[0]
    picked: dict[str, Any] = {}
    for item in fields(feedback):
        value = getattr(feedback, item.name)
        if value is None:
            continue
        per_example = isinstance(value, Tensor | LogRatios) and value.shape[:1] == (size,)
        picked[item.name] = value[index] if per_example else value
    return type(feedback)(**picked)


def cast_to(feedback: Feedback, dtype: torch.dtype) -> Feedback:
    """The feedback with every floating-point tensor in this dtype; log-ratios upcast half precision themselves."""
    # Rows reach LogRatios upcast (from_token_logps does it), so half precision means rounded, not stored.
    rows_dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return with_tensors(
        feedback,
        {
            path: value.to(dtype).to(rows_dtype) if ".per_token." in path else value.to(dtype)
            for path, value in numbers(feedback).items()
        },
    )


def without(feedback: Feedback, need: str) -> Feedback:
    """The feedback without something that `needs` or `reads` can name."""
    first, _, row = need.partition(".")
    if first == "per_token":
        return map_parts(feedback, lambda part: _without_rows(part, row))
    if need == "tokens":
        return map_parts(feedback, lambda part: replace(part, tokens=None))
    return replace(feedback, **dict.fromkeys(covered_by(type(feedback), need)))


def _without_rows(ratios: LogRatios, row: str) -> LogRatios:
    if not row or ratios.per_token is None:
        return replace(ratios, per_token=None)
    return replace(ratios, per_token=replace(ratios.per_token, **{row: None}))


def emptied(feedback: Feedback, part: str, keep: Tensor) -> Feedback:
    """The feedback in which the completions of a part that are not in `keep` have no tokens."""
    ratios = parts(feedback)[part]
    assert ratios.tokens is not None
    rows = ratios.per_token
    if rows is None:
        return replace(feedback, **{part: replace(ratios, tokens=torch.where(keep, ratios.tokens, 0))})
    mask = rows.mask & keep.unsqueeze(-1)
    # As a collator leaves them: every row is 0 where there is no token.
    blank = map_rows(rows, lambda value: torch.where(mask, value, torch.zeros_like(value)))
    return replace(feedback, **{part: blank.log_ratios()})


def reversed_tokens(ratios: LogRatios) -> LogRatios:
    """The same sums from other rows: policy log-probs in the reverse order of the tokens."""
    rows = ratios.per_token
    if rows is None:
        return ratios
    tokens = rows.mask.sum(-1, keepdim=True)
    place = (tokens - 1 - torch.arange(rows.mask.shape[-1])).clamp(min=0)
    return replace(rows, policy=torch.where(rows.mask, rows.policy.gather(-1, place), 0.0)).log_ratios()


def altered(feedback: Feedback, need: str, seed: int) -> Feedback:
    """The feedback with other numbers for something that `needs` or `reads` can name, if it has it."""
    if need == "tokens":
        # Other counts on each side, so that their difference changes too.
        longer = {name: _with_more_tokens(part, len(name)) for name, part in parts(feedback).items()}
        return replace(feedback, **longer)
    if need == "per_token":
        return map_parts(feedback, reversed_tokens)
    values = numbers(feedback)
    if "." in need:
        paths = [path for path in values if path.endswith(f".{need}")]
    else:
        # Of the two scores of a pair only that of the chosen completion changes, upwards: the order stays.
        name = covered_by(type(feedback), need)[0]
        paths = [path for path in values if path in (name, f"{name}.policy", f"{name}.per_token.policy")]
    rising = need == "scores"
    return with_tensors(feedback, {path: _other_values(values[path], seed, rising) for path in paths})


def _other_values(value: Tensor, seed: int, rising: bool) -> Tensor:
    generator = random.Random(1000 + seed)
    shares = torch.tensor([generator.uniform(0.2, 0.9) for _ in range(value.numel())], dtype=value.dtype)
    shares = shares.reshape(value.shape)
    # A score stays below 1.
    return value + shares * (1 - value) if rising else value * (1 + shares)


def _with_more_tokens(ratios: LogRatios, first: int) -> LogRatios:
    if ratios.tokens is None:
        return ratios
    extra = (torch.arange(ratios.policy.numel()).reshape(ratios.shape) + first) % 3 + 1
    return replace(ratios, tokens=ratios.tokens + extra)


def show(record: Any, indent: str = "    ") -> str:
    """Code that makes the feedback again, digit by digit."""
    lines = [f"{type(record).__name__}("]
    for item in fields(record):
        value = getattr(record, item.name)
        if value is None:
            continue
        if isinstance(value, Tensor):
            text = f"torch.tensor({value.detach().tolist()!r}, dtype={value.dtype})"
        else:
            text = show(value, indent + "    ")
        lines.append(f"{indent}{item.name}={text},")
    return "\n".join([*lines, f"{indent[:-4]})"])
