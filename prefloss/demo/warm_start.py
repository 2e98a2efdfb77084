"""Supervised warm start: a model with random weights learns the language of the data first."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefloss import token_logps
from prefloss.data.tokens import Encoded, pad
from prefloss.logratios import IGNORE_INDEX, completion_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def warm_start(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    **settings: Any,
) -> float:
    """A whole `WarmStart` at once.

    Args:
        model: Causal language model; trained on the device where it is.
        rows: Prompt and completion token ids.
        on_step: Called after every step with its number, from 1, and its loss, nats per token.
        **settings: The other arguments of `WarmStart`.

    Returns:
        The loss averaged over the last tenth of the steps, nats per token.
    """
    return WarmStart(model, rows, **settings).run(on_step)


class WarmStart:
    """Maximises the log-probability of completions, in place.

    Args:
        model: Causal language model; trained on the device where it is.
        rows: Prompt and completion token ids.
        padding: Token id to pad with.
        steps: Optimizer steps.
        batch_size: Rows of a step.
        learning_rate: Highest learning rate of AdamW; rises over the first tenth, then falls to 0.
        max_length: Cut rows to this many tokens.
        seed: Of the order of the rows, and of dropout.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Encoded],
        *,
        padding: int,
        steps: int,
        batch_size: int = 64,
        learning_rate: float = 5e-3,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        if not rows:
            raise ValueError("rows: got none, expected at least one prompt with a completion")
        self._model, self._rows, self._padding, self._steps = model, rows, padding, steps
        self._batch_size, self._max_length, self._seed = batch_size, max_length, seed
        self._order = random.Random(seed)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
        warm = max(1, steps // 10)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm))),
        )
        self._losses: list[float] = []
        # Of dropout: set by the first step, and carried on by the others.
        self._random: Tensor | None = None

    def run(self, on_step: Callable[[int, float], None] = lambda step, loss: None) -> float:
        """Take the steps that are left.

        Args:
            on_step: Called after every step with its number, from 1, and its loss, nats per token.

        Returns:
            The loss averaged over the last tenth of the steps, nats per token.

        Raises:
            FloatingPointError: If the loss of a step is not finite.
        """
        self._model.train()
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            if self._random is not None:
                torch.set_rng_state(self._random)
            for step in range(len(self._losses) + 1, self._steps + 1):
                self._losses.append(self._step())
                if not math.isfinite(self._losses[-1]):
                    raise FloatingPointError(f"the loss of warm-up step {step} is {self._losses[-1]}")
                on_step(step, self._losses[-1])
        tail = self._losses[-max(1, self._steps // 10) :]
        return sum(tail) / len(tail) if tail else float("nan")

    def _step(self) -> float:
        batch = pad(self._order.choices(self._rows, k=self._batch_size), self._padding, self._max_length)
        batch = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
        targets = completion_targets(batch["input_ids"], batch["completion_mask"])
        logits = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = -token_logps(logits, targets).sum() / (targets != IGNORE_INDEX).sum().clamp(min=1)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the steps to come depend on, called between two of them: `torch.save` takes it."""
        version, words, normal = self._order.getstate()
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "order": [version, list(words), normal],
            "random": torch.get_rng_state(),
            "losses": self._losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        version, words, normal = state["order"]
        self._order.setstate((version, tuple(words), normal))
        self._random, self._losses = state["random"], list(state["losses"])
