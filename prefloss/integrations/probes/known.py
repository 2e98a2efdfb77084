"""A language model that gives each completion a given log-prob, so that a trainer's whole step is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from prefloss.logratios import IGNORE_INDEX

PAD, EOS, PROMPT = 0, 1, (2, 3)
"""Token ids: padding, end of text, and those of every prompt."""

_FIRST = 4


@dataclass(frozen=True)
class Rows:
    """Token ids of completions, in which no token occurs twice: a token says in which completion it stands.

    Attributes:
        tokens: Token counts of the completions, [rows]: the chosen ones, then the rejected ones.
    """

    tokens: Tensor

    @cached_property
    def completions(self) -> list[list[int]]:
        """Token ids of each completion."""
        ends = (self.tokens.cumsum(0) + _FIRST).tolist()
        return [list(range(end - count, end)) for end, count in zip(ends, self.tokens.tolist(), strict=True)]

    def padded(self) -> dict[str, Tensor]:
        """Prompt and completion of each row, padded on the right: `input_ids` and masks, [rows, T]."""
        rows = [[*PROMPT, *completion] for completion in self.completions]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": (ids != PAD).long(),
            "completion_mask": (ids >= _FIRST).long(),
        }

    def labels(self) -> Tensor:
        """Token ids of completion tokens, ignored elsewhere, [rows, T]."""
        padded = self.padded()
        return padded["input_ids"].masked_fill(padded["completion_mask"] == 0, IGNORE_INDEX)

    def by_token(self, sums: Tensor) -> Tensor:
        """Log-prob of each token id, [V], from those of the completions, [rows]: the same for all tokens of one."""
        spread = (sums / self.tokens).repeat_interleave(self.tokens)
        return torch.cat([spread.new_full((_FIRST,), -3.0), spread])


class KnownModel(nn.Module):
    """Stands for a causal language model: after any token, token k follows with log-prob `by_token[k]`.

    Args:
        by_token: Log-prob of each token id, [V], < 0; gradients flow to it.
        config: What the trainer reads from a model.
    """

    def __init__(self, by_token: Tensor, config: Any) -> None:
        super().__init__()
        self.by_token, self.config = by_token, config

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.by_token.device

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> ModelOutput:
        """Logits, [rows, T, V]; what TRL's fused head returns, if it is asked for."""
        following = torch.roll(input_ids, -1, dims=-1)
        if given.get("fused_lm_head"):
            assert labels is not None
            counted = labels[:, 1:] != IGNORE_INDEX
            log_probs = torch.where(counted, self.by_token[following[:, :-1]], 0.0)
            zeros = torch.zeros_like(log_probs).detach()
            return ModelOutput(
                log_probs=log_probs,
                entropy=zeros,
                mean_logits=zeros,
                is_top1=zeros.bool(),
                log_sum_sq_probs=zeros,
            )
        # Of V logits all but one are 0; the one for which the softmax gives p is log(p (V - 1) / (1 - p)).
        others = len(self.by_token) - 1
        known = (
            self.by_token + torch.log(torch.tensor(float(others))) - torch.log(-torch.expm1(self.by_token))
        )
        logits = known.new_zeros(*input_ids.shape, others + 1)
        return ModelOutput(logits=logits.scatter(-1, following[..., None], known[following][..., None]))
