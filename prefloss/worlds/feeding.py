"""From parameters to feedback: gather the log-probs at the completions of the data, and build what a loss takes.

Values are kept as plain tensors by name, so that `torch.func.vmap` can map over runs, and become feedback inside it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import NEEDS, Feedback, Labels, Pairs, Rankings, has
from prefloss.logratios import LogRatios, PerToken
from prefloss.registry import specs
from prefloss.worlds.data import Data, draw, taken
from prefloss.worlds.judges import Judge
from prefloss.worlds.policies import Policy

Values = Mapping[str, Tensor]

_PER_TOKEN = "per_token."
_FIELDS = {
    Pairs: ("weight", "embedding", "score_chosen", "score_rejected"),
    Labels: ("weight", "desirable", "scores", "baseline", "kl"),
    Rankings: ("weight", "scores"),
}
# A last column of the completions that few losses ask for, the number of columns without it, and its name.
_EXTRA = {Pairs: (2, "gold"), Labels: (1, "mismatched")}


def asked(data: Data, wanted: Collection[str]) -> Data:
    """The data without the last column of completions where nobody asks for it."""
    columns, name = _EXTRA.get(data.kind, (data.completions.shape[-1], ""))
    if name in wanted:
        return data
    return Data(data.kind, data.prompt, data.completions[..., :columns], data.fields, data.seeds)


def fixed_values(policy: Policy, data: Data, wanted: Collection[str]) -> dict[str, Tensor]:
    """What the feedback carries whatever the policy does, [seeds, n, ...]; `wanted` as in `NEEDS`."""
    world = policy.world
    values = {**data.fields, "reference": taken(world.reference, data)}
    if "tokens" in wanted:
        values["tokens"] = taken(world.lengths, data)  # type: ignore[arg-type]
    if "embedding" in wanted:
        # One-hot: two prompts have nothing in common.
        values["embedding"] = torch.eye(world.prompts, dtype=torch.float64)[data.prompt]
    return values | _rows(policy.per_token_reference() if _reads_tokens(wanted) else {}, data)


def moving_values(policy: Policy, theta: Tensor, data: Data, wanted: Collection[str]) -> dict[str, Tensor]:
    """What the feedback carries of the policy: `theta` [..., seeds, *shape] -> [..., seeds, n, ...]."""
    log_probs = policy.log_probs(theta)
    values = {"policy": taken(log_probs, data)}
    if "kl" in wanted:
        gap = log_probs - policy.world.reference
        values["kl"] = (log_probs.exp() * gap).sum(-1).mean(-1).detach()
    return values | _rows(policy.per_token(theta) if _reads_tokens(wanted) else {}, data)


def feedback_of(kind: type, values: Values) -> Feedback:
    """The feedback of one run, from its values [n, ...]."""
    rows = {name[len(_PER_TOKEN) :]: value for name, value in values.items() if name.startswith(_PER_TOKEN)}
    fields: dict[str, Any] = {name: values[name] for name in _FIELDS[kind] if name in values}
    tokens = values.get("tokens")
    if kind is Rankings:
        per_token = PerToken(**rows) if rows else None
        completions = LogRatios(values["policy"], values["reference"], tokens, per_token)
        return Rankings(completions=completions, **fields)
    # Column by column: the gradient of an unbound tensor is cheaper than that of a slice.
    columns = values["policy"].unbind(-1)
    sides = [
        LogRatios(
            policy,
            values["reference"][:, i],
            None if tokens is None else tokens[:, i],
            PerToken(**{name: value[:, i] for name, value in rows.items()}) if rows else None,
        )
        for i, policy in enumerate(columns)
    ]
    names = ("chosen", "rejected", "gold") if kind is Pairs else ("completions", "mismatched")
    return kind(**dict(zip(names, sides, strict=False)), **fields)


def fed(policy: Policy) -> dict[str, list[str]]:
    """What each registered loss needs and does not get in this world; an empty list where it can be trained.

    Example:
        >>> from prefloss.worlds import Tabular, bandit
        >>> lacking = fed(Tabular(bandit()))
        >>> lacking["dpo"], lacking["tdpo1"]
        ([], ['per_token.kl'])
    """
    example: dict[type, Feedback] = {}
    for kind in (Pairs, Labels, Rankings):
        data = draw(policy.world, Judge(), kind, 2)
        theta = torch.zeros(1, *policy.shape, dtype=torch.float64)
        values = fixed_values(policy, data, NEEDS) | moving_values(policy, theta, data, NEEDS)
        example[kind] = feedback_of(kind, {name: value[0] for name, value in values.items()})
    return {
        name: sorted(need for need in spec.needs if not has(example[spec.feedback], need))
        for name, spec in specs.items()
    }


def _reads_tokens(wanted: Collection[str]) -> bool:
    return any(name.startswith("per_token") for name in wanted)


def _rows(rows: Values, data: Data) -> dict[str, Tensor]:
    return {_PER_TOKEN + name: taken(value, data, per_token=True) for name, value in rows.items()}
