"""Feedback as named tensors: read them, replace them, pick examples, print them back as code.

A side that carries per-token rows keeps its sums equal to them: whoever changes rows gets the sums changed too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios, PerToken

AVAILABLE: dict[type, tuple[str, ...]] = {
    Pairs: ("tokens", "scores", "gold", "embedding"),
    Labels: ("tokens", "scores", "baseline", "mismatched", "kl"),
    Rankings: ("tokens",),
}
"""What each kind of feedback can carry beside its log-probs, as named in `needs` and `reads`."""

ROWS = ("log_sum_sq", "kl", "reverse_kl", "reference_entropy", "weight")
"""What the per-token rows can carry beside the log-probs, named `per_token.<row>` in `needs` and `reads`."""


def available(kind: type) -> tuple[str, ...]:
    """Every name that a loss of this kind of feedback can list in `needs` or `reads`."""
    return (*AVAILABLE[kind], "per_token", *(f"per_token.{row}" for row in ROWS))


def parts(feedback: Feedback) -> dict[str, LogRatios]:
    """The log-ratios of some feedback by field, in order."""
    values = {item.name: getattr(feedback, item.name) for item in fields(feedback)}
    return {name: value for name, value in values.items() if isinstance(value, LogRatios)}


def tensors(record: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of some feedback by path, such as `chosen.policy` or `chosen.per_token.kl`."""
    found: dict[str, Tensor] = {}
    for item in fields(record):
        value, path = getattr(record, item.name), f"{prefix}{item.name}"
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, LogRatios | PerToken):
            found.update(tensors(value, f"{path}."))
    return found


def with_tensors(feedback: Feedback, changes: Mapping[str, Tensor | None]) -> Feedback:
    """The feedback with some tensors replaced, by path; where rows change, their sums follow."""
    return cast(Feedback, _with_tensors(feedback, dict(changes)))


def _with_tensors(record: Any, changes: dict[str, Tensor | None]) -> Any:
    own: dict[str, Any] = {path: value for path, value in changes.items() if "." not in path}
    nested: dict[str, dict[str, Tensor | None]] = {}
    for path, value in changes.items():
        first, dot, rest = path.partition(".")
        if dot:
            nested.setdefault(first, {})[rest] = value
    for name, inner in nested.items():
        own[name] = _with_tensors(getattr(record, name), inner)
    if (
        isinstance(record, LogRatios)
        and own.get("per_token") is not None
        and not own.keys() & {"policy", "reference"}
    ):
        return summed(own["per_token"])
    return replace(record, **own)


def summed(rows: PerToken) -> LogRatios:
    """The log-ratios that these rows add up to, with the rows."""
    total = rows.log_ratios()
    return replace(total, per_token=rows)


def map_parts(feedback: Feedback, change: Callable[[str, LogRatios], LogRatios | None]) -> Feedback:
    """The feedback with each of its log-ratios changed; `change` gets the field's name too."""
    return replace(feedback, **{name: change(name, part) for name, part in parts(feedback).items()})


def moved(ratios: LogRatios, policy: Tensor | float = 0.0, reference: Tensor | float = 0.0) -> LogRatios:
    """The completions with log-probs raised by some nats, spread evenly over the tokens where there are rows."""
    rows = ratios.per_token
    if rows is None:
        moved_reference = None if ratios.reference is None else ratios.reference + reference
        return replace(ratios, policy=ratios.policy + policy, reference=moved_reference)
    tokens = rows.mask.sum(-1).clamp(min=1)

    def spread(values: Tensor, nats: Tensor | float) -> Tensor:
        each = torch.as_tensor(nats, dtype=values.dtype) / tokens
        return torch.where(rows.mask, values + each.unsqueeze(-1), values)

    moved_rows = None if rows.reference is None else spread(rows.reference, reference)
    return summed(replace(rows, policy=spread(rows.policy, policy), reference=moved_rows))


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
        own = value.shape[:1] == (size,) if isinstance(value, Tensor | LogRatios) else False
        picked[item.name] = value[index] if own else value
    return type(feedback)(**picked)


def cast_to(feedback: Feedback, dtype: torch.dtype) -> Feedback:
    """The feedback with every floating-point tensor in this dtype; log-ratios upcast half precision themselves."""
    found = tensors(feedback)
    rows = {
        path: value for path, value in found.items() if ".per_token." in path and value.is_floating_point()
    }
    whole = {
        path: value.to(dtype)
        for path, value in found.items()
        if value.is_floating_point() and path not in rows and not _has_rows(feedback, path)
    }
    # Rows reach LogRatios upcast (from_token_logps does it), so half precision means rounded, not stored.
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return with_tensors(
        feedback, {**whole, **{path: value.to(dtype).to(wide) for path, value in rows.items()}}
    )


def _has_rows(feedback: Feedback, path: str) -> bool:
    part = parts(feedback).get(path.split(".")[0])
    return part is not None and part.per_token is not None


def without(feedback: Feedback, name: str) -> Feedback:
    """The feedback without something that `needs` or `reads` can name."""
    first, _, row = name.partition(".")
    if first == "per_token":
        return map_parts(feedback, lambda _, part: _without_rows(part, row))
    if name == "tokens":
        return map_parts(feedback, lambda _, part: replace(part, tokens=None))
    if name == "scores" and isinstance(feedback, Pairs):
        return replace(feedback, score_chosen=None, score_rejected=None)
    return replace(feedback, **{name: None})


def _without_rows(ratios: LogRatios, row: str) -> LogRatios:
    if not row or ratios.per_token is None:
        return replace(ratios, per_token=None)
    return replace(ratios, per_token=replace(ratios.per_token, **{row: None}))


def emptied(feedback: Feedback, part: str, keep: Tensor) -> Feedback:
    """The feedback in which the completions of a part that are not in `keep` have lost all their tokens."""
    ratios = parts(feedback)[part]
    assert ratios.tokens is not None
    rows = ratios.per_token
    if rows is not None:
        mask = rows.mask & keep.unsqueeze(-1)
        # As a collator leaves them: log-probs and all that is read of a token are 0 where there is none.
        blank = rows._map(lambda value: torch.where(mask, value, torch.zeros_like(value)))
        return replace(feedback, **{part: summed(blank)})
    return replace(feedback, **{part: replace(ratios, tokens=torch.where(keep, ratios.tokens, 0))})


def trainable(feedback: Feedback) -> dict[str, Tensor]:
    """What a loss may send a gradient to: the policy's log-probs, and the KL of tokens, by path."""
    found: dict[str, Tensor] = {}
    for name, part in parts(feedback).items():
        if name == "mismatched":
            continue
        rows = part.per_token
        if rows is None:
            found[f"{name}.policy"] = part.policy
            continue
        found[f"{name}.per_token.policy"] = rows.policy
        for row in ("kl", "reverse_kl"):
            if getattr(rows, row) is not None:
                found[f"{name}.per_token.{row}"] = getattr(rows, row)
    return found


def data(feedback: Feedback) -> dict[str, Tensor]:
    """What no loss may send a gradient to, by path: reference, KL baselines, scores, weights."""
    whole = {"weight", "score_chosen", "score_rejected", "scores", "kl", "embedding"}
    last = {"reference", "reference_entropy", "weight"}
    return {
        path: value
        for path, value in tensors(feedback).items()
        if (path in whole or path.split(".")[-1] in last or path.startswith("mismatched."))
        and value.is_floating_point()
        and not (_has_rows(feedback, path) and ".per_token." not in path)
    }


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
