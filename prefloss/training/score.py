"""Sums of log-probs of completions under a model, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from prefloss.data.tokens import Encoded, pad
from prefloss.logratios import completion_targets
from prefloss.training.forward import model_logps


class Score(NamedTuple):
    """Of one completion.

    Attributes:
        logp: Sum of its tokens' log-probs, nats.
        tokens: How many tokens were scored.
    """

    logp: float
    tokens: int


def score_rows(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    padding: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Score completions in evaluation mode and without gradient.

    Args:
        model: A causal language model of transformers, where it shall compute.
        rows: Token ids of prompt and completion, cut as they are trained on.
        batch_size: Rows of a forward pass.
        padding: Token id to fill rows up with.
        on_batch: Told how many rows each pass had.

    Returns:
        One score per row, in their order.
    """
    training = model.training
    model.eval()
    found: dict[int, Score] = {}
    # Neighbours in length make passes with little padding.
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    try:
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            found.update(zip(picked, _pass(model, [rows[i] for i in picked], padding), strict=True))
            on_batch(len(picked))
    finally:
        model.train(training)
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def _pass(model: nn.Module, rows: list[Encoded], padding: int) -> list[Score]:
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in pad(rows, padding).items()}
    targets = completion_targets(batch["input_ids"], batch.pop("completion_mask"))
    logps = model_logps(model, batch, targets).logps
    # float64: the sum is then as good as its terms, whatever the order that another device adds them in.
    sums, tokens = logps.double().sum(-1).tolist(), (targets >= 0).sum(-1).tolist()
    return [Score(logp, count) for logp, count in zip(sums, tokens, strict=True)]
