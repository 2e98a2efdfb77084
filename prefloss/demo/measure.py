"""What a training run did to a model: true reward, distance from the reference, accuracy, log-prob drift.

All log-probs come from `prefloss.token_logps` and `prefloss.LogRatios`, as in training, so the numbers compare.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prefloss import LogRatios, token_logps
from prefloss.data.tokens import Encoded, pad, pad_id
from prefloss.logratios import IGNORE_INDEX, completion_targets


@dataclass(frozen=True)
class Measurement:
    """One look at a policy; a value that nothing could be measured from is None.

    Attributes:
        step: Optimizer steps taken so far.
        reward: Mean true reward of sampled completions.
        reward_error: Its standard error.
        kl: KL(policy || reference) of sampled completions, nats per completion.
        kl_error: Its standard error.
        accuracy: Share of held-out comparisons whose better side has the higher log-ratio; ties count half.
        accuracy_error: Its standard error; None where every better one is compared with every worse one.
        chosen: Mean change of the log-prob of the better (upvoted) completions, nats per completion.
        rejected: The same for the worse (downvoted) ones.
        chosen_falling: Share of better completions that became less likely than they were.
        samples: The sampled completions as text.
        confidence: Mean probability that σ(beta |margin|) gives to the side it prefers; equal to the accuracy where
            the implicit rewards are calibrated, above it where they are too sure.
        length: Mean length of the sampled completions, tokens.
    """

    step: int
    reward: float | None = None
    reward_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    accuracy: float | None = None
    accuracy_error: float | None = None
    chosen: float | None = None
    rejected: float | None = None
    chosen_falling: float | None = None
    samples: tuple[str, ...] = ()
    confidence: float | None = None
    length: float | None = None


@dataclass
class Meter:
    """Measures one policy against one reference.

    Args:
        policy: Causal language model in training.
        reference: Frozen copy of where it started; None if the policy is a PEFT model whose adapter,
            switched off, leaves the reference.
        tokenizer: Of both.
        better: Held-out completions that people preferred or upvoted.
        worse: Held-out completions that people rejected or downvoted.
        paired: Whether `better[i]` and `worse[i]` answer one prompt. If not, every better one is
            compared with every worse one (the area under the ROC curve).
        prompts: Token ids of prompts to sample completions for, with repeats as given.
        reward: Scores a sampled text; takes the index of the prompt and the text. None if it is unknown.
        max_new_tokens: Longest sampled completion, tokens.
        max_length: Cut held-out rows to this many tokens, as training does.
        batch_size: Rows of a forward pass.
        autocast: Context of every forward pass: that of training, or rounding would look like learning.
        seed: Of the samples; the same for each measurement, so that curves are smooth.
        beta: KL strength of the loss, if it has one.
    """

    policy: Any
    reference: Any
    tokenizer: Any
    better: Sequence[Encoded] = ()
    worse: Sequence[Encoded] = ()
    paired: bool = True
    prompts: Sequence[list[int]] = ()
    reward: Callable[[int, str], float] | None = None
    max_new_tokens: int = 32
    max_length: int | None = None
    batch_size: int = 64
    seed: int = 0
    beta: float | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    _frozen: dict[str, LogRatios] = field(default_factory=dict, init=False)

    def __call__(self, step: int) -> Measurement:
        """Measure now; leaves weights, mode and random state of the policy as they were.

        Raises:
            FloatingPointError: If the policy's log-probs are not finite.
        """
        was_training = self.policy.training
        self.policy.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(), self.autocast():
                torch.manual_seed(self.seed)
                return Measurement(step=step, **self._held_out(), **self._sampled())
        finally:
            self.policy.train(was_training)

    def _held_out(self) -> dict[str, float]:
        better, worse = self._compared("better", self.better), self._compared("worse", self.worse)
        # A completion that was cut away altogether cannot be compared with anything.
        b_kept, w_kept = ~better.empty, ~worse.empty
        if self.paired:
            b_kept = w_kept = b_kept & w_kept
        b_h, w_h = better.h[b_kept], worse.h[w_kept]
        values: dict[str, float] = {}
        if not (torch.isfinite(b_h).all() and torch.isfinite(w_h).all()):
            raise FloatingPointError("the log-probs of held-out completions are not finite")
        if len(b_h):
            values["chosen"] = b_h.mean().item()
            values["chosen_falling"] = (b_h < 0).float().mean().item()
        if len(w_h):
            values["rejected"] = w_h.mean().item()
        if len(b_h) and len(w_h):
            values["accuracy"] = accuracy(b_h, w_h, paired=self.paired)
        if self.paired and len(b_h):
            values["accuracy_error"] = standard_error(_wins(b_h - w_h))
            if self.beta is not None:
                values["confidence"] = torch.sigmoid(self.beta * (b_h - w_h).abs()).mean().item()
        return values

    def _sampled(self) -> dict[str, Any]:
        if not self.prompts:
            return {}
        rows = [row for batch in _batches(self.prompts, self.batch_size) for row in self._sample(batch)]
        with self._as_reference() as reference:
            frozen = self._scored(reference, rows, None)
        kl = replace(self._scored(self.policy, rows, None), reference=frozen.policy).h
        texts = tuple(self.tokenizer.decode(row[1], skip_special_tokens=True) for row in rows)
        values: dict[str, Any] = {"kl": kl.mean().item(), "kl_error": standard_error(kl), "samples": texts}
        values["length"] = sum(len(completion) for _, completion in rows) / len(rows)
        if self.reward is not None:
            rewards = torch.tensor([self.reward(i, text) for i, text in enumerate(texts)])
            values |= {"reward": rewards.mean().item(), "reward_error": standard_error(rewards)}
        return values

    def _sample(self, prompts: Sequence[list[int]]) -> list[Encoded]:
        """One completion of each prompt, drawn from the whole distribution at temperature 1."""
        width, padding, end = max(map(len, prompts)), pad_id(self.tokenizer), self.tokenizer.eos_token_id
        ids = torch.tensor([[padding] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = self.policy.generate(
            input_ids=ids.to(self.policy.device),
            attention_mask=mask.to(self.policy.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=padding,
            logits_processor=[_finite],
        )
        # What follows the first end token is padding.
        drawn = (new[: new.index(end) + 1] if end in new else new for new in out[:, width:].tolist())
        return [(list(prompt), new) for prompt, new in zip(prompts, drawn, strict=True)]

    def _compared(self, name: str, rows: Sequence[Encoded]) -> LogRatios:
        """Log-ratios of held-out rows, [rows]; the frozen reference scores them once."""
        if not rows:
            return LogRatios(policy=torch.empty(0), reference=torch.empty(0))
        if name not in self._frozen:
            with self._as_reference() as reference:
                self._frozen[name] = self._scored(reference, rows, self.max_length)
        policy = self._scored(self.policy, rows, self.max_length)
        return replace(policy, reference=self._frozen[name].policy)

    def _scored(self, model: Any, rows: Sequence[Encoded], max_length: int | None) -> LogRatios:
        """Log-probs of completions under one model, [rows], on the CPU."""
        padding = pad_id(self.tokenizer)
        parts = []
        for batch in _batches(rows, self.batch_size):
            tensors = {k: v.to(model.device) for k, v in pad(batch, padding, max_length).items()}
            targets = completion_targets(tensors["input_ids"], tensors["completion_mask"])
            logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
            part = LogRatios.from_token_logps(token_logps(logits, targets), targets != IGNORE_INDEX)
            tokens = None if part.tokens is None else part.tokens.cpu()
            parts.append(LogRatios(policy=part.policy.cpu(), tokens=tokens))
        return LogRatios.cat(parts)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[Any]:
        if self.reference is not None:
            yield self.reference
            return
        with self.policy.disable_adapter():
            yield self.policy


def accuracy(better: Tensor, worse: Tensor, *, paired: bool) -> float:
    """Share of comparisons that the log-ratios order as people did; ties count half.

    Args:
        better: Log-ratios of preferred completions, [n], nats.
        worse: Log-ratios of the others, [n] if paired, else [m], nats.
        paired: Compare entry by entry; else each with each.

    Example:
        >>> accuracy(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]), paired=True)
        0.75
    """
    return _wins(better - worse if paired else better[:, None] - worse).mean().item()


def _finite(ids: Tensor, scores: Tensor) -> Tensor:
    """The scores of the next token, if one can be drawn: an infinite one would end the process on a GPU."""
    if not torch.isfinite(scores.amax(-1)).all():
        raise FloatingPointError("the scores of the next token are not finite")
    return scores


def _wins(difference: Tensor) -> Tensor:
    return (difference > 0).float() + 0.5 * (difference == 0).float()


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values, [n]; 0 for a single value."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
