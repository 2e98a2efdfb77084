"""Feedback as named tensors: read them, replace them, pick examples, print them as code.

Where a completion carries per-token rows, its sums are those of the rows: a change of the rows changes the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Rankings, fields_of
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


def _values(record: Any) -> dict[str, Any]:
    """The fields that are filled."""
    return {item.name: value for item in fields(record) if (value := getattr(record, item.name)) is not None}


def parts(feedback: Feedback) -> dict[str, LogRatios]:
    """The log-ratios of some feedback by field, in order."""
    return {name: value for name, value in _values(feedback).items() if isinstance(value, LogRatios)}


def sides(feedback: Feedback) -> dict[str, tuple[str, Tensor]]:
    """The better and the worse completions, then what else is trained, by name: a part, and True where in it."""
    if isinstance(feedback, Labels):
        votes = feedback.desirable
        return {"upvoted": ("completions", votes), "downvoted": ("completions", ~votes)}
    if isinstance(feedback, Rankings):
        scores, absent = feedback.scores, ~feedback.present
        best = scores.masked_fill(absent, -torch.inf)
        worst = scores.masked_fill(absent, torch.inf)
        return {
            "the best": ("completions", best == best.amax(-1, keepdim=True)),
            "the worst": ("completions", worst == worst.amin(-1, keepdim=True)),
        }
    return {name: (name, torch.ones(part.shape, dtype=torch.bool)) for name, part in parts(feedback).items()}


def tensors(record: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a record by path, such as `chosen.policy` or `chosen.per_token.kl`."""
    by_path: dict[str, Tensor] = {}
    for name, value in _values(record).items():
        if isinstance(value, Tensor):
            by_path[prefix + name] = value
        else:
            by_path.update(tensors(value, f"{prefix}{name}."))
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
    ends = (".policy", ".per_token.kl", ".per_token.reverse_kl")
    return {
        path: value
        for path, value in numbers(feedback).items()
        if path.endswith(ends) and not path.startswith("mismatched.")
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
    picked = {
        name: value[index] if value.shape[:1] == feedback.shape else value
        for name, value in _values(feedback).items()
    }
    return type(feedback)(**picked)


def cast_to(feedback: Feedback, dtype: torch.dtype) -> Feedback:
    """The feedback with every floating-point tensor in this dtype; log-ratios upcast half precision themselves."""
    # Rows reach LogRatios upcast (from_token_logps does it), so half precision means rounded, not stored.
    rows_dtype = torch.promote_types(dtype, torch.float32)
    cast = {
        path: value.to(dtype).to(rows_dtype if ".per_token." in path else dtype)
        for path, value in numbers(feedback).items()
    }
    return with_tensors(feedback, cast)


def without(feedback: Feedback, need: str) -> Feedback:
    """The feedback without something that `needs` or `reads` can name."""
    of_parts = [f"{part}.{need}" for part in parts(feedback)]
    return with_tensors(feedback, dict.fromkeys(covered_by(type(feedback), need) or of_parts))


def emptied(feedback: Feedback, part: str, keep: Tensor) -> Feedback:
    """The feedback in which the completions of a part that are not in `keep` have no tokens."""
    ratios = parts(feedback)[part]
    assert ratios.tokens is not None
    rows = ratios.per_token
    if rows is None:
        return replace(feedback, **{part: replace(ratios, tokens=torch.where(keep, ratios.tokens, 0))})
    # As a collator leaves them: every row is 0 where there is no token.
    blank = map_rows(rows, lambda value: value * keep.unsqueeze(-1))
    return replace(feedback, **{part: blank.log_ratios()})


def reversed_tokens(ratios: LogRatios) -> LogRatios:
    """The same sums from other rows: policy log-probs in the reverse order of the tokens."""
    rows = ratios.per_token
    if rows is None:
        return ratios
    # The completions' places first, in order; then the same backwards.
    order = torch.argsort(~rows.mask, dim=-1, stable=True)
    tokens = rows.mask.sum(-1, keepdim=True)
    back = (tokens - 1 - torch.arange(rows.mask.shape[-1])).clamp(min=0)
    reverse = rows.policy.gather(-1, order.gather(-1, back))
    policy = torch.where(rows.mask, torch.zeros_like(reverse).scatter(-1, order, reverse), 0.0)
    return replace(rows, policy=policy).log_ratios()


def altered(feedback: Feedback, need: str, seed: int) -> Feedback:
    """The feedback with other numbers for something that `needs` or `reads` can name, if it has it."""
    if need == "tokens":
        counts = {path: value for path, value in tensors(feedback).items() if path.endswith(".tokens")}
        # Other counts on each side, so that their difference changes too.
        places = {path: torch.arange(value.numel()).reshape(value.shape) for path, value in counts.items()}
        longer = {path: value + (places[path] + len(path)) % 3 + 1 for path, value in counts.items()}
        return with_tensors(feedback, longer)
    if need == "per_token":
        return map_parts(feedback, reversed_tokens)
    values = numbers(feedback)
    if "." in need:
        paths = [path for path in values if path.endswith(f".{need}")]
    else:
        # Of the two scores of a pair only that of the chosen completion changes, upwards: the order stays.
        name = covered_by(type(feedback), need)[0]
        paths = [path for path in values if path in (name, f"{name}.policy", f"{name}.per_token.policy")]

    def other(value: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        shares = torch.empty_like(value).uniform_(0.2, 0.9, generator=generator)
        # A score stays below 1.
        return value + shares * (1 - value) if need == "scores" else value * (1 + shares)

    return with_tensors(feedback, {path: other(values[path]) for path in paths})


def show(record: Any, indent: str = "    ") -> str:
    """Code that makes the feedback again, digit by digit."""
    lines = [f"{type(record).__name__}("]
    for name, value in _values(record).items():
        if isinstance(value, Tensor):
            text = f"torch.tensor({value.detach().tolist()!r}, dtype={value.dtype})"
        else:
            text = show(value, indent + "    ")
        lines.append(f"{indent}{name}={text},")
    return "\n".join([*lines, f"{indent[:-4]})"])
