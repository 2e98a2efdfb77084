"""Supervised warm start: a model with random weights learns the language of the data first."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from prefloss import token_logps
from prefloss.data.tokens import Encoded, pad
from prefloss.logratios import IGNORE_INDEX, completion_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def warm_start(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    padding: int,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 5e-3,
    max_length: int | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Maximise the log-probability of the completions, in place.

    Args:
        model: Causal language model; trained on the device where it is.
        rows: Prompt and completion token ids.
        padding: Token id to pad with.
        steps: Optimizer steps.
        batch_size: Rows of a step.
        learning_rate: Highest learning rate of AdamW; rises over the first tenth, then falls to 0.
        max_length: Cut rows to this many tokens.
        seed: Of the order of the rows.
        on_step: Called after every step with its number, from 1, and its loss, nats per token.

    Returns:
        The loss averaged over the last tenth of the steps, nats per token.
    """
    if not rows:
        raise ValueError("rows: got none, expected at least one prompt with a completion")
    order = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    model.train()
    losses: list[float] = []
    for step in range(1, steps + 1):
        batch = pad(order.choices(rows, k=batch_size), padding, max_length)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        targets = completion_targets(batch["input_ids"], batch["completion_mask"])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = -token_logps(logits, targets).sum() / (targets != IGNORE_INDEX).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        on_step(step, losses[-1])
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail) if tail else float("nan")
